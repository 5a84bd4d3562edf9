"""Steps captured once and compiled: objectives as drop-ins for Pyro's SVI, and the steps of fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import is_validation_enabled
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vae.beta import scale_pair
from pyro_vae.errors import InputError
from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound, elbo_terms, particle_options
from pyro_vae.infer.engine import Call, Engine, Step
from pyro_vae.infer.settings import FitSettings
from pyro_vae.infer.stock_bound import StockBound
from pyro_vae.infer.trainer import SUMMARY, TrainingObjective
from pyro_vae.pair.functions import PairFunction, modules_of
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.precision import ROUNDING
from pyro_vae.pair.state import Snapshot, with_submodules

# Steps from which on a run on a CPU is recorded, or compiled, unless told otherwise. Recording takes
# 1.2 s, its checks included, and saves 1 ms a step of a small net (64-512-256-8, batch 64); compiling
# takes 16 to 26 s of one core the first time, and saves 4 to 7 ms. Constants, and never a clock: the
# same call takes the same steps, bit for bit.
RECORDED_FROM_STEPS, COMPILED_FROM_STEPS = 1_500, 5_000
# How a run takes its steps, and what its checkpoint says of it.
_GEARS: dict[str, bool | str] = {"eager": False, "recorded": "recorded", "compiled": True}


class DeviceLoss(Tensor):
    """A loss still on its way: reading it waits for the device, and warns or raises as Pyro does."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    read: Callable[[], float]

    def item(self) -> float:
        """Read the loss."""
        return self.read()


class _Stepping(Engine):
    """The part of a compiled objective that takes steps."""

    def _scaled(self, model: Any, guide: Any) -> tuple[Any, Any]:
        """The pair under beta."""
        is_handler = isinstance(poutine.unwrap(guide), poutine.messenger.Messenger)
        if is_handler and self.beta != 1.0:
            raise InputError("beta needs a guide that is a function of its own, got a handler")
        return scale_pair(model, guide, self.beta)

    @property
    def validates(self) -> bool:  # type: ignore[override]
        """Whether Pyro would look at what is observed."""
        return is_validation_enabled()

    def _key(self) -> Hashable:
        return super()._key(), self.validates

    def _hand_over(self, step: Step) -> Any:
        """Add to the gradients as ``backward`` does and return the loss, as Pyro's own step."""
        summary, validate = step.summary, step.validate  # the gradients are not kept

        def read() -> float:
            loss, *outside = summary.tolist()
            if loss != loss or any(outside):
                validate()
            warn_if_nan(loss, "loss")
            return float(loss)

        is_on_cpu = step.program.device.type == "cpu"
        loss: Any = read() if is_on_cpu else summary[0].as_subclass(DeviceLoss)
        for leaf, gradient in zip(step.leaves, step.gradients, strict=True):
            if leaf.grad is None:
                leaf.grad = gradient
            else:
                with torch.no_grad():
                    leaf.grad.add_(gradient)
        if _PYRO_STACK:
            step.program.emit([handler.trace for handler in _PYRO_STACK])
        if not is_on_cpu:
            loss.read = read
        return loss


