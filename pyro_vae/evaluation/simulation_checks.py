"""Checks by simulation: new data in place of the data, the aggregate posterior, and calibration."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.estimate import one_chain, structure
from pyro_vae.evaluation.latent_codes import label_dimensions
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair import sites as traced
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import Knowledge, OpenedPair, Progress, any_number_of_data, open_pair
from pyro_vae.pair.sites import Given, Latents, Site
from pyro_vae.summary import Summary, shown
from pyro_vae.weights.particles import Particles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistic = Callable[[Tensor], Tensor]

_STATISTICS: dict[str, Statistic] = {"mean": lambda x: x.reshape(len(x), -1).mean(1)}
_STATISTICS["standard deviation"] = lambda x: x.reshape(len(x), -1).std(1, correction=0)


@shown
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
        """Share of drawn values at or above the datum's, by statistic, ``(N,)``; ties by half.

        Near 0 or 1 for data that the model can't make. The guide has seen the datum, so for a good
        model the values crowd around 1/2 rather than being uniform.
        """
        return {n: _share_above(self.replicated[n], seen) for n, seen in self.observed.items()}

    @property
    def overall_p_value(self) -> dict[str, float]:
        """Share of drawn data sets whose mean is above the data's, by statistic."""
        means = {n: (self.replicated[n].mean(1), seen.mean()) for n, seen in self.observed.items()}
        return {name: _share_above(*both).item() for name, both in means.items()}

    def plot(self) -> "Figure":
        """Show each statistic over the data and over the data drawn in their place."""
        from pyro_vae import plots

        labels = [f"{name}  p = {p_value:.2f}" for name, p_value in self.overall_p_value.items()]
        both = self.observed, self.replicated
        seen, drawn = ({name: value.numpy() for name, value in of.items()} for of in both)
        return plots.observed_and_replicated(seen, drawn, labels, title="posterior predictive check")


def _share_above(drawn: Tensor, value: Tensor) -> Tensor:
    return ((drawn > value).double() + (drawn == value).double() / 2).mean(0)


def posterior_predictive(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    statistics: Mapping[str, Statistic] | None = None, num_draws: int = 100,
    observed: str | None = None, plate: str = "data", seed: int | None = None,
) -> PosteriorPredictive:  # fmt: skip
    """Draw latents given each datum, new data given these, and compare statistics of both.

    Args:
        model, x, plate, seed: as in :func:`pyro_vae.log_marginal`.
        guide: its variational function, taken for the posterior.
        statistics: by name, functions from data ``(N, ...)`` to one number each, ``(N,)``; by default
            the mean and the standard deviation over the values of a datum.
        num_draws: data drawn in place of each datum, S.
        observed: as in :func:`pyro_vae.tasks.decode`.

    Raises:
        InputError: several observed sites without a name, no site of that name, no statistic, one of
            another shape, a number of draws below 1, or a pair that can't be weighed.

    Source:
        Gelman, Meng, Stern 1996, "Posterior Predictive Assessment of Model Fitness", section 2.
    """
    check_counts(num_draws=num_draws)
    statistics = _STATISTICS if statistics is None else statistics
    if not statistics:
        raise InputError("expected at least one statistic, got none: leave it out for the default")
    pair = open_pair(model, guide, x, plate=plate)
    seen, drawn = [], []
    with pair.evaluating(seed):
        for _, part in pair.blocks():
            replicated = []
            for _ in range(num_draws):
                trace, _ = part.trace()
                site = trace.nodes[traced.observed_site(trace, observed)]
                axis = traced.value_axis(site, plate)
                replicated.append(_compute(statistics, site["fn"].sample().movedim(axis, 0)))
            drawn.append(torch.stack(replicated, 1))
            seen.append(_compute(statistics, site["value"].movedim(axis, 0)))
    both = (dict(zip(statistics, torch.cat(each, dim=-1), strict=True)) for each in (seen, drawn))
    return PosteriorPredictive(*both)


