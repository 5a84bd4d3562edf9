"""Two checks by simulation: data drawn in place of the data, and the aggregate posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.latent_codes import label_dimensions
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import open_pair
from pyro_vae.pair.sites import observed_site, value_axis
from pyro_vae.weights.particles import Particles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistic = Callable[[Tensor], Tensor]

_STATISTICS: dict[str, Statistic] = {
    "mean": lambda values: values.reshape(len(values), -1).mean(1),
    "standard deviation": lambda values: values.reshape(len(values), -1).std(1, correction=0),
}


@dataclass(frozen=True)
class PosteriorPredictive:
    """Statistics of the data beside those of data drawn from the posterior predictive.

    Attributes:
        observed: by statistic, its value for each datum, ``(N,)``.
        replicated: by statistic, its values for the data drawn in their place, ``(S, N)``.
    """

    observed: dict[str, Tensor]
    replicated: dict[str, Tensor] = field(repr=False)

    @property
    def p_value(self) -> dict[str, Tensor]:
        """By statistic, the share of drawn values at or above the datum's, ``(N,)``; ties by half.

        Near 0 or 1 for data that the model can't make. The guide has seen the datum, so for a good
        model the values crowd around 1/2 rather than being uniform.
        """
        shares = {}
        for name, observed in self.observed.items():
            above = (self.replicated[name] > observed).double().mean(0)
            equal = (self.replicated[name] == observed).double().mean(0)
            shares[name] = above + equal / 2
        return shares

    @property
    def overall_p_value(self) -> dict[str, float]:
        """By statistic, the share of whole drawn data sets whose mean is above the data's."""
        shares = {}
        for name, observed in self.observed.items():
            means = self.replicated[name].mean(1)
            above = (means > observed.mean()).double() + (means == observed.mean()).double() / 2
            shares[name] = above.mean().item()
        return shares

    def plot(self) -> Figure:
        """Show each statistic over the data and over the data drawn in their place."""
        from pyro_vae import plots

        overall = self.overall_p_value
        return plots.observed_and_replicated(
            {name: value.numpy() for name, value in self.observed.items()},
            {name: value.numpy() for name, value in self.replicated.items()},
            [f"{name}  p = {overall[name]:.2f}" for name in self.observed],
            title="posterior predictive check",
        )


def posterior_predictive(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    statistics: Mapping[str, Statistic] | None = None,
    num_draws: int = 100,
    observed: str | None = None,
    plate: str = "data",
    seed: int | None = None,
) -> PosteriorPredictive:
    """Draw latents given each datum, new data given these, and compare statistics of both.

    Args:
        model: the generative function of the pair.
        guide: its variational function, taken for the posterior.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        statistics: by name, functions from data ``(N, ...)`` to one number each, ``(N,)``; by default
            the mean and the standard deviation over the values of a datum.
        num_draws: data drawn in place of each datum, S.
        observed: name of the observed site; needed where the model has several.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.

    Raises:
        InputError: several observed sites without a name, no site of that name, no statistic, one of
            another shape, a number of draws below 1, or a pair that can't be weighed.

    Source:
        Gelman, Meng, Stern 1996, "Posterior Predictive Assessment of Model Fitness via Realized
        Discrepancies", section 2.
    """
    check_counts(num_draws=num_draws)
    statistics = _STATISTICS if statistics is None else statistics
    if not statistics:
        raise InputError("expected at least one statistic, got none: leave it out for the default")
    pair = open_pair(model, guide, x, plate=plate)
    seen: dict[str, list[Tensor]] = {name: [] for name in statistics}
    drawn: dict[str, list[Tensor]] = {name: [] for name in statistics}
    with pair.evaluating(seed):
        for _, part in pair.blocks():
            replicated: dict[str, list[Tensor]] = {name: [] for name in statistics}
            for _ in range(num_draws):
                trace, _ = part.trace()
                site = trace.nodes[observed_site(trace, observed)]
                axis = value_axis(site, plate)
                new = site["fn"].sample().movedim(axis, 0).double()
                for name, statistic in statistics.items():
                    replicated[name].append(_compute(name, statistic, new))
            values = site["value"].movedim(axis, 0).double()
            for name, statistic in statistics.items():
                seen[name].append(_compute(name, statistic, values))
                drawn[name].append(torch.stack(replicated[name]))
    return PosteriorPredictive(
        {name: torch.cat(parts) for name, parts in seen.items()},
        {name: torch.cat(parts, dim=1) for name, parts in drawn.items()},
    )


