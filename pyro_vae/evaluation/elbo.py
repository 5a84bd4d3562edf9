"""ELBO, importance-weighted bound, rate and distortion per datum, each with its standard error."""

import math
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.distributions.kl import closed_form_kl
from pyro_vae.pair.opened import OpenedPair, Progress
from pyro_vae.pair.sites import TracePair, data_dim, latent_sites, sample_sites, sum_to
from pyro_vae.weights.particles import LogDensities, Particles, check_weights


class PerDatum(NamedTuple):
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
    """What draws of the guide give: the quantities that :class:`Measured` explains."""

    elbo: PerDatum
    iwae: PerDatum
    rate: PerDatum
    distortion: PerDatum
    exact_kl: bool


def measure_bounds(
    pair: OpenedPair, *, num_samples: int, num_importance: int = 50, max_memory: int | None = None,
    progress: Progress | None = None,
) -> Bounds:  # fmt: skip
    """Measure the bounds of an open pair; draws are rounded up to a multiple of ``num_importance``.

    Where the KL has a closed form the distortion is minus the mean log weight minus that KL: the mean
    log weight varies least, not at all where q is the posterior.

    Source:
        Burda, Grosse, Salakhutdinov 2016, "Importance Weighted Autoencoders", equation 8.
    """
    # One group has no spread: a standard error takes two.
    how = max(2, -(-num_samples // num_importance)), num_importance, pair.memory(max_memory)
    parts = [_measure_block(Particles(part), *how) for _, part in pair.blocks(progress=progress)]
    *columns, exact = zip(*parts, strict=True)
    found: Any = (PerDatum(*map(torch.cat, zip(*column, strict=True))) for column in columns)
    return Bounds._make([*found, all(exact)])


def single_latent(trace: Trace) -> dict[str, Any] | None:
    """Return the one latent site of a trace, or None where there are several."""
    sites = latent_sites(trace)
    return sites[0] if len(sites) == 1 else None


def _measure_block(particles: Particles, num_groups: int, num_importance: int, budget: int) -> Bounds:
    moments = {name: Moments() for name in ("elbo", "iwae", "rate", "distortion")}
    at_once = max(1, budget // (particles.pair.structure.bytes_per_datum * particles.num_data))
    for _ in range(num_groups):
        starts = range(0, num_importance, at_once)
        chunks = [particles.draw(min(at_once, num_importance - start)) for start in starts]
        densities = LogDensities(*(torch.cat(terms) for terms in zip(*chunks, strict=True)))
        check_weights(densities)
        log_weights = densities.log_weights
        moments["elbo"].add(log_weights)
        moments["iwae"].add(log_weights.logsumexp(0, keepdim=True) - math.log(num_importance))
        moments["rate"].add(densities.log_proposal - densities.log_prior)
        moments["distortion"].add(-densities.log_likelihood)
    means = {name: (each.mean(), each.standard_error()) for name, each in moments.items()}
    measured = {name: PerDatum(*map(Tensor.cpu, both)) for name, both in means.items()}
    kl = _exact_kl(particles.pair.trace(), particles.pair.plate)
    if kl is not None:
        kl, elbo = kl.cpu(), measured["elbo"]
        measured["rate"] = PerDatum(kl, torch.zeros_like(kl))
        measured["distortion"] = PerDatum(-elbo.value - kl, elbo.standard_error)
    return Bounds(**measured, exact_kl=kl is not None)


class Moments:
    """Mean of rows that stream by, its standard error and the rows' variance, in float64."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add ``(K, ...)``."""
        rows = rows.double()
        if not self.count:
            # Sums of deviations from a first guess lose no digits to the mean's size.
            first = rows.mean(0)
            self.shift = torch.where(first.isfinite(), first, 0.0)
            self.sum, self.sum_squares = torch.zeros_like(first), torch.zeros_like(first)
        deviation = rows - self.shift
        self.sum = self.sum + deviation.sum(0)
        self.sum_squares = self.sum_squares + deviation.square().sum(0)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """Return the mean, of one row's shape."""
        return self.shift + self.sum / self.count

    def variance(self) -> Tensor:
        """Return the unbiased variance; NaN of a single row."""
        spread = (self.sum_squares / self.count - (self.sum / self.count).square()).clamp(min=0)
        return spread * self.count / (self.count - 1) if self.count > 1 else spread * math.nan

    def standard_error(self) -> Tensor:
        """Return the standard error of the mean; infinite where the mean is."""
        return torch.where(self.sum.isfinite(), (self.variance() / self.count).sqrt(), math.inf)


def _exact_kl(traces: TracePair, plate: str | None) -> Tensor | None:
    """Return KL(q || p(z)) per datum of a pair with one latent where it has a closed form."""
    prior, posterior = map(single_latent, traces)  # of several, one's prior depends on another's draw
    if prior is None or posterior is None or len(sample_sites(traces[1])) > 1:
        return None
    if prior["mask"] is not None or posterior["mask"] is not None:
        return None
    kl = closed_form_kl(posterior["fn"], prior["fn"])
    return None if kl is None else sum_to(kl, (data_dim(posterior, plate),))
