"""The paired difference of two pairs over data points and runs, its interval, and what is a tie."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.evaluation.elbo import PerDatum

# Share of the data points that a verdict may rest on at least.
_LEAST_TRUSTED = 0.9


class Difference(NamedTuple):
    """Mean paired difference of one pair from another, nats per datum."""

    mean: float  # over the data points (and runs) of this pair's value minus the other's
    # Over the data points, from the spread of the differences (averaged over the runs) alone, which
    # has their Monte Carlo errors in it; and with the data held fixed and independent draws.
    standard_error: float
    monte_carlo_standard_error: float
    run_standard_error: float  # from the spread over runs of their means; NaN (unknown) for one
    half_width: float  # half a 95% interval of the mean; of a single run it says nothing of others
    by_run: tuple[float, ...]  # the mean of each run to the other pair's run of the same number

    @property
    def is_tie(self) -> bool:
        """Whether 0 lies in the interval, or the interval is not known."""
        return not abs(self.mean) > self.half_width


def paired_difference(mine: Sequence[PerDatum], theirs: Sequence[PerDatum]) -> Difference:
    """Subtract one pair's values from another's, datum by datum and run by run.

    Half the width of the interval of the mean over N data points and R runs is

    .. math:: h^2 = (t_{N-1} s_N)^2 + (t_{R-1} s_R)^2

    where s_N is the standard error over the data points of the differences averaged over the runs,
    s_R that over the runs of the differences averaged over the data points, and t the 97.5% point of
    Student's distribution: runs are few, and their spread is itself uncertain. With one run the
    second term is left out, and with a single data point nothing is known. What varies with data
    point and run together counts in both terms, which errs on the wide side.

    Source:
        Half-widths of independent effects add in squares: Howe 1974, "Approximate Confidence Limits
        on the Mean of X + Y Where X and Y are Two Tabled Independent Random Variables". Errors shared
        by the rows and by the columns of a table: Cameron, Gelbach, Miller 2011, "Robust Inference
        with Multiway Clustering", section 2, here without the term that is subtracted there.
    """
    runs = []
    for (value, error), (other, its) in zip(mine, theirs, strict=True):
        impossible: Tensor = value.isneginf() & other.isneginf()
        runs.append(PerDatum(torch.where(impossible, 0.0, value - other), torch.hypot(error, its)))
    count, paired = len(runs), average_runs(runs)
    over_data = paired.data_standard_error
    by_run = tuple(run.mean for run in runs)
    run_error = deviation(by_run) / math.sqrt(count)
    widths = [_student(len(paired.value) - 1) * over_data]
    if count > 1:
        widths.append(_student(count - 1) * run_error)
    errors = over_data, paired.mean_standard_error, run_error
    return Difference(paired.mean, *errors, math.hypot(*widths), by_run)


def judge(mine: Sequence[PerDatum], theirs: Sequence[PerDatum], trusted: Tensor) -> str:
    """Return whether one pair's log p(x) is ``"behind"`` another's, ``"tied"``, or ``"withheld"``.

    A verdict is to be the same without the data points that are not ``trusted`` in both, ``(N,)``,
    and with the bias taken out that is expected of the log of a mean: it does not average out.
    """
    if trusted.double().mean() < _LEAST_TRUSTED:
        return "withheld"
    runs = [*zip(mine, theirs, strict=True)]
    unbiased = [[PerDatum(v + 0.5 * e.square(), e) for v, e in both] for both in runs]
    rest = [[PerDatum(v[trusted], e[trusted]) for v, e in both] for both in runs]
    found = [paired_difference(*zip(*view, strict=True)) for view in (runs, unbiased, rest)]
    signs = {0.0 if each.is_tie else math.copysign(1.0, each.mean) for each in found}
    if len(signs) > 1:
        return "withheld"
    return "tied" if signs == {0.0} else "behind"


def average_runs(runs: Sequence[PerDatum]) -> PerDatum:
    """Average a quantity over runs, datum by datum."""
    errors = torch.stack([run.standard_error for run in runs])
    mean = torch.stack([run.value for run in runs]).mean(0)
    return PerDatum(mean, errors.square().sum(0).sqrt() / len(runs))


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; NaN for a single value."""
    return math.nan if len(values) < 2 else torch.tensor(values, dtype=torch.float64).std().item()


def _student(degrees: int) -> float:
    """Return how many standard errors half of a 95% interval is wide; NaN without freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975)) if degrees else math.nan
