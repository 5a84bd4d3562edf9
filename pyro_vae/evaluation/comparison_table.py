"""A comparison as a table for the terminal: one column per pair."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from pyro_vae.evaluation.pareto import PARETO_K_LIMIT

if TYPE_CHECKING:
    from pyro_vae.evaluation.comparison_result import Comparison
    from pyro_vae.evaluation.elbo import PerDatum

_NAMES = {
    "log_prob": "log p(x)",
    "annealed": "log p(x), annealed",
    "iwae": "IWAE-{num_importance}",
    "elbo": "ELBO",
}


def rich_table(comparison: Comparison) -> Any:
    """Return the table with its notes, for rich to print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    num_data = len(next(iter(comparison.pairs.values())).elbo.value)
    table = Table(title=f"{num_data} data, nats per datum", title_justify="left")
    table.add_column("")
    for name in comparison.pairs:
        table.add_column(Text(name), justify="right")
    for label, cells in _rows(comparison).items():
        table.add_row(label, *cells)
    return Group(table, *(Text(note) for note in _notes(comparison)))


def as_text(comparison: Comparison) -> str:
    """Return the table as plain text, as wide as it needs to be."""
    from rich.console import Console

    file = io.StringIO()
    width = 40 + sum(max(28, len(name) + 4) for name in comparison.pairs)
    Console(file=file, width=width, color_system=None, force_jupyter=False).print(
        rich_table(comparison)
    )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _rows(comparison: Comparison) -> dict[str, list[str]]:
    pairs = comparison.pairs
    rows: dict[str, list[str]] = {}
    for quantity in comparison.quantities:
        label = _NAMES[quantity].format(num_importance=comparison.num_importance)
        rows[label] = [_value(comparison.per_datum(name, quantity)) for name in pairs]
        rows[f"  {label}, to the best"] = [_difference(comparison, name, quantity) for name in pairs]
        if quantity == comparison.ranked_by:
            rows["  verdict"] = [comparison.verdict(name) for name in pairs]
    if comparison.ranked_by != "annealed" and any(pair.annealed for pair in pairs.values()):
        rows[_NAMES["annealed"]] = [
            "does not apply" if pair.annealed is None else _value(pair.annealed)
            for pair in pairs.values()
        ]
    rows["rate (KL)"] = [_value(pair.rate) for pair in pairs.values()]
    rows["  KL"] = ["exact" if pair.exact_kl else "Monte Carlo" for pair in pairs.values()]
    rows["distortion"] = [_value(pair.distortion) for pair in pairs.values()]
    divergences = [pair.posterior_divergence for pair in pairs.values()]
    if all(divergence is not None for divergence in divergences):
        rows["KL(q || p(z|x)), quadrature"] = [
            f"{divergence.mean:.4f}" for divergence in divergences if divergence is not None
        ]
    rows[f"data with k > {PARETO_K_LIMIT}"] = [
        f"{100 * pair.unreliable_share:.1f} %" for pair in pairs.values()
    ]
    rows[f"median ESS of {comparison.num_samples:,}"] = [
        f"{pair.median_ess:,.0f}" for pair in pairs.values()
    ]
    rows["parameters trained"] = [f"{pair.num_parameters:,}" for pair in pairs.values()]
    if any(not math.isnan(pair.seconds_per_epoch) for pair in pairs.values()):
        rows["seconds per epoch"] = [f"{pair.seconds_per_epoch:.3g}" for pair in pairs.values()]
    rows["seconds per 1,000 log p(x)"] = [f"{pair.seconds_per_1000:.3g}" for pair in pairs.values()]
    return rows


def _notes(comparison: Comparison) -> list[str]:
    notes = [
        "± Monte Carlo standard error, in brackets the standard error over the data; differences to "
        "the best: standard error of the paired difference, both in it.",
        f"tied: within two standard errors of the best ({_NAMES[comparison.ranked_by]}).",
    ]
    if comparison.likelihood == "pseudo-likelihood":
        notes.append(
            "The likelihood is a pseudo-likelihood: compare with nothing outside this table."
        )
    if comparison.hold == "model":
        notes.append("All guides were measured against one frozen model.")
    heavy = [name for name, pair in comparison.pairs.items() if pair.estimate.num_unreliable]
    if heavy and comparison.ranked_by == "log_prob":
        notes.append(
            f"Some weights of {', '.join(heavy)} have k > {PARETO_K_LIMIT}: log p(x) there is "
            'probably too low and its error too small; methods=("importance", "annealed") checks it.'
        )
    return notes


def _value(quantity: PerDatum) -> str:
    over_data = quantity.data_standard_error
    brackets = "" if math.isnan(over_data) else f" ({_error(over_data)})"
    return f"{_with_error(quantity.mean, quantity.mean_standard_error)}{brackets}"


def _difference(comparison: Comparison, name: str, quantity: str) -> str:
    if name == comparison.best(quantity):
        return "0"
    difference = comparison.difference(name, quantity)
    return _with_error(difference.mean, difference.standard_error)


def _with_error(value: float, error: float) -> str:
    """Show a number to the digits its error leaves, two to four of them after the point."""
    if error == 0:
        return f"{value:.3f} ± 0"
    return f"{value:.{_digits(error)}f} ± {_error(error)}"


def _error(error: float) -> str:
    return f"{error:.{_digits(error)}f}" if math.isfinite(error) else "unknown"


def _digits(error: float) -> int:
    if not math.isfinite(error) or error == 0:
        return 3
    return min(4, max(2, 1 - math.floor(math.log10(error))))