class CompiledTrace_ELBO(_Stepping, Trace_ELBO):  # noqa: N801 (Pyro's own naming)
    r"""Pyro's ``Trace_ELBO`` with the whole step, loss and gradients, captured once and compiled.

    .. math:: -L = E_q[\log q(z|x)^\beta - \log p(z)^\beta - \log p(x|z)]

    Use it wherever ``Trace_ELBO`` stands: ``SVI(model, guide, optim, CompiledTrace_ELBO())``.  The
    first call of :meth:`loss_and_grads` with a new signature (shapes, dtypes and devices of the
    tensors; values of other arguments; train and ``requires_grad`` flags; autocast, default dtype)
    is Pyro's own step.  It then captures the joint graph of (loss, gradients), compiles it, and
    holds it against Pyro's own loss and gradients on one generator state.  Later calls run the
    graph: they draw fresh noise from torch's generators, in Pyro's order, so a seed gives the same
    run compiled or not, to rounding.  The pair runs a few extra times in the capturing call;
    generators and module buffers are put back.

    A pair that can't be captured faithfully runs as stock Pyro, with one warning that says why:
    control flow on tensor values, a latent site that isn't reparameterised, enumeration, sparse
    gradients, sites that change, hooks on parameters, Python's or NumPy's global random numbers,
    handlers that stand around the step, a pair that counts its own runs or draws from a generator of
    its own.  Numbers, flags and other objects that the pair's code names (attributes, closures,
    globals, arguments) are read again at each step: a number that has changed becomes an input of
    the graph where it can, any other change is captured anew, for up to 4 values.  What can't be
    seen (files, counters inside other libraries) is baked in at capture; the graph is held against
    stock Pyro again at its steps 1, 2, 4, 8, ... and at every ``verify_every``-th.  While Pyro's
    validation is on, a batch outside the support of an observed site raises Pyro's own error: on the
    CPU before its gradients are handed over, on an accelerator when the loss is read, after the
    optimiser took the step.  A batch of another shape that comes once, such as the odd last one of
    an epoch, runs as stock Pyro; when it comes twice in a row it is captured too.  Only
    :meth:`loss_and_grads` is compiled; :meth:`loss` and :meth:`differentiable_loss` are Pyro's own,
    with ``beta`` applied.

    On the CPU the loss comes back as a float.  On an accelerator it is a 0-dim tensor, so that
    nothing waits before the optimiser is launched; ``SVI.step`` turns it into a float.

    Args:
        num_particles: samples per step.  Without ``vectorize_particles`` the graph is unrolled.
        max_plate_nesting: as in ``Trace_ELBO``.
        vectorize_particles: draw the particles in one outer plate.
        beta: weight of the latent sites' terms in model and guide, at least 0.  Assign the
            attribute ``beta`` to change it, every step if need be: it is an input of the graph.
        backend: ``"inductor"``, any other backend of ``torch.compile``, or ``"eager"`` to run the
            captured graph operator by operator, which needs no compiler.
        compile_after: steps of a graph on the CPU before inductor compiles it: as recorded it is
            faster than stock Pyro from the second step on, while compiling takes 10 to 30 s, which
            some thousand steps repay. 0 compiles at once, as on an accelerator in any case.
        mode: mode of ``torch.compile``; None takes ``"reduce-overhead"`` (CUDA graphs) where the
            parameters are on a CUDA device and ``"default"`` elsewhere.
        verify_every: repeat the comparison with stock Pyro every so many steps of a graph.
        options: the other options of ``Trace_ELBO``.

    Raises:
        InputError: if ``beta`` is negative or not finite, ``verify_every`` less than 1, or
            ``compile_after`` less than 0.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_vae.infer import FusedOptim
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     shift = pyro.param("shift", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(shift, 1.0))
        >>> elbo = CompiledTrace_ELBO(backend="eager")  # without: compiled by inductor
        >>> svi = pyro.infer.SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1e-3}), elbo)
        >>> losses = [svi.step(torch.ones(8)) for _ in range(3)]
        >>> elbo.num_graphs
        1
    """

    def __init__(
        self, num_particles: int = 1, max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False, *, beta: float = 1.0,
        backend: str | Callable[..., Any] = "inductor", compile_after: int = COMPILED_FROM_STEPS,
        mode: str | None = None, verify_every: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        options |= {"max_plate_nesting": max_plate_nesting}
        Trace_ELBO.__init__(self, num_particles, vectorize_particles=vectorize_particles, **options)
        how: Any = {"compile_after": compile_after, "mode": mode, "verify_every": verify_every}
        Engine.__init__(self, type(self).__name__, backend=backend, **how)
        self.beta = beta

    def bound(self) -> Bound:
        """Return the ELBO without reads of values, its options as they stand."""
        return TraceBound(**particle_options(self))

    def _standard_terms(self, call: Call) -> BoundTerms:
        """Return loss and surrogate by Pyro's own code."""
        stock, traces = Trace_ELBO(**particle_options(self)), []
        loss: Any = 0.0
        surrogate: Any = 0.0
        for pair in stock._get_traces(*call):
            value, term = stock._differentiable_loss_particle(*pair)
            loss = loss + value / stock.num_particles
            surrogate = surrogate + term / stock.num_particles
            traces.append(pair)
        rate, distortion = elbo_terms(traces, stock.num_particles)
        return BoundTerms(rate.new_tensor(loss), surrogate, rate, distortion)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        return super()._get_traces(*self._scaled(model, guide), args, kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Estimate the loss and add its gradient to the parameters' ``grad``.

        Returns:
            The negative ELBO in nats, summed over the batch (a float on the CPU, a 0-dim tensor on
            an accelerator).
        """
        stock, call = super().loss_and_grads, Call(model, guide, args, kwargs)
        return self.take(call, lambda: stock(model, guide, *args, **kwargs))


class Compiled(_Stepping, ELBO):
    """Any :class:`~pyro_vae.infer.bounds.Bound` with the whole step captured once and compiled.

    What :class:`CompiledTrace_ELBO` says of steps, refusals and what is baked in holds here too.
    The bound's own eager step is the standard that the graph is held against.

    Args:
        objective: the bound.
        beta: weight of the latent sites' terms, at least 0; assign the attribute to change it.
        backend: as in :class:`CompiledTrace_ELBO`.
        compile_after: as in :class:`CompiledTrace_ELBO`.
        mode: as in :class:`CompiledTrace_ELBO`.
        verify_every: repeat the comparison every so many steps of a graph.

    Raises:
        InputError: an objective that is no Bound, a ``beta`` that is negative or not finite, or
            ``verify_every`` or ``compile_after`` out of range.

    Example:
        >>> from pyro_vae.infer.bounds import TraceBound
        >>> Compiled(TraceBound(num_particles=2)).objective.num_particles
        2
    """

    def __init__(
        self, objective: Bound, *, beta: float = 1.0,
        backend: str | Callable[..., Any] = "inductor", compile_after: int = COMPILED_FROM_STEPS,
        mode: str | None = None, verify_every: int | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(objective, Bound):
            raise InputError(
                f"expected an objective of pyro_vae.infer, got {type(objective).__name__}: for "
                "Pyro's Trace_ELBO use CompiledTrace_ELBO"
            )
        ELBO.__init__(self, num_particles=objective.num_particles)
        name = f"Compiled({type(objective).__name__})"
        how: Any = {"compile_after": compile_after, "mode": mode, "verify_every": verify_every}
        Engine.__init__(self, name, backend=backend, **how)
        self.objective, self.beta = objective, beta

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(*self._scaled(model, guide), args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the negative bound, summed over the batch, in nats."""
        return self.objective.loss(*self._scaled(model, guide), *args, **kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a tensor with the value of the loss and the gradient of the surrogate."""
        return self.objective.differentiable_loss(*self._scaled(model, guide), *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Estimate the negative bound and add the gradient to the parameters' ``grad``.

        Returns:
            The negative bound in nats, summed over the batch (a float on the CPU, a 0-dim tensor on
            an accelerator).
        """
        eager, call = self.objective.loss_and_grads, Call(model, guide, args, kwargs)
        return self.take(call, lambda: eager(*self._scaled(model, guide), *args, **kwargs))


def uncompiled(objective: ELBO | None) -> tuple[ELBO | None, float]:
    """Return the objective behind a compiled one, and the beta that it has of its own."""
    if isinstance(objective, _Stepping):
        return objective.bound(), objective.beta
    return objective, 1.0


class StepCapture(Engine):
    """Takes the steps of a run by captured graphs, where its gear says so and it can be done."""

    names = SUMMARY
    keeps_outputs = False

    def __init__(
        self, objective: TrainingObjective, settings: FitSettings, *, device: torch.device,
        num_steps: int, begun: bool | str | None = None,
    ) -> None:  # fmt: skip
        given, compile = settings.objective, settings.compile
        options: dict[str, Any] = {}
        if isinstance(given, _Stepping):
            options = {name: getattr(given, name) for name in ("backend", "mode", "verify_every")}
        self.training_objective = objective
        self.rounding = ROUNDING.get(settings.precision, ())
        self.warns = compile is True or (compile == "auto" and isinstance(given, _Stepping))
        # The data were looked at before the run; what a transform makes of them was not.
        self.validates = device.type == "cpu" and objective.transform is not None
        self.gear, reason = "eager", " as asked"
        if isinstance(objective.bound, StockBound) and compile is not False:
            name, reads = type(objective.bound.objective).__name__, "reads values in Python"
            reason = f": {name} {reads}"
            if self.warns:  # the caller of fit
                warnings.warn(f"fit runs {name} eagerly: it {reads}", stacklevel=4)
        elif compile is not False:
            self.gear, reason = self._gear(device, num_steps, begun)
        self._choice = f"{self.gear}{reason}"
        if self.gear == "recorded":
            options["backend"] = "eager"
        super().__init__("fit", **options)

    def _gear(
        self, device: torch.device, num_steps: int, begun: bool | str | None
    ) -> tuple[str, str]:
        """Choose by the whole run's steps; one that is resumed goes on as it was ``begun``."""
        if self.warns:
            return "compiled", " as asked"
        gear, reason = "compiled", f": {num_steps} steps on {device.type}"
        if device.type == "cpu" and num_steps < COMPILED_FROM_STEPS:
            gear, what, least = "recorded", "compiling", COMPILED_FROM_STEPS
            if num_steps < RECORDED_FROM_STEPS:
                gear, what, least = "eager", "recording them", RECORDED_FROM_STEPS
            reason = f": {num_steps} steps, {what} pays from {least} on"
        other = [name for name, kept in _GEARS.items() if kept == begun != _GEARS[gear]]
        return (other[0], ": as the run was begun") if other else (gear, reason)

    @property
    def is_chosen(self) -> bool:
        """Whether steps are to be captured."""
        return self.gear != "eager"

    @property
    def record(self) -> bool | str:
        """What a checkpoint says of the gear."""
        return _GEARS[self.gear]

    @property
    def outcome(self) -> str:
        """The reason of the choice, and what became of it."""
        if not self.reasons:
            return self._choice
        after = "" if self.num_graphs else "eager after all: "
        return f"{self._choice}; {after}{'; '.join(self.reasons)}"

    def step(
        self, model: PairFunction, guide: PairFunction, batch: Inputs, beta: float,
        eager: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Leave the gradients with the parameters and return the summary, as ``eager`` does."""
        self.beta = beta
        call = Call(model, guide, batch, {})
        fresh = self.num_graphs == 0 and not self.reasons
        before = Snapshot(with_submodules(modules_of(model, guide))) if fresh else None
        summary: Tensor = self.take(call, eager)
        if before is not None and self.num_graphs:
            # The step that led to the capture is taken again by the graph, so that a run that is
            # resumed here takes the very steps of one that was never interrupted.
            before.restore()
            summary = self.take(call, eager)
        return summary

    def _hand_over(self, step: Step) -> Tensor:
        summary = step.summary[: len(self.names)]
        if self.validates and step.summary[-1]:
            step.validate()
        for leaf, gradient in zip(step.leaves, step.gradients, strict=True):
            leaf.grad = gradient
        return summary

    def _key(self) -> Hashable:
        return None  # nothing changes within a run

    def _roots(self) -> Sequence[Any]:
        return [self.training_objective.transform]

    def _terms(self, call: Call) -> BoundTerms:
        batch = self.training_objective.transform_batch(call.args)
        return self.training_objective.terms(call.model, call.guide, batch)

    def _finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.training_objective.finish(terms, gradients)
