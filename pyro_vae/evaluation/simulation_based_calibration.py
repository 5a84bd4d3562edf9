"""Simulation-based calibration: does a guide cover the latents that made the data as it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.latent_codes import label_dimensions
from pyro_vae.evaluation.simulate import simulate
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import Progress, open_pair
from pyro_vae.weights.particles import Particles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Part of the bins that lie inside the figure's band where all ranks are uniform.
_BAND = 0.95


@dataclass(frozen=True)
class Calibration:
    """Ranks of the latents that made simulated data among the guide's draws.

    Attributes:
        ranks: by latent site, ``(M, D)``: how many draws lie below the true value (among equal ones
            a place at random), for each of the simulated data and each dimension; uniform on 0, ...,
            ``num_draws`` where the guide is the posterior.
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
        """How many data have their rank in each bin, ``(dimensions, num_bins)``."""
        ranks = torch.cat(list(self.ranks.values()), dim=1)
        bins = ranks * self.num_bins // (self.num_draws + 1)
        return torch.stack([torch.bincount(column, minlength=self.num_bins) for column in bins.T])

    @property
    def chi_square(self) -> Tensor:
        """Chi-square statistic of each dimension against uniform ranks, ``(dimensions,)``.

        Its expectation under uniform ranks is ``num_bins - 1``.
        """
        expected = self._num_data / self.num_bins
        return (self.counts - expected).square().sum(1) / expected

    @property
    def p_value(self) -> Tensor:
        """Chance of a statistic as large under uniform ranks, ``(dimensions,)``.

        Small for a guide that is not the posterior. Over many dimensions one of them is small by
        chance: compare their minimum with a level divided by their number.
        """
        from scipy.stats import chi2

        return torch.as_tensor(chi2.sf(self.chi_square.numpy(), self.num_bins - 1))

    @property
    def _num_data(self) -> int:
        return len(next(iter(self.ranks.values())))

    def __str__(self) -> str:
        p_value = self.p_value
        lowest = int(p_value.argmin())
        return (
            f"ranks of {self._num_data} simulated data among {self.num_draws} draws of the guide: "
            f"lowest p-value of {len(p_value)} dimensions {p_value[lowest].item():.2g} "
            f"({self.labels[lowest]}; chi-square {self.chi_square[lowest].item():.1f}, "
            f"{self.num_bins - 1} expected)"
        )

    def plot(self) -> Figure:
        """Show the histogram of ranks of each dimension with the band that 95 % of bins lie in."""
        from scipy.stats import binom

        from pyro_vae import plots

        low, high = binom.interval(_BAND, self._num_data, 1 / self.num_bins)
        labels = [
            f"{label}  p = {p_value:.2g}"
            for label, p_value in zip(self.labels, self.p_value.tolist(), strict=True)
        ]
        title = "calibration of the guide: hill = too wide, bowl = too narrow, slope = shifted"
        return plots.rank_histograms(
            self.counts.numpy(), (float(low), float(high)), labels, title=title
        )

    def to_arviz(self) -> Any:
        """Return the ranks as values in (0, 1), in group ``prior_sbc`` of ArviZ's structure.

        ``arviz.plot_ecdf_pit`` (1.x) takes it as it is; with 0.23 pass a variable's values to
        ``arviz.plot_ecdf(values, cdf=scipy.stats.uniform.cdf, difference=True)``.
        """
        from pyro_vae.evaluation.arviz import calibration_groups

        middles = {
            name: ((ranks + 0.5) / (self.num_draws + 1)).numpy() for name, ranks in self.ranks.items()
        }
        return calibration_groups(middles)


def calibration(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_data: int = 1000,
    num_draws: int = 99,
    num_bins: int = 20,
    plate: str = "data",
    seed: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Draw latents and data from the model, and rank the latents among the guide's draws.

    Where the guide is the posterior the ranks are uniform. Both are run in eval mode.

    Args:
        model: the generative function of the pair.
        guide: its variational function.
        x: a template ``(N, ...)``: its shapes, and its inputs that the model does not observe, which
            are repeated as often as needed. Its observed values are not used.
        num_data: data to simulate, M.
        num_draws: draws of the guide per datum, L; L + 1 is to be a multiple of the bins.
        num_bins: bins of the test, at most M / 5: each should expect five data.
        plate: name of the data plate.
        seed: seed of all draws; the generators' state is restored afterwards.
        progress: called with (data done, M).

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
                found = _ranks(true, drawn[name].unsqueeze(-1).flatten(2))
                ranks.setdefault(name, []).append(found.cpu())
    joined = {name: torch.cat(parts) for name, parts in ranks.items()}
    return Calibration(joined, num_draws, num_bins, pair.inputs)


def _ranks(true: Tensor, draws: Tensor) -> Tensor:
    """Return how many draws ``(L, N, D)`` lie below the true values ``(N, D)``; ties at random.

    Among draws that equal the true value, as those of a discrete latent do, every place is as
    likely: without that the ranks of a posterior would not be uniform.
    """
    below, equal = (draws < true).sum(0), (draws == true).sum(0)
    place = torch.rand(equal.shape, dtype=torch.float64, device=equal.device) * (equal + 1)
    return below + place.long().minimum(equal)


def _check_options(num_data: int, num_draws: int, num_bins: int) -> None:
    check_counts(num_data=num_data, num_draws=num_draws, num_bins=num_bins)
    if num_bins < 2 or (num_draws + 1) % num_bins:
        fitting = max(1, round((num_draws + 1) / max(num_bins, 2))) * max(num_bins, 2) - 1
        raise InputError(
            f"expected num_bins of at least 2 that divide num_draws + 1, got {num_bins} for "
            f"{num_draws} draws: use e.g. num_draws={fitting}"
        )
    if num_data < 5 * num_bins:
        raise InputError(
            f"expected num_data of at least {5 * num_bins} for {num_bins} bins, got {num_data}: the "
            "test needs five data in each"
        )
