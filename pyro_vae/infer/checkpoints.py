"""Checkpoints of a training run: all that its coming steps depend on, in files written whole."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from pyro_vae.errors import InputError, first_line
from pyro_vae.infer.bounds import Bound
from pyro_vae.infer.files import UNREADABLE, checksum_of, refuse_to_write, write_whole
from pyro_vae.infer.pair import Inputs
from pyro_vae.infer.per_datum import StockBound
from pyro_vae.infer.steps import Steps
from pyro_vae.infer.validation import EarlyStopping

__all__ = ["Checkpoints", "Interrupted", "bound_named", "checkpoint_files", "data_checksum"]

_FORMAT = 1
_ENTRY = "checkpoint"  # one entry alone: the order of several would differ from process to process
_NAME = re.compile(r"step-(\d{10})\.safetensors")
_KEPT = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TENSOR = "__tensor__"


_Run = tuple[dict[str, Any], Steps, EarlyStopping, list[dict[str, float]]]


class Interrupted(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended, after its checkpoint was written.

    Attributes:
        number: the signal's number.
        folder: where the checkpoint is.
    """

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(
            f"interrupted by {signal.Signals(number).name}, its state is in {folder}: repeat the "
            "call with resume=True to go on"
        )
        self.number, self.folder = number, folder


class Checkpoints:
    """The checkpoints of one run; without a folder none are read or written.

    Inside the context, and in the main thread, SIGINT and SIGTERM are noted, and end the run at the
    next step's boundary, when its state is on the disk; a second one ends it at once.

    Args:
        folder: created if missing.
        every: epochs after which one is written; None: not by epochs.
        minutes: after which one is written at the next step's boundary, 0 after every step; None: not
            by time.
        resume: go on from the newest one, or start where there is none.

    Raises:
        InputError: a period out of range, a folder that can't be written, or one that holds
            checkpoints where ``resume`` is not set.
    """

    def __init__(
        self, folder: str | Path | None, *, every: int | None, minutes: float | None, resume: bool
    ) -> None:
        if every is not None and every < 1:
            raise InputError(f"expected checkpoint_every of at least 1 epoch, got {every}")
        if minutes is not None and not 0 <= minutes < math.inf:
            raise InputError(f"expected checkpoint_minutes of at least 0, got {minutes}")
        if folder is None and resume:
            raise InputError("expected the folder of the checkpoints to resume from: checkpoint=")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.every, self.minutes, self.resume = every, minutes, resume
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._run: _Run | None = None
        if self.folder is not None and not resume and checkpoint_files(self.folder):
            raise InputError(
                f"expected a folder without checkpoints, {self.folder} holds some: resume=True goes "
                "on from them, or choose another folder"
            )

    # --- the run ---

    def __enter__(self) -> Checkpoints:
        self._signal, self._written = None, time.monotonic()
        if self.folder is None:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse_to_write(self.folder, error)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: set by something that is not Python.
                self._handlers[number] = signal.getsignal(number) or signal.SIG_DFL
                signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._restore_handlers()
        if self.folder is None:
            return
        # A run that stops on numbers gone wrong leaves its last good state; one that does so in its
        # first epoch has none worth keeping.
        if isinstance(error, InputError) and self._run is not None and self._run[3]:
            with suppress(InputError):
                self._write()
        with suppress(OSError):
            self.folder.rmdir()  # of a run that failed before its first checkpoint
        if error is None and self._signal is not None:
            raise Interrupted(self._signal, self.folder)

    def begin(
        self,
        settings: Mapping[str, Any],
        steps: Steps,
        best: EarlyStopping,
        rows: list[dict[str, float]],
        batch: Inputs,
    ) -> None:
        """Take up the newest checkpoint if the run is resumed; say what the next ones hold.

        Args:
            settings: plain values that decide the run; those of the checkpoint must be the same.
            steps: takes the gradient steps.
            best: early stopping.
            rows: metrics of the epochs that have ended.
            batch: data on which the pair may be run to find its parameters.

        Raises:
            InputError: a checkpoint of another run, or none that can be read.

        Warns:
            UserWarning: the newest one can't be read, and the one before is taken.
        """
        if self.folder is None:
            return
        plain = json.loads(json.dumps(dict(settings), default=str))  # as they are when read
        self._run = (plain, steps, best, rows)
        found = _newest(self.folder) if self.resume else None
        if found is None:
            return
        _refuse_other(plain, found["settings"], self.folder)
        try:
            state = found["state"]
            rows += [
                dict(zip(state["columns"], row, strict=True)) for row in state["history"].tolist()
            ]
            best.load_state_dict(state["best"])
            steps.resume(state["steps"], batch)
            _set_generators(state["generators"], steps.device)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(
                f"expected a checkpoint of this run in {self.folder}, got one that does not fit: "
                f"{first_line(error)}"
            ) from error

    def after_step(self) -> None:
        """Write if it is time to, and end the run if it was told to end.

        Raises:
            Interrupted: the run was told to end; its state is on the disk.
        """
        if self.folder is None:
            return
        if self._signal is not None:
            self._write()
            raise Interrupted(self._signal, self.folder)
        if self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes:
            self._write()

    def after_epoch(self, epoch: int) -> None:
        """Write where the period in epochs says so; then as :meth:`after_step`."""
        if self.folder is not None and self.every is not None and epoch % self.every == 0:
            self._write()
        self.after_step()

    def finish(self) -> None:
        """Write the end of the run, from which resuming takes no step more."""
        if self.folder is not None and self._run is not None and self._run[1].count:
            self._write()

    # --- inside ---

    def _write(self) -> None:
        assert self.folder is not None
        assert self._run is not None
        settings, steps, best, rows = self._run
        columns = list(rows[0]) if rows else []
        history = [[row[name] for name in columns] for row in rows]
        state = {
            "columns": columns,
            "history": torch.tensor(history, dtype=torch.float64).reshape(len(rows), len(columns)),
            "best": best.state_dict(),
            "steps": steps.state_dict(),
            "generators": _generators(steps.device),
        }
        tensors: dict[str, Tensor] = {}
        content = {"format": _FORMAT, "settings": settings, "state": _packed(state, tensors)}
        content["checksum"] = checksum_of(content, tensors)
        file = serialised(tensors, metadata={_ENTRY: json.dumps(content)})
        path = self.folder / f"step-{steps.count:010d}.safetensors"
        write_whole(path, lambda temporary: temporary.write_bytes(file))
        for old in checkpoint_files(self.folder)[:-_KEPT]:
            with suppress(OSError):
                old.unlink()
        self._written = time.monotonic()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._restore_handlers()
            raise KeyboardInterrupt
        self._signal = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last."""
    try:
        names = sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(
            f"expected a folder for checkpoints, got {folder}: {error.strerror}; choose another"
        ) from error
    return [folder / name for name in names]


# --- what decides a run ---


def bound_named(bound: Bound) -> str:
    """Return a bound's class and its plain options, by which another one is told."""
    objective = bound.objective if isinstance(bound, StockBound) else bound
    # A first step may find out the nesting of the plates and note it.
    options = {
        name: value
        for name, value in sorted(vars(objective).items())
        if isinstance(value, bool | int | float | str) and name != "max_plate_nesting"
    }
    return f"{type(objective).__name__}({', '.join(f'{k}={v}' for k, v in options.items())})"


