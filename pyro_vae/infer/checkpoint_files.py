"""Checkpoint files: plain values and tensors in one file each, written whole, the last two kept."""

import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialise
from torch import Tensor

from pyro_vae.errors import InputError, expecting, first_line
from pyro_vae.files import UNREADABLE, checksum_of, is_regular, parse_json, read_tensors, write_whole

_FORMAT = 1
_ENTRY = "checkpoint"  # one entry alone: the order of several would differ from process to process
_NAME = re.compile(r"step-(\d{10})\.safetensors")
_KEPT = 2
_TENSOR = "__tensor__"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last."""
    with expecting(f"a folder for checkpoints at {folder}", OSError, advice="choose another"):
        found = folder.iterdir() if folder.exists() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name))


def write_checkpoint(folder: Path, count: int, settings: Any, state: Mapping[str, Any]) -> None:
    """Write the checkpoint after this many steps; of the earlier ones keep the last."""
    tensors: dict[str, Tensor] = {}
    content = {"format": _FORMAT, "settings": settings, "state": _pack(state, tensors)}
    content["checksum"] = checksum_of(content, tensors)
    path = folder / f"step-{count:010d}.safetensors"
    write_whole(path, serialise(tensors, metadata={_ENTRY: json.dumps(content)}))
    paths = checkpoint_files(folder)
    # On a GPU a run may find only later that it went wrong here; what came after is void then.
    position = paths.index(path) + 1
    for other in [*paths[: max(position - _KEPT, 0)], *paths[position:]]:
        with suppress(OSError):
            other.unlink()


def read_newest(folder: Path) -> dict[str, Any] | None:
    """Return settings and state of the newest checkpoint that can be read, or None without any."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoint_files(folder)):
        found = _read(path)
        if isinstance(found, str):
            damaged[path] = found
            continue
        for other, reason in damaged.items():
            warnings.warn(
                f"the checkpoint {other} can't be read ({reason}): the one before is taken",
                stacklevel=8,  # the caller of fit
            )
            with suppress(OSError):
                other.unlink()  # or it would pass for the newest again
        return found
    if damaged:
        wanted = f"a checkpoint in {folder} that can be read"
        got = f"{len(damaged)} damaged ones (the newest: {next(iter(damaged.values()))})"
        raise InputError(f"expected {wanted}, got {got}: start again in another folder")
    return None


def _read(path: Path) -> dict[str, Any] | str:
    """Return settings and state, or why the file is not a checkpoint that was written."""
    try:
        if not is_regular(path):
            return "it is no file of its own"
        tensors, metadata = read_tensors(path)
        content = parse_json(metadata[_ENTRY], finite=False)
        if type(content["format"]) is int and content["format"] > _FORMAT:
            got = f"{content['format']}: it was written by a newer pyro_vae"
            raise InputError(f"expected format {_FORMAT} in {path}, got {got}: update")
        written = content.pop("checksum")
        if content["format"] != _FORMAT or written != checksum_of(content, tensors):
            return "its checksum is another"
        return {"settings": dict(content["settings"]), "state": _unpack(content["state"], tensors)}
    except InputError:
        raise
    except (*UNREADABLE, RecursionError) as error:
        return first_line(error)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return plain values in which each tensor is named, and collect the tensors."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {name: _pack(inner, tensors) for name, inner in value.items()}
    return [_pack(inner, tensors) for inner in value] if isinstance(value, list | tuple) else value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {name: _unpack(inner, tensors) for name, inner in value.items()}
    return [_unpack(inner, tensors) for inner in value] if isinstance(value, list) else value
