"""The page of a comparison: what it found in words, tables with every kind of error, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae.app.pages import MANY_UNRELIABLE, PSEUDO, log_prob_name, write_page
from pyro_vae.app.report import Page, plus_minus
from pyro_vae.evaluation.comparison_result import Comparison
from pyro_vae.evaluation.pareto import PARETO_K_LIMIT

_CAPTIONS = {
    "differences": (
        "Paired differences to the best family. Bars: 95% intervals from the spread over the data "
        "points and the spread between runs together; small dots: single runs, each beside the best "
        "family's run of the same seed."
    ),
    "per-datum": "Log p(x) of each datum under two of the families, averaged over the runs.",
}

_Row = Mapping[str, Any]


def write_comparison_page(
    folder: Path,
    comparison: Comparison,
    rows: Mapping[str, _Row],
    singles: Sequence[_Row],
    figures: Mapping[str, Figure],
    made: Mapping[str, Any],
) -> None:
    """Write the page of a comparison into its folder."""
    settings = made["settings"]
    page = Page(
        "Comparison of " + ", ".join(rows),
        subtitle=f"{Path(settings['dataset']).name}, {settings['epochs']} epochs, seeds "
        f"{settings['seed']} to {settings['seed'] + settings['seeds'] - 1}",
    )
    page.section("Result")
    page.text(conclude(comparison))
    _add_warnings(page, comparison)
    _add_ranking(page, comparison, rows)
    page.figure(figures["differences"], caption=_CAPTIONS["differences"])
    page.section("Where the bound goes")
    _add_bounds(page, comparison, rows)
    if "per-datum" in figures:
        page.figure(figures["per-datum"], caption=_CAPTIONS["per-datum"])
    page.section("Reliability and cost")
    _add_cost(page, rows)
    page.section("Single runs")
    _add_runs(page, comparison.ranked_by, singles)
    write_page(page, folder, made)


def conclude(comparison: Comparison) -> str:
    """Say in words what the numbers support, and nothing more."""
    quantity, best = comparison.ranked_by, comparison.best()
    value = comparison.per_datum(best, quantity)
    said = [f"The highest log p(x) is that of {best}, {value.mean:.2f} nats per datum."]
    verdicts = {name: comparison.verdict(name) for name in comparison.pairs if name != best}
    tied = [name for name, verdict in verdicts.items() if verdict == "tied"]
    if tied:
        verb = "is" if len(tied) == 1 else "are"
        said.append(f"{', '.join(tied)} {verb} not told apart from it by these data and runs.")
    for name in (name for name in verdicts if name not in tied):
        difference = comparison.difference(name, quantity)
        said.append(f"{name} is behind by {plus_minus(-difference.mean, difference.half_width, 3)}.")
    said.append("Intervals cover 95%.")
    if comparison.num_runs < 2:
        said.append("With one run each nothing is known of the spread between runs.")
    return " ".join(said)


def _add_warnings(page: Page, comparison: Comparison) -> None:
    if comparison.likelihood == "pseudo-likelihood":
        page.warning(PSEUDO)
    heavy = [
        name
        for name, pair in comparison.pairs.items()
        if pair.unreliable_share > MANY_UNRELIABLE and comparison.ranked_by == "log_prob"
    ]
    if heavy:
        page.warning(
            f"More than {MANY_UNRELIABLE:.0%} of the data points have Pareto k above "
            f"{PARETO_K_LIMIT} under {', '.join(heavy)}: log p(x) there is probably too low and its "
            "Monte Carlo error too small. Annealing checks it: --method both."
        )


def _add_ranking(page: Page, comparison: Comparison, rows: Mapping[str, _Row]) -> None:
    quantity = comparison.ranked_by
    method = "annealing" if quantity == "annealed" else "importance sampling"
    page.table(
        [
            "",
            log_prob_name(comparison.likelihood == "pseudo-likelihood"),
            "error, Monte Carlo",
            "error, over data",
            "deviation between runs",
            "difference to the best (95%)",
            "verdict",
        ],
        [
            [
                name,
                row[quantity],
                row[f"{quantity}_standard_error"],
                row[f"{quantity}_data_standard_error"],
                row[f"{quantity}_run_deviation"],
                plus_minus(
                    row[f"{quantity}_difference"], row[f"{quantity}_difference_half_width"], 3
                ),
                row["verdict"],
            ]
            for name, row in rows.items()
        ],
        caption=f"Test part, nats per datum, by {method} with {comparison.num_samples:,} "
        f"draws, averaged over {comparison.num_runs} runs each. The error over data is shared by all "
        "families, as they saw the same data; differences are paired, so it drops out of them. "
        "Tied: the interval has 0 in it.",
        decimals=3,
    )


def _add_bounds(page: Page, comparison: Comparison, rows: Mapping[str, _Row]) -> None:
    ranked_by, bound = comparison.ranked_by, f"IWAE-{comparison.num_importance}"
    page.table(
        ["", "ELBO", bound, "log p(x)", "log p(x) - ELBO", "rate (KL)", "KL", "distortion"],
        [
            [
                name,
                *(
                    plus_minus(row[each], row[f"{each}_run_deviation"], 3)
                    for each in ("elbo", "iwae", ranked_by)
                ),
                comparison.per_datum(name, ranked_by).mean - comparison.pairs[name].elbo.mean,
                row["rate"],
                "exact" if row["exact_kl"] else "Monte Carlo",
                row["distortion"],
            ]
            for name, row in rows.items()
        ],
        caption="Test part, nats per datum; \N{PLUS-MINUS SIGN} is the deviation between runs. The "
        "gap between log p(x) and the ELBO is what the guide loses.",
        decimals=3,
    )


def _add_cost(page: Page, rows: Mapping[str, _Row]) -> None:
    numbers = {
        "median_ess": "median effective sample size",
        "num_parameters": "parameters trained",
        "seconds_per_epoch": "seconds per epoch",
        "seconds_per_1000": "seconds per 1,000 log p(x)",
    }
    page.table(
        ["", f"data points with k > {PARETO_K_LIMIT}", *numbers.values()],
        [
            [name, f"{row['unreliable_share']:.1%}", *(row[number] for number in numbers)]
            for name, row in rows.items()
        ],
        caption="Importance weights of all runs, and what training and measuring cost on the machine "
        "that ran them.",
    )


def _add_runs(page: Page, quantity: str, singles: Sequence[_Row]) -> None:
    page.table(
        ["", "seed", "log p(x)", "ELBO", "rate (KL)", "distortion", "k > 0.7", "seconds"],
        [
            [
                row["name"],
                str(row["seed"]),
                plus_minus(row[quantity], row[f"{quantity}_standard_error"], 3),
                plus_minus(row["elbo"], row["elbo_standard_error"], 3),
                row["rate"],
                row["distortion"],
                f"{row['unreliable_share']:.1%}",
                row["training_seconds"],
            ]
            for row in singles
        ],
        caption="Test part, nats per datum, with Monte Carlo standard errors.",
    )
