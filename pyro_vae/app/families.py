"""Several runs of each family put together: means over runs, and three kinds of error kept apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from scipy.stats import norm, t
from torch import Tensor

from pyro_vae.evaluation.comparison_result import Comparison, Measured
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal

# Of the intervals that verdicts rest on.
_COVERAGE = 0.95

_ESTIMATED = (
    "log_prob",
    "standard_error",
    "ess",
    "pareto_k",
    "rate",
    "distortion",
    "num_samples",
    "cost",
)


class RunDifference(NamedTuple):
    """A family's mean difference to the best one, nats per datum.

    Attributes:
        by_run: difference of each run to the best family's run of the same seed.
        mean: mean over data and runs.
        data_standard_error: spread over the data of the differences averaged over the runs.
        run_standard_error: spread over the runs of the differences averaged over the data; NaN for a
            single run.
        half_width: half the width of a 95 % interval of the mean, from both spreads.
    """

    by_run: list[float]
    mean: float
    data_standard_error: float
    run_standard_error: float
    half_width: float

    @property
    def is_tie(self) -> bool:
        """Whether the interval has 0 in it, or is not known."""
        return not abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Families:
    """Families measured in several runs each, all on the same data.

    Attributes:
        runs: what was measured, by family, in the order of the seeds.
        comparison: the families with their numbers averaged over the runs, datum by datum.
    """

    runs: Mapping[str, Sequence[Measured]]
    comparison: Comparison

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[Measured]], **settings: Any) -> Families:
        """Average over the runs; the settings are those of a :class:`Comparison`."""
        return cls(runs, Comparison({name: _mean(own) for name, own in runs.items()}, **settings))

    def run_deviation(self, name: str, quantity: str) -> float:
        """Return the standard deviation between runs of their means; NaN for a single run."""
        return _deviation([getattr(run, quantity).mean for run in self.runs[name]])

    def difference(self, name: str, quantity: str) -> RunDifference:
        """Return a family's difference to the one that is best in this quantity."""
        best = self.comparison.best(quantity)
        by_run = [
            getattr(mine, quantity).mean - getattr(theirs, quantity).mean
            for mine, theirs in zip(self.runs[name], self.runs[best], strict=True)
        ]
        if name == best:
            return RunDifference(by_run, 0.0, 0.0, 0.0, 0.0)
        over_data = self.comparison.difference(name, quantity)
        count = len(by_run)
        over_runs = _deviation(by_run) / math.sqrt(count)
        tail = (1 + _COVERAGE) / 2
        # Data are many, runs are few: their spread is itself uncertain, which Student's t allows for.
        widths = [norm.ppf(tail) * over_data.standard_error]
        if count > 1:
            widths.append(t.ppf(tail, count - 1) * over_runs)
        return RunDifference(
            by_run, over_data.mean, over_data.standard_error, over_runs, math.hypot(*widths)
        )

    def verdict(self, name: str) -> str:
        """Return ``"best"``, ``"tied"`` or ``"behind"``, by the intervals of the differences."""
        quantity = self.comparison.ranked_by
        best = self.comparison.best(quantity)
        tied = {other for other in self.runs if self.difference(other, quantity).is_tie}
        if name == best:
            return "best" if tied == {best} else "tied"
        return "tied" if name in tied else "behind"

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the numbers of each family under flat names, as plain values."""
        rows = self.comparison.to_dict()["pairs"]
        for name, row in rows.items():
            row |= {"verdict": self.verdict(name), "num_runs": len(self.runs[name])}
            for quantity in self.comparison.quantities:
                difference = self.difference(name, quantity)
                row[f"{quantity}_run_deviation"] = self.run_deviation(name, quantity)
                row[f"{quantity}_difference_run_standard_error"] = difference.run_standard_error
                row[f"{quantity}_difference_half_width"] = difference.half_width
        return rows


def _mean(runs: Sequence[Measured]) -> Measured:
    """Average what was measured in several runs, datum by datum."""
    first = runs[0]
    averaged: dict[str, Any] = {
        name: _mean_per_datum([getattr(run, name) for run in runs])
        for name in ("elbo", "iwae", "log_prob", "annealed", "rate", "distortion")
    }
    # Shares and medians are those of the data of all runs together.
    together: dict[str, Any] = {
        name: torch.cat([getattr(run.estimate, name) for run in runs]) for name in _ESTIMATED
    }
    return replace(
        first,
        **averaged,
        estimate=LogMarginal(**together),
        exact_kl=all(run.exact_kl for run in runs),
        seconds_per_1000=sum(run.seconds_per_1000 for run in runs) / len(runs),
    )


def _mean_per_datum(values: Sequence[PerDatum | None]) -> PerDatum | None:
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None
    errors: Tensor = torch.stack([value.standard_error for value in present])
    mean = torch.stack([value.value for value in present]).mean(0)
    return PerDatum(mean, errors.square().sum(0).sqrt() / len(present))


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    return torch.tensor(values, dtype=torch.float64).std().item()
