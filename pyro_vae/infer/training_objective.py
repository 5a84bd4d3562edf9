"""What a training step computes: transform, bound per datum, norm of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.infer.analytic_kl import AnalyticKL
from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound, elbo_terms, recorded_traces, wide
from pyro_vae.infer.compiled import Compiled, CompiledTrace_ELBO
from pyro_vae.infer.program import Call
from pyro_vae.infer.settings import products_in
from pyro_vae.pair.inputs import Inputs, as_inputs
from pyro_vae.pair.sites import TracePair
from pyro_vae.pair.state import accumulating_leaves

# Pyro's objectives that a bound computes without reading values, so that its steps can be captured.
_BOUNDS: dict[type[ELBO], type[Bound]] = {
    Trace_ELBO: TraceBound,
    CompiledTrace_ELBO: TraceBound,
    TraceMeanField_ELBO: AnalyticKL,
}

_JIT = (JitTrace_ELBO, JitTraceMeanField_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO)


class StockBound(Bound):
    """Any ELBO of Pyro as a bound; rate and distortion are read from the traces it draws."""

    def __init__(self, objective: ELBO) -> None:
        super().__init__(num_particles=objective.num_particles)
        self.objective = objective

    @property
    def is_differentiable(self) -> bool:
        """Whether the objective gives a loss to differentiate, or only gradients."""
        return hasattr(self.objective, "differentiable_loss")

    def terms(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundTerms:
        """Draw once and return loss, surrogate, rate and distortion."""
        with recorded_traces(self.objective) as traces:
            if self.is_differentiable:
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
        log_probs = _log_probs(traces)
        surrogate = log_probs[0].new_zeros(())
        for leaf in accumulating_leaves(*log_probs):
            if leaf.grad is not None:
                surrogate = surrogate + (leaf * leaf.grad).sum()
                leaf.grad = None
        # Some (reweighted wake-sleep) have a loss for either function.
        total = sum(value) if isinstance(value, tuple) else value
        return torch.as_tensor(float(total), dtype=torch.float64, device=surrogate.device), surrogate


def bound_of(objective: ELBO | None) -> Bound:
    """Return the bound that an objective of :func:`pyro_vae.fit` stands for."""
    if objective is None:
        return TraceBound()
    if isinstance(objective, Bound):
        return objective
    if isinstance(objective, Compiled):
        return objective.objective
    _refuse_unusable(objective)
    if type(objective) in _BOUNDS:
        return _BOUNDS[type(objective)](
            num_particles=objective.num_particles,
            max_plate_nesting=objective.max_plate_nesting,
            vectorize_particles=objective.vectorize_particles,
        )
    return StockBound(objective)


def _refuse_unusable(objective: ELBO) -> None:
    """Refuse the ELBOs of Pyro that a training loop of batches can't take."""
    name = type(objective).__name__
    if isinstance(objective, TraceTailAdaptive_ELBO):
        raise InputError(f"expected an objective with a loss, got {name}, which has none: use IWAE")
    if isinstance(objective, _JIT):  # their graphs keep the first batch's shape and parameters
        raise InputError(
            f"expected an objective that fit captures itself, if it can, got {name}: use "
            f"{type(objective).__bases__[0].__name__}"
        )


class BoundPerDatum:
    """A bound's mean per datum of a batch, as one training step needs it.

    Args:
        bound: what is optimised.
        plate: name of the data plate; by how much it subsamples is taken out of the loss.
        transform: called with the batch; what it returns is given to both functions.
        gradient_clip: greatest global norm of the gradient that is handed over.
        precision: what layers multiply in.
        is_share: whether a batch is one process's share of it: the gradients are then left as they
            are, for only those of the whole batch can be clipped.
    """

    names: tuple[str, ...] = ("loss", "rate", "distortion", "gradient norm", "non-finite flag")

    def __init__(
        self,
        bound: Bound,
        *,
        plate: str = "data",
        transform: Callable[..., Any] | None = None,
        gradient_clip: float | None = None,
        precision: str = "float32",
        is_share: bool = False,
    ) -> None:
        self.bound, self.plate, self.transform = bound, plate, transform
        self.gradient_clip, self.precision, self.is_share = gradient_clip, precision, is_share
        # TF32 has the mantissa of float16. It and bfloat16 round differently from kernel to kernel.
        kinds = {"tf32": (torch.float16,), "bfloat16": (torch.bfloat16,)}
        self.rounding: tuple[torch.dtype, ...] = kinds.get(precision, ())

    def key(self) -> Hashable:
        """Nothing changes within a run."""
        return None

    def transformed(self, batch: Inputs) -> Inputs:
        """Return what the pair is given for a batch."""
        return batch if self.transform is None else as_inputs(self.transform(*batch))

    def terms(self, call: Call) -> BoundTerms:
        """Transform the batch; then as :meth:`of_batch`."""
        return self.of_batch(call._replace(args=self.transformed(call.args)))

    def reference(self, call: Call) -> BoundTerms:
        """The same, run eagerly."""
        return self.terms(call)

    def of_batch(self, call: Call) -> BoundTerms:
        """Return the bound summed over a batch, and as surrogate its mean per datum."""
        scale = _PlateScale(self.plate)
        with scale, products_in(self.precision):
            terms = self.bound.terms(*call)
        return terms._replace(
            loss=terms.loss / scale.value,
            surrogate=terms.surrogate / (len(call.args[0]) * scale.value),
        )

    def finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summary (see ``names``) and the gradients, clipped if asked for."""
        return finished(terms, gradients, None if self.is_share else self.gradient_clip)


def finished(
    terms: BoundTerms, gradients: Sequence[Tensor], gradient_clip: float | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the summary of a step and its gradients, clipped to a global norm if there is one."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([wide(norm) for norm in norms]))
    if gradient_clip is not None:
        # A gradient of exactly 0 divides to infinity, and is left as it is.
        factor = (gradient_clip / norm).clamp(max=1.0)
        gradients = [gradient * factor.to(gradient.dtype) for gradient in gradients]
    loss = wide(terms.loss)
    flag = wide(~(loss.isfinite() & norm.isfinite()))
    summary = [loss, wide(terms.rate), wide(terms.distortion), norm, flag]
    return torch.stack(summary), gradients


class _PlateScale(Messenger):
    """Finds by how much the data plate scales what is inside it, because it subsamples."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate, self.value = plate, 1.0

    def _pyro_sample(self, message: Any) -> None:
        for frame in message["cond_indep_stack"]:
            if frame.name == self.plate and frame.full_size and frame.full_size > 0:
                self.value = frame.full_size / frame.size


def _log_probs(traces: list[TracePair]) -> list[Tensor]:
    """Return the log-probabilities that an objective computed from its traces."""
    sites = (site for pair in traces for trace in pair for site in trace.nodes.values())
    return [site["log_prob"] for site in sites if isinstance(site.get("log_prob"), Tensor)]
