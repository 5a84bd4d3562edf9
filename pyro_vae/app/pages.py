"""The pages that commands write: a run's, a comparison's, and the origin that every page states."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae.app.options import in_options
from pyro_vae.app.output import Page, plus_minus
from pyro_vae.evaluation.comparison_result import Comparison
from pyro_vae.files import write_whole

Row = Mapping[str, Any]
PAGE = "report.html"
# Where more than this share of the data has too heavy a tail, their mean can't be trusted either.
MANY_UNRELIABLE = 0.05
# Characters of a command line that fit into the width of a page.
_LINE = 80
# Of the ELBO, as tables name them.
TERMS = {"elbo": "ELBO", "rate": "rate (KL)", "distortion": "distortion"}

PSEUDO = "grey values under a Bernoulli: log p(x) is a pseudo-likelihood, which can't be compared "
PSEUDO += "with a density or with a likelihood of binary data."

_CAPTIONS = {
    "training": "ELBO, rate and distortion against epochs, on the training and the validation part. "
    "The ELBO is minus rate minus distortion.",
    "diagnostics": "Pareto k of each datum's importance weights, and the mean estimate from the "
    "first samples only. Log p(x) is a lower bound in expectation: a curve that still rises is still "
    "too low, and a flat one may be.",
    "samples": "New data drawn from the trained model.",
    "reconstructions": "Test data and what the model makes of their latents.",
    "differences": "Paired differences from the best family. Bars: 95% intervals from the spread "
    "over the data points and the spread between runs together; small dots: single runs, each beside "
    "the best family's run of the same seed.",
    "per-datum": "Log p(x) of each datum under two of the families, averaged over the runs.",
}


def write_run_page(folder: Path, run: Row, metrics: Row, pictures: Mapping[str, Figure]) -> None:
    """Write a training run's page from ``config.json`` and ``metrics.json``, with figures.

    There is none named ``training`` after no epochs.
    """
    settings = run["settings"]
    parts = ", ".join(f"{settings[part]} {part}" for part in ("prior", "likelihood", "guide"))
    about = f"{Path(settings['dataset']).name}: {parts}, {metrics['num_parameters']:,} parameters"
    page = Page(f"Run {folder.name}", subtitle=about)
    _add_result(page, metrics)
    page.section("Training")
    for text in metrics["warnings"]:
        page.warning(f"{in_options(text)}.")
    best, warmup = metrics["best_epoch"], settings["warmup_epochs"]
    kept = f"; the parameters of epoch {best} were kept" if "patience" in settings else ""
    rising = f", which rises over {warmup} epochs" if warmup else ""
    page.text(
        f"{len(metrics['history']['train_elbo']):,} epochs in {metrics['training_seconds']:.1f} s on "
        f"{metrics['device']}, batches of {settings['batch_size']}, objective "
        f"{settings['objective']}, beta {settings['beta']:g}{rising}{kept}. Training step: "
        f"{metrics['compile_choice']}."
    )
    if "training" in pictures:
        page.figure(pictures["training"], caption=_CAPTIONS["training"])
    page.section("Can log p(x) be trusted?")
    add_reliability(page, metrics["test_log_marginal"])
    page.figure(pictures["diagnostics"], caption=_CAPTIONS["diagnostics"])
    page.section("Pictures")
    for name in ("samples", "reconstructions"):
        page.figure(pictures[name], caption=_CAPTIONS[name])
    resolved = {"compile": metrics["compile_choice"], "device": metrics["device"]}
    resolved |= {"start": run["start"], "data points": run["num_data"]}
    write_page(page, folder, {**run, "settings": settings | resolved})


def log_prob_name(pseudo: bool) -> str:
    """Return the name of log p(x) in a table: a pseudo-likelihood is called one."""
    return "log p(x)" + (" (pseudo-likelihood)" if pseudo else "")


def add_reliability(page: Page, estimate: Row) -> None:
    """Say in words and numbers how far an estimate of log p(x) can be trusted."""
    count, untrusted = estimate["num_data"], estimate["num_unreliable"]
    said = (
        f"{untrusted:,} of {count:,} data points can't be trusted: the Pareto k of their importance "
        "weights is above min(0.7, 1 - 1 / log10 of the number of samples), or not known (below 21 "
        "samples)."
    )
    if untrusted > MANY_UNRELIABLE * count:
        page.warning(
            f"{said} Neither their log p(x) nor its standard error means what it says, nor does the "
            "mean over the data. Annealing (pyro-vae evaluate RUN --method annealed), a richer "
            "variational family or more samples help."
        )
    else:
        light = "The weights of the others have a tail light enough for the estimate and its standard"
        page.text(f"{said} {light} error to mean what they say.")
    rows = [
        ["data points not trusted", f"{untrusted / count:.1%}"],
        ["samples per datum", estimate["num_samples"]],
        ["median effective sample size", estimate["median_ess"]],
        ["standard error of the mean, Monte Carlo (nats)", f"{estimate['standard_error']:.4f}"],
        ["standard error of the mean, over data (nats)", estimate["data_standard_error"]],
        ["expected bias of the mean (nats)", f"{estimate['expected_bias']:.4f}"],
    ]
    page.table(["diagnostic", "value"], rows, caption="Importance weights of the test data")


def write_page(page: Page, folder: Path, made: Row) -> None:
    """Write a page, whole or not at all; it ends with how to reproduce it."""
    page.section("How it was made")
    page.code(in_lines(made["command"]))
    used = {name: value for name, value in made["settings"].items() if value is not None}
    page.facts(used, caption="Settings")
    page.facts(made["checksums"], caption="SHA-256 of the data")
    page.facts(made["versions"], caption="Versions")
    write_whole(folder / PAGE, page.html().encode())


def in_lines(command: str) -> str:
    """Return a command line as a shell reads it from several lines, none too wide for the page."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) > _LINE:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _add_result(page: Page, metrics: Row) -> None:
    bound, estimate = metrics["test"], metrics["test_log_marginal"]
    errors = metrics["test_data_standard_errors"]
    page.section("Result")
    if metrics["pseudo_likelihood"]:
        page.warning(PSEUDO)
    name = log_prob_name(metrics["pseudo_likelihood"])
    monte_carlo = f"{estimate['standard_error']:.4f}"
    which = "All" if estimate["num_data"] == bound["num_data"] else "First"
    page.table(
        ["quantity", "mean", "error, Monte Carlo", "error, over data"],
        [
            [name, estimate["log_marginal"], monte_carlo, estimate["data_standard_error"]],
            *([label, estimate[key], None, errors[key]] for key, label in TERMS.items()),
        ],
        caption=f"{which} {estimate['num_data']:,} test data points, {estimate['num_samples']:,} "
        "draws per datum: means per datum in nats, with standard errors where they are known. Rate "
        "and distortion are Monte Carlo estimates. The ELBO is minus rate minus distortion.",
    )
    if (missing := estimate.get("missing")) is not None:
        page.text(f"{missing:.1%} of the values are missing; the numbers are those of the others.")
    if "bits_per_dimension" in estimate:
        page.text(f"Bits per dimension: {estimate['bits_per_dimension']:.3f}.")
    page.text(
        f"Bound of the whole test part ({bound['num_data']:,} data points, one draw each): ELBO "
        f"{bound['elbo']:.2f}, rate {bound['rate']:.2f}, distortion {bound['distortion']:.2f} nats "
        f"per datum. {metrics['active_units']} latent coordinates are in use: the variance over data "
        "of their posterior mean is above 0.01 (Burda et al. 2016)."
    )