def _compute(statistics: Mapping[str, Statistic], values: Tensor) -> Tensor:
    """Return statistics of data ``(N, ...)``, a row ``(N,)`` each; refuse those of another shape."""
    values, computed = values.double(), []
    for name, statistic in statistics.items():
        found = statistic(values)
        if not isinstance(found, Tensor) or found.shape != values.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            wanted = f"statistic {name!r} to give one number per datum, shape ({len(values)},)"
            raise InputError(f"expected {wanted}, got {got}: leave the first dimension alone")
        computed.append(found.double().cpu())
    return torch.stack(computed)


@shown
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
        """Probability of a distance this large between draws of one distribution, ``(D,)``."""
        return self._tests()[1]

    def _tests(self) -> Tensor:
        from scipy.stats import ks_2samp

        results = map(ks_2samp, self.draws.T.numpy(), self.prior.T.numpy())
        return torch.tensor([[result.statistic, result.pvalue] for result in results]).T

    def plot(self) -> "Figure":
        """Show both distributions, one panel per dimension."""
        from pyro_vae import plots

        distances = zip(self.labels, self.statistic.tolist(), strict=True)
        labels = [f"{label}  KS distance {distance:.2f}" for label, distance in distances]
        both, title = (self.draws.numpy(), self.prior.numpy()), "aggregate posterior and prior"
        return plots.prior_and_aggregate(*both, labels, title=title)


def aggregate_posterior(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *, num_draws: int = 1,
    plate: str = "data", seed: int | None = None,
) -> AggregatePosterior:  # fmt: skip
    """Compare the guide's draws over all data with the prior, dimension by dimension.

    A model generates from its prior; where the aggregate posterior is elsewhere, it generates what it
    was never trained to decode. Agreement of the dimensions one by one is necessary, not sufficient.

    Args:
        model, guide, x, plate, seed: as in :func:`pyro_vae.log_marginal`.
        num_draws: draws per datum. Several of one are not independent: p-values are too small.

    Raises:
        InputError: a number of draws below 1, or a pair that can't be weighed.

    Source:
        Hoffman, Johnson 2016, "ELBO surgery", section 1.
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
                both = [n for n in draws if n in prior]  # auxiliary sites have no prior
                flat = {n: latents[n].flatten(0, 1).unsqueeze(-1).flatten(1) for n in both}
                rows.append(torch.cat([value.double() for value in flat.values()], dim=1).cpu())
    return AggregatePosterior(torch.cat(found[0]), torch.cat(found[1]), label_dimensions(flat))


@shown
@dataclass(frozen=True)
class Calibration:
    """Ranks of the latents that made simulated data among the guide's draws.

    Attributes:
        ranks: by latent site, ``(M, D)``: how many draws lie below the true value (among equal ones
            a place at random); uniform on 0, ..., ``num_draws`` where the guide is the posterior.
        num_draws: draws of the guide per datum.
        num_bins: bins of the histograms and of the test.
        x: the simulated data, as the pair takes them.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    num_bins: int
    x: Inputs = field(repr=False)

    @property
    def labels(self) -> list[str]:
        """A name for each dimension, in the order of the rows of :attr:`counts`."""
        return label_dimensions(self.ranks)

    @property
    def counts(self) -> Tensor:
        """How many data points have their rank in each bin, ``(dimensions, num_bins)``."""
        bins = torch.cat(list(self.ranks.values()), dim=1) * self.num_bins // (self.num_draws + 1)
        return torch.stack([torch.bincount(column, minlength=self.num_bins) for column in bins.T])

    @property
    def chi_square(self) -> Tensor:
        """Chi-square statistic of each dimension against uniform ranks, ``(dimensions,)``.

        Its expectation under uniform ranks is ``num_bins - 1``.
        """
        expected = len(self.x[0]) / self.num_bins
        return (self.counts - expected).square().sum(1) / expected

    @property
    def p_value(self) -> Tensor:
        """Probability of a statistic this large under uniform ranks, ``(dimensions,)``.

        Small for a guide that is not the posterior. Over many dimensions one of them is small by
        chance: compare their minimum with a level divided by their number.
        """
        from scipy.stats import chi2

        return torch.as_tensor(chi2.sf(self.chi_square.numpy(), self.num_bins - 1))

    def _summary(self) -> Summary:
        p_value, count = self.p_value, len(self.x[0])
        lowest = int(p_value.argmin())
        title = f"ranks of {count} simulated data points among {self.num_draws} draws of the guide"
        value = f"{p_value[lowest].item():.2g} ({self.labels[lowest]})"
        statistic = f"{self.chi_square[lowest].item():.1f}, {self.num_bins - 1} expected"
        name = f"lowest p-value of {len(p_value)} dimensions"
        return title, {name: value, "its chi-square": statistic}

    def plot(self) -> "Figure":
        """Show the histogram of ranks of each dimension with the band that 95 % of bins lie in."""
        from scipy.stats import binom

        from pyro_vae import plots

        low, high = binom.interval(0.95, len(self.x[0]), 1 / self.num_bins)
        p_values = zip(self.labels, self.p_value.tolist(), strict=True)
        labels = [f"{label}  p = {p_value:.2g}" for label, p_value in p_values]
        title = "calibration of the guide: hill = too wide, bowl = too narrow, slope = shifted"
        band = float(low), float(high)
        return plots.rank_histograms(self.counts.numpy(), band, labels, title=title)

    def to_arviz(self) -> Any:
        """Return the ranks as values in (0, 1), in group ``prior_sbc`` of ArviZ's structure.

        ``arviz.plot_ecdf_pit`` (1.x) takes it as it is; with 0.23 pass a variable's values to
        ``arviz.plot_ecdf(values, cdf=scipy.stats.uniform.cdf, difference=True)``.
        """
        middles = {n: (ranks + 0.5) / (self.num_draws + 1) for n, ranks in self.ranks.items()}
        return structure({"prior_sbc": one_chain(middles)})


