"""What a comparison of pairs found: numbers per datum, paired differences, a table and figures."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_name
from pyro_vae.evaluation import paired_difference as paired
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal, concatenate, pointwise_densities
from pyro_vae.evaluation.paired_difference import Difference
from pyro_vae.files import finite_or_none
from pyro_vae.summary import error_text, plus_minus, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_vae.infer.training import FitResult


@dataclass(frozen=True)
class Measured:
    """The measurements of one pair: quantities per datum in nats, None if not asked for."""

    elbo: PerDatum
    iwae: PerDatum
    log_prob: PerDatum
    annealed: PerDatum | None  # log p(x) by annealing; None too where it does not apply
    rate: PerDatum  # KL(q(z|x) || p(z))
    distortion: PerDatum  # -E_q[log p(x|z)]
    exact_kl: bool  # whether the rate is a closed form
    posterior_divergence: PerDatum | None  # KL(q(z|x) || p(z|x)), with quadrature's numerical error
    # With Pareto k and effective sample size; of several runs all their data points, run after run.
    estimate: LogMarginal = field(repr=False)
    num_parameters: int  # that train
    num_guide_parameters: int
    seconds_per_1000: float  # of importance sampling for 1,000 data points
    fit: "FitResult | None" = field(repr=False)  # of the first run
    seconds_per_epoch: float = math.nan  # NaN where nothing was trained here
    annealed_trusted: Tensor | None = field(default=None, repr=False)

    def trusted(self, quantity: str) -> Tensor:
        """Return which data points' log p(x) is trusted, by ``"log_prob"`` or ``"annealed"``."""
        found = self.annealed_trusted if quantity == "annealed" else self.estimate.trusted
        return torch.ones(len(self.elbo.value), dtype=torch.bool) if found is None else found

    @property
    def unreliable_share(self) -> float:
        """Share of the data points whose estimate of log p(x) is not trusted."""
        return self.estimate.num_unreliable / len(self.estimate.pareto_k)

    @property
    def median_ess(self) -> float:
        """Median effective sample size of the importance weights."""
        return self.estimate.ess.median().item()

    def means(self, quantities: Sequence[str]) -> dict[str, float]:
        """Return means over the data points and both their standard errors under flat names."""
        row = {}
        for quantity in (*quantities, "rate", "distortion", "posterior_divergence"):
            value: PerDatum | None = getattr(self, quantity)
            if value is not None:
                row[quantity] = value.mean
                row[f"{quantity}_standard_error"] = value.mean_standard_error
                row[f"{quantity}_data_standard_error"] = value.data_standard_error
        return row


