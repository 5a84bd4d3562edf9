"""Files written whole or not at all: values as strict JSON has them, and a checksum of tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor

from pyro_vae.errors import InputError, first_line

# Begins the name of the file in which a file is written.
PART = ".part-"

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


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file by way of a temporary one, which takes its place when all is on the disk."""
    temporary = path.with_name(PART + path.name)
    try:
        # What a killed process left; or a link or a pipe put there, which is never written through.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                content(stream)
            stream.flush()
            os.fsync(stream.fileno())  # the name never precedes the content
        os.replace(temporary, path)
    except OSError as error:
        refuse_to_write(path, error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_regular(path: Path) -> bool:
    """Say whether there is a file itself, no link to one and nothing that reading could wait for."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def check_in_place(folder: Path, before: os.stat_result) -> None:
    """Refuse to write into a folder that has come to another's place since ``before`` was found."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(folder), before):
            return
    raise InputError(
        f"expected {folder} where the run began, it was moved, replaced or deleted since: go on with "
        "the run where it is now"
    )


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
