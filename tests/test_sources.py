"""Data from tables, Datasets, loaders and large files: the same numbers as from a tensor."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae import datasets, sources
from pyro_vae.datasets import load

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3


class Pairs(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


SOURCES = {
    "table": lambda: pd.DataFrame(X.numpy()),
    "tensors": lambda: TensorDataset(X),
    "dataset with labels": Pairs,
    "iterable dataset": Stream,
    "loader": lambda: DataLoader(TensorDataset(X), batch_size=16),
    "loader with labels": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
    "generator": lambda: (X[start : start + 7] for start in range(0, 60, 7)),
    "arrays in float64": lambda: (X[start : start + 9].double().numpy() for start in range(0, 60, 9)),
}


@pytest.fixture
def vae():
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((3,), (8,))
    likelihood, guide = pv.likelihoods.Gaussian(decoder, (3,)), pv.guides.MeanFieldNormal(encoder, 2)
    return pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)


@pytest.fixture
def small_is_large(monkeypatch):
    for module in (sources, datasets):
        monkeypatch.setattr(module, "LARGE", 200)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_numbers_of_the_tensor(vae, source):
    expected = pv.log_marginal(vae.model, vae.guide, X, num_samples=5, seed=0).log_prob
    found = pv.log_marginal(vae.model, vae.guide, SOURCES[source](), num_samples=5, seed=0).log_prob
    assert torch.equal(found, expected)
    runs = [
        pv.fit(vae.model, vae.guide, data, epochs=1, learning_rate=1e-12, seed=0, validation=X[:5])
        for data in (X, SOURCES[source]())
    ]
    np.testing.assert_allclose(
        runs[0].history["train_elbo"], runs[1].history["train_elbo"], rtol=1e-6
    )
    loaded = load(SOURCES[source](), binarize="none", validation_size=0)
    parts = torch.cat([loaded.train, loaded.test])
    assert torch.equal(parts.sort(0).values, X.sort(0).values)


def test_a_pair_of_two_inputs_gets_both(vae):
    def model(x, y):
        return vae.model(x + 0 * y[:, None])

    def guide(x, y):
        return vae.guide(x)

    pair = (X, Y.float())
    expected = pv.log_marginal(model, guide, pair, num_samples=5, seed=0).log_prob
    loader = DataLoader(TensorDataset(*pair), batch_size=16)
    assert torch.equal(
        pv.log_marginal(model, guide, loader, num_samples=5, seed=0).log_prob, expected
    )


def table():
    return pd.DataFrame(
        {
            "height": np.linspace(1, 2, 40),
            "kind": ["a", "b"] * 20,
            "age": np.arange(40),
            "id": [f"n{i}" for i in range(40)],
            "price": np.linspace(0.5, 9.7, 40),
        }
    )


@pytest.mark.parametrize("as_csv", [False, True])
def test_columns_are_data_labels_or_left_out_by_name(tmp_path, as_csv):
    given = table()
    if as_csv:
        given.to_csv(tmp_path / "table.csv", index=False)
        given = tmp_path / "table.csv"
    found = load(given, binarize="none", labels="kind", leave_out=["id"])
    assert found.data_shape == (3,)
    assert found.test_labels.tolist().count(0) == found.test_labels.tolist().count(1) == 4
    # Heights grow with the rows, which are kept with their labels.
    row = table()[table().age == int(found.train[5, 1])].iloc[0]
    assert "ab"[found.train_labels[5]] == row.kind
    assert found.train[5].tolist() == pytest.approx([row.height, row.age, row.price])
    numbers = load(given, binarize="none", labels="price", leave_out=["id", "kind"])
    assert numbers.train_labels.dtype == torch.float32


def test_missing_values_are_kept_when_that_is_said_and_refused_otherwise():
    holed = table()[["height", "age"]]
    holed.loc[3, "height"] = np.nan
    with pytest.raises(pv.InputError, match=r"NaN .* missing values, say so"):
        load(holed, binarize="none")
    found = load(holed, binarize="none", allow_missing=True)
    parts = (found.train, found.validation, found.test)
    assert sum(int(part.isnan().sum()) for part in parts) == 1
    holed.loc[4, "height"] = np.inf
    with pytest.raises(pv.InputError, match="finite"):
        load(holed, binarize="none", allow_missing=True)


def test_classes_have_their_share_of_every_part_of_a_file(tmp_path):
    y = np.repeat([0, 1, 2], [70, 20, 10])
    np.savez(tmp_path / "own.npz", data=np.random.default_rng(0).random((100, 2)), target=y)
    found = load(tmp_path / "own.npz", binarize="none")
    assert found.test_labels.bincount().tolist() == [14, 4, 2]
    train = found.train_labels.bincount() / len(found.train_labels)
    torch.testing.assert_close(train, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.02)


def test_what_is_given_beside_the_data_goes_with_its_rows(tmp_path):
    random = np.random.default_rng(0)
    x, sizes = random.random((50, 2)).astype(np.float32), random.random(50).astype(np.float32)
    kinds = np.array(["fox", "ant", "elk"])[np.arange(50) % 3]
    np.savez(tmp_path / "whole.npz", x=x, sizes=sizes, y=kinds)
    found = load(tmp_path / "whole.npz", binarize="none", given=("labels", "sizes"))
    assert found.words == {"labels": ("ant", "elk", "fox")}
    for part in ("train", "validation", "test"):
        own, kind, size = found.inputs(part)
        rows = [int(np.flatnonzero((x == row).all(1))[0]) for row in own.numpy()]
        assert np.array_equal(size, sizes[rows])
        assert [found.words["labels"][number] for number in kind] == kinds[rows].tolist()
    other = load(tmp_path / "whole.npz", binarize="none", given=("sizes",))
    assert other.checksums != found.checksums
    parts = {"train": x[:30], "test": x[30:], "train_sizes": sizes[:30], "test_sizes": sizes[30:]}
    np.savez(tmp_path / "parts.npz", **parts)
    found = load(tmp_path / "parts.npz", binarize="none", given=("sizes",), validation_size=0)
    assert np.array_equal(found.inputs("test")[1], sizes[30:])
    assert [len(value) for value in found.inputs("validation")] == [0, 0]


def test_a_fit_is_given_what_stands_beside_the_data():
    columns = table()[["height", "kind"]].assign(sizes=2.0)
    found = load(columns, given=("kind", "sizes"))
    assert found.words["kind"] == tuple(sorted(set(columns["kind"])))
    seen = []

    def model(x, kind, sizes):
        seen.append((x.shape[1], len(kind), sizes.unique().tolist()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

    def guide(x, kind, sizes):
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, scale))

    pv.fit(model, guide, found, epochs=1, batch_size=len(found.train), compile=False, seed=0)
    assert (1, len(found.train), [2.0]) in seen


REFUSED = {
    "words": (lambda: table(), "expected columns of numbers, got kind, id: leave them out"),
    "nothing but words": (lambda: table()[["id"]], "got id"),
    "no batch": (lambda: iter(()), "expected at least one batch, the tuple_iterator has none"),
    "dicts": (lambda: iter([{"x": X}]), "a batch with a dict; give it a transform"),
    "shapes": (lambda: iter([X, X[:, :2]]), r"rows of shapes \(3,\) and \(2,\)"),
    "three": (lambda: TensorDataset(X, Y, Y), "got 3 tensors in each batch"),
    "array": (X.numpy, "got ndarray: pass tensors and arrays to fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_says_what_to_do_with_it(case):
    source, message = REFUSED[case]
    with pytest.raises(pv.InputError, match=message):
        load(source(), binarize="none")


def test_what_can_not_be_given_beside_the_data_is_refused(tmp_path):
    holed = table()
    holed.loc[3, "kind"] = None
    for how, message in (
        ({"given": ("kind",)}, "expected 'kind' in each row, 1 are without"),
        ({"given": ("labels",), "labels": "kind"}, "expected 'kind' in each row, 1 are without"),
        (
            {"given": ("labels",), "leave_out": ["kind"]},
            r"expected labels \(labels=\), a column .* got 'labels'",
        ),
    ):
        with pytest.raises(pv.InputError, match=message):
            load(holed.drop(columns="id"), **how)
    with pytest.raises(pv.InputError, match="got 'sizes', which is none"):
        load("digits", given=("sizes",))
    words = {"train": X, "test": X, "train_labels": ["a", "b"] * 30, "test_labels": ["b"] * 60}
    np.savez(tmp_path / "words.npz", **words)
    with pytest.raises(pv.InputError, match="one set of words for labels in all parts"):
        load(tmp_path / "words.npz", binarize="none")


def test_other_refusals(tmp_path, vae):
    with pytest.raises(pv.InputError, match="expected a column 'colour', got height, kind"):
        load(table(), labels="colour")
    with pytest.raises(pv.InputError, match="with a table, whose columns have names"):
        load("digits", labels="kind")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(pv.InputError, match="expected a CSV table"):
        load(tmp_path / "empty.csv")
    for data, message in (
        ("x.npy", "load the file by pyro_vae.datasets.load"),
        (X[0], r"of one datum pass x\[None\]"),
        (list(X), "a list of data points as one tensor by torch.stack"),
    ):
        with pytest.raises(pv.InputError, match=message):
            pv.log_marginal(vae.model, vae.guide, data)
    with pytest.raises(pv.InputError, match=r"pass an instance, IWAE\(...\)"):
        pv.fit(vae.model, vae.guide, X, objective=pv.infer.IWAE)
    with pytest.raises(pv.InputError, match=r"got a VAE without forward: pass its methods"):
        pv.fit(vae, vae, X)


@pytest.mark.parametrize("kind", ["npy", "float64", "fortran", "npz", "compressed", "csv", "batches"])
def test_large_data_stay_on_the_disk_in_their_order(tmp_path, small_is_large, kind):
    x = X.numpy()
    path = tmp_path / {"npz": "x.npz", "compressed": "x.npz", "csv": "x.csv"}.get(kind, "x.npy")
    if kind in ("npz", "compressed"):
        (np.savez if kind == "npz" else np.savez_compressed)(path, x=x, y=Y.numpy())
    elif kind == "csv":
        pd.DataFrame(x).to_csv(path, index=False)
    else:
        np.save(path, {"float64": x.astype(float), "fortran": np.asfortranarray(x)}.get(kind, x))
    found = load(
        (X[i : i + 8] for i in range(0, 60, 8)) if kind == "batches" else path, binarize="none"
    )
    assert found.is_mapped == (kind != "csv")
    if found.is_mapped:
        np.testing.assert_allclose(
            torch.cat([found.train, found.validation, found.test]), x, rtol=1e-6
        )
    if "npz" in path.name:
        assert len(found.test_labels) == len(found.test)


def test_a_mapped_file_is_never_written_to(tmp_path, small_is_large):
    np.save(tmp_path / "x.npy", X.numpy())
    load(tmp_path / "x.npy", binarize="none").train.zero_()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), X.numpy())


def test_a_full_disk_names_the_folder_of_temporary_files(small_is_large, monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(pv.InputError, match="set TMPDIR to a folder on a larger disk"):
        load(iter([X]), binarize="none")
