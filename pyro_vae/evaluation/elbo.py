"""ELBO, importance-weighted bound, rate and distortion per datum, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.distributions.kl import closed_form_kl
from pyro_vae.evaluation.blocks import block_scorers, memory_budget
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import TracePair, data_dim, latent_sites, sample_sites, sum_to
from pyro_vae.weights.particles import LogDensities, PairScorer, check_weights

# Data that share one pass of the guide.
_BLOCK = 1024


@dataclass(frozen=True)
class PerDatum:
    """One quantity per datum with its Monte Carlo standard error, both ``(N,)``, nats, on the CPU."""

    value: Tensor
    standard_error: Tensor

    @property
    def mean(self) -> float:
        """Mean over the data."""
        return self.value.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """Monte Carlo standard error of :attr:`mean`, the data held fixed."""
        return self.standard_error.square().sum().sqrt().item() / len(self.standard_error)

    @property
    def data_standard_error(self) -> float:
        """Standard error of :attr:`mean` over the data's distribution; NaN for a single datum."""
        if len(self.value) < 2:
            return math.nan
        return self.value.std().item() / math.sqrt(len(self.value))


class Bounds(NamedTuple):
    """What the draws of a guide say of the pair.

    Attributes:
        elbo: evidence lower bound, the mean log weight; it is minus rate minus distortion.
        iwae: importance-weighted bound of ``num_importance`` draws.
        rate: KL(q(z|x) || p(z)).
        distortion: -E_q[log p(x|z)].
        exact_kl: whether the rate is in closed form; otherwise it is Monte Carlo.
    """

    elbo: PerDatum
    iwae: PerDatum
    rate: PerDatum
    distortion: PerDatum
    exact_kl: bool


def measure_bounds(
    model: PairFunction,
    guide: PairFunction,
    inputs: Inputs,
    *,
    num_samples: int,
    num_importance: int = 50,
    plate: str = "data",
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bounds:
    """Measure the bounds from draws of the guide; the caller holds lock, mode, seed and no_grad.

    Where the KL has a closed form the distortion is minus the mean log weight minus that KL: the mean
    log weight varies least, not at all where q is the posterior.

    Args:
        model: the generative function of the pair.
        guide: its variational function.
        inputs: the pair's inputs.
        num_samples: draws per datum, rounded up to a multiple of ``num_importance``.
        num_importance: draws in one importance-weighted bound, k.
        plate: name of the data plate.
        max_memory: bytes that a chunk may need.
        progress: called with (data done, N).

    Source:
        Burda, Grosse, Salakhutdinov 2016, "Importance Weighted Autoencoders", equation 8.
    """
    budget = max_memory or memory_budget(inputs[0].device)
    # One group has no spread: a standard error takes two.
    num_groups = max(2, -(-num_samples // num_importance))
    parts: list[Bounds] = []
    for _, scorer in block_scorers(model, guide, inputs, plate, _BLOCK, progress):
        parts.append(_measure_block(scorer, num_groups, num_importance, budget))
    elbo, iwae, rate, distortion = (
        PerDatum(
            torch.cat([quantity.value for quantity in column]),
            torch.cat([quantity.standard_error for quantity in column]),
        )
        for column in zip(*(part[:4] for part in parts), strict=True)
    )
    exact = all(part.exact_kl for part in parts)
    return Bounds(elbo, iwae, rate, distortion, exact_kl=exact)


def single_latent(trace: Trace) -> dict[str, Any] | None:
    """Return the one latent site of a trace, or None where there are several."""
    sites = latent_sites(trace)
    return sites[0] if len(sites) == 1 else None


def _measure_block(scorer: PairScorer, num_groups: int, num_importance: int, budget: int) -> Bounds:
    moments = {name: _Moments() for name in ("elbo", "iwae", "rate", "distortion")}
    at_once = max(1, budget // (scorer.bytes_per_datum * scorer.num_data))
    for _ in range(num_groups):
        chunks = [
            scorer.draw(min(at_once, num_importance - first))
            for first in range(0, num_importance, at_once)
        ]
        scores = LogDensities(*(torch.cat(terms) for terms in zip(*chunks, strict=True)))
        check_weights(scores)
        moments["elbo"].add(scores.log_weights)
        bound = scores.log_weights.logsumexp(0) - math.log(num_importance)
        moments["iwae"].add(bound[None])
        moments["rate"].add(scores.log_proposal - scores.log_prior)
        moments["distortion"].add(-scores.log_likelihood)
    measured = {name: moment.result() for name, moment in moments.items()}
    kl = _exact_kl(scorer.traces(), scorer.plate)
    if kl is not None:
        kl = kl.cpu()
        elbo = measured["elbo"]
        measured["rate"] = PerDatum(kl, torch.zeros_like(kl))
        measured["distortion"] = PerDatum(-elbo.value - kl, elbo.standard_error)
    return Bounds(**measured, exact_kl=kl is not None)


class _Moments:
    """Mean of rows that stream by and its standard error."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add ``(K, N)``."""
        if not self.count:
            # Sums of deviations from a first guess lose no digits to the mean's size.
            first = rows.mean(0)
            self.shift = torch.where(first.isfinite(), first, 0.0)
            self.sum, self.sum_squares = torch.zeros_like(first), torch.zeros_like(first)
        deviation = rows - self.shift
        self.sum = self.sum + deviation.sum(0)
        self.sum_squares = self.sum_squares + deviation.square().sum(0)
        self.count += len(rows)

    def result(self) -> PerDatum:
        """Return mean and standard error, ``(N,)`` each; infinite error where the mean is."""
        mean = self.sum / self.count
        variance = (self.sum_squares / self.count - mean.square()).clamp(min=0) / (self.count - 1)
        error = torch.where(mean.isfinite(), variance.sqrt(), math.inf)
        return PerDatum((self.shift + mean).cpu(), error.cpu())


def _exact_kl(traces: TracePair, plate: str) -> Tensor | None:
    """Return KL(q || p(z)) per datum where it has a closed form, else None.

    Only for a pair with one latent: with several, the prior of one depends on draws of another.
    """
    model_trace, guide_trace = traces
    prior, posterior = single_latent(model_trace), single_latent(guide_trace)
    if prior is None or posterior is None or len(sample_sites(guide_trace)) > 1:
        return None
    if prior["mask"] is not None or posterior["mask"] is not None:
        return None
    kl = closed_form_kl(posterior["fn"], prior["fn"])
    return None if kl is None else sum_to(kl, (data_dim(posterior, plate),))
