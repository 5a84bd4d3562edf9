"""``pyro-vae sweep``: a series of runs over beta, from a high rate to a low one."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.output import Page, plus_minus, print_line, print_table
from pyro_vae.app.pages import PSEUDO, log_prob_name, write_page
from pyro_vae.app.pictures import save_picture
from pyro_vae.app.settings import as_record, check_settings, tell_defaults
from pyro_vae.app.study import Study, open_study, write_rows
from pyro_vae.errors import InputError
from pyro_vae.runs.files import write_json

_Rows = list[dict[str, Any]]
_PICTURE = "rate-distortion.png"
# Of a run, as its row has them and tables show them.
_MEANS = ("rate", "distortion", "elbo", "log_marginal")


def sweep(settings: TrainSettings, betas: str, *, warm_start: bool, output: Path) -> _Rows:
    """Train one run per beta, and write table, rate-distortion picture and page; return the rows.

    A series of the same settings that was begun in the folder is continued. With a warm start, each
    run but the first starts from the one before, without a warm-up of its own.

    Source:
        Higgins et al. 2017 (beta); Alemi et al. 2018, "Fixing a Broken ELBO" (rate and distortion).
    """
    values = _betas(betas)
    if warm_start and len(values) == 1:
        raise InputError("expected --warm-start with several --betas, got one: leave it out")
    for value in values:
        settings = check_settings(replace(settings, beta=value))
    asked = {**asdict(settings), "beta": list(values), "warm_start": warm_start}
    with open_study(output, asked, settings) as study:
        rows = _train(study, settings, values, warm_start)
        columns = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}
        errors = {f"{n}_error": columns[f"{n}_standard_error"] for n in ("rate", "distortion")}
        title = f"Rate and distortion over beta: {Path(settings.dataset).name}, test part"
        curve = [columns[name] for name in ("beta", "rate", "distortion")]
        units = [row["active_units"] for row in rows]
        figure = plots.rate_distortion(*curve, **errors, active_units=units, title=title)
        save_picture(figure, study.folder / _PICTURE)
        write_rows(rows, study.folder / "sweep.csv")
        told = tell_defaults(settings, study.dataset.train, study.dataset.validation)
        used = as_record(told) | {"beta": list(values), "warm_start": warm_start}
        used["device"] = str(study.device)
        if warm_start and settings.warmup_epochs is None:
            used["warmup_epochs"] = [told.warmup_epochs, *(0 for _ in values[1:])]
        made = study.describe(used)
        _write_page(study.folder, rows, figure, made)
        write_json(study.folder / "sweep.json", {"rows": rows, **made})
        names = (*_MEANS, "active_units")
        shown = [[f"{row['beta']:g}", *(row[name] for name in names)] for row in rows]
        label = log_prob_name(rows[0]["pseudo_likelihood"])
        header = ["beta", "rate", "distortion", "ELBO", label, "active units"]
        print_table("Test part, nats per datum", header, shown)
        print_line(f"sweep: {study.folder}")
    return rows


def _train(study: Study, settings: TrainSettings, betas: Sequence[float], warm_start: bool) -> _Rows:
    """Train or load a run per beta; return a row of each."""
    rows: _Rows = []
    before = None
    for beta in betas:
        own = replace(settings, beta=beta)
        if before is not None and settings.warmup_epochs is None:
            own = replace(own, warmup_epochs=0)  # the latents are in use already
        vae, metrics = study.run(f"beta-{repr(beta).removesuffix('.0')}", own, start=before)
        rows.append(_row(beta, metrics))
        before = vae if warm_start else None
    return rows


def _row(beta: float, metrics: dict[str, Any]) -> dict[str, Any]:
    parts = (metrics[name] for name in ("test_log_marginal", "test_data_standard_errors"))
    # Numbers as they were before JSON made null of those that are not finite.
    estimate, errors = ({n: math.nan if v is None else v for n, v in each.items()} for each in parts)
    row: dict[str, Any] = {"beta": beta}
    for name in ("rate", "distortion", "elbo"):
        row |= {name: estimate[name], f"{name}_standard_error": errors[name]}
    return row | {
        "log_marginal": estimate["log_marginal"],
        "log_marginal_standard_error": estimate["data_standard_error"],
        "log_marginal_monte_carlo_error": estimate["standard_error"],
        "pseudo_likelihood": metrics["pseudo_likelihood"],
        **{name: estimate[name] for name in ("num_unreliable", "num_data", "num_samples")},
        **{name: metrics[name] for name in ("active_units", "training_seconds")},
        "epochs": len(metrics["history"]["train_elbo"]),
    }


def _write_page(folder: Path, rows: _Rows, figure: Figure, made: dict[str, Any]) -> None:
    settings = made["settings"]
    parts = ", ".join((settings["prior"], settings["likelihood"], settings["guide"]))
    about = f"{Path(settings['dataset']).name}: {parts}"
    page = Page("Rate and distortion over beta", subtitle=about)
    page.section("Result")
    best = max(rows, key=lambda row: row["elbo"])
    highest = f"{plus_minus(best['elbo'], best['elbo_standard_error'])} nats at beta {best['beta']:g}"
    page.text(f"{len(rows)} runs minimise distortion + beta * rate. The highest ELBO is {highest}.")
    pseudo = rows[0]["pseudo_likelihood"]
    if pseudo:
        page.warning(PSEUDO)
    page.figure(
        figure,
        caption="Rate R = KL(q(z|x) || p(z)) and distortion D = -E[log p(x|z)] of each run, with "
        "standard errors over data. On each straight line R + D = -ELBO stays the same: lower is "
        "better. Beta moves a run along its curve.",
    )
    shown = []
    for row in rows:
        above, seconds = row["num_unreliable"], f"{row['training_seconds']:.1f}"
        share = "unknown" if above is None else f"{above / row['num_data']:.1%}"
        means = [plus_minus(row[name], row[f"{name}_standard_error"]) for name in _MEANS]
        shown.append([f"{row['beta']:g}", *means, share, row["active_units"], seconds])
    header = ["beta", "rate", "distortion", "ELBO", log_prob_name(pseudo)]
    page.table(
        [*header, "not trusted", "active units", "seconds"],
        shown,
        caption=f"First {rows[0]['num_data']:,} test data points, nats per datum, with standard "
        f"errors over data; Monte Carlo from {rows[0]['num_samples']:,} draws per datum. Not "
        "trusted: share of data points whose log p(x) can't be. Active units: variance over data of "
        "the posterior mean above 0.01 (Burda et al. 2016).",
    )
    write_page(page, folder, made)


def _betas(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected betas as numbers separated by commas, got {text!r}") from None
    if len(set(values)) < len(values):
        raise InputError(f"expected each beta once, got {text!r}")
    return values