def write_comparison_page(
    folder: Path, found: Comparison, singles: Sequence[Row], figures: Mapping[str, Figure], made: Row
) -> None:
    """Write the page of a comparison into its folder, with a row for each of the single runs."""
    settings, rows = made["settings"], found.to_dict()["pairs"]
    seeds = f"{settings['seed']} to {settings['seed'] + settings['seeds'] - 1}"
    about = f"{Path(settings['dataset']).name}, {settings['epochs']} epochs, seeds {seeds}"
    page = Page("Comparison of " + ", ".join(rows), subtitle=about)
    page.section("Result")
    page.text(conclude(found))
    _add_warnings(page, found)
    _add_ranking(page, found, rows)
    page.figure(figures["differences"], caption=_CAPTIONS["differences"])
    page.section("Where the bound goes")
    _add_bounds(page, found, rows)
    if "per-datum" in figures:
        page.figure(figures["per-datum"], caption=_CAPTIONS["per-datum"])
    page.section("Reliability and cost")
    _add_cost(page, rows)
    page.section("Single runs")
    _add_runs(page, found.ranked_by, singles)
    write_page(page, folder, made)


def conclude(comparison: Comparison) -> str:
    """Say in words what the numbers support, and nothing more."""
    quantity, best = comparison.ranked_by, comparison.best()
    value = comparison.per_datum(best, quantity)
    said = [f"The highest log p(x) is that of {best}, {value.mean:.2f} nats per datum."]
    verdicts = {name: comparison.verdict(name) for name in comparison.pairs if name != best}
    tied = [name for name, verdict in verdicts.items() if verdict == "tied"]
    if tied:
        said.append(f"These data and runs do not distinguish {', '.join(tied)} from it.")
    withheld = [name for name, verdict in verdicts.items() if verdict == "withheld"]
    if withheld:
        said.append(f"The numbers do not support a verdict on {', '.join(withheld)}.")
    for name in (name for name, verdict in verdicts.items() if verdict == "behind"):
        difference = comparison.difference(name, quantity)
        said.append(f"{name} is behind by {plus_minus(-difference.mean, difference.half_width, 3)}.")
    said.append("Intervals cover 95%.")
    if comparison.num_runs < 2:
        said.append("One run each says nothing about the spread between runs.")
    return " ".join(said)


