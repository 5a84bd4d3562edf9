"""Loading, splitting and binarising: files of every layout, accepted or refused in one line."""

import itertools
import socket
import struct

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.datasets import Dataset, load

RANDOM = np.random.default_rng(0)
DIGITS_TRAIN_CHECKSUM = "5b53829441f2fca680b5c737eee8b137595cebdf5a4d860acb09906bc8e1c225"


def write_idx(path, array):
    """Write unsigned bytes in the IDX format of the MNIST files."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, folder="MNIST"):
    arrays = {}
    for part, count in (("train", 50), ("t10k", 20)):
        images = RANDOM.integers(0, 256, (count, 28, 28))
        images[0, 0, :2] = 0, 255
        labels = np.arange(count) % 10
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", labels)
        arrays[part] = images, labels
    return arrays


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_idx_files_are_read_whole(tmp_path, name, folder):
    arrays = write_mnist(tmp_path, folder)
    data = load(name, tmp_path, binarize="none", validation_size=0)
    images, labels = arrays["train"]
    assert data.train.dtype == torch.float32
    np.testing.assert_array_equal(data.train.numpy(), (images[:, None] / 255).astype(np.float32))
    np.testing.assert_array_equal(data.train_labels.numpy(), labels)
    assert data.validation.shape == (0, 1, 28, 28)
    np.testing.assert_array_equal(data.test[:, 0].mul(255).round().numpy(), arrays["t10k"][0])
    assert (data.train.min(), data.train.max()) == (0, 1)


def test_the_variable_names_the_root(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert len(load("mnist").test) == 20


def test_a_missing_set_is_not_downloaded_unasked(tmp_path):
    with pytest.raises(pv.InputError, match=r"'mnist' below .* give the right root") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["mnist", "kmnist", "omniglot"])
def test_without_a_network_a_download_is_one_line(tmp_path, monkeypatch, capfd, name):
    def fail(*arguments, **options):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(pv.InputError, match=f"{name!r} below .*; check the network or put") as caught:
        load(name, tmp_path, download=True)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("size", [3, 10, 5000])
def test_a_truncated_idx_file_is_refused(tmp_path, size):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(pv.InputError, match="expected data set 'mnist'"):
        load("mnist", tmp_path)


def test_omniglot_is_small_with_bright_ink(tmp_path, monkeypatch):
    from PIL import Image
    from torchvision.datasets import Omniglot

    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: True)
    drawing = np.full((105, 105), 255, np.uint8)
    drawing[:, :52] = 0  # ink is dark in the files
    for background in ("images_background", "images_evaluation"):
        for character in ("character01", "character02"):
            folder = tmp_path / "omniglot-py" / background / "Alphabet" / character
            folder.mkdir(parents=True)
            for index in range(4):
                Image.fromarray(drawing).save(folder / f"{index:04}.png")
    data = load("omniglot", tmp_path, binarize="none", validation_size=0)
    assert data.train.shape == data.test.shape == (8, 1, 28, 28)
    assert (data.train[..., :13] == 1).all()
    assert (data.train[..., 14:] == 0).all()
    assert sorted(data.train_labels.tolist()) == [0] * 4 + [1] * 4


def test_digits_need_no_files():
    data = load("digits", binarize="none")
    assert data.data_shape == (1, 8, 8)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert (data.train.min(), data.train.max()) == (0, 1)
    assert data.train_labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("shape", [(40, 1), (40, 7), (40, 3, 5), (40, 3, 4, 4)])
@pytest.mark.parametrize("dtype", ["f8", "f4", ">f4", "f2", "u1", "i8", "?"])
def test_an_array_of_any_shape_and_number_type(tmp_path, shape, dtype):
    array = RANDOM.integers(0, 2, shape).astype(dtype)
    np.save(tmp_path / "own.npy", array)
    data = load(tmp_path / "own.npy", binarize="none", validation_size=0)
    assert data.data_shape == shape[1:]
    assert data.train.dtype == torch.float32
    assert data.train_labels is None
    assert (len(data.train), len(data.test)) == (32, 8)


def test_values_are_never_rescaled(tmp_path):
    array = RANDOM.normal(100, 50, (40, 3)).astype(np.float32)
    np.save(tmp_path / "own.npy", array)
    data = load(str(tmp_path / "own.npy"), binarize="none")
    rows = torch.cat([data.train, data.validation, data.test])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, array.tolist()))


def test_split_is_disjoint_covering_and_seeded(tmp_path):
    array = np.arange(200, dtype=np.float32)[:, None]
    np.savez(tmp_path / "own.npz", x=array, y=np.arange(200))
    parts = ("train", "validation", "test")

    def split(seed):
        data = load(tmp_path / "own.npz", binarize="none", validation_size=30, seed=seed)
        for part in parts:  # labels follow their data
            assert getattr(data, f"{part}_labels").tolist() == getattr(data, part)[:, 0].tolist()
        return [getattr(data, part)[:, 0].int().tolist() for part in parts]

    first, again, other = split(0), split(0), split(1)
    assert [len(part) for part in first] == [130, 30, 40]
    assert sorted(itertools.chain(*first)) == list(range(200))
    assert first == again
    assert first != other


def test_validation_is_a_tenth_unless_told(tmp_path):
    np.save(tmp_path / "own.npy", np.zeros((100, 2)))
    assert len(load(tmp_path / "own.npy").validation) == 8
    assert len(load(tmp_path / "own.npy", validation_size=5).validation) == 5
    none = load(tmp_path / "own.npy", validation_size=0)
    assert (len(none.validation), len(none.train)) == (0, 80)


def test_a_split_of_ones_own_is_kept(tmp_path):
    arrays = {
        "train": RANDOM.random((10, 4)),
        "train_labels": np.arange(10),
        "validation": RANDOM.random((3, 4)),
        "test": RANDOM.random((5, 4)),
    }
    np.savez(tmp_path / "own.npz", **arrays)
    data = load(tmp_path / "own.npz", binarize="none")
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(data, part).numpy(), arrays[part].astype(np.float32))
    assert data.train_labels.tolist() == list(range(10))
    with pytest.raises(pv.InputError, match="validation part"):
        load(tmp_path / "own.npz", validation_size=2)


def test_one_array_of_any_name_is_the_data(tmp_path):
    np.savez_compressed(tmp_path / "own.npz", measurements=np.ones((10, 2)))
    assert load(tmp_path / "own.npz").data_shape == (2,)


def are_bits(part):
    return bool(((part == 0) | (part == 1)).all())


def test_threshold_is_grey_above_a_half():
    grey, bits = load("digits", binarize="none"), load("digits", binarize="threshold")
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(bits, part), (getattr(grey, part) > 0.5).float())


def test_static_draws_every_part_once_with_the_grey_values_as_probabilities(tmp_path):
    grey = np.tile([0.0, 0.1, 0.5, 0.9, 1.0], (20_000, 1))
    np.save(tmp_path / "own.npy", grey)
    data = load(tmp_path / "own.npy", binarize="static")
    assert all(map(are_bits, (data.train, data.validation, data.test)))
    count = len(data.train)
    p = torch.tensor(grey[0])
    error = (p * (1 - p) / count).sqrt()
    assert ((data.train.double().mean(0) - p).abs() < 5 * error + 1e-6).all()
    assert torch.equal(data.draw(data.train), data.train)


def test_dynamic_draws_afresh_for_training_and_once_for_the_rest():
    grey, data = load("digits", binarize="none"), load("digits", binarize="dynamic")
    assert torch.equal(data.train, grey.train)
    assert are_bits(data.validation)
    assert are_bits(data.test)
    first, second = data.draw(data.train), data.draw(data.train)
    assert are_bits(first)
    assert not torch.equal(first, second)
    p = data.train.double()
    error = (p * (1 - p)).sum().sqrt()
    assert abs(first.double().sum() - p.sum()) < 5 * error + 1e-6


def test_none_keeps_the_values():
    data = load("digits", binarize="none")
    assert torch.equal(data.draw(data.train), data.train)
    assert not are_bits(data.test)


def test_checksums_are_stable_and_tell_data_apart():
    first, again = load("digits").checksums, load("digits").checksums
    assert first == again
    assert set(first) == {"train", "validation", "test"}
    assert load("digits", seed=1).checksums["test"] != first["test"]
    assert load("digits", binarize="threshold").checksums["test"] != first["test"]
    grey = load("digits", binarize="none", validation_size=0)
    # Of the 1,438 training digits: the split and the scaling are the same on every machine.
    assert grey.checksums["train"] == DIGITS_TRAIN_CHECKSUM
    no_validation = grey.checksums["validation"]
    assert no_validation == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_draw_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    load("digits", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_of_ones_own_making_serves_fit():
    x = torch.bernoulli(torch.rand(32, 4))
    data = Dataset(name="own", train=x, validation=x[:0], test=x)
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), data.data_shape),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(data.data_shape, (8,)), 2),
    )
    result = pv.fit(vae.model, vae.guide, data, epochs=2, device="cpu")
    assert np.isfinite(result.history["train_elbo"]).all()


def test_idx_files_of_another_size_are_refused(tmp_path):
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((50, 14, 56)))
    with pytest.raises(pv.InputError, match=r"expected images of \(28, 28\) pixels"):
        load("mnist", tmp_path)
