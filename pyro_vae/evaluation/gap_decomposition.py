"""The inference gap of a pair, split into what the family and what the encoder loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts, check_optional_counts, real_number
from pyro_vae.evaluation.elbo import PerDatum, measure_bounds
from pyro_vae.evaluation.estimate import LogMarginal, warn_if_unreliable
from pyro_vae.evaluation.importance_sampling import ImportanceOptions, estimate_log_prob
from pyro_vae.evaluation.semi_amortized import Refinement, family_of
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import Progress, open_pair


@dataclass(frozen=True)
class InferenceGaps:
    """log p(x) - ELBO per datum, split in two (nats, float64, on the CPU, ``(N,)`` each).

    The standard errors are Monte Carlo. A gap may come out slightly below 0 within its error.

    Attributes:
        log_prob: estimate of log p(x), with ``log_prob_standard_error``.
        elbo: the bound with the guide as it is, with ``elbo_standard_error``.
        best_elbo: the bound with the best member of the family found for each datum, with
            ``best_elbo_standard_error``.
        refined_guide: that best member as a guide for exactly these data, e.g. as the proposal of
            ``log_marginal(model, gaps.refined_guide, x)``.
        log_marginal: the estimate that ``log_prob`` comes from, with its diagnostics.
        num_steps: optimisation steps taken (the largest number over the blocks of data).
        converged: whether the stopping rule, and not ``max_steps``, ended the optimisation.
    """

    log_prob: Tensor
    log_prob_standard_error: Tensor
    elbo: Tensor
    elbo_standard_error: Tensor
    best_elbo: Tensor
    best_elbo_standard_error: Tensor
    refined_guide: PairFunction = field(repr=False)
    log_marginal: LogMarginal = field(repr=False)
    num_steps: int
    converged: bool

    @property
    def total(self) -> Tensor:
        """The whole gap: log p(x) - ELBO = KL(q(z|x) || p(z|x))."""
        return self.log_prob - self.elbo

    @property
    def total_standard_error(self) -> Tensor:
        """Standard error of :attr:`total`."""
        return torch.hypot(self.log_prob_standard_error, self.elbo_standard_error)

    @property
    def approximation(self) -> Tensor:
        """What the family can't express: log p(x) - best ELBO."""
        return self.log_prob - self.best_elbo

    @property
    def approximation_standard_error(self) -> Tensor:
        """Standard error of :attr:`approximation`."""
        return torch.hypot(self.log_prob_standard_error, self.best_elbo_standard_error)

    @property
    def amortization(self) -> Tensor:
        """The encoder's shortfall: best ELBO - ELBO."""
        return self.best_elbo - self.elbo

    @property
    def amortization_standard_error(self) -> Tensor:
        """Standard error of :attr:`amortization`."""
        return torch.hypot(self.best_elbo_standard_error, self.elbo_standard_error)

    def __str__(self) -> str:
        parts = []
        for name in ("total", "approximation", "amortization"):
            gap = PerDatum(getattr(self, name), getattr(self, f"{name}_standard_error"))
            parts.append(f"{name} {gap.mean:.3f} +- {gap.mean_standard_error:.3f}")
        ended = "converged" if self.converged else "stopped at max_steps, not converged"
        return (
            f"inference gap of {len(self.log_prob)} data, mean in nats with Monte Carlo standard "
            f"error: {', '.join(parts)} ({self.num_steps} steps, {ended})"
        )


