"""Data sets as tensors: loaded, scaled, split and binarised once, so that a batch is an index."""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_room, first_line, unknown_name, whole_number
from pyro_vae.files import expand_path

__all__ = ["BINARIZATIONS", "NAMES", "Dataset", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "kmnist", "omniglot")
BINARIZATIONS = ("dynamic", "static", "threshold", "none")
FILE_TYPES = (".npy", ".npz")

_PARTS = ("train", "validation", "test")

# Pixels of the images of the IDX files; other sizes are a damaged header or another set.
_IDX_SHAPE = (28, 28)

# What the readers of archives, arrays, IDX files and pictures raise at bytes that are none.
_UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(OSError, EOFError, MemoryError, RuntimeError, SyntaxError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

# What to do with data that are larger than the memory.
_IN_PARTS = (
    "keep them as a float32 .npy file and pass numpy.load(path, mmap_mode='r') itself to fit, which "
    "reads it batch by batch"
)

# Largest number that torch takes for a seed or a size.
_LARGEST = 2**63 - 1

# Share of a set without a split of its own that is kept for testing.
_TEST_SHARE = 0.2
# Share of the training part kept for validation unless a size is given, and its largest size.
_VALIDATION_SHARE, _VALIDATION_MOST = 0.1, 10_000


@dataclass(frozen=True)
class Dataset:
    """A data set in three parts, each a float32 tensor ``(N, *data_shape)``.

    Attributes:
        name: the name or the file it was loaded by.
        train: training data; with ``binarize="dynamic"`` still grey, drawn afresh for each batch.
        validation: validation data, binarised once; may have length 0.
        test: test data, binarised once.
        train_labels: class labels ``(N,)``, where there are any.
        validation_labels: likewise of the validation data.
        test_labels: likewise of the test data.
        binarize: how grey values are turned into bits, one of :data:`BINARIZATIONS`.
        checksums: SHA-256 of each part as it is here.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    binarize: str = "none"
    checksums: dict[str, str] | None = None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.train.shape[1:])

    def draw(self, batch: Tensor) -> Tensor:
        """Return a training batch as the model sees it: bits drawn afresh if dynamic."""
        return torch.bernoulli(batch) if self.binarize == "dynamic" else batch


def load(
    name_or_path: str | Path,
    root: str | Path | None = None,
    *,
    binarize: str = "dynamic",
    validation_size: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> Dataset:
    """Load a named data set or a file of the user's own.

    Args:
        name_or_path: ``digits`` (8x8 handwritten digits that come with scikit-learn), ``mnist``,
            ``fashion-mnist``, ``kmnist``, ``omniglot``, or the path of a ``.npy`` or ``.npz`` file.
            A ``.npz`` holds either one array (or one named ``x``, with labels ``y``) or ``train``,
            ``test`` and perhaps ``validation`` and ``*_labels``.
        root: folder of the named sets, as torchvision lays it out; by default the variable
            ``PYRO_VAE_DATA``, or ``~/.cache/pyro_vae``.
        binarize: ``dynamic`` draws bits with the grey values as probabilities, afresh for every
            training batch and once, by ``seed``, for validation and test; ``static`` draws once for
            every part; ``threshold`` is grey > 1/2; ``none`` keeps the values as they are.
        validation_size: data taken from the training part for validation; 0 trains on all of it.
            By default a tenth, 10,000 at most.
        seed: seed of the split and of the bits drawn once.
        download: allow torchvision to download a set that is missing.

    Returns:
        the data set. Images have shape ``(channels, height, width)`` and values in [0, 1]; files keep
        their shape and values.

    Raises:
        InputError: an unknown name, missing or unreadable files, data that can't be split or
            binarised as asked.
    """
    if binarize not in BINARIZATIONS:
        raise unknown_name("binarisation", binarize, BINARIZATIONS)
    if not isinstance(name_or_path, str | Path):
        raise InputError(
            f"expected the name or the file of a data set, got {type(name_or_path).__name__}: pass "
            "tensors to fit themselves, or as a Dataset"
        )
    seed = whole_number("a seed", seed, most=_LARGEST)
    if validation_size is not None:
        validation_size = whole_number("a validation size", validation_size, most=_LARGEST)
    generator = torch.Generator().manual_seed(seed)
    if str(name_or_path) in NAMES:
        loaded = _load_named(str(name_or_path), root_of(root), download)
    else:
        loaded = _load_file(Path(name_or_path))
    tensors = {name: _as_tensor(name, value) for name, value in loaded.items()}
    parts = _binarize(_split(tensors, validation_size, generator), binarize, generator)
    checksums = {name: hashlib.sha256(parts[name].numpy()).hexdigest() for name in _PARTS}
    return Dataset(name=str(name_or_path), binarize=binarize, checksums=checksums, **parts)


def root_of(root: str | Path | None) -> Path:
    """Return the folder of the named sets: as given, from the variable, or the default one."""
    chosen = root or os.environ.get("PYRO_VAE_DATA") or Path.home() / ".cache" / "pyro_vae"
    return expand_path(chosen).absolute()


def _load_named(name: str, root: Path, download: bool) -> dict[str, Any]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return {"x": digits.images[:, None] / 16, "y": digits.target}
    import torchvision.datasets as sets

    try:
        if name == "omniglot":
            return _load_omniglot(sets, root, download)
        classes = {"mnist": sets.MNIST, "fashion-mnist": sets.FashionMNIST, "kmnist": sets.KMNIST}
        train, test = (classes[name](root, train=part, download=download) for part in (True, False))
    except _UNREADABLE as error:
        advice = "give the right root or allow the download"
        if download:
            advice = "check the network or put the files there"
        raise InputError(
            f"expected data set {name!r} below {root}, got: {first_line(error)}; {advice}"
        ) from error
    parts: dict[str, Any] = {}
    for part, images in (("train", train), ("test", test)):
        if tuple(images.data.shape[1:]) != _IDX_SHAPE:
            raise InputError(
                f"expected images of {_IDX_SHAPE} pixels for {name!r} below {root}, got "
                f"{tuple(images.data.shape[1:])}: the files are damaged or of another set"
            )
        parts[part], parts[f"{part}_labels"] = images.data[:, None] / 255, images.targets
    return parts


def _load_omniglot(sets: Any, root: Path, download: bool) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for part, background in (("train", True), ("test", False)):
        images = sets.Omniglot(root, background=background, download=download)
        # 105x105 pixels, ink dark; 28x28 with ink bright is how the field uses the set.
        small = [
            255 - np.asarray(image.convert("L").resize((28, 28), resample=4)) for image, _ in images
        ]
        parts[part] = np.stack(small)[:, None] / 255
        parts[f"{part}_labels"] = np.array([label for _, label in images._flat_character_images])
    return parts


def _load_file(path: Path) -> dict[str, Any]:
    if path.suffix not in FILE_TYPES:
        raise unknown_name("data set (and no .npy or .npz file)", str(path), NAMES)
    path = expand_path(path, kind="data file")
    if not path.is_file():
        raise InputError(f"expected a data file at {path}, found none: check the path")
    try:
        check_room("data", _bytes_of(path), _IN_PARTS)
        with path.open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"x": content}
            arrays = {name: content[name] for name in content.files}
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(
            f"expected an array file of numbers at {path}, got: {first_line(error)}; write it by "
            "numpy.save"
        ) from error
    if len(arrays) == 1:
        return {"x": next(iter(arrays.values()))}
    known = {field for field in Dataset.__dataclass_fields__ if field.startswith(_PARTS)}
    if not ({"x"} <= set(arrays) <= {"x", "y"} or {"train", "test"} <= set(arrays) <= known):
        raise InputError(
            f"expected one array, x (and y), or train and test (and validation, *_labels) in {path}, "
            f"got {', '.join(sorted(arrays)) or 'nothing'}: rename them"
        )
    return arrays


def _bytes_of(path: Path) -> int:
    """Return how many bytes a file is once unpacked."""
    if path.suffix == ".npy":
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def _as_tensor(name: str, value: Any) -> Tensor:
    """Return data as float32 and labels as int64; refuse what is no data."""
    array = np.asarray(value)
    if name == "y" or name.endswith("_labels"):
        if array.dtype.kind not in "iub" or array.ndim != 1:
            raise InputError(
                f"expected labels {name!r} as whole numbers (N,), got {array.dtype} {array.shape}"
            )
        return torch.as_tensor(array.astype(np.int64))
    if array.dtype.kind not in "fiub":
        raise InputError(f"expected real numbers in {name!r}, got {array.dtype}: convert them")
    if array.ndim < 2 or 0 in array.shape:
        advice = "reshape to (N, 1)" if array.ndim == 1 and len(array) else "check the file"
        raise InputError(
            f"expected {name!r} of shape (N, ...), N at least 1, got {array.shape}: {advice}"
        )
    if array.dtype != np.float32:
        check_room(f"float32 {name!r}", 4 * array.size, _IN_PARTS)
    with np.errstate(over="ignore"):  # what float32 can't hold is refused below
        tensor = torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32))
    if not tensor.isfinite().all():
        raise InputError(
            f"expected finite float32 data in {name!r}, got NaN or infinity: clean them first"
        )
    return tensor


def _split(
    parts: dict[str, Any], validation_size: int | None, generator: torch.Generator
) -> dict[str, Any]:
    """Bring any of the accepted layouts to train, validation and test."""
    for labels, of in (("y", "x"), *((f"{part}_labels", part) for part in _PARTS)):
        if labels in parts and len(parts[labels]) != len(parts.get(of, ())):
            raise InputError(
                f"expected one label per datum, got {len(parts[labels])} {labels!r} for "
                f"{len(parts.get(of, ()))} {of!r}"
            )
    if "x" in parts:
        x, y = parts["x"], parts.get("y")
        test_size = max(1, round(_TEST_SHARE * len(x)))
        _check_size("data", len(x), test_size + 1)
        parts = _cut({"train": x, "train_labels": y}, "test", test_size, generator)
    shapes = {name: tuple(parts[name].shape[1:]) for name in _PARTS if name in parts}
    if len(set(shapes.values())) > 1:
        raise InputError(f"expected parts of one data shape, got {shapes}")
    if "validation" in parts:
        if validation_size is not None:
            raise InputError("expected no validation size for data with a validation part")
        return parts
    if validation_size is None:
        validation_size = min(_VALIDATION_MOST, round(_VALIDATION_SHARE * len(parts["train"])))
    _check_size("training data", len(parts["train"]), validation_size + 1)
    return _cut(parts, "validation", validation_size, generator)


def _cut(parts: dict[str, Any], name: str, size: int, generator: torch.Generator) -> dict[str, Any]:
    """Move ``size`` random data points from the training part to a new part."""
    if size == 0:
        return {**parts, name: parts["train"][:0]}
    order = torch.randperm(len(parts["train"]), generator=generator)
    taken, kept = order[:size].sort().values, order[size:].sort().values
    cut = dict(parts)
    for kind in ("", "_labels"):
        if parts.get(f"train{kind}") is not None:
            cut[f"{name}{kind}"] = parts[f"train{kind}"][taken]
            cut[f"train{kind}"] = parts[f"train{kind}"][kept]
    return cut


def _check_size(what: str, size: int, least: int) -> None:
    if size < least:
        raise InputError(f"expected at least {least} {what} to split as asked, got {size}")


def _binarize(parts: dict[str, Any], how: str, generator: torch.Generator) -> dict[str, Any]:
    """Turn grey into bits, except training data of which every batch draws its own."""
    if how == "none":
        return parts
    for part in (parts[name] for name in _PARTS):
        if len(part) and not (part.min() >= 0 and part.max() <= 1):
            raise InputError(
                f"expected values in [0, 1] to binarise, got values from {part.min():g} to "
                f"{part.max():g}: divide by the largest possible value (255 for bytes), or use "
                "binarize 'none' with the Gaussian likelihood"
            )

    def bits(part: Tensor) -> Tensor:
        if how == "threshold":
            return (part > 0.5).float()
        return torch.bernoulli(part, generator=generator)

    drawn = _PARTS[1:] if how == "dynamic" else _PARTS
    return {**parts, **{name: bits(parts[name]) for name in drawn}}
