"""What a comparison of pairs found: numbers per datum, paired differences, tables and figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pyro_vae.errors import unknown_name
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_vae.infer.training import FitResult

# Standard errors within which a difference is none.
_TIE = 2.0


class Difference(NamedTuple):
    """Mean paired difference of one pair to another, nats per datum.

    Attributes:
        mean: mean over the data of this pair's value minus the other's.
        standard_error: its standard error: the spread of the per-datum differences over the data,
            which has their Monte Carlo errors in it; never below ``monte_carlo_standard_error``.
        monte_carlo_standard_error: with the data held fixed and the pairs' draws independent.
    """

    mean: float
    standard_error: float
    monte_carlo_standard_error: float

    @property
    def is_tie(self) -> bool:
        """Whether the difference is within two standard errors, or its error unknown."""
        return not abs(self.mean) > _TIE * self.standard_error


@dataclass(frozen=True)
class Measured:
    """What was measured of one pair; quantities per datum in nats.

    Attributes:
        elbo: evidence lower bound.
        iwae: importance-weighted bound.
        log_prob: log p(x) by importance sampling.
        annealed: log p(x) by annealing; None where it was not asked for or does not apply.
        rate: KL(q(z|x) || p(z)).
        distortion: -E_q[log p(x|z)].
        exact_kl: whether the rate is in closed form.
        posterior_divergence: KL(q(z|x) || p(z|x)) by quadrature, with its numerical error; None where
            it was not asked for.
        estimate: the importance estimate, with Pareto k and effective sample size per datum.
        num_parameters: parameters of model and guide that train.
        num_guide_parameters: those of the guide.
        seconds_per_1000: seconds of importance sampling for 1,000 data.
        fit: the training, where it was done here.
    """

    elbo: PerDatum
    iwae: PerDatum
    log_prob: PerDatum
    annealed: PerDatum | None
    rate: PerDatum
    distortion: PerDatum
    exact_kl: bool
    posterior_divergence: PerDatum | None
    estimate: LogMarginal = field(repr=False)
    num_parameters: int
    num_guide_parameters: int
    seconds_per_1000: float
    fit: FitResult | None = field(repr=False)

    @property
    def unreliable_share(self) -> float:
        """Share of the data whose importance weights have Pareto k > 0.7."""
        return self.estimate.num_unreliable / len(self.estimate.pareto_k)

    @property
    def median_ess(self) -> float:
        """Median effective sample size of the importance weights."""
        return self.estimate.ess.median().item()

    @property
    def seconds_per_epoch(self) -> float:
        """Mean seconds of a training epoch; NaN where nothing was trained here."""
        if self.fit is None or not len(self.fit.history["seconds"]):
            return math.nan
        return self.fit.seconds / len(self.fit.history["seconds"])


@dataclass(frozen=True)
class Comparison:
    """Pairs measured on the same data.

    ``print`` shows a table, and so does rich. Quantities are named ``"log_prob"``, ``"elbo"``,
    ``"iwae"``, and ``"annealed"`` where annealing was asked for and applies to every pair.

    Attributes:
        pairs: what was measured, by name.
        likelihood: kind of the likelihood, the same for all: ``"density"``, ``"probability"`` or
            ``"pseudo-likelihood"``.
        num_importance: draws in the importance-weighted bound.
        num_samples: draws of the importance estimate.
        hold: ``"model"`` where all guides were measured against one frozen model.
        seed: seed of all draws.
    """

    pairs: dict[str, Measured]
    likelihood: str
    num_importance: int
    num_samples: int
    hold: str | None
    seed: int

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
        """Return a quantity of a pair.

        Raises:
            InputError: no pair or no quantity of that name.
        """
        if name not in self.pairs:
            raise unknown_name("pair", name, self.pairs)
        if quantity not in self.quantities:
            raise unknown_name("quantity", quantity, self.quantities)
        value: PerDatum = getattr(self.pairs[name], quantity)
        return value

    def best(self, quantity: str | None = None) -> str:
        """Return the name with the highest mean; by default of what the verdicts rest on."""
        quantity = quantity or self.ranked_by
        return max(self.pairs, key=lambda name: self.per_datum(name, quantity).mean)

    def difference(
        self, name: str, quantity: str = "log_prob", *, to: str | None = None
    ) -> Difference:
        """Return the paired difference of one pair to another, by default to the best.

        Args:
            name: the pair.
            quantity: what to compare.
            to: the other pair; None takes the one that is best in this quantity.

        Raises:
            InputError: no pair or no quantity of that name.
        """
        to = to or self.best(quantity)
        mine, theirs = self.per_datum(name, quantity), self.per_datum(to, quantity)
        if name == to:
            return Difference(0.0, 0.0, 0.0)
        both_impossible = mine.value.isneginf() & theirs.value.isneginf()
        paired = PerDatum(
            torch.where(both_impossible, 0.0, mine.value - theirs.value),
            torch.hypot(mine.standard_error, theirs.standard_error),
        )
        monte_carlo, spread = paired.mean_standard_error, paired.data_standard_error
        errors = [error for error in (monte_carlo, spread) if not math.isnan(error)]
        # With a single datum nothing is known of the spread over the data, and nothing is claimed.
        error = max(errors) if len(errors) == 2 else math.nan
        return Difference(paired.mean, error, monte_carlo)

    def verdict(self, name: str) -> str:
        """Return ``"best"``, ``"tied"`` or ``"behind"``, by what :attr:`ranked_by` says.

        A pair is behind if its paired difference to the best is more than two standard errors, and
        tied otherwise; the best is called so only where all others are behind. There is no
        correction for the number of pairs: the best of many equal ones is partly luck.
        """
        best = self.best()
        tied = {
            other for other in self.pairs if self.difference(other, self.ranked_by, to=best).is_tie
        }
        if name == best:
            return "best" if tied == {best} else "tied"
        return "tied" if name in tied else "behind"

    def to_dict(self, *, per_datum: bool = False) -> dict[str, Any]:
        """Return plain values for JSON; NaN and infinity become None.

        Args:
            per_datum: with the values of every datum.
        """
        settings = {
            name: getattr(self, name)
            for name in ("likelihood", "num_importance", "num_samples", "hold", "seed", "ranked_by")
        }
        rows = {name: self._row(name) for name in self.pairs}
        if per_datum:
            for name, row in rows.items():
                row["per_datum"] = {
                    quantity: self.per_datum(name, quantity).value.tolist()
                    for quantity in self.quantities
                } | {"pareto_k": self.pairs[name].estimate.pareto_k.tolist()}
        num_data = len(next(iter(self.pairs.values())).elbo.value)
        return _plain({**settings, "num_data": num_data, "pairs": rows})

    def to_dataframe(self) -> Any:
        """Return a pandas ``DataFrame`` with one row per pair and one column per number."""
        import pandas  # type: ignore[import-untyped, unused-ignore]

        rows = {name: self._row(name) for name in self.pairs}
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("pair")

    def to_arviz(self) -> dict[str, Any]:
        """Return the pairs as ArviZ's pointwise densities: ``arviz.compare`` takes them as they are.

        See ``pyro_vae.evaluation.arviz.pointwise_densities``.
        """
        from pyro_vae.evaluation.arviz import pointwise_densities

        found = {}
        for name, pair in self.pairs.items():
            log_prob, pareto_k = self.per_datum(name, self.ranked_by).value, pair.estimate.pareto_k
            if self.ranked_by == "annealed":
                pareto_k = torch.full_like(pareto_k, math.nan)  # it is of the importance weights
            found[name] = pointwise_densities(log_prob, pareto_k, self.num_samples)
        return found

    def plot(self, quantity: str | None = None) -> Figure:
        """Show the paired differences to the best, with their standard errors."""
        from pyro_vae import plots

        quantity = quantity or self.ranked_by
        differences = [self.difference(name, quantity) for name in self.pairs]
        return plots.paired_differences(
            list(self.pairs),
            [difference.mean for difference in differences],
            [difference.standard_error for difference in differences],
            best=self.best(quantity),
            title=f"{_LABELS[quantity]}: difference to the best, with standard error",
        )

    def scatter(self, first: str, second: str, quantity: str | None = None) -> Figure:
        """Show a quantity of every datum under one pair against that under another."""
        from pyro_vae import plots

        quantity = quantity or self.ranked_by
        values = [self.per_datum(name, quantity).value.numpy() for name in (first, second)]
        return plots.datum_against_datum(
            *values, labels=(first, second), title=f"{_LABELS[quantity]} of each datum (nats)"
        )

    def __rich__(self) -> Any:
        from pyro_vae.evaluation.comparison_table import rich_table

        return rich_table(self)

    def __str__(self) -> str:
        from pyro_vae.evaluation.comparison_table import as_text

        return as_text(self)

    def _row(self, name: str) -> dict[str, Any]:
        """Return the numbers of one pair under flat names."""
        pair = self.pairs[name]
        row: dict[str, Any] = {"verdict": self.verdict(name)}
        measured = (*self.quantities, "rate", "distortion")
        if pair.posterior_divergence is not None:
            measured = (*measured, "posterior_divergence")
        for quantity in measured:
            value: PerDatum = getattr(pair, quantity)
            row[quantity] = value.mean
            row[f"{quantity}_standard_error"] = value.mean_standard_error
            row[f"{quantity}_data_standard_error"] = value.data_standard_error
        for quantity in self.quantities:
            difference = self.difference(name, quantity)
            row[f"{quantity}_difference"] = difference.mean
            row[f"{quantity}_difference_standard_error"] = difference.standard_error
        plain = (
            "exact_kl",
            "unreliable_share",
            "median_ess",
            "num_parameters",
            "num_guide_parameters",
            "seconds_per_epoch",
            "seconds_per_1000",
        )
        return row | {column: getattr(pair, column) for column in plain}


_LABELS = {
    "log_prob": "log p(x)",
    "annealed": "log p(x), annealed",
    "iwae": "importance-weighted bound",
    "elbo": "ELBO",
}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