def inference_gaps(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    family: Any = None,
    num_samples: int = 1000,
    num_importance_samples: int = 5000,
    num_optimization_samples: int = 32,
    max_steps: int = 3000,
    tolerance: float = 1.0,
    estimate: LogMarginal | None = None,
    max_memory: int | None = None,
    plate: str = "data",
    seed: int | None = None,
    progress: Progress | None = None,
) -> InferenceGaps:
    r"""Split log p(x) - ELBO into the family's part and the encoder's.

    .. math:: \log p(x) - L(q) = [\log p(x) - L(q^*)] + [L(q^*) - L(q)],
        \quad q^* = \arg\max_{q \in Q} L(q)

    The first bracket is the approximation gap, the second the amortisation gap. The best member q* is
    found for each datum by Adam on what the family's ``encode`` gave, from the encoder's output on,
    with fresh reparameterised draws in every step. The learning rate falls each time the mean
    objective rises, from one window of steps to the next, by less than ``tolerance`` of that rise's
    standard error; the last window's average is kept. A datum whose refined q is not better than its
    encoder's keeps the latter. All reported values come from draws that chose nothing.

    What a family shares between data (the layers of a flow) stays as trained: q* is then the best
    member given the shared part, and the approximation gap that of the flow as trained. The search is
    local: the true approximation gap can only be smaller.

    Args:
        model: the generative function of the pair.
        guide: its variational function, with one latent site.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        family: object with ``encode(*x)`` (a dict of unconstrained per-datum tensors) and
            ``distribution(parameters)`` that the guide draws from; by default the
            ``variational_family`` of the VAE whose method the guide is.
        num_samples: draws per datum for each of the two ELBOs.
        num_importance_samples: draws per datum for log p(x); the refined q is the proposal.
        num_optimization_samples: draws per datum and step.
        max_steps: optimisation steps from which on the search goes no further; it looks every 50
            steps, and 50 more (250 where it has converged) make the average that is kept.
        tolerance: share of a standard error below which a window's improvement counts as none.
        estimate: an estimate of log p(x) to use instead, e.g. an annealed one of the same data.
        max_memory: bytes that the draws of a step may need.
        plate: name of the data plate.
        seed: seed of all draws; the generators' state is restored afterwards.
        progress: called with (data refined, N).

    Raises:
        InputError: a guide without that split, with several latent sites or without reparameterised
            draws, a family that is not the guide's, an estimate of other data, or an option out of
            range.

    Source:
        Cremer, Li, Duvenaud 2018, "Inference Suboptimality in Variational Autoencoders", section 3.
    """
    check_counts(
        num_samples=num_samples,
        num_importance_samples=num_importance_samples,
        num_optimization_samples=num_optimization_samples,
        max_steps=max_steps,
    )
    if not 0 < real_number("tolerance", tolerance) < math.inf:
        raise InputError(f"expected a tolerance above 0, got {tolerance}")
    check_optional_counts(max_memory=max_memory)
    check_callables(progress=progress)
    pair = open_pair(model, guide, x, plate=plate)
    if estimate is not None:
        _check_estimate(estimate, pair.num_data)
    family = family_of(guide, family)
    search = Refinement(pair, family, num_optimization_samples, max_steps, tolerance)
    with pair.evaluating(seed, family):
        refined, num_steps, converged = search.run(max_memory, progress)
        elbo, best = (
            measure_bounds(each, num_samples=num_samples, max_memory=max_memory).elbo
            for each in (pair, refined)
        )
        if estimate is None:
            options = ImportanceOptions(num_importance_samples)
            estimate = estimate_log_prob(refined, options, max_memory=max_memory)
            warn_if_unreliable(estimate, stacklevel=2)
    return InferenceGaps(
        estimate.log_prob,
        estimate.standard_error,
        elbo.value,
        elbo.standard_error,
        best.value,
        best.standard_error,
        refined.guide,
        estimate,
        num_steps,
        converged,
    )


def _check_estimate(estimate: Any, num_data: int) -> None:
    if not isinstance(estimate, LogMarginal):
        raise InputError(
            "expected an estimate as pyro_vae.log_marginal returns it, got "
            f"{type(estimate).__name__}: leave it out to have one made"
        )
    if len(estimate.log_prob) != num_data:
        raise InputError(
            f"expected an estimate of the {num_data} data, got one of {len(estimate.log_prob)}: pass "
            "that of the same x"
        )
