"""The bound that an objective of ``fit`` stands for: one of this package, by name too, or Pyro's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import infer
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.errors import InputError, check_name
from pyro_vae.infer.analytic_kl import AnalyticKL, DefaultBound, FreeBits
from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound, elbo_terms, particle_options, wide
from pyro_vae.infer.iwae import IWAE
from pyro_vae.infer.sticking_the_landing import StickingTheLanding
from pyro_vae.pair.sites import TracePair
from pyro_vae.pair.state import accumulating_leaves

OBJECTIVES: dict[str, Callable[..., Bound]] = {
    "elbo": TraceBound, "analytic-kl": AnalyticKL, "sticking-the-landing": StickingTheLanding,
    "free-bits": FreeBits, "iwae": IWAE,
}  # fmt: skip
# Pyro's objectives that a bound computes without reading values, so that its steps can be captured.
_BOUNDS = {infer.Trace_ELBO: TraceBound, infer.TraceMeanField_ELBO: AnalyticKL}
# What a first step may find out and note.
_FOUND_OUT = ("max_plate_nesting", "is_analytic")
_JIT = tuple(getattr(infer, f"JitTrace{kind}_ELBO") for kind in ("", "MeanField", "Graph", "Enum"))


class StockBound(Bound):
    """Any ELBO of Pyro as a bound; rate and distortion are read from the traces it draws."""

    def __init__(self, objective: ELBO) -> None:
        super().__init__(num_particles=objective.num_particles)
        self.objective = objective
        self.sums_out = isinstance(objective, infer.TraceEnum_ELBO)

    def terms(self, model: Any, guide: Any, args: Any, kwargs: Any) -> BoundTerms:
        """Draw once and return loss, surrogate, rate and distortion."""
        with _record_traces(self.objective) as traces:
            if hasattr(self.objective, "differentiable_loss"):
                surrogate = self.objective.differentiable_loss(model, guide, *args, **kwargs)
                loss = surrogate.detach()
            else:
                loss, surrogate = self._from_gradients(traces, model, guide, args, kwargs)
        rate, distortion = elbo_terms(traces, self.num_particles)
        return BoundTerms(wide(loss), surrogate, rate, distortion)

    def _from_gradients(
        self, traces: list[TracePair], model: Any, guide: Any, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and a tensor whose gradient is the one the objective has computed."""
        value = self.objective.loss_and_grads(model, guide, *args, **kwargs)
        sites = (site for pair in traces for trace in pair for site in trace.nodes.values())
        log_probs = [site["log_prob"] for site in sites if isinstance(site.get("log_prob"), Tensor)]
        surrogate = log_probs[0].new_zeros(())
        for leaf in accumulating_leaves(*log_probs):
            if leaf.grad is not None:
                surrogate = surrogate + (leaf * leaf.grad).sum()
                leaf.grad = None
        # Some (reweighted wake-sleep) have a loss for either function.
        total = sum(value) if isinstance(value, tuple) else value
        return torch.as_tensor(float(total), dtype=torch.float64, device=surrogate.device), surrogate


@contextmanager
def _record_traces(objective: ELBO) -> Iterator[list[TracePair]]:
    """Collect the (model, guide) traces that a Pyro ELBO draws, so that nothing is run twice."""
    traces: list[TracePair] = []
    draw = objective._get_trace

    def recording(*args: Any, **kwargs: Any) -> TracePair:
        traces.append(draw(*args, **kwargs))
        return traces[-1]

    objective._get_trace = recording
    try:
        yield traces
    finally:
        del objective._get_trace


def bound_of(objective: ELBO | None) -> Bound:
    """Return the bound that an objective stands for; without one the default ELBO."""
    if objective is None:
        return DefaultBound()
    if isinstance(objective, Bound):
        return objective
    name = type(objective).__name__
    if isinstance(objective, infer.TraceTailAdaptive_ELBO):
        raise InputError(f"expected an objective with a loss, got {name}, which has none: use IWAE")
    if isinstance(objective, _JIT):  # their graphs keep the first batch's shape and parameters
        wanted = "an objective that fit captures itself, if it can"
        advice = f"use {type(objective).__bases__[0].__name__}"
        raise InputError(f"expected {wanted}, got {name}: {advice}")
    if type(objective) in _BOUNDS:
        return _BOUNDS[type(objective)](**particle_options(objective))
    return StockBound(objective)


def name_of(bound: Bound) -> str:
    """Return a bound's class and its plain options, by which another one is told."""
    objective = bound.objective if isinstance(bound, StockBound) else bound
    known = {name: vars(objective)[name] for name in sorted(vars(objective).keys() - _FOUND_OUT)}
    options = [f"{k}={v}" for k, v in known.items() if isinstance(v, bool | int | float | str)]
    return f"{type(objective).__name__}({', '.join(options)})"


def default_particles(name: str) -> int:
    """Return the draws of a step: 5 for IWAE, the smaller number of Burda et al. 2016, else 1."""
    return 5 if name == "iwae" else 1


def objective_named(name: str, num_particles: int | None = None, **options: Any) -> Bound:
    """Return an objective by its name."""
    check_name("objective", name, OBJECTIVES)
    if name == "free-bits" and "floor" not in options:
        wanted = "how many nats cost nothing with the objective 'free-bits'"
        raise InputError(f"expected {wanted}, got none: pass pyro_vae.infer.FreeBits(floor)")
    return OBJECTIVES[name](num_particles=num_particles or default_particles(name), **options)
