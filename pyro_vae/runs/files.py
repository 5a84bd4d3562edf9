"""The files of a run folder: JSON read strictly, and everything written whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

from pyro_vae.errors import InputError, expecting
from pyro_vae.files import MOST_BYTES, parse_json, serialise, write_whole

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "model.safetensors", "checkpoints"
# Of a folder of several runs: its settings, and where its runs are.
STUDY, RUNS = "study.json", "runs"
FORMAT = 1


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a run's settings; refuse what is no JSON object of a known format."""
    config = read_json(folder, CONFIG)
    if config is None:
        found = f"found no {CONFIG} in it"
        raise InputError(f"expected a run folder at {folder}, {found}: check the path")
    path, version = Path(folder) / CONFIG, config.get("format") if isinstance(config, dict) else None
    # True is 1 to Python, and so is 1.0.
    if type(version) is not int or version != FORMAT:
        newer = type(version) is int and version > FORMAT
        advice = "it was written by a newer pyro_vae: update" if newer else "it is not from a run"
        raise InputError(f"expected format {FORMAT} in {path}, got {_short(version)}: {advice}")
    if not isinstance(config.get("run", {}), dict):
        raise InputError(f"expected an object 'run' in {path}, got {_short(config['run'])}")
    return config


def read_json(folder: str | Path, name: str) -> Any:
    """Read a file of a run folder as strict JSON; return None where there is none."""
    path = own_file(folder, name)
    if path is None:
        return None
    # A RecursionError: lists in lists without end.
    with expecting(f"JSON in {path}", ValueError, OSError, RecursionError), path.open("rb") as stream:
        found = parse_json(stream.read(MOST_BYTES + 1).decode())
    return {} if found is None else found


def check_schema(value: Any, kind: Any, place: str) -> None:
    """Refuse a JSON value that is not of a kind.

    A kind is a type or a union of types; a dict of kinds by name; a list of one kind for any number
    of values, or of several for as many.
    """
    fits, parts = isinstance(value, type(kind)), []
    if isinstance(kind, dict):
        parts = [(name, value.get(name, ...), each) for name, each in kind.items()] if fits else []
    elif isinstance(kind, list):
        kinds = kind * len(value) if fits and len(kind) == 1 else kind
        fits = fits and len(kinds) == len(value)
        pairs = zip(value, kinds, strict=True) if fits else ()
        parts = [(str(i), *pair) for i, pair in enumerate(pairs)]
    else:  # True is 1 to Python
        types = get_args(kind) or (kind,)
        fits = isinstance(value, kind) and (bool in types or not isinstance(value, bool))
    if not fits:
        raise InputError(f"expected another value as {place}, got {_short(value)}: it was changed")
    for name, part, each in parts:
        check_schema(part, each, f"{place}: {name}")


def own_file(folder: str | Path, name: str) -> Path | None:
    """Return the path of a regular file of a run folder, or None; refuse a link out of it."""
    path = Path(folder) / name
    # A name too long, or with a zero byte in it.
    with expecting(f"a run folder by the name {str(folder)!r}", OSError, ValueError):
        if not path.is_file():
            return None
        inside = os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder)
    if not inside:
        _refuse_link(path)
    return path


def own_folder(folder: Path, name: str) -> Path:
    """Return the path of a folder inside a run's, there or not; refuse a link to another one."""
    path = folder / name
    if path.is_symlink():
        _refuse_link(path)
    return path


def _refuse_link(path: Path) -> NoReturn:
    wanted = f"{path.name} inside {path.parent}"
    raise InputError(f"expected {wanted}, got a link to {os.path.realpath(path)}: put itself there")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; numbers that are not finite become null."""
    write_whole(path, serialise(content).encode())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