def data_checksum(train: Inputs, validation: Inputs | None) -> str:
    """Return the SHA-256 of the data's types, shapes and bytes."""
    tensors = {f"train {i}": value.cpu() for i, value in enumerate(train)}
    tensors |= {f"validation {i}": value.cpu() for i, value in enumerate(validation or ())}
    return checksum_of("", tensors)


def _refuse_other(settings: Mapping[str, Any], kept: Mapping[str, Any], folder: Path) -> None:
    for name in sorted(settings.keys() | kept.keys()):
        if settings.get(name) != kept.get(name):
            shown = name.replace("_", " ")
            raise InputError(
                f"expected {shown} {kept.get(name)!r} as the run in {folder} was begun with, got "
                f"{settings.get(name)!r}: repeat its options or choose another folder"
            )


# --- files ---


class _DamagedError(Exception):
    """A file that is no checkpoint, or no longer the one that was written."""


def _newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint that can be read; those after it are taken away."""
    paths = checkpoint_files(folder)
    damaged: list[Path] = []
    for path in reversed(paths):
        try:
            found = _read(path)
        except _DamagedError as error:
            warnings.warn(
                f"the checkpoint {path} can't be read ({first_line(error)}): the one before is taken",
                stacklevel=4,
            )
            damaged.append(path)
            continue
        for other in damaged:  # or it would pass for the newest again
            other.unlink(missing_ok=True)
        return found
    if damaged:
        raise InputError(
            f"expected a checkpoint in {folder} that can be read, got {len(damaged)} damaged ones: "
            "start again in another folder"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink():
            raise _DamagedError("it is a link")
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if type(content["format"]) is int and content["format"] > _FORMAT:
            raise InputError(
                f"expected format {_FORMAT} in {path}, got {content['format']}: it was written by a "
                "newer pyro_vae: update"
            )
        written = content.pop("checksum")
        if content["format"] != _FORMAT or written != checksum_of(content, tensors):
            raise _DamagedError("its checksum is another")
        return {"settings": dict(content["settings"]), "state": _unpacked(content["state"], tensors)}
    except InputError:
        raise
    except (*UNREADABLE, RecursionError) as error:
        raise _DamagedError(first_line(error)) from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return plain values in which each tensor is named, and collect the tensors."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {name: _packed(inner, tensors) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(inner, tensors) for inner in value]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {name: _unpacked(inner, tensors) for name, inner in value.items()}
    return [_unpacked(inner, tensors) for inner in value] if isinstance(value, list) else value


# --- generators ---


def _generators(device: torch.device) -> dict[str, Any]:
    """Return the state of every random generator: Python's, NumPy's, torch's on CPU and device."""
    version, words, gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state()  # noqa: NPY002
    states = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(np.asarray(numpy_words).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(numpy_gauss),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, Any], device: torch.device) -> None:
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = numpy["words"].numpy().astype(np.uint32)
    state = ("MT19937", words, numpy["position"], numpy["has_gauss"], numpy["gauss"])
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
