"""Options of a training run: one frozen object, checked once, and what they mean step by step."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim

from pyro_vae.beta import check_beta
from pyro_vae.errors import InputError, check_choice, first_line, positive_number, whole_number
from pyro_vae.infer.optim import optimizer_class
from pyro_vae.pair.precision import check_precision

Schedule = str | Callable[[float], float]


@dataclass(frozen=True)
class FitSettings:
    """The options of :func:`pyro_vae.fit` that decide a run; each is explained there.

    Numbers of NumPy and torch become Python's own.

    Raises:
        InputError: an option of another kind or out of range.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    parameter_groups: Mapping[str, Mapping[str, Any]] | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    ema: float | None = None
    objective: ELBO | None = None
    beta: float = 1.0
    warmup_epochs: int = 0
    patience: int | None = None
    schedule: Schedule = "constant"
    gradient_clip: float | None = None
    precision: str = "float32"
    compile: bool | str = "auto"
    on_nonfinite: str = "stop"
    nonfinite_limit: int = 20
    seed: int | None = None
    plate: str | None = "data"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "epochs": whole_number("epochs", self.epochs),
            "batch_size": whole_number("a batch size", self.batch_size, least=1, most=2**31 - 1),
            "learning_rate": positive_number("learning rate", self.learning_rate),
            "warmup_epochs": whole_number("warm-up epochs", self.warmup_epochs),
            "nonfinite_limit": whole_number("a nonfinite_limit", self.nonfinite_limit),
        }
        if self.patience is not None:
            checked["patience"] = whole_number("a patience", self.patience, least=1)
        if self.gradient_clip is not None:
            checked["gradient_clip"] = positive_number("gradient_clip", self.gradient_clip)
        if self.ema is not None:
            checked["ema"] = positive_number("ema", self.ema)
            if not checked["ema"] < 1:
                raise InputError(f"expected ema below 1, got {self.ema}: 0.999 is usual")
        if self.seed is not None:
            checked["seed"] = whole_number("a seed", self.seed, least=-(2**63))
            if not 0 <= checked["seed"] < 2**32:
                raise InputError(f"expected a seed from 0 to 2**32 - 1, got {checked['seed']}")
        check_beta(self.beta)
        checked["beta"] = float(self.beta)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        schedule = self.schedule
        if not callable(schedule) and not (isinstance(schedule, str) and schedule in _SCHEDULES):
            what = "a schedule constant, cosine or a function of the fraction"
            raise InputError(f"expected {what}, got {schedule!r}")
        self._check_optimizer()
        check_precision(self.precision)
        check_choice("compile as", self.compile, (True, False, "auto"))
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        if not isinstance(self.objective, ELBO | None):
            is_class = isinstance(self.objective, type) and issubclass(self.objective, ELBO)
            advice = f": pass an instance, {self.objective.__name__}(...)" if is_class else ""
            wanted = "an objective of pyro_vae.infer or an ELBO of Pyro"
            raise InputError(f"expected {wanted}, got {first_line(repr(self.objective))}{advice}")

    def _check_optimizer(self) -> None:
        check_callables(optimizer=self.optimizer, scheduler=self.scheduler)
        if isinstance(self.optimizer, PyroOptim):
            what = "optimizer as a class of torch.optim or a function from parameters to an optimiser"
            advice = "pass torch.optim.Adam itself"
            raise InputError(f"expected {what}, got Pyro's {type(self.optimizer).__name__}: {advice}")
        is_function = self.optimizer is not None and optimizer_class(self.optimizer) is None
        if is_function and self.learning_rate != FitSettings.learning_rate:
            wanted = "the learning rate inside the function given as optimizer"
            got = f"learning_rate={self.learning_rate} beside it"
            raise InputError(f"expected {wanted}, got {got}: leave it out")
        if self.scheduler is not None and self.schedule != "constant":
            raise InputError("expected a schedule or a scheduler, got both: leave one of them out")
        for pattern, options in as_dict("parameter_groups", self.parameter_groups).items():
            as_dict(f"the options of {pattern!r}", options)

    @property
    def skip_limit(self) -> int | None:
        """How many steps that are not finite may be left out; None stops at the first one."""
        return self.nonfinite_limit if self.on_nonfinite == "skip" else None

    def record(self) -> dict[str, Any]:
        """Return the plain options (not objective and compilation), by which a run is known again."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        del plain["objective"], plain["compile"]
        for name in ("optimizer", "parameter_groups", "scheduler"):
            plain[name] = _as_text(plain[name])
        return plain | {"schedule": "a function" if callable(self.schedule) else self.schedule}

    def multiplier_at(self, step: int, num_steps: int) -> float:
        """Return what the schedule multiplies the learning rate of a step by, counted from 0."""
        fraction = min(step / max(num_steps, 1), 1.0)
        schedule = self.schedule if callable(self.schedule) else _SCHEDULES[self.schedule]
        multiplier = float(schedule(fraction))
        if not 0 <= multiplier < math.inf:
            what = f"a finite multiplier of at least 0 from schedule({fraction:.4g})"
            raise InputError(f"expected {what}, got {multiplier}")
        return multiplier


def as_dict(option: str, value: object) -> dict[str, Any]:
    """Return options as a dict; refuse anything but a mapping."""
    if not isinstance(value, Mapping | None):
        raise InputError(f"expected {option} as a mapping from names, got {type(value).__name__}")
    return dict(value or {})


def _as_text(value: Any) -> str | None:
    """Return what a run is known by again: a function's name, a partial's options, plain values."""
    if isinstance(value, functools.partial):
        return f"{_as_text(value.func)} {_as_text(value.keywords)}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return json.dumps(value, default=lambda inner: type(inner).__name__) if value else None


def check_callables(**functions: object) -> None:
    """Refuse anything but a function, by the option's name; None stands for none."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise InputError(f"expected {name} as a function, got {type(function).__name__}")


# Steps of the shortest warm-up: eight epochs of the digits give up their latents without one, and use
# them after one of 84 steps.
_WARMUP_STEPS = 120


def default_warmup_epochs(epochs: int, num_steps_per_epoch: int) -> int:
    """Return a warm-up that keeps the latents in use: the epochs over which beta rises from 0."""
    return max(epochs // 10, min(epochs // 2, -(-_WARMUP_STEPS // num_steps_per_epoch)))


# Half a cosine from 1 down to 0: Loshchilov, Hutter 2017, equation 5, without restarts.
_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda _: 1.0}
_SCHEDULES["cosine"] = lambda fraction: 0.5 * (1 + math.cos(math.pi * fraction))
