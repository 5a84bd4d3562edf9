"""Checkpoints of a training run: when they are written, what they hold, and what signals do."""

import math
import random
import signal
import threading
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from pyro_vae.distributed import ALONE, Processes
from pyro_vae.errors import InputError, check_same, expecting, real_number, whole_number
from pyro_vae.files import check_in_place, expand_path, writing_to
from pyro_vae.infer.checkpoint_files import checkpoint_files, read_newest, write_checkpoint
from pyro_vae.infer.trainer import NotFiniteError, Trainer
from pyro_vae.infer.validation import EarlyStopping

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Rows = list[dict[str, float]]


class Interrupted(KeyboardInterrupt):
    """A run that was ended by SIGINT or SIGTERM, after its checkpoint was written.

    Attributes:
        number: the signal's number.
        folder: where the checkpoint is.
    """

    def __init__(self, number: int, folder: Path) -> None:
        what = f"interrupted by {signal.Signals(number).name}, its state is in {folder}"
        super().__init__(f"{what}: repeat the call with resume=True to continue")
        self.number, self.folder = number, folder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.number, self.folder)  # an exception is built again from its message


class Checkpoints:
    """The checkpoints of one run; without a folder none are read or written."""

    def __init__(
        self, folder: str | Path | None, every: int | None, minutes: float | None, *, resume: bool,
        processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        if every is not None:
            every = whole_number("checkpoint_every", every, least=1)
        if minutes is not None:
            minutes = real_number("checkpoint_minutes", minutes)
            if not 0 <= minutes < math.inf:
                raise InputError(f"expected checkpoint_minutes of at least 0, got {minutes}")
        if folder is None and resume:
            raise InputError("expected the folder of the checkpoints to resume from: checkpoint=")
        self.folder = None if folder is None else expand_path(folder).absolute()
        self.every, self.minutes, self.resume, self.processes = every, minutes, resume, processes
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._run: tuple[dict[str, Any], Trainer, EarlyStopping, _Rows] | None = None

    def __enter__(self) -> Self:
        """Prepare the folder and take notice of signals."""
        self._signal, self._written = None, time.monotonic()
        if self.folder is None:
            return self
        self.processes.decide(self._prepare)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: set by something that is not Python.
                handler = signal.getsignal(number) or signal.SIG_DFL
                if handler != signal.SIG_IGN:  # as of a script's job in the background
                    self._handlers[number] = handler
                    signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._restore_handlers()
        if self.folder is None:
            return
        if isinstance(error, NotFiniteError) and self._run is not None:
            self._keep_last_good(self._run[1], error)
        if isinstance(error, Interrupted) and error.folder != self.folder:
            self.finish()  # a fit inside of on_epoch has taken the signal
        if self.processes.is_first:
            with suppress(OSError):
                self.folder.rmdir()  # of a run that failed before its first checkpoint
        if error is None and (number := self._ask()[0]) is not None:
            raise Interrupted(number, self.folder)

    @cached_property
    def _newest(self) -> dict[str, Any] | None:
        folder = self.folder if self.resume else None
        return self.processes.decide(lambda: read_newest(folder) if folder else None)

    def kept(self, name: str) -> Any:
        """Return what the run to resume was begun with, by a setting's name; None without one."""
        return None if self._newest is None else self._newest["settings"].get(name)

    def begin(self, settings: Any, trainer: Trainer, best: EarlyStopping, rows: _Rows) -> None:
        """Take up the newest checkpoint if the run is resumed; say what the next ones hold."""
        found = self._newest
        del self._newest  # the state is large
        if (folder := self.folder) is None:
            return
        settings = {**settings, "number of processes": self.processes.size}
        self._run = (settings, trainer, best, rows)
        if found is None:
            return
        where, advice = f"the run in {folder}", "repeat its options or choose another folder"
        kept, own = (dict(sorted(each.items())) for each in (found["settings"], settings))
        self.processes.check_together(lambda: check_same(kept, own, where, advice))
        what = f"a checkpoint of this run in {self.folder} that fits"
        with expecting(what, LookupError, TypeError, ValueError, RuntimeError, AttributeError):
            state = found["state"]
            columns, history = state["columns"], state["history"].tolist()
            rows += [dict(zip(columns, row, strict=True)) for row in history]
            best.load_state_dict(state["best"])
            own = state["own"][self.processes.rank]
            trainer.load_state_dict({**state["steps"], "own": own["steps"]})
            _set_generator_states(own["generators"], trainer.device)

    def after_step(self, epoch: int | None = None) -> None:
        """Write if it is time to, by the epoch that has ended too; end the run if told to end it."""
        if self.folder is None:
            return
        number, is_time = self._ask()
        is_period = epoch is not None and self.every is not None and epoch % self.every == 0
        if number is not None or is_time or is_period:
            self._write()
        if number is not None:
            raise Interrupted(number, self.folder)

    def finish(self) -> None:
        """Write the end of the run, from which resuming takes no step more."""
        if self._run is not None and self._run[1].count:
            self._write()

    def _prepare(self) -> None:
        assert self.folder is not None
        if not self.resume and checkpoint_files(self.folder):
            wanted = "a folder without checkpoints"
            advice = "continue with resume=True, or choose another folder"
            raise InputError(f"expected {wanted}, {self.folder} holds some: {advice}")
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._begun = self.folder.stat()

    def _ask(self) -> tuple[int | None, bool]:
        """Return the signal that came to any process, and whether it is time to write."""
        is_time = self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes
        if not self.processes.are_several:
            return self._signal, is_time
        flags = [self._signal == number for number in _SIGNALS]
        asked = torch.tensor([*flags, is_time and self.processes.is_first], dtype=torch.int64)
        *came, time_came = self.processes.sum_(asked).tolist()
        signals = [number for number, count in zip(_SIGNALS, came, strict=True) if count]
        return (signals[0] if signals else None), time_came > 0

    def _keep_last_good(self, trainer: Trainer, error: NotFiniteError) -> None:
        """Write the state before the step that stopped the run, if there is one, and say where."""
        if trainer.count == trainer.skipped:
            return
        with suppress(InputError):
            self._write()
            which = "before it" if trainer.settings.skip_limit is None else "at the end of that epoch"
            error.args = (f"{error}; the state {which} is in {self.folder}",)

    def _write(self) -> None:
        assert self.folder is not None
        assert self._run is not None
        folder, (settings, trainer, best, rows) = self.folder, self._run
        columns = list(rows[0]) if rows else []
        history = [[row[name] for name in columns] for row in rows]
        shared = trainer.state_dict()
        own = {"steps": shared.pop("own"), "generators": _generator_states(trainer.device)}
        state = {
            "columns": columns,
            "history": torch.tensor(history, dtype=torch.float64).reshape(len(rows), len(columns)),
            "best": best.state_dict(),
            "steps": shared,
            "own": self.processes.gather(own),
        }

        def write() -> None:
            # Or the run that has come to its place would lose its checkpoints to this one's.
            check_in_place(folder, self._begun)
            write_checkpoint(folder, trainer.count, settings, state)

        self.processes.decide(write)
        self._written = time.monotonic()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._restore_handlers()
            raise KeyboardInterrupt(number)
        self._signal = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _generator_states(device: torch.device) -> dict[str, Any]:
    """Return the state of every random generator: Python's, NumPy's, torch's on CPU and device."""
    version, words, gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state()  # noqa: NPY002
    python = {"version": version, "words": torch.tensor(words), "gauss": gauss}
    kept = torch.from_numpy(np.asarray(numpy_words).astype(np.int64))
    numpy = {"words": kept, "position": int(position), "has_gauss": int(has_gauss)}
    numpy["gauss"] = numpy_gauss
    states = {"python": python, "numpy": numpy, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Take up the states of :func:`_generator_states`."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = numpy["words"].numpy().astype(np.uint32)
    state = ("MT19937", words, numpy["position"], numpy["has_gauss"], numpy["gauss"])
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