def _add_warnings(page: Page, comparison: Comparison) -> None:
    if comparison.likelihood == "pseudo-likelihood":
        page.warning(PSEUDO)
    pairs = comparison.pairs.items()
    heavy = [name for name, pair in pairs if pair.unreliable_share > MANY_UNRELIABLE]
    if heavy and comparison.ranked_by == "log_prob":
        page.warning(
            f"More than {MANY_UNRELIABLE:.0%} of the data points are not trusted under "
            f"{', '.join(heavy)}: there neither log p(x) nor its Monte Carlo error means what it "
            "says. Annealing, with more steps or of more data points, checks it: --method auto, "
            "--num-steps, --max-annealed."
        )


def _add_ranking(page: Page, comparison: Comparison, rows: Mapping[str, Row]) -> None:
    quantity = comparison.ranked_by
    method = "annealing" if quantity == "annealed" else "importance sampling"
    if any(pair.estimate.method == "auto" for pair in comparison.pairs.values()):
        method = "importance sampling, annealed where that is not trusted,"
    parts = ("", "_standard_error", "_data_standard_error", "_run_deviation")
    header = ["", log_prob_name(comparison.likelihood == "pseudo-likelihood")]
    header += ["error, Monte Carlo", "error, over data", "deviation between runs"]
    shown = []
    for name, row in rows.items():
        apart, half_width = (row[f"{quantity}_difference{end}"] for end in ("", "_half_width"))
        to_best = plus_minus(apart, half_width, 3)
        shown.append([name, *(row[quantity + part] for part in parts), to_best, row["verdict"]])
    page.table(
        [*header, "difference from the best (95%)", "verdict"],
        shown,
        caption=f"Test part, nats per datum, by {method} with {comparison.num_samples:,} "
        f"draws, averaged over {comparison.num_runs} runs each. The error over data is shared by all "
        "families, as they saw the same data; differences are paired, so it drops out of them. "
        "Tied: the interval contains 0. Withheld: the numbers do not support a verdict.",
        decimals=3,
    )


def _add_bounds(page: Page, comparison: Comparison, rows: Mapping[str, Row]) -> None:
    ranked_by, bound = comparison.ranked_by, f"IWAE-{comparison.num_importance}"
    means, shown = ("elbo", "iwae", ranked_by), []
    for name, row in rows.items():
        bounds = [plus_minus(row[key], row[f"{key}_run_deviation"], 3) for key in means]
        gap = comparison.per_datum(name, ranked_by).mean - comparison.pairs[name].elbo.mean
        kl = "exact" if row["exact_kl"] else "Monte Carlo"
        shown.append([name, *bounds, gap, row["rate"], kl, row["distortion"]])
    page.table(
        ["", "ELBO", bound, "log p(x)", "log p(x) - ELBO", "rate (KL)", "KL", "distortion"],
        shown,
        caption="Test part, nats per datum; \N{PLUS-MINUS SIGN} is the deviation between runs. The "
        "gap between log p(x) and the ELBO is what the guide loses.",
        decimals=3,
    )


def _add_cost(page: Page, rows: Mapping[str, Row]) -> None:
    numbers = ("median_ess", "num_parameters", "seconds_per_epoch", "seconds_per_1000")
    header = ["", "data points not trusted", "median effective sample size", "parameters trained"]
    cells = {name: [row[number] for number in numbers] for name, row in rows.items()}
    page.table(
        [*header, "seconds per epoch", "seconds per 1,000 log p(x)"],
        [[name, f"{rows[name]['unreliable_share']:.1%}", *own] for name, own in cells.items()],
        caption="Importance weights of all runs, and what training and measuring cost on the machine "
        "that ran them.",
    )


def _add_runs(page: Page, quantity: str, singles: Sequence[Row]) -> None:
    shown = []
    for row in singles:
        means = [plus_minus(row[q], row[f"{q}_standard_error"], 3) for q in (quantity, "elbo")]
        rest = row["rate"], row["distortion"], f"{row['unreliable_share']:.1%}"
        shown.append([row["name"], str(row["seed"]), *means, *rest, row["training_seconds"]])
    page.table(
        ["", "seed", "log p(x)", "ELBO", "rate (KL)", "distortion", "not trusted", "seconds"],
        shown,
        caption="Test part, nats per datum, with Monte Carlo standard errors.",
    )