@dataclass(frozen=True)
class Comparison:
    """Pairs measured on the same data, in one run each or in several.

    ``print`` shows a table, and so does rich. Quantities are named ``"log_prob"``, ``"elbo"``,
    ``"iwae"``, and ``"annealed"`` where annealing was asked for and applies to every pair. Several
    runs of a pair, trained from different seeds, are averaged datum by datum, and the spread between
    them is part of the interval of every difference; see :meth:`of_runs`.

    Attributes:
        runs: what was measured of each run, by the pair's name; as many runs of every pair.
        likelihood: the kind of all: ``"density"``, ``"probability"`` or ``"pseudo-likelihood"``.
        num_importance: draws in the importance-weighted bound.
        num_samples: draws of the importance estimate.
        hold: ``"model"`` where all guides were measured against one frozen model.
        seed: seed of all draws.
    """

    runs: Mapping[str, Sequence[Measured]]
    likelihood: str
    num_importance: int
    num_samples: int
    hold: str | None
    seed: int

    @classmethod
    def of_runs(cls, comparisons: "Sequence[Comparison]") -> "Comparison":
        """Join results of :func:`pyro_vae.compare`, each from another training seed.

        Raises:
            InputError: none, or comparisons of other pairs, settings or numbers of data points.
        """
        kinds = [
            f"{', '.join(each.runs)} on {each.num_data} data points ({each.likelihood}, num_samples "
            f"{each.num_samples}, num_importance {each.num_importance}, hold {each.hold})"
            for each in comparisons
        ]
        if not kinds:
            raise InputError("expected at least one comparison, got none")
        other = next((kind for kind in kinds if kind != kinds[0]), None)
        if other is not None:
            wanted = "comparisons that differ in their seed alone"
            advice = "compare the same pairs in each"
            raise InputError(f"expected {wanted}, got {kinds[0]} beside {other}: {advice}")
        first = comparisons[0]
        joined = {n: [run for each in comparisons for run in each.runs[n]] for n in first.runs}
        return replace(first, runs=joined)

    @cached_property
    def pairs(self) -> dict[str, Measured]:
        """The measurements of each pair by its name, averaged over the runs."""
        return {name: _average(runs) for name, runs in self.runs.items()}

    @property
    def num_runs(self) -> int:
        """Runs of each pair."""
        return len(next(iter(self.runs.values())))

    @property
    def num_data(self) -> int:
        """Data points that every pair was measured on."""
        return len(next(iter(self.pairs.values())).elbo.value)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the quantities that every pair has and that can be ranked."""
        annealed = all(pair.annealed is not None for pair in self.pairs.values())
        return ("log_prob", *(("annealed",) if annealed else ()), "iwae", "elbo")

    @property
    def ranked_by(self) -> str:
        """The quantity that verdicts rest on: ``annealed`` where all have it, else ``log_prob``."""
        return "annealed" if "annealed" in self.quantities else "log_prob"

    def per_datum(self, name: str, quantity: str = "log_prob") -> PerDatum:
        """Return a quantity of a pair, averaged over its runs.

        Raises:
            InputError: no pair or no quantity of that name.
        """
        check_name("pair", name, self.pairs)
        check_name("quantity", quantity, self.quantities)
        return getattr(self.pairs[name], quantity)

    def best(self, quantity: str | None = None) -> str:
        """Return the name of the pair with the highest mean, by default of :attr:`ranked_by`."""
        quantity = quantity or self.ranked_by
        return max(self.pairs, key=lambda name: self.per_datum(name, quantity).mean)

    def run_deviation(self, name: str, quantity: str = "log_prob") -> float:
        """Return the standard deviation between runs of their means; NaN for a single run."""
        return paired.deviation([getattr(run, quantity).mean for run in self.runs[name]])

    def difference(
        self, name: str, quantity: str = "log_prob", *, to: str | None = None
    ) -> Difference:
        """Return one pair's paired difference from another, by default the best in this quantity.

        Raises:
            InputError: no pair or no quantity of that name.
        """
        to = to or self.best(quantity)
        for each in (name, to):
            self.per_datum(each, quantity)  # refuses what is not there
        if name == to:
            return Difference(0.0, 0.0, 0.0, 0.0, 0.0, (0.0,) * self.num_runs)
        mine, theirs = ([getattr(run, quantity) for run in self.runs[each]] for each in (name, to))
        return paired.paired_difference(mine, theirs)

    def verdict(self, name: str) -> str:
        """Return ``"best"``, ``"tied"``, ``"behind"`` or ``"withheld"``, by :attr:`ranked_by`.

        A pair is tied if 0 lies in the 95% interval of its paired difference from the best (about two
        standard errors, with several runs also of their spread), and behind otherwise; the best is
        called so only where all others are behind. There is no correction for the number of pairs:
        the best of many equal ones is partly luck.

        The verdict is withheld where the numbers do not support it: a tenth of the data points is not
        trusted, or it would be another without them or without the estimates' expected biases.
        """
        best = self.best()
        if name != best:
            return self._judge(name, best)
        others = {self._judge(each, best) for each in self.pairs if each != best}
        return next((each for each in ("tied", "withheld") if each in others), "best")

    def _judge(self, name: str, best: str) -> str:
        mine, theirs = ([getattr(r, self.ranked_by) for r in self.runs[n]] for n in (name, best))
        return paired.judge(mine, theirs, self._trusted(name) & self._trusted(best))

    def _trusted(self, name: str) -> Tensor:
        """Return which data points' log p(x) is trusted in all runs, ``(N,)``."""
        return torch.stack([run.trusted(self.ranked_by) for run in self.runs[name]]).all(0)

    def to_dict(self, *, per_datum: bool = False) -> dict[str, Any]:
        """Return plain values for JSON, also ``per_datum`` if asked; NaN and infinity become None."""
        rows = {name: self._row(name) for name in self.pairs}
        if per_datum:
            for name, row in rows.items():
                values = {each: self.per_datum(name, each).value for each in self.quantities}
                values["pareto_k"] = self._pareto_k(name)
                row["per_datum"] = {each: value.tolist() for each, value in values.items()}
        about = ("likelihood", "num_importance", "num_samples", "hold", "seed", "ranked_by")
        settings = {name: getattr(self, name) for name in (*about, "num_data", "num_runs")}
        return finite_or_none({**settings, "pairs": rows})

    def to_dataframe(self) -> Any:
        """Return a pandas ``DataFrame`` with one row per pair and one column per number."""
        import pandas  # type: ignore[import-untyped, unused-ignore]

        rows = {name: self._row(name) for name in self.pairs}
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("pair")

    def to_arviz(self) -> dict[str, Any]:
        """Return each pair's pointwise log-densities for ArviZ, as ``arviz.compare`` takes them.

        See ``pyro_vae.evaluation.estimate.pointwise_densities``.
        """
        found = {}
        for name in self.pairs:
            log_prob, pareto_k = self.per_datum(name, self.ranked_by).value, self._pareto_k(name)
            if self.ranked_by == "annealed":
                pareto_k = torch.full_like(pareto_k, math.nan)  # it is of the importance weights
            values = (log_prob, pareto_k, self._trusted(name), self.num_samples)
            pseudo = self.likelihood == "pseudo-likelihood"
            found[name] = pointwise_densities(*values, pseudo_likelihood=pseudo)
        return found

    def plot(self, quantity: str | None = None) -> "Figure":
        """Show paired differences from the best, with their 95 % intervals and the single runs."""
        from pyro_vae.plots import paired_differences

        quantity = quantity or self.ranked_by
        found = [self.difference(name, quantity) for name in self.pairs]
        shown = [each.mean for each in found], [each.half_width for each in found]
        how: dict[str, Any] = {"best": self.best(quantity)}
        how["by_run"] = [each.by_run for each in found] if self.num_runs > 1 else None
        title = f"{_NAMES[quantity]}: difference from the best, with 95% interval"
        return paired_differences(list(self.pairs), *shown, title=title, **how)

    def scatter(self, first: str, second: str, quantity: str | None = None) -> "Figure":
        """Show a quantity of every datum under one pair against that under another."""
        from pyro_vae.plots import datum_against_datum

        quantity = quantity or self.ranked_by
        labels, title = (first, second), f"{_NAMES[quantity]} of each datum (nats)"
        values = [self.per_datum(name, quantity).value.numpy() for name in labels]
        return datum_against_datum(*values, labels=labels, title=title)

    def __rich__(self) -> Any:
        """Return the table, one column per pair, with its notes."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=self._title(), title_justify="left")
        shown.add_column("")
        for name in self.pairs:
            shown.add_column(Text(name), justify="right")
        for label, cells in _table_rows(self):
            shown.add_row(label, *cells)
        return Group(shown, *(Text(note) for note in _notes(self)))

    def _title(self) -> str:
        runs = f", mean of {self.num_runs} runs" if self.num_runs > 1 else ""
        return f"{self.num_data} data points, nats per data point{runs}"

    def __str__(self) -> str:
        """Return the table as plain text, as wide as it needs to be."""
        from rich.console import Console

        file = io.StringIO()
        width = max(100, 40 + sum(max(28, len(name) + 4) for name in self.pairs))
        Console(file=file, width=width, color_system=None, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [[label, *cells] for label, cells in _table_rows(self)]
        return table(self._title(), [["", *self.pairs], *rows], _notes(self))

    def _pareto_k(self, name: str) -> Tensor:
        """Return the largest tail index of each datum among the runs, NaN where one is not known."""
        return torch.stack([run.estimate.pareto_k for run in self.runs[name]]).amax(0)

    def _row(self, name: str) -> dict[str, Any]:
        """Return the numbers of one pair under flat names."""
        pair = self.pairs[name]
        row = {"verdict": self.verdict(name), **pair.means(self.quantities)}
        for quantity in self.quantities:
            difference = self.difference(name, quantity)
            row[f"{quantity}_difference"] = difference.mean
            parts = ("standard_error", "monte_carlo_standard_error", "run_standard_error")
            for part in (*parts, "half_width"):
                row[f"{quantity}_difference_{part}"] = getattr(difference, part)
            row[f"{quantity}_run_deviation"] = self.run_deviation(name, quantity)
        weights = ("exact_kl", "unreliable_share", "median_ess")
        costs = ("num_parameters", "num_guide_parameters", "seconds_per_epoch", "seconds_per_1000")
        plain = {column: getattr(pair, column) for column in (*weights, *costs)}
        return row | plain | {"num_runs": self.num_runs}


_NAMES = {"log_prob": "log p(x)", "annealed": "log p(x), annealed"}
_NAMES |= {"iwae": "importance-weighted bound", "elbo": "ELBO"}


def _average(runs: Sequence[Measured]) -> Measured:
    """Average what was measured in several runs, datum by datum."""
    if len(runs) == 1:
        return runs[0]
    averaged: dict[str, Any] = {}
    for part in fields(Measured):
        values = [getattr(run, part.name) for run in runs]
        if all(isinstance(value, PerDatum) for value in values):
            averaged[part.name] = paired.average_runs(values)
        elif None in values and part.name != "fit":
            averaged[part.name] = None
        elif part.name.startswith("seconds"):
            averaged[part.name] = sum(values) / len(runs)
    # Shares and medians are those of the data points of all runs together.
    averaged["estimate"] = concatenate([run.estimate for run in runs])
    return replace(runs[0], **averaged, exact_kl=all(run.exact_kl for run in runs))


def _table_rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    pairs, several = comparison.pairs, comparison.num_runs > 1
    for quantity in comparison.quantities:
        label = f"IWAE-{comparison.num_importance}" if quantity == "iwae" else _NAMES[quantity]
        yield label, [_value(comparison.per_datum(name, quantity)) for name in pairs]
        if several:
            deviations = [comparison.run_deviation(name, quantity) for name in pairs]
            yield "  deviation between runs", [error_text(value) for value in deviations]
        differences = [_difference(comparison, name, quantity) for name in pairs]
        yield f"  {label}, minus the best", differences
        if quantity == comparison.ranked_by:
            yield "  verdict", [comparison.verdict(name) for name in pairs]
    measured = list(pairs.values())
    annealed = [pair.annealed for pair in measured]
    if comparison.ranked_by != "annealed" and any(annealed):
        yield _NAMES["annealed"], [_value(each) if each else "does not apply" for each in annealed]
    yield "rate (KL)", [_value(pair.rate) for pair in measured]
    yield "  KL", ["exact" if pair.exact_kl else "Monte Carlo" for pair in measured]
    yield "distortion", [_value(pair.distortion) for pair in measured]
    divergences = [pair.posterior_divergence for pair in measured if pair.posterior_divergence]
    if len(divergences) == len(measured):
        # The grids' errors don't average out.
        means = [(each.mean, each.standard_error.mean().item()) for each in divergences]
        cells = [plus_minus(*each) if each[0] == each[0] else "not resolved" for each in means]
        yield "KL(q || p(z|x)), quadrature", cells
    yield "data points not trusted", [f"{100 * pair.unreliable_share:.1f} %" for pair in measured]
    sizes = [f"{pair.median_ess:,.0f}" for pair in measured]
    yield f"median ESS of {comparison.num_samples:,}", sizes
    yield "parameters trained", [f"{pair.num_parameters:,}" for pair in measured]
    if any(not math.isnan(pair.seconds_per_epoch) for pair in measured):
        yield "seconds per epoch", [f"{pair.seconds_per_epoch:.3g}" for pair in measured]
    yield "seconds per 1,000 log p(x)", [f"{pair.seconds_per_1000:.3g}" for pair in measured]


def _notes(comparison: Comparison) -> Iterator[str]:
    both = "over data points and runs" if comparison.num_runs > 1 else "over data points"
    yield (
        "± Monte Carlo standard error, in brackets the standard error over the data points; "
        f"differences from the best: ± half a 95% interval of the paired difference {both}, in "
        "brackets its Monte Carlo standard error (less where pairs share draws)."
    )
    yield f"tied: that interval of {_NAMES[comparison.ranked_by]} contains 0."
    if comparison.likelihood == "pseudo-likelihood":
        yield "The likelihood is a pseudo-likelihood: compare with nothing outside this table."
    if comparison.hold == "model":
        yield "All guides were measured against one frozen model."
    untrusted = [name for name, pair in comparison.pairs.items() if pair.estimate.num_unreliable]
    if untrusted and comparison.ranked_by == "log_prob":
        by_weights = all(pair.estimate.method == "importance" for pair in comparison.pairs.values())
        advice = '; methods=("auto",) anneals them' * by_weights
        doubt = f"log p(x) may be off there by more than its errors say{advice}"
        yield f"Some data points of {', '.join(untrusted)} are not trusted: {doubt}."
    if "withheld" in map(comparison.verdict, comparison.pairs):
        yield "withheld: the numbers do not support a verdict, see Comparison.verdict."


def _value(quantity: PerDatum) -> str:
    over_data = quantity.data_standard_error
    brackets = "" if math.isnan(over_data) else f" ({error_text(over_data)})"
    return plus_minus(quantity.mean, quantity.mean_standard_error) + brackets


def _difference(comparison: Comparison, name: str, quantity: str) -> str:
    if name == comparison.best(quantity):
        return "0"
    found = comparison.difference(name, quantity)
    noise = error_text(found.monte_carlo_standard_error)
    return f"{plus_minus(found.mean, found.half_width)} ({noise})"
