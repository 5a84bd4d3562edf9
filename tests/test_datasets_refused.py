"""Data files that are no data: refused in one line, never unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import errors
from pyro_vae.datasets import load

RANDOM = np.random.default_rng(0)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_objects_are_refused_and_never_unpickled(tmp_path, suffix):
    objects = np.array([[Bomb(tmp_path / "trace")]], dtype=object)
    path = tmp_path / f"own{suffix}"
    if suffix == ".npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, x=objects)
    with pytest.raises(pv.InputError, match="Object arrays cannot be loaded"):
        load(path)
    assert not (tmp_path / "trace").exists()
    np.load(path, allow_pickle=True) if suffix == ".npy" else np.load(path, allow_pickle=True)["x"]
    assert (tmp_path / "trace").exists()  # the trap was real


REFUSED_ARRAYS = {
    "one axis": (np.ones(10), r"got \(10,\): reshape to \(N, 1\)"),
    "no axis": (np.array(3.0), r"got \(\)"),
    "no datum": (np.ones((0, 4)), r"got \(0, 4\)"),
    "no coordinate": (np.ones((5, 0)), r"got \(5, 0\)"),
    "one datum": (np.ones((1, 4)), "at least 2 data"),
    "nan": (np.full((10, 2), np.nan), "finite"),
    "inf": (np.full((10, 2), -np.inf), "finite"),
    "too large for float32": (np.full((10, 2), 1e300), "finite"),
    "complex": (np.ones((10, 2), complex), "real numbers"),
    "text": (np.array([["a", "b"]] * 10), "real numbers"),
    "records": (np.zeros((10, 2), [("a", "f4")]), "real numbers"),
    "dates": (np.zeros((10, 2), "M8[D]"), "real numbers"),
}


@pytest.mark.parametrize("case", REFUSED_ARRAYS)
def test_arrays_that_are_no_data_are_refused(tmp_path, case):
    array, message = REFUSED_ARRAYS[case]
    np.save(tmp_path / "own.npy", array)
    with pytest.raises(pv.InputError, match=message) as caught:
        load(tmp_path / "own.npy", binarize="none")
    assert "\n" not in str(caught.value)


REFUSED_LAYOUTS = {
    "no test": ({"train": np.ones((9, 2)), "other": np.ones((9, 2))}, "rename them"),
    "surplus": ({"x": np.ones((9, 2)), "z": np.ones((9, 2))}, "rename them"),
    "both": (
        {"x": np.ones((9, 2)), "train": np.ones((9, 2)), "test": np.ones((9, 2))},
        "rename them",
    ),
    "nothing": ({}, "got nothing"),
    "shapes differ": ({"train": np.ones((9, 2)), "test": np.ones((9, 3))}, "one data shape"),
    "too few labels": ({"x": np.ones((9, 2)), "y": np.ones(5, int)}, "one label per datum"),
    "labels of a part": (
        {"train": np.ones((9, 2)), "test": np.ones((9, 2)), "test_labels": np.ones(5, int)},
        "one label per datum",
    ),
    "labels of no part": (
        {"train": np.ones((9, 2)), "test": np.ones((9, 2)), "validation_labels": np.ones(5, int)},
        "one label per datum",
    ),
    "labels that are dates": ({"x": np.ones((9, 2)), "y": np.zeros(9, "M8[D]")}, "or words, got dat"),
    "labels in columns": ({"x": np.ones((9, 2)), "y": np.ones((9, 2), int)}, r"of shape \(N,\)"),
}


@pytest.mark.parametrize("case", REFUSED_LAYOUTS)
def test_layouts_that_are_not_understood_are_refused(tmp_path, case):
    arrays, message = REFUSED_LAYOUTS[case]
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(pv.InputError, match=message):
        load(tmp_path / "own.npz", binarize="none")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "folder", "absent"])
def test_files_that_are_not_arrays_are_refused(tmp_path, suffix, damage):
    path = tmp_path / f"own{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, RANDOM.random((50, 20)))
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes({"empty": b"", "cut": whole[:2000], "text": b"1,2,3\n"}[damage])
    with pytest.raises(pv.InputError, match=r"expected (a data file|an array file)") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_member_is_refused(tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, x=RANDOM.random((50, 20)))
    content = bytearray(path.read_bytes())
    content[2000:2050] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(pv.InputError, match="an array file"):
        load(path)


def test_unknown_names_come_with_the_nearest_right_one():
    with pytest.raises(pv.InputError, match="did you mean 'digits'"):
        load("digts")
    with pytest.raises(pv.InputError, match="did you mean 'fashion-mnist'"):
        load("fashion_mnist")
    with pytest.raises(pv.InputError, match="did you mean 'dynamic'"):
        load("digits", binarize="dynamc")


@pytest.mark.parametrize("size", [-1, 1438, 10**9])
def test_validation_sizes_that_leave_nothing_are_refused(size):
    with pytest.raises(pv.InputError, match="expected"):
        load("digits", validation_size=size)
    assert len(load("digits", validation_size=1437).train) == 1


@pytest.mark.parametrize("binarize", ["dynamic", "static", "threshold"])
@pytest.mark.parametrize("scale", [255, -1])
def test_values_outside_the_unit_interval_are_not_binarised(tmp_path, binarize, scale):
    np.save(tmp_path / "own.npy", scale * RANDOM.random((20, 4)))
    with pytest.raises(pv.InputError, match=r"\[0, 1\] to binarise.*divide by"):
        load(tmp_path / "own.npy", binarize=binarize)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (torch.zeros(4, 2), {}),
        (None, {}),
        ("digits", {"validation_size": 2.5}),
        ("digits", {"validation_size": "10"}),
        ("digits", {"seed": -1}),
        ("digits", {"seed": 2**70}),
        ("digits", {"seed": "0"}),
        ("digits", {"binarize": 3}),
        ("mnist", {"root": "~nobody-of-this-name/data"}),
        ("~nobody-of-this-name/own.npy", {}),
        ("own\0.npy", {}),
        ("mnist", {"root": "a\0b"}),
        ("mnist", {"root": "/dev/null", "download": True}),
        ("mnist", {"root": "/proc/nowhere", "download": True}),
    ],
)
def test_arguments_of_another_kind_are_refused(source, options):
    with pytest.raises(pv.InputError, match=r"expected|unknown") as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


def test_what_linux_says_is_available_is_between_nothing_and_everything():
    available = errors.available_memory()
    assert available == 1 << 62 or 0 < available < 1 << 50