def _compute(name: str, statistic: Statistic, values: Tensor) -> Tensor:
    """Return a statistic of data ``(N, ...)``, ``(N,)``; refuse one of another shape."""
    found = statistic(values)
    if not isinstance(found, Tensor) or found.shape != values.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"expected statistic {name!r} to give one number per datum, shape ({len(values)},), got "
            f"{got}: leave the first dimension alone"
        )
    return found.cpu()


@dataclass(frozen=True)
class AggregatePosterior:
    """Draws of the guide over the data beside draws of the prior.

    Attributes:
        draws: aggregate posterior, ``(S, D)``, all latent sites side by side.
        prior: as many draws of the prior, ``(S, D)``.
        labels: a name for each dimension.
    """

    draws: Tensor = field(repr=False)
    prior: Tensor = field(repr=False)
    labels: list[str]

    @property
    def statistic(self) -> Tensor:
        """Kolmogorov-Smirnov distance of each dimension, ``(D,)``: 0 where they agree, at most 1."""
        return self._tests()[0]

    @property
    def p_value(self) -> Tensor:
        """Chance of such a distance between draws of one distribution, ``(D,)``."""
        return self._tests()[1]

    def _tests(self) -> Tensor:
        from scipy.stats import ks_2samp

        results = [
            ks_2samp(mine, theirs)
            for mine, theirs in zip(self.draws.T.numpy(), self.prior.T.numpy(), strict=True)
        ]
        return torch.tensor([[result.statistic, result.pvalue] for result in results]).T

    def plot(self) -> Figure:
        """Show both distributions, one panel per dimension."""
        from pyro_vae import plots

        labels = [
            f"{label}  KS distance {distance:.2f}"
            for label, distance in zip(self.labels, self.statistic.tolist(), strict=True)
        ]
        return plots.prior_and_aggregate(
            self.draws.numpy(), self.prior.numpy(), labels, title="aggregate posterior and prior"
        )


def aggregate_posterior(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_draws: int = 1,
    plate: str = "data",
    seed: int | None = None,
) -> AggregatePosterior:
    """Compare the guide's draws over all data with the prior, dimension by dimension.

    A model generates from its prior; where the aggregate posterior is elsewhere, it generates what it
    was never trained to decode. Agreement of the dimensions one by one is necessary, not sufficient.

    Args:
        model: the generative function of the pair.
        guide: its variational function.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        num_draws: draws per datum. Several of one datum are no independent draws of the aggregate,
            and make the p-values too small.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.

    Raises:
        InputError: a number of draws below 1, or a pair that can't be weighed.

    Source:
        Hoffman, Johnson 2016, "ELBO surgery: yet another way to carve up the variational evidence
        lower bound", section 1.
    """
    check_counts(num_draws=num_draws)
    pair = open_pair(model, guide, x, plate=plate)
    found: list[list[Tensor]] = [[], []]
    with pair.evaluating(seed):
        for _, part in pair.blocks():
            particles = Particles(part)
            prior = particles.data_first(particles.propose_from_prior(num_draws))
            draws = particles.data_first(particles.propose(num_draws)[0])
            for rows, latents in zip(found, (draws, prior), strict=True):
                flat = {  # auxiliary sites have no prior
                    n: latents[n].flatten(0, 1).unsqueeze(-1).flatten(1) for n in draws if n in prior
                }
                rows.append(torch.cat([value.double() for value in flat.values()], dim=1).cpu())
    labels = label_dimensions(flat)
    return AggregatePosterior(torch.cat(found[0]), torch.cat(found[1]), labels)
