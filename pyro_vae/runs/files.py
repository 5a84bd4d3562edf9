"""The files of a run folder: JSON read strictly, and everything written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pyro_vae.errors import InputError, first_line
from pyro_vae.files import finite_or_none, write_whole

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "model.safetensors", "checkpoints"

# Of a folder of several runs: its settings, and where its runs are.
STUDY, RUNS = "study.json", "runs"

FORMAT = 1

# Settings are a few kilobytes; tensors among them some more. What is larger is no settings file.
_MOST_CONFIG_BYTES = 1 << 26


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a run's settings; refuse what is no JSON object of a known format."""
    path = own_file(folder, CONFIG)
    if path is None:
        raise InputError(
            f"expected a run folder at {folder}, found no {CONFIG} in it: check the path"
        )
    try:
        size = path.stat().st_size
        if size > _MOST_CONFIG_BYTES:
            raise InputError(
                f"expected at most {_MOST_CONFIG_BYTES:,} bytes of settings in {path}, got {size:,}"
            )
        config = _parse(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:  # lists in lists without end
        raise InputError(f"expected JSON in {path}, got: {first_line(error)}") from error
    _check_format(config, path)
    return config


def own_file(folder: str | Path, name: str) -> Path | None:
    """Return the path of a regular file of a run folder, or None; refuse a link out of it."""
    path = Path(folder) / name
    try:
        if not path.is_file():
            return None
        inside = os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder)
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise InputError(
            f"expected a run folder, got {str(folder)!r}: {first_line(error)}"
        ) from error
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
    raise InputError(
        f"expected {path.name} inside {path.parent}, got a link to {os.path.realpath(path)}: put "
        "itself there"
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; numbers that are not finite become null."""
    text = json.dumps(finite_or_none(content), indent=2, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def _parse(text: str) -> Any:
    """Read JSON; refuse what Python's reader accepts although it isn't, or what is said twice."""

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
        # No size, seed or count is longer; Python takes ever longer to read such numbers.
        if len(digits) > 20:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name}, which JSON has not")

    return json.loads(
        text, object_pairs_hook=no_twice, parse_float=number, parse_int=whole_number,
        parse_constant=no_constant,
    )  # fmt: skip


def _check_format(config: Any, path: Path) -> None:
    version = config.get("format") if isinstance(config, dict) else None
    # True is 1 to Python, and so is 1.0.
    if type(version) is not int or version != FORMAT:
        newer = type(version) is int and version > FORMAT
        advice = "it was written by a newer pyro_vae: update" if newer else "it is no run's"
        raise InputError(f"expected format {FORMAT} in {path}, got {_short(version)}: {advice}")
    if not isinstance(config.get("run", {}), dict):
        raise InputError(f"expected an object 'run' in {path}, got {_short(config['run'])}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
