"""Data sets as tensors: loaded, scaled, split and binarised once, so that a batch is an index."""

import hashlib
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data_scale import without_missing
from pyro_vae.errors import InputError, check_name, expecting, unknown_name, whole_number
from pyro_vae.files import expand_path
from pyro_vae.sources import LARGE, Rows, gather, is_table, read_arrays, read_table
from pyro_vae.summary import Summary, shown

__all__ = ["BINARIZATIONS", "NAMES", "Dataset", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "kmnist", "omniglot")
BINARIZATIONS = ("dynamic", "static", "threshold", "none")
FILE_TYPES = (".npy", ".npz", ".csv")
PARTS = ("train", "validation", "test")
# Pixels of the images of the IDX files; other sizes are a damaged header or another set.
_IDX_SHAPE = (28, 28)
# What the readers of archives, arrays, IDX files and pictures raise at bytes that are none.
_UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(OSError, EOFError, MemoryError, RuntimeError, SyntaxError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
# scikit-learn's names of arrays.
_OTHER_NAMES = {"data": "x", "target": "y"}
# Largest number that torch takes for a seed or a size.
_LARGEST = 2**63 - 1
# Share of a set without a split of its own that is kept for testing.
_TEST_SHARE = 0.2
# Share of the training part kept for validation unless a size is given, and its largest size.
_VALIDATION_SHARE, _VALIDATION_MOST = 0.1, 10_000


@shown
@dataclass(frozen=True)
class Dataset:
    """A data set in three parts, each a float32 tensor ``(N, *data_shape)``.

    Attributes:
        name: the name or the file it was loaded by.
        train: training data; with ``binarize="dynamic"`` still grey, drawn afresh for each batch.
        validation: validation data, binarised once; may have length 0.
        test: test data, binarised once.
        train_labels, validation_labels, test_labels: class labels ``(N,)``, or numbers, if any.
        binarize: how grey values are turned into bits, one of :data:`BINARIZATIONS`.
        checksums: SHA-256 of each part as it is here.
        is_mapped: whether the data stay on the disk and are read from there, in the file's order.
        given: of each part what a pair is given beside its data, each ``(N,)``.
        allow_missing: whether NaN in the data stands for missing values.
        words: of labels and of what is given by its name: the words that the numbers stand for.
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
    is_mapped: bool = False
    given: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    allow_missing: bool = False
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def _summary(self) -> Summary:
        labels = self.train_labels
        rows = {name: f"{len(getattr(self, name)):,} data points" for name in PARTS}
        rows["each of shape"] = f"{self.data_shape}{', read from the disk' * self.is_mapped}"
        rows["binarize"] = self.binarize
        if labels is not None:
            is_class = not labels.is_floating_point()
            rows["labels"] = f"{len(labels.unique())} classes" if is_class else "numbers"
        return f"data set {self.name}", rows

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.train.shape[1:])

    def inputs(self, part: str, number: int | None = None, device: Any = "cpu") -> tuple[Any, ...]:
        """Return a pair's inputs from a part: its first data points, and what is given beside."""
        inputs = getattr(self, part), *self.given.get(part, ())
        return tuple(value[:number].to(device) for value in inputs)

    def draw(self, batch: Tensor, *given: Tensor) -> Any:
        """Return a training batch as the model sees it: bits drawn afresh if dynamic."""
        if self.binarize == "dynamic":
            batch = _draw_bits(batch) if self.allow_missing else torch.bernoulli(batch)
        return (batch, *given) if given else batch


def load(
    name_or_path: Any, root: str | Path | None = None, *, binarize: str | None = None,
    validation_size: int | None = None, seed: int = 0, download: bool = False,
    labels: str | None = None, leave_out: Sequence[str] = (), allow_missing: bool = False,
    given: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Load a named data set, a file, a table, a torch Dataset, or batches of a loader.

    Your own data with labels are split so that each class has its share of every part. Data larger
    than 128 MiB stay on the disk, in a temporary file if need be, and are split in their order.

    Args:
        name_or_path: ``digits`` (8x8 handwritten digits that come with scikit-learn), ``mnist``,
            ``fashion-mnist``, ``kmnist``, ``omniglot``, or the path of a ``.npy``, ``.npz`` or
            ``.csv`` file. A ``.npz`` holds either one array (or one named ``x`` or ``data``, with
            labels ``y`` or ``target``) or ``train``, ``test`` and perhaps ``validation`` and
            ``*_labels``. Or a pandas ``DataFrame``, a ``torch.utils.data.Dataset`` (so a folder of
            images too), a ``DataLoader`` or any iterable of batches, with labels or without.
        root: folder of the named sets, as torchvision lays it out; by default the variable
            ``PYRO_VAE_DATA``, or ``~/.cache/pyro_vae``.
        binarize: ``dynamic`` draws bits with the grey values as probabilities, afresh for every
            training batch and once, by ``seed``, for validation and test; ``static`` draws once for
            every part; ``threshold`` is grey > 1/2; ``none`` keeps the values as they are. By default
            tables are kept and everything else is drawn by ``dynamic``.
        validation_size: data points of the training part to validate on; 0 trains on all of it.
            By default a tenth, 10,000 at most.
        seed: seed of the split and of the bits drawn once.
        download: allow torchvision to download a set that is missing.
        labels: name of a table's column that holds labels: classes, which may be words, or numbers.
        leave_out: names of a table's columns to ignore.
        allow_missing: keep NaN, where values are missing (see :func:`pyro_vae.tasks.observed_pair`).
        given: what a pair takes beside the data, such as a condition or size factors: ``labels``,
            columns of a table, or arrays of a ``.npz`` file by name (``NAME``, or ``train_NAME``).

    Returns:
        the data set. Images have shape ``(channels, height, width)`` and values in [0, 1]; files keep
        their shape and values.

    Raises:
        InputError: an unknown name, missing or unreadable files, data that can't be split or
            binarised as asked.
    """
    is_path = isinstance(name_or_path, str | Path)
    has_columns = is_table(name_or_path) or (is_path and Path(name_or_path).suffix == ".csv")
    binarize = binarize or ("none" if has_columns else "dynamic")
    check_name("binarisation", binarize, BINARIZATIONS)
    seed = whole_number("a seed", seed, most=_LARGEST)
    if validation_size is not None:
        validation_size = whole_number("a validation size", validation_size, most=_LARGEST)
    generator = torch.Generator().manual_seed(seed)
    is_named = is_path and str(name_or_path) in NAMES
    if has_columns:
        path = _data_file(Path(name_or_path)) if is_path else name_or_path
        loaded: dict[str, Any] = read_table(path, labels, leave_out, given)
    elif labels is not None or leave_out:
        raise InputError(
            "expected labels and leave_out with a table, whose columns have names, got them without: "
            "pass a pandas DataFrame or a CSV file"
        )
    elif is_named:
        if name_or_path == "omniglot" and "labels" in given:
            advice = "condition on another set"
            wanted = "labels that mean the same in the training and the test part"
            raise InputError(f"expected {wanted}, got omniglot, whose characters differ: {advice}")
        loaded = _load_named(str(name_or_path), root_of(root), download)
    else:
        loaded = _load_file(Path(name_or_path), given) if is_path else _load_rows(name_or_path)
    if "labels" in given:
        labels_of = {"y": "x:labels"} | {f"{part}_labels": f"{part}:labels" for part in PARTS}
        loaded = {labels_of[name]: loaded[name] for name in loaded.keys() & labels_of} | loaded
    for name in given:
        if not {f"x:{name}", f"train:{name}"} & loaded.keys():
            raise InputError(
                "expected labels (labels=), a column of a table or an array of a .npz file to give "
                f"beside the data, got {name!r}, which is none: check the name"
            )
    words: dict[str, tuple[str, ...]] = {}
    tensors = {
        n: _as_tensor(n, value, allow_missing) if n in ("x", *PARTS) else _labels(n, value, words)
        for n, value in loaded.items()
    }
    is_mapped = any(isinstance(value, np.memmap) for value in loaded.values())
    split = _split(tensors, validation_size, None if is_mapped else generator, stratify=not is_named)
    parts = _binarize(split, binarize, generator)
    beside = {part: tuple(_given(parts, part, name) for name in given) for part in PARTS}
    hashed = [name for name in parts if name in PARTS or ":" in name]
    checksums = {name: hashlib.sha256(parts[name].numpy()).hexdigest() for name in hashed}
    name = str(name_or_path) if is_path else type(name_or_path).__name__
    known = {name: value for name, value in parts.items() if ":" not in name}
    how: dict[str, Any] = {"binarize": binarize, "is_mapped": is_mapped, "words": words}
    how |= {"checksums": checksums, "allow_missing": allow_missing, "given": beside}
    return Dataset(name=name, **how, **known)


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

    advice = "give the right root or allow the download"
    if download:
        advice = "check the network or put the files there"
    with expecting(f"data set {name!r} below {root}", *_UNREADABLE, advice=advice):
        if name == "omniglot":
            return _load_omniglot(sets, root, download)
        classes = {"mnist": sets.MNIST, "fashion-mnist": sets.FashionMNIST, "kmnist": sets.KMNIST}
        train, test = (classes[name](root, train=part, download=download) for part in (True, False))
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
        grey = (image.convert("L").resize((28, 28), resample=4) for image, _ in images)
        parts[part] = np.stack([255 - np.asarray(image) for image in grey])[:, None] / 255
        parts[f"{part}_labels"] = np.array([label for _, label in images._flat_character_images])
    return parts


def _load_rows(source: Any) -> dict[str, Any]:
    """Return data, and labels where there are any, of a Dataset, a loader or an iterable."""
    columns = gather(source)
    if columns is source or len(columns) > 2:
        got = type(source).__name__ if columns is source else f"{len(columns)} tensors in each batch"
        raise InputError(
            "expected the name or the file of a data set, a DataFrame, a torch Dataset or batches of "
            f"data and perhaps labels, got {got}: pass tensors and arrays to fit themselves"
        )
    return dict(zip(("x", "y"), columns, strict=False))


def _data_file(path: Path) -> Path:
    if path.suffix not in FILE_TYPES:
        raise unknown_name(f"data set (and no {', '.join(FILE_TYPES)} file)", str(path), NAMES)
    path = expand_path(path, kind="data file")
    if not path.is_file():
        raise InputError(f"expected a data file at {path}, found none: check the path")
    return path


def _load_file(path: Path, given: Sequence[str] = ()) -> dict[str, Any]:
    path = _data_file(path)
    advice = "write it by numpy.save"
    with expecting(f"an array file of numbers at {path}", *_UNREADABLE, advice=advice):
        arrays = {_OTHER_NAMES.get(name, name): each for name, each in read_arrays(path).items()}
    known = {field for field in Dataset.__dataclass_fields__ if field.startswith(PARTS)}
    for name in given:
        keys = {name: f"x:{name}"} | {f"{part}_{name}": f"{part}:{name}" for part in PARTS}
        arrays = {each if each in known else keys.get(each, each): arrays[each] for each in arrays}
    beside = {name: arrays.pop(name) for name in list(arrays) if ":" in name}
    if len(arrays) == 1:
        return {"x": next(iter(arrays.values())), **beside}
    if not ({"x"} <= set(arrays) <= {"x", "y"} or {"train", "test"} <= set(arrays) <= known):
        raise InputError(
            f"expected one array, x (and y), or train and test (and validation, *_labels) in {path}, "
            f"got {', '.join(sorted(arrays)) or 'nothing'}: rename them"
        )
    return arrays | beside


def _as_tensor(name: str, value: Any, allow_missing: bool = False) -> Tensor:
    """Return data as finite float32 numbers, or refuse them."""
    array = np.asanyarray(value)
    if array.dtype.kind not in "fiub":
        raise InputError(f"expected real numbers in {name!r}, got {array.dtype}: convert them")
    if array.ndim < 2 or 0 in array.shape:
        advice = "reshape to (N, 1)" if array.ndim == 1 and len(array) else "check the file"
        what = f"{name!r} of shape (N, ...), N at least 1"
        raise InputError(f"expected {what}, got {array.shape}: {advice}")
    with np.errstate(over="ignore"):  # what float32 can't hold is refused below
        is_ready = array.dtype == np.float32 and array.flags.c_contiguous
        if isinstance(array, np.memmap) and not is_ready:
            rows = Rows()
            for start in range(0, len(array), step := max(1, LARGE * len(array) // array.nbytes)):
                rows.add(np.asarray(array[start : start + step], np.float32))
            array = rows.finish()
        tensor = torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32))
    blocks = tensor.split(max(1, LARGE * len(tensor) // tensor.nbytes))
    if any(b.isinf().any() or (b.isnan().any() and not allow_missing) for b in blocks):
        mend = "clean them first, or, if NaN stands for missing values, say so: allow_missing=True"
        raise InputError(f"expected finite float32 data in {name!r}, got NaN or infinity: {mend}")
    return tensor


def _labels(name: str, value: Any, words: dict[str, tuple[str, ...]]) -> Tensor:
    """Return labels ``(N,)``: whole numbers, fractions, or words numbered in their order."""
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iubfUO":
        raise InputError(
            f"expected labels {name!r} of shape (N,), as numbers or words, got {array.dtype} "
            f"{array.shape}"
        )
    if ":" in name and array.dtype.kind == "f" and (missing := int(np.isnan(array).sum())):
        what = f"{name.partition(':')[2]!r} for each datum"
        raise InputError(f"expected {what}, {missing} are NaN: leave these data points out")
    if array.dtype.kind in "UO":
        found, array = np.unique(array.astype(str), return_inverse=True)
        own, kind = tuple(found.tolist()), name.partition(":")[2] or "labels"
        if words.setdefault(kind, own) != own:
            raise InputError(f"expected one set of words for {kind} in all parts: number them")
    if array.dtype.kind == "f" and not (array == np.round(array)).all():
        return torch.as_tensor(array.astype(np.float32))
    return torch.as_tensor(array.astype(np.int64))


def _split(
    parts: dict[str, Any], held_out: int | None, generator: torch.Generator | None, *, stratify: bool
) -> dict[str, Any]:
    """Bring any of the accepted layouts to train, validation and test; without generator in order."""
    for labels in parts:
        of = "x" if labels == "y" else labels.partition(":")[0].removesuffix("_labels")
        if len(parts[labels]) != len(parts.get(of, ())):
            raise InputError(
                f"expected one label per datum, got {len(parts[labels])} {labels!r} for "
                f"{len(parts.get(of, ()))} {of!r}"
            )
    if "x" in parts:
        x, y = parts["x"], parts.get("y")
        test_size = max(1, round(_TEST_SHARE * len(x)))
        _check_size("data", len(x), test_size + 1)
        beside = {f"train{name[1:]}": parts[name] for name in parts if ":" in name}
        whole = {"train": x, "train_labels": y, **beside}
        parts = _cut(whole, "test", test_size, generator, stratify)
    shapes = {name: tuple(parts[name].shape[1:]) for name in PARTS if name in parts}
    if len(set(shapes.values())) > 1:
        raise InputError(f"expected parts of one data shape, got {shapes}")
    if "validation" in parts:
        if held_out is not None:
            raise InputError("expected no validation size for data with a validation part")
        return parts
    if held_out is None:
        held_out = min(_VALIDATION_MOST, round(_VALIDATION_SHARE * len(parts["train"])))
    _check_size("training data", len(parts["train"]), held_out + 1)
    return _cut(parts, "validation", held_out, generator, stratify)


def _cut(
    parts: dict[str, Any], name: str, size: int, generator: torch.Generator | None, stratify: bool
) -> dict[str, Any]:
    """Move ``size`` random data points, or the last ones, from the training part to a new part."""
    if size == 0:
        return {**parts, name: parts["train"][:0]}
    chosen: Any = slice(-size, None), slice(None, -size)
    if generator is not None:
        order = torch.randperm(len(parts["train"]), generator=generator)
        labels = parts.get("train_labels")
        if stratify and labels is not None and not labels.is_floating_point():
            order = _spread_classes(order, labels)
        chosen = order[:size].sort().values, order[size:].sort().values
    cut = dict(parts)
    for whole, value in parts.items():
        if whole.startswith("train") and value is not None:
            cut[whole.replace("train", name, 1)], cut[whole] = (value[rows] for rows in chosen)
    return cut


def _spread_classes(order: Tensor, labels: Tensor) -> Tensor:
    """Return an order of which any first part has each class in its share of the whole."""
    place = torch.empty(len(order), dtype=torch.float64)
    for label in labels.unique():
        own = order[labels[order] == label]
        place[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return order[place[order].argsort(stable=True)]


def _check_size(what: str, size: int, least: int) -> None:
    if size < least:
        raise InputError(f"expected at least {least} {what} to split as asked, got {size}")


def _given(parts: dict[str, Any], part: str, name: str) -> Tensor:
    """Return what a part has beside its data; of a part without data nothing was cut."""
    found: Tensor = parts.get(f"{part}:{name}", parts[f"train:{name}"][:0])
    if len(found) != len(parts[part]):
        raise InputError(f"expected {name!r} for the {part} part too, got none: add {part}_{name}")
    return found


def _binarize(parts: dict[str, Any], how: str, generator: torch.Generator) -> dict[str, Any]:
    """Turn grey into bits, except training data of which every batch draws its own."""
    if how == "none":
        return parts
    for part in (part for name in PARTS if len(parts[name]) for part in without_missing(parts[name])):
        if part.min() < 0 or part.max() > 1:
            raise InputError(
                f"expected values in [0, 1] to binarise, got values from {part.min():g} to "
                f"{part.max():g}: divide by the largest possible value (255 for bytes), or use "
                "binarize 'none' with the Gaussian likelihood"
            )

    def bits(part: Tensor) -> Tensor:
        if how == "threshold":
            return torch.where(part.isnan(), part, (part > 0.5).float())
        return _draw_bits(part, generator)

    return parts | {name: bits(parts[name]) for name in (PARTS[1:] if how == "dynamic" else PARTS)}


def _draw_bits(grey: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw bits with grey values as their probabilities; NaN stays."""
    return torch.bernoulli(grey.nan_to_num(0.0), generator=generator) + 0 * grey