def calibration(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *, num_data: int = 1000,
    num_draws: int = 99, num_bins: int = 20, plate: str = "data", seed: int | None = None,
    progress: Progress | None = None,
) -> Calibration:  # fmt: skip
    """Draw latents and data from the model, and rank the latents among the guide's draws.

    Where the guide is the posterior the ranks are uniform. Both are run in eval mode.

    Args:
        model, guide, plate, seed: as in :func:`pyro_vae.log_marginal`.
        x: a template ``(N, ...)``: its shapes, and its inputs that the model does not observe, which
            are repeated as often as needed. Its observed values are not used.
        num_data: data to simulate, M.
        num_draws: draws of the guide per datum, L; L + 1 is to be a multiple of the bins.
        num_bins: bins of the test, at most M / 5: each should expect five data points.
        progress: called with (data points done, M).

    Raises:
        InputError: numbers out of range, bins that do not divide the ranks, a pair that can't be
            weighed, or that no data can be simulated from (see
            :func:`pyro_vae.evaluation.bidirectional`).

    Source:
        Talts, Betancourt, Simpson, Vehtari, Gelman 2018, "Validating Bayesian Inference Algorithms
        with Simulation-Based Calibration", algorithm 1 and section 4.1.
    """
    _check_options(num_data, num_draws, num_bins)
    check_callables(progress=progress)
    template = open_pair(model, guide, x, plate=plate)
    ranks: dict[str, list[Tensor]] = {}
    with template.evaluating(seed):
        pair, latents = simulate(template, num_data)
        for rows, part in pair.blocks(progress=progress):
            particles = Particles(part)
            drawn = particles.data_first(particles.propose(num_draws)[0])
            for name, value in latents.items():
                true = value[rows].unsqueeze(-1).flatten(1)
                among = drawn[name].unsqueeze(-1).flatten(2)
                below, equal = (among < true).sum(0), (among == true).sum(0)  # ties at random
                place = torch.rand(equal.shape, dtype=torch.float64, device=equal.device)
                found = below + (place * (equal + 1)).long().minimum(equal)
                ranks.setdefault(name, []).append(found.cpu())
    joined = {name: torch.cat(parts) for name, parts in ranks.items()}
    return Calibration(joined, num_draws, num_bins, pair.inputs)


