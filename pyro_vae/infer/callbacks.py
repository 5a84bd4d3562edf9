"""What watches a run of training from outside, and may end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_vae.distributed import Processes
from pyro_vae.errors import InputError, whole_number

_METHODS = ("on_begin", "on_step", "on_epoch", "on_end")


class Callback:
    """Watches a run of :func:`pyro_vae.fit`: derive from it, or give an object some of its methods.

    Metrics are plain numbers, per datum and in nats where they are bounds. With ``ema`` the pair has
    its averaged parameters in ``on_epoch``, as in validation.

    Attributes:
        every: steps from one call of ``on_step`` to the next; each of these waits for the device.

    Example:
        >>> import torch, pyro_vae as pv
        >>> class UntilRate(pv.infer.Callback):
        ...     every = 2
        ...     def on_step(self, step, metrics):
        ...         return metrics["train_rate"] > 3.0
        >>> family = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((4,), (8,)), 2)
        >>> likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (4,))
        >>> vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, family)
        >>> x = torch.ones(16, 4)
        >>> pv.fit(vae.model, vae.guide, x, epochs=2, callbacks=[UntilRate()], seed=0).stopped_early
        False
    """

    every: int = 1

    def on_begin(self, options: dict[str, Any]) -> None:
        """Take notice of a run that begins or is resumed; its options are plain values by name."""

    def on_step(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Take notice of a step, counted from 1 over the whole run; True ends the run behind it.

        ``metrics`` has ``train_bound``, ``train_elbo``, ``train_rate`` and ``train_distortion`` of
        its batch, ``gradient_norm``, ``learning_rate``, and ``beta`` of the coming step.
        """

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> bool | None:
        """Take notice of an epoch, from 1, and its row of the history; True ends the run."""

    def on_end(self, result: Any) -> None:
        """Take notice of the :class:`pyro_vae.FitResult` of a run that came to its end."""


class Callbacks:
    """The callbacks of one run, called in their order; what one of them ends, all processes end."""

    def __init__(
        self, callbacks: Any, on_epoch: Callable[..., Any] | None, processes: Processes
    ) -> None:
        if not isinstance(callbacks, list | tuple):
            raise InputError(
                f"expected callbacks as a list, got {type(callbacks).__name__}: write [callback]"
            )
        for callback in callbacks:
            if isinstance(callback, type) or not any(hasattr(callback, name) for name in _METHODS):
                what = callback.__name__ if isinstance(callback, type) else type(callback).__name__
                raise InputError(
                    f"expected callbacks with {', '.join(_METHODS[:-1])} or {_METHODS[-1]}, got "
                    f"{what}: pass an object, or a function of epochs as on_epoch="
                )
            whole_number("every of a callback", getattr(callback, "every", 1), least=1)
        self.callbacks: Sequence[Any] = callbacks
        self._on_epoch, self.processes = on_epoch, processes
        self.end_run = False

    def begin(self, options: dict[str, Any]) -> None:
        """Tell of the run."""
        for callback in self._with("on_begin"):
            callback.on_begin(dict(options))

    def after_step(self, step: int, read: Callable[[], dict[str, float]]) -> None:
        """Tell of a step, whose metrics are read only if somebody wants to know."""
        due = [each for each in self._with("on_step") if step % getattr(each, "every", 1) == 0]
        if due:
            metrics = read()
            self._take([callback.on_step(step, dict(metrics)) for callback in due])

    def after_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Tell of an epoch."""
        if self._on_epoch is not None:
            self._on_epoch(epoch, row)
        self._take([each.on_epoch(epoch, dict(row)) for each in self._with("on_epoch")])

    def end(self, result: Any) -> None:
        """Tell of what the run has come to."""
        for callback in self._with("on_end"):
            callback.on_end(result)

    def _with(self, method: str) -> list[Any]:
        return [callback for callback in self.callbacks if hasattr(callback, method)]

    def _take(self, answers: list[Any]) -> None:
        if answers:
            votes = torch.tensor(float(any(answers)))
            self.end_run |= bool(self.processes.sum_(votes) > 0)
