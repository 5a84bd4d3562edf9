"""Missing values, conditions and size factors on the command line: weighed, shown, refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import WARNED, refused, run, train

import pyro_vae as pv
from pyro_vae.app.names import PictureSettings, TrainSettings
from pyro_vae.app.pictures import Subject
from pyro_vae.app.run_folder import load_data, open_run
from pyro_vae.app.settings import build_vae, check_settings

pytestmark = WARNED

KINDS = ("ape", "bee", "cow")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """CSV files of three kinds: whole, with holes, and counts at known sizes."""
    folder, random = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    kind, year = np.arange(300) % 3, random.integers(1990, 2020, 300)
    columns = [
        1000 * kind + 100 * random.normal(size=300),
        5 + 0.1 * kind + 0.05 * random.normal(size=300),
        year - 2000 + random.normal(size=300),
    ]
    table = pd.DataFrame(dict(zip("abc", columns, strict=True)))
    table["kind"], table["year"] = np.array(KINDS)[kind], year
    table.to_csv(folder / "whole.csv", index=False)
    table[["a", "b", "c"]] = table[["a", "b", "c"]].mask(random.random((300, 3)) < 0.2)
    table.to_csv(folder / "holes.csv", index=False)
    sizes = np.exp(random.normal(size=300))
    counts = pd.DataFrame(random.poisson(sizes[:, None] * (1 + kind[:, None]), (300, 4)))
    counts["depth"], counts["kind"] = sizes, table["kind"]
    counts.to_csv(folder / "counts.csv", index=False)
    np.savez(folder / "counts.npz", x=counts.to_numpy()[:, :4].astype(float), depth=sizes, y=kind)
    return folder


HOLES = ("--likelihood", "gaussian", "--compile", "off", "--leave-out", "year", "--missing", "nan")


@pytest.fixture(scope="module")
def holes(tables, tmp_path_factory):
    """A run on the table with holes, conditioned on the labels; tests only read it."""
    folder = tmp_path_factory.mktemp("holes") / "run"
    how = (*HOLES, "--labels", "kind", "--condition", "labels")
    train("--dataset", tables / "holes.csv", *how, "--output", folder)
    return folder


def test_missing_values_are_weighed_as_the_library_weighs_them(holes):
    result = run("evaluate", holes, "--method", "importance", "--num-samples", 50, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    vae, settings, _ = open_run(holes, torch.device("cpu"))
    x, condition = load_data(settings).inputs("test")
    assert x.isnan().any()
    assert told["missing"] == pytest.approx(x.isnan().double().mean().item())
    filled, missing = pv.tasks.nan_as_missing(x)
    observed = pv.tasks.observed_pair(vae.model, vae.guide, fill=vae.variational_family.encoder.loc)
    exact = pv.log_marginal(*observed, (filled, condition, missing), num_samples=50, seed=0)
    assert told["log_marginal"] == pytest.approx(exact.mean, rel=1e-5)
    assert "of the values are missing" in (holes / "report.html").read_text()


def test_a_run_with_holes_and_conditions_loads_and_knows_its_settings(holes):
    vae = pv.load(holes)
    assert (type(vae), vae.num_classes) == (pv.ConditionalVAE, 3)
    settings = json.loads((holes / "config.json").read_text())["run"]["settings"]
    assert (settings["missing"], settings["condition"]) == ("nan", "labels")
    # The units are those of what was observed.
    table = pd.read_csv(settings["dataset"])
    assert vae.likelihood.scale[0].item() == pytest.approx(table["a"].std(), rel=0.1)


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "--condition", "bee"),
        ("reconstruct", "--condition", "cow"),
        ("complete",),
        ("complete", "--missing", "nan"),
        ("latent", "--view", "manifold", "--condition", "ape", "--num-steps", "3"),
        ("traverse",),
        ("interpolate",),
    ],
    ids=" ".join,
)
def test_pictures_of_data_with_holes(holes, tmp_path, words):
    steps = ("--num-steps", 4, "--num", 9, "--num-draws", 2) if words[0] == "complete" else ()
    result = run(words[0], holes, *words[1:], *steps, "--output", tmp_path / "picture.png")
    assert result.code == 0, result.err
    assert (tmp_path / "picture.png").exists()


def subject_of(folder, condition=None):
    vae, settings, limits = open_run(folder, torch.device("cpu"))
    how = PictureSettings(condition=condition)
    return Subject(vae, settings, lambda: load_data(settings), limits, how)


def test_a_condition_picks_the_test_data_that_have_it(holes):
    subject = subject_of(holes, "bee")
    x, condition = subject.inputs()
    assert (condition == 1).all()
    assert len(x) == pytest.approx(20, abs=1)  # a third of the test part
    labels = load_data(subject.settings).test_labels
    assert len(labels) == len(load_data(subject.settings).test) == 60
    assert torch.equal(subject.dataset.test_labels, torch.ones(len(x), dtype=torch.int64))
    like, condition = subject.like(7)
    assert (like.shape, condition.tolist()) == ((7, 3), [1] * 7)


def test_new_images_are_of_each_class_and_take_turns(tmp_path):
    how = ("--condition", "labels", "--compile", "off")
    train(*how, "--output", tmp_path / "run", epochs=1)
    assert pv.load(tmp_path / "run").num_classes == 10
    _, condition = subject_of(tmp_path / "run").like(40)
    assert condition.tolist() == [label for label in range(10) for _ in range(4)]
    message = "expected --condition as one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got '10'"
    refused(tmp_path, "sample", tmp_path / "run", "--condition", "10", message=message)


def test_numbers_as_conditions_have_a_scale_of_their_own(tables, tmp_path):
    how = (
        "--likelihood",
        "gaussian",
        "--leave-out",
        "kind",
        "--condition",
        "year",
        "--compile",
        "off",
    )
    train("--dataset", tables / "whole.csv", *how, "--output", tmp_path / "run")
    vae = pv.load(tmp_path / "run")
    assert vae.num_classes is None
    assert vae.likelihood.decoder.loc.item() == pytest.approx(2004.5, abs=1.5)
    assert vae.likelihood.decoder.scale.item() == pytest.approx(8.7, abs=1)
    subject = subject_of(tmp_path / "run", "2003.2")
    distance = (subject.inputs()[1] - 2003.2).abs()
    assert torch.equal(distance, distance.sort().values)
    assert subject.like(3)[1].tolist() == pytest.approx([2003.2] * 3)
    message = "expected --condition as a number, got 'soon'"
    refused(tmp_path, "sample", tmp_path / "run", "--condition", "soon", message=message)


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_size_factors_that_are_known(tables, tmp_path, kind):
    condition = "kind" if kind == "csv" else "labels"
    how = ("--likelihood", "poisson", "--size-factor", "depth", "--condition", condition)
    file = tables / f"counts.{kind}"
    train("--dataset", file, *how, "--compile", "off", "--output", tmp_path / "run")
    vae = pv.load(tmp_path / "run")
    assert (vae.likelihood.size_factor, vae.num_inputs) == ("observed", 3)
    result = run("evaluate", tmp_path / "run", "--method", "importance", "--num-samples", 30)
    assert result.code == 0, result.err
    settings = open_run(tmp_path / "run", torch.device("cpu"))[1]
    x, condition, sizes = load_data(settings).inputs("train")
    assert (len(x), x.shape[1]) == (216, 4)
    # The start is the counts' mean at a size of 1.
    start = vae.likelihood.log_rate.map.bias.exp()
    torch.testing.assert_close(start, x.mean(0) / sizes.mean(), rtol=0.2, atol=0)
    assert run("sample", tmp_path / "run").code == 0


def test_grey_digits_with_holes_become_bits_with_holes(tmp_path, monkeypatch):
    images = np.random.default_rng(0).random((60, 1, 6, 6))
    images[images < 0.3] = np.nan
    np.savez(tmp_path / "grey.npz", x=images, y=np.arange(60) % 2)
    monkeypatch.chdir(tmp_path)
    train("--dataset", "grey.npz", "--missing", "nan", "--compile", "off", "--output", "run")
    data = load_data(open_run(tmp_path / "run", torch.device("cpu"))[1])
    assert torch.equal(data.test.nan_to_num(0.5).unique(), torch.tensor([0, 0.5, 1]))
    drawn = data.draw(data.train)
    assert torch.equal(drawn.isnan(), data.train.isnan())
    assert torch.equal(drawn.nan_to_num(0.5).unique(), torch.tensor([0, 0.5, 1]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dataset", "holes.csv", "--labels", "kind"), "say so: --missing nan"),
        (("--dataset", "whole.csv"), "leave them out (--leave-out), keep one as --labels"),
        (("--dataset", "whole.csv", "--condition", "colour"), "expected a column 'colour', got a, b"),
        (
            ("--dataset", "whole.csv", "--leave-out", "kind", "--condition", "labels"),
            "expected labels (--labels), a column",
        ),
        (("--dataset", "digits", "--condition", "kind"), "got 'kind', which is none"),
        (
            ("--dataset", "digits", "--condition", "labels", "--prior", "vamp"),
            "without pseudo-inputs",
        ),
        (("--dataset", "holes.csv", "--missing", "zero"), "missing 'zero'"),
    ],
)
def test_what_is_not_there_is_refused_in_the_words_of_the_options(
    tables, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tables)
    how = () if "digits" in words else ("--likelihood", "gaussian")
    refused(tables, "train", *words, *how, "--output", tmp_path / "run", message=message)


def test_a_condition_is_asked_for_only_of_a_run_that_has_one(digits):
    message = "expected --condition of a run that was trained with one: leave it out"
    refused(digits, "sample", digits, "--condition", "3", message=message)


def test_conditions_of_which_some_are_missing_are_refused(tmp_path):
    images, condition = np.random.default_rng(0).random((60, 6)), np.arange(60.0)
    condition[[4, 7]] = np.nan
    np.savez(tmp_path / "set.npz", x=images, depth=condition)
    message = "expected 'depth' for each datum, 2 are NaN: leave these data points out"
    words = ("--dataset", tmp_path / "set.npz", "--condition", "depth")
    refused(tmp_path, "train", *words, "--output", tmp_path / "run", message=message)


def test_classes_that_no_training_datum_has_are_told(tmp_path):
    x, labels = np.random.default_rng(0).random((60, 6)), np.arange(60) % 4
    parts = {"train": x[:40], "train_labels": labels[:40] % 2, "test": x[40:]}
    np.savez(tmp_path / "set.npz", **parts, test_labels=labels[40:], validation=x[:4])
    settings = TrainSettings(dataset=str(tmp_path / "set.npz"), condition="labels")
    with pytest.raises(pv.InputError, match="expected 'labels' for the validation part too"):
        load_data(settings)
    parts |= {"validation": x[:4], "validation_labels": labels[:4]}
    np.savez(tmp_path / "set.npz", **parts, test_labels=labels[40:])
    with pytest.warns(UserWarning, match="12 of 24 validation and test data points are of a class"):
        build_vae(check_settings(settings), load_data(settings))


def test_characters_that_differ_between_the_parts_are_no_condition(tmp_path):
    words = ("--dataset", "omniglot", "--data-root", tmp_path, "--condition", "labels")
    message = "got omniglot, whose characters differ: condition on another set"
    refused(tmp_path, "train", *words, "--output", tmp_path / "run", message=message)


def test_the_baseline_is_given_no_size_factors(tmp_path):
    words = ("--likelihood", "poisson", "--size-factor", "learned")
    result = run("autoencoder", *words, "--output", tmp_path / "run")
    assert (result.code, list(tmp_path.iterdir())) == (2, [])
    assert "No such option" in result.err


@pytest.mark.slow
def test_an_interrupted_run_with_holes_ends_as_if_it_had_not_been(tables, tmp_path, monkeypatch):
    from pyro_vae.infer.validation import EarlyStopping

    how = (*HOLES, "--condition", "kind", "--checkpoint-minutes", 0)
    train("--dataset", tables / "holes.csv", *how, "--output", tmp_path / "whole", epochs=3)
    inner, done = EarlyStopping.take_in, []

    def stop(self, epoch, *given):
        done.append(epoch)
        if epoch == 2:
            raise KeyboardInterrupt(2)
        return inner(self, epoch, *given)

    with monkeypatch.context() as patch:
        patch.setattr(EarlyStopping, "take_in", stop)
        options = ("--hidden", "16", "--latent-dim", "2", "--device", "cpu", "--epochs", 3)
        cut = tmp_path / "cut"
        result = run("train", *options, "--dataset", tables / "holes.csv", *how, "--output", cut)
    assert (result.code, done) == (130, [1, 2])
    result = run("train", "--resume", tmp_path / "cut")
    assert result.code == 0, result.err
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_families_are_compared_on_what_was_observed(tables, tmp_path):
    small = ("--hidden", "8", "--latent-dim", "2", "--epochs", 1, "--seeds", 1, "--device", "cpu")
    how = (*HOLES, "--condition", "kind", "--guides", "mean-field,full-rank", "--likelihoods")
    how = [word for word in how if word != "--likelihood"]
    how.remove("gaussian")
    result = run(
        "compare", *small, *how, "gaussian", "--dataset", tables / "holes.csv", "--hold", "model",
        "--method", "importance", "--num-samples", 30, "--output", tmp_path / "families",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "families" / "comparison.json").read_text())
    assert all(math.isfinite(row["log_prob"]) for row in found["families"].values())