def _check_options(num_data: int, num_draws: int, num_bins: int) -> None:
    check_counts(num_data=num_data, num_draws=num_draws, num_bins=num_bins)
    if num_bins < 2 or (num_draws + 1) % num_bins:
        fitting = max(1, round((num_draws + 1) / max(num_bins, 2))) * max(num_bins, 2) - 1
        wanted = "num_bins of at least 2 that divides num_draws + 1"
        got = f"{num_bins} for {num_draws} draws"
        raise InputError(f"expected {wanted}, got {got}: use e.g. num_draws={fitting}")
    if num_data < 5 * num_bins:
        wanted = f"num_data of at least {5 * num_bins} for {num_bins} bins"
        advice = "the test needs five data points in each"
        raise InputError(f"expected {wanted}, got {num_data}: {advice}")


def simulate(template: OpenedPair, num_data: int) -> tuple[OpenedPair, Latents]:
    """Draw data from the model of an open pair; return their pair, and their latents, data first."""
    model = template.model
    observed = traced.sample_sites(poutine.trace(model).get_trace(*template.inputs))
    sources = {s["name"]: _source(s, template.inputs) for s in observed if s["is_observed"]}
    for (name, index), (other, its) in itertools.combinations(sources.items(), 2):
        if index == its:
            wanted = "one observed site for each input"
            advice = "simulated data would differ between them; pass it as two inputs"
            raise InputError(f"expected {wanted}, {name!r} and {other!r} observe the same: {advice}")
    inputs = list(template.part(torch.arange(num_data) % template.num_data).inputs)
    with any_number_of_data("pair", num_data):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*inputs)
        for name, index in sources.items():
            site, given = trace.nodes[name], inputs[index]
            drawn = site["value"].reshape(given.shape)
            inputs[index] = drawn.to(given.dtype)
            if not given.is_floating_point() and (inputs[index] != drawn).any():
                what = f"data at {name!r}, whose simulated values are not whole numbers"
                raise InputError(f"expected floating-point {what}, got {given.dtype}: convert them")
            site["value"] = inputs[index].reshape(site["value"].shape)
        latents = [site for site in traced.latent_sites(trace) if site["name"] not in sources]
        with Given({site["name"]: site["value"] for site in latents}):
            changed = traced.changed_site(trace, poutine.trace(model).get_trace(*inputs))
        if changed is not None:  # what it drew is then not what it says
            what = "a model that uses the data at its observed sites alone"
            mend = "no data can be simulated from it"
            raise InputError(f"expected {what}, the density at {changed!r} changes with them: {mend}")
        pair = template.on(tuple(inputs))
        if num_data != template.num_data:
            pair.knowledge = Knowledge()  # whether it takes so many is to be seen
            pair.structure  # noqa: B018
    drawn = ((s["name"], s["value"], traced.value_axis(s, template.plate)) for s in latents)
    return pair, {name: value.movedim(axis, 0) for name, value, axis in drawn}


def _source(site: Site, template: Inputs) -> int:
    """Return which input an observed site observes, even in another shape."""
    value: Any = site["value"]
    if isinstance(value, Tensor) and not isinstance(site["fn"], dist.Unit):
        for index, given in enumerate(template):
            same_memory = value.data_ptr() == given.data_ptr() and value.numel() == given.numel()
            contiguous = value.is_contiguous() and given.is_contiguous()
            alike = value.shape == given.shape and value.stride() == given.stride()
            if same_memory and (contiguous or alike):
                return index
    raise InputError(
        f"expected observed site {site['name']!r} to observe an input as it is, got other values: "
        "simulated data can't be put in their place; pass what is observed as an input of its own"
    )
