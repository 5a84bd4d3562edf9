"""Callbacks: they watch a training run from outside, and may end it."""

from collections.abc import Callable
from typing import Any

import torch

from pyro_vae.distributed import Processes
from pyro_vae.errors import InputError, whole_number

_METHODS = ("on_begin", "on_step", "on_epoch", "on_end")


class Callback:
    """Watches a run of :func:`pyro_vae.fit`: derive from it, or give an object some of its methods.

    Metrics are plain numbers, per datum and in nats where they are bounds. Under ``ema`` the pair has
    its averaged parameters in ``on_epoch``.

    Attributes:
        every: steps from one ``on_step`` to the next; each of them waits for the device.
    """

    every: int = 1

    def on_begin(self, options: dict[str, Any]) -> None:
        """Handle the start of a run, new or resumed, with its options as plain values."""

    def on_step(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Handle a step, from 1; return True to end the run after it.

        ``metrics`` are ``train_bound``, ``train_elbo``, ``train_rate`` and ``train_distortion`` of
        the batch, ``gradient_norm``, ``learning_rate``, and ``beta`` of the coming step.
        """

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> bool | None:
        """Handle an epoch, from 1, with its row of the history; return True to end the run."""

    def on_end(self, result: Any) -> None:
        """Handle the end of the run, with its :class:`pyro_vae.FitResult`."""


class Callbacks:
    """The callbacks of one run, called in their order; what one of them ends, all processes end."""

    def __init__(self, callbacks: Any, processes: Processes) -> None:
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
        self.callbacks, self.processes, self.end_run = given, processes, False
        for each in self.callbacks:
            whole_number("every of a callback", getattr(each, "every", 1), least=1)
            if isinstance(each, type) or not any(hasattr(each, name) for name in _METHODS):
                wanted = f"callbacks as objects with {' or '.join(_METHODS)}"
                advice = "pass a function of epochs as on_epoch="
                raise InputError(f"expected {wanted}, got {each!r}: {advice}")

    def tell(self, method: str, *values: Any) -> None:
        """Call a method of all callbacks that have it."""
        found = [each for each in self.callbacks if hasattr(each, method)]
        answers = [getattr(each, method)(*values) for each in found]
        self._end_if(answers if method == "on_epoch" else [])

    def after_step(self, step: int, read: Callable[[], dict[str, float]]) -> None:
        """Tell of a step; its metrics are read only if somebody wants to know."""
        found = [each for each in self.callbacks if hasattr(each, "on_step")]
        if due := [each for each in found if step % getattr(each, "every", 1) == 0]:
            metrics = read()
            self._end_if([each.on_step(step, metrics) for each in due])

    def _end_if(self, answers: list[Any]) -> None:
        if answers:
            self.end_run |= bool(self.processes.sum_(torch.tensor(float(any(answers)))) > 0)
