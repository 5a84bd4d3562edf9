"""What a captured step computes: a bound as it is, or Pyro's own Trace_ELBO."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound, elbo_terms
from pyro_vae.infer.program import Call


class Estimator(Protocol):
    """What is captured: a bound, and what of it and of its gradients is handed over."""

    names: tuple[str, ...]  # of the summary's entries, for messages
    rounding: tuple[torch.dtype, ...]  # precisions computed in besides that of the gradients

    def key(self) -> Hashable:
        """Settings that a graph depends on."""

    def terms(self, call: Call) -> BoundTerms:
        """The bound, without reading any value in Python."""

    def reference(self, call: Call) -> BoundTerms:
        """The same by the code that is the standard."""

    def finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the step's summary (one vector) and the gradients to be handed over."""


class BoundEstimator:
    """A bound as it is: (loss, rate, distortion) and the gradient of the sum over the batch."""

    names: tuple[str, ...] = ("loss", "rate", "distortion")
    rounding: tuple[torch.dtype, ...] = ()

    def __init__(self, bound: Bound) -> None:
        self.bound = bound

    def key(self) -> Hashable:
        """The bound's plain attributes: a changed one asks for a graph of its own."""
        plain = (bool, int, float, str, type(None))
        return tuple((k, v) for k, v in vars(self.bound).items() if isinstance(v, plain))

    def terms(self, call: Call) -> BoundTerms:
        """The bound's own terms."""
        return self.bound.terms(call.model, call.guide, call.args, call.kwargs)

    def reference(self, call: Call) -> BoundTerms:
        """The bound's own terms, run eagerly."""
        return self.terms(call)

    def finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return loss, rate and distortion; the gradients as they are."""
        return torch.stack([terms.loss, terms.rate, terms.distortion]), gradients


class TraceEstimator(BoundEstimator):
    """A ``Trace_ELBO``, held against Pyro's own code."""

    def __init__(self, elbo: Trace_ELBO) -> None:
        self.elbo = elbo

    def _options(self) -> dict[str, Any]:
        names = ("num_particles", "max_plate_nesting", "vectorize_particles")
        return {name: getattr(self.elbo, name) for name in names}

    def key(self) -> Hashable:
        """Number and arrangement of the particles."""
        return tuple(self._options().values())

    def terms(self, call: Call) -> BoundTerms:
        """The same ELBO without reads of values."""
        return TraceBound(**self._options()).terms(*call)

    def reference(self, call: Call) -> BoundTerms:
        """Loss and surrogate by Pyro's own code."""
        stock, traces = Trace_ELBO(**self._options()), []
        loss: Any = 0.0
        surrogate: Any = 0.0
        for pair in stock._get_traces(*call):
            value, term = stock._differentiable_loss_particle(*pair)
            loss = loss + value / stock.num_particles
            surrogate = surrogate + term / stock.num_particles
            traces.append(pair)
        rate, distortion = elbo_terms(traces, stock.num_particles)
        return BoundTerms(rate.new_tensor(loss), surrogate, rate, distortion)
