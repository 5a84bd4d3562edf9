"""Files written whole or not at all: values as strict JSON has them, and a checksum of tensors."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_vae.errors import InputError, expecting, first_line

# Begins the name of the file in which a file is written.
PART = ".part-"
# What the reader of safetensors raises at bytes that are none.
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError)
# Settings are a few kilobytes; tensors among them some more. What is larger is no settings file.
MOST_BYTES = 1 << 26
# The entropy of NumPy's seeds has 39; Python takes ever longer to read longer numbers.
_MOST_DIGITS = 400


def finite_or_none(value: Any) -> Any:
    """Return plain JSON values, also of NumPy's numbers and torch's; None for what is not finite."""
    if isinstance(value, Mapping):
        plain = {str(name): finite_or_none(inner) for name, inner in value.items()}
        if len(plain) < len(value):
            raise ValueError("two names that are one as text")
        return plain
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def serialise(content: Mapping[str, Any]) -> str:
    """Return JSON that :func:`parse_json` reads; refuse what it would not read."""
    what = "numbers, text, lists and dicts of them, which can be read again"
    with expecting(what, TypeError, ValueError, RuntimeError):  # lists in themselves, or without end
        text = json.dumps(finite_or_none(content), indent=2, allow_nan=False) + "\n"
        parse_json(text)
    return text


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Read JSON; refuse what Python's reader accepts although it isn't, or what is said twice."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} bytes, of {MOST_BYTES:,} at most")

    def no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise ValueError("an object with a name twice")
        return members

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"a number that no float holds ({digits[:20]})")
        return value

    def whole_number(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"{name}, which is not JSON")
        return float(name)

    return json.loads(
        text, object_pairs_hook=no_twice, parse_float=number, parse_int=whole_number,
        parse_constant=constant,
    )  # fmt: skip


def expand_path(path: str | Path, *, kind: str = "folder") -> Path:
    """Return a path with its ``~`` as the home that is meant; ``kind`` is what a message calls it."""
    try:
        expanded = Path(path).expanduser()
        if kind == "folder":
            str(expanded).encode()  # safetensors opens no path that is not UTF-8
        return expanded
    except (TypeError, RuntimeError, UnicodeEncodeError) as error:
        shown = f"{first_line(repr(path))}: {first_line(error)}"
        raise InputError(f"expected the path of a {kind}, got {shown}") from error


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file by way of a temporary one, which takes its place when all is on the disk."""
    temporary = path.with_name(PART + path.name)
    try:
        with writing_to(path):
            # What a killed process left; or a link or pipe put there, which is never written through.
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as stream:
                if isinstance(content, bytes):
                    stream.write(content)
                else:
                    content(stream)
                stream.flush()
                os.fsync(stream.fileno())  # the name never precedes the content
            os.replace(temporary, path)
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
    wanted, advice = f"{folder} where the run began", "resume the run where it is now"
    raise InputError(f"expected {wanted}, it was moved, replaced or deleted since: {advice}")


def writing_to(path: Path, *more: type[Exception]) -> AbstractContextManager[None]:
    """Turn what the system says of a path into the one error of this package."""
    advice = "make room or choose another folder"
    return expecting(f"to write {str(path)!r}", OSError, *more, advice=advice)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata; may raise UNREADABLE."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def checksum_of(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a description and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name!r} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
