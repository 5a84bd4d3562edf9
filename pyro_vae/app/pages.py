"""The pages that commands write: a run's own, and what every page says about its origin."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae.app.report import Page
from pyro_vae.evaluation.pareto import PARETO_K_LIMIT
from pyro_vae.files import write_whole

PAGE = "report.html"

# Where more than this share of the data has too heavy a tail, their mean can't be trusted either.
MANY_UNRELIABLE = 0.05

# Characters of a command line that fit into the width of a page.
_LINE = 80

# Of the ELBO, as tables name them.
TERMS = {"elbo": "ELBO", "rate": "rate (KL)", "distortion": "distortion"}

PSEUDO = (
    "grey values under a Bernoulli: log p(x) is a pseudo-likelihood, which can't be compared with a "
    "density or with a likelihood of binary data."
)

_CAPTIONS = {
    "training": (
        "ELBO, rate and distortion against epochs, on the training and the validation part. "
        "The ELBO is minus rate minus distortion."
    ),
    "diagnostics": (
        "Pareto k of each datum's importance weights, and the mean estimate from the first samples "
        "only. Log p(x) is a lower bound in expectation: a curve that still rises is still too "
        "low, and a flat one may be."
    ),
    "samples": "New data drawn from the trained model.",
    "reconstructions": "Test data and what the model makes of their latents.",
}


def write_run_page(
    folder: Path, run: Mapping[str, Any], metrics: Mapping[str, Any], pictures: Mapping[str, Figure]
) -> None:
    """Write a training run's page: of what ``config.json`` and ``metrics.json`` hold, with figures.

    There is none named ``training`` after no epochs.
    """
    settings = run["settings"]
    page = Page(f"Run {folder.name}", subtitle=_parts(settings, metrics["num_parameters"]))
    _add_result(page, metrics)
    page.section("Training")
    for text in metrics["warnings"]:
        page.warning(f"{text}.")
    page.text(_training_text(settings, metrics))
    if "training" in pictures:
        page.figure(pictures["training"], caption=_CAPTIONS["training"])
    page.section("Can log p(x) be trusted?")
    add_reliability(page, metrics["test_log_marginal"])
    page.figure(pictures["diagnostics"], caption=_CAPTIONS["diagnostics"])
    page.section("Pictures")
    for name in ("samples", "reconstructions"):
        page.figure(pictures[name], caption=_CAPTIONS[name])
    resolved = {
        "compile": metrics["compile_choice"],
        "device": metrics["device"],
        "start": run["start"],
        "data points": run["num_data"],
    }
    write_page(page, folder, {**run, "settings": settings | resolved})


def log_prob_name(pseudo: bool) -> str:
    """Return the name of log p(x) in a table: what is no density is called so."""
    return "log p(x)" + (" (pseudo-likelihood)" if pseudo else "")


def add_reliability(page: Page, estimate: Mapping[str, Any]) -> None:
    """Say in words and numbers how far an estimate of log p(x) can be trusted."""
    count, above = estimate["num_data"], estimate["num_unreliable"]
    share = "unknown" if above is None else f"{above / count:.1%}"
    said = f"{above or 0:,} of {count:,} data points have Pareto k above {PARETO_K_LIMIT}"
    if above is None:
        page.text(
            "Too few samples per datum to tell how heavy the importance weights' tail is (Pareto k "
            "needs 21): nothing says whether the estimate can be trusted."
        )
    elif above > MANY_UNRELIABLE * count:
        page.warning(
            f"{said}. For these the estimate of log p(x) is probably too low and its standard error "
            "too small, and so is the mean over the data. Annealing (pyro-vae evaluate RUN --method "
            "annealed), a richer variational family or more samples help."
        )
    else:
        page.text(
            f"{said}. Below that value the importance weights have a tail light enough for the "
            "estimate and its standard error to mean what they say."
        )
    page.table(
        ["diagnostic", "value"],
        [
            [f"data points with Pareto k above {PARETO_K_LIMIT}", share],
            ["samples per datum", estimate["num_samples"]],
            ["median effective sample size", estimate["median_ess"]],
            ["standard error of the mean, Monte Carlo (nats)", f"{estimate['standard_error']:.4f}"],
            ["standard error of the mean, over data (nats)", estimate["data_standard_error"]],
        ],
        caption="Importance weights of the test data",
    )


def write_page(page: Page, folder: Path, made: Mapping[str, Any]) -> None:
    """Write a page whole or not at all, with how to get the same again at its end."""
    page.section("How it was made")
    page.code(in_lines(made["command"]))
    used = {name: value for name, value in made["settings"].items() if value is not None}
    page.facts(used, caption="Settings")
    page.facts(made["checksums"], caption="SHA-256 of the data")
    page.facts(made["versions"], caption="Versions")
    text = page.html()
    write_whole(folder / PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def in_lines(command: str) -> str:
    """Return a command line as a shell reads it from several lines, none too wide for the page."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) > _LINE:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _add_result(page: Page, metrics: Mapping[str, Any]) -> None:
    bound, estimate = metrics["test"], metrics["test_log_marginal"]
    errors = metrics["test_data_standard_errors"]
    page.section("Result")
    if metrics["pseudo_likelihood"]:
        page.warning(PSEUDO)
    name = log_prob_name(metrics["pseudo_likelihood"])
    monte_carlo = f"{estimate['standard_error']:.4f}"
    page.table(
        ["quantity", "mean", "error, Monte Carlo", "error, over data"],
        [
            [name, estimate["log_marginal"], monte_carlo, estimate["data_standard_error"]],
            *([label, estimate[key], None, errors[key]] for key, label in TERMS.items()),
        ],
        caption=f"First {estimate['num_data']:,} test data points, {estimate['num_samples']:,} draws "
        "per datum: means per datum in nats, with standard errors where they are known. Rate and "
        "distortion are Monte Carlo estimates. The ELBO is minus rate minus distortion.",
    )
    page.text(
        f"Bound of the whole test part ({bound['num_data']:,} data points, one draw each): ELBO "
        f"{bound['elbo']:.2f}, rate {bound['rate']:.2f}, distortion {bound['distortion']:.2f} nats "
        f"per datum. {metrics['active_units']} latent coordinates are in use: the variance over data "
        "of their posterior mean is above 0.01 (Burda et al. 2016)."
    )


def _training_text(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    epochs, best = len(metrics["history"]["train_elbo"]), metrics["best_epoch"]
    kept = f"; the parameters of epoch {best} were kept" if "patience" in settings else ""
    warmup = settings["warmup_epochs"]
    rising = f", which rises over {warmup} epochs" if warmup else ""
    return (
        f"{epochs:,} epochs in {metrics['training_seconds']:.1f} s on {metrics['device']}, batches "
        f"of {settings['batch_size']}, objective {settings['objective']}, beta "
        f"{settings['beta']:g}{rising}{kept}. Training step: {metrics['compile_choice']}."
    )


def _parts(settings: Mapping[str, Any], num_parameters: int) -> str:
    prior, likelihood, guide = (settings[part] for part in ("prior", "likelihood", "guide"))
    return (
        f"{Path(settings['dataset']).name}: {prior} prior, {likelihood} likelihood, {guide} guide, "
        f"{num_parameters:,} parameters"
    )
