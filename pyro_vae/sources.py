"""Where data come from: tables, Datasets, loaders and files as arrays, kept on the disk if large."""

import inspect
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vae.errors import InputError, expecting

# Bytes from which on rows are read from the disk in place of filling the memory.
LARGE = 1 << 27
# Rows of a batch of a Dataset.
_ROWS = 1 << 10

# Data that functions take: tensors and arrays, tuples of these, tables, and what yields batches.
DataLike = Tensor | np.ndarray | Dataset[Any] | Iterable[Any]


def gather(source: Any, *functions: Any) -> Any:
    """Return tables, Datasets and loaders as tensors and arrays, anything else as it is.

    A pandas table gives its columns as numbers; a ``torch.utils.data.Dataset``, a ``DataLoader`` or
    any other iterable of batches gives its rows in its order, read once through: a tuple of arrays,
    of which functions that take but one argument get the first. What is no such thing is refused.
    """
    if is_table(source):
        return table_values(source)
    if isinstance(source, Tensor | np.ndarray | Sequence | Mapping):
        return source
    kind = type(source).__name__
    if isinstance(source, TensorDataset):
        columns: tuple[Any, ...] = source.tensors
    elif isinstance(source, Dataset):
        columns = _stack(DataLoader(source, batch_size=_ROWS), kind)
    elif isinstance(source, Iterable):
        columns = _stack(source, kind)
    else:
        return source
    few = any(_takes(function, 1) and not _takes(function, len(columns)) for function in functions)
    return columns[:1] if few else columns


def _takes(function: Any, number: int) -> bool:
    wanted = getattr(getattr(function, "__self__", None), "num_inputs", number)  # of a VAE
    try:
        inspect.signature(function).bind(*[None] * number)
    except (TypeError, ValueError):
        return False
    return bool(wanted == number)


def _stack(batches: Iterable[Any], kind: str) -> tuple[np.ndarray, ...]:
    columns: list[Rows] = []
    what = f"batches of tensors that differ in length alone, from the {kind}"
    advice = "give it a transform or a collate_fn that returns tensors"
    with expecting(what, TypeError, ValueError, advice=advice):
        for batch in batches:
            values = batch if isinstance(batch, list | tuple) else (batch,)
            columns = columns or [Rows() for _ in values]
            for rows, value in zip(columns, values, strict=True):
                if not isinstance(value, Tensor | np.ndarray):
                    raise TypeError(f"a batch with a {type(value).__name__}")
                rows.add(value.numpy(force=True) if isinstance(value, Tensor) else value)
    if not columns:
        raise InputError(f"expected at least one batch, the {kind} has none: was it read before?")
    return tuple(rows.finish() for rows in columns)


class Rows:
    """Rows that come part by part: in memory, or in a nameless file once they are ``LARGE``."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None
        self._count = 0

    def add(self, part: np.ndarray) -> None:
        """Take in some rows, ``(n, ...)``; floating-point ones become float32."""
        part = np.ascontiguousarray(part, np.float32 if part.dtype.kind == "f" else None)
        first = self._parts[0] if self._parts else part
        if part.shape[1:] != first.shape[1:]:
            raise ValueError(f"rows of shapes {first.shape[1:]} and {part.shape[1:]}")
        self._parts.append(part.astype(first.dtype, copy=False))
        self._count += len(part)
        if self._file is None and self._count * int(np.prod(first.strides[:1])) <= LARGE:
            return
        room = f"room for {self._count} rows in {tempfile.gettempdir()}"
        with expecting(room, OSError, advice="set TMPDIR to a folder on a larger disk"):
            self._file = self._file or tempfile.TemporaryFile(prefix="pyro-vae-")  # noqa: SIM115
            for each in self._parts:
                self._file.write(each.data)
            self._file.flush()
        self._parts = [first[:0]]

    def finish(self) -> np.ndarray:
        """Return all the rows, ``(N, ...)``; what is written to them never gets into the file."""
        first = self._parts[0]
        if self._file is None:
            return np.concatenate(self._parts)
        with self._file as file:  # the mapping outlives it
            return np.memmap(file, first.dtype, "c", shape=(self._count, *first.shape[1:]))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a ``.npz`` file by name, of a ``.npy`` file as x; large ones mapped."""
    if path.suffix == ".npy":
        mode: Any = "c" if path.stat().st_size > LARGE else None
        return {"x": np.load(path, mmap_mode=mode, allow_pickle=False)}
    with (
        path.open("rb") as stream,
        np.load(stream, allow_pickle=False) as content,
        zipfile.ZipFile(path) as archive,
    ):
        sizes = {each.filename.removesuffix(".npy"): each.file_size for each in archive.infolist()}
        large = {name for name, size in sizes.items() if size > LARGE}
        return {n: _map_member(archive, f"{n}.npy") if n in large else content[n] for n in content}


def _map_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array in a temporary file, which its mapping outlives."""
    what, advice = f"room for {name}", "set TMPDIR to a folder on a larger disk"
    with (
        expecting(f"{what} in {tempfile.gettempdir()}", OSError, advice=advice),
        tempfile.TemporaryDirectory(prefix="pyro-vae-") as folder,
    ):
        return np.asanyarray(np.load(archive.extract(name, folder), "c", allow_pickle=False))


def is_table(source: Any) -> bool:
    """Say whether it is a pandas ``DataFrame``; pandas itself is not imported."""
    return type(source).__name__ == "DataFrame" and hasattr(source, "to_numpy")


def table_values(frame: Any) -> np.ndarray:
    """Return the numbers of a pandas table, ``(N, columns)`` in float32, NaN where one is missing."""
    words = [str(name) for name in frame if frame[name].dtype.kind not in "fiub"]
    if words or not len(frame.columns):
        raise InputError(
            f"expected columns of numbers, got {', '.join(words) or 'none'}: leave them out "
            "(leave_out=), keep one as labels=, or code them, e.g. by pandas.get_dummies"
        )
    return np.asarray(frame.to_numpy(np.float64, na_value=np.nan), np.float32)


def read_table(
    table: Any, labels: str | None, leave_out: Sequence[str], given: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return the columns of a pandas table or a CSV file as ``x``, labels as ``y``, ``x:given``."""
    if not is_table(table):
        import pandas  # type: ignore[import-untyped, unused-ignore]

        with expecting(f"a CSV table in {table}", ValueError, OSError):
            table = pandas.read_csv(table)
    beside = [name for name in given if name in table or name != "labels"]
    wanted = [*leave_out, *([] if labels is None else [labels]), *beside]
    for name in wanted:
        if name not in table:
            raise InputError(f"expected a column {name!r}, got {', '.join(map(str, table))[:200]}")
    for name in beside if "labels" not in given else wanted[len(leave_out) :]:
        if empty := int(table[name].isna().sum()):
            raise InputError(f"expected {name!r} in each row, {empty} are without: leave them out")
    found = {} if labels is None else {"y": table[labels].to_numpy()}
    found |= {f"x:{name}": table[name].to_numpy() for name in beside}
    return {"x": table_values(table.drop(columns=list(dict.fromkeys(wanted)))), **found}
