"""Files written whole or not at all: values as strict JSON has them, and a checksum of tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor

from pyro_vae.errors import InputError, first_line

# What the reader of safetensors raises at bytes that are none.
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError)


def finite_or_none(value: Any) -> Any:
    """Return plain JSON values with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(name): finite_or_none(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def expand_path(path: str | Path, *, kind: str = "folder") -> Path:
    """Return a path with its ``~`` as the home that is meant; ``kind`` is what a message calls it."""
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"expected the path of a {kind}, got {first_line(repr(path))}: {first_line(error)}"
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with the path of a temporary file that takes the file's place when done."""
    # The temporary name keeps the suffix, by which a picture's format is chosen.
    temporary = path.with_name(f".part-{path.name}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        refuse_to_write(path, error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def refuse_to_write(path: Path, error: OSError | ValueError) -> NoReturn:
    """Turn what the system says of a path into the one error of this package."""
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    raise InputError(
        f"expected to write {str(path)!r}, got: {reason}; make room or choose another folder"
    ) from error


def checksum_of(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a description and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name!r} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's content is on the disk, so that the name never precedes it."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
