"""What is done with a finished run: ``pyro-vae evaluate``, ``sample`` and ``reconstruct``."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console
from rich.table import Table

from pyro_vae import plots
from pyro_vae.app.evaluate import as_dict, estimated, is_pseudo
from pyro_vae.app.names import EvaluateSettings
from pyro_vae.app.pictures import (
    data_shape_of,
    diagnostics_picture,
    reconstruction_picture,
    sample_picture,
    save_picture,
)
from pyro_vae.app.run import PictureOptions, RunPicture, check_pictured, data_of_run, opened_run
from pyro_vae.app.settings import check_evaluation
from pyro_vae.app.writing import picture_path
from pyro_vae.evaluation.pareto import PARETO_K_LIMIT
from pyro_vae.files import finite_or_none
from pyro_vae.pair.functions import resolve_device

# Of the numbers of an estimate, as a table names them.
_LABELS = {
    "log_marginal": "log p(x)",
    "standard_error": "its error, Monte Carlo",
    "data_standard_error": "its error, over data",
    "elbo": "ELBO",
    "rate": "rate (KL)",
    "distortion": "distortion",
    "num_data": "data",
    "num_samples": "draws per datum",
    "num_unreliable": f"data with Pareto k above {PARETO_K_LIMIT}",
    "median_ess": "median effective sample size",
    "acceptance": "acceptance of annealing",
}


def evaluate(
    run: Path,
    how: EvaluateSettings,
    *,
    data_root: str | None,
    device: str,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Estimate log p(x) of a run's test part.

    Args:
        run: the run folder.
        how: method, samples, chains and seed.
        data_root: where the data are now; by default where they were.
        device: where to compute.
        picture: file for a picture of the importance weights' diagnostics.

    Returns:
        means per datum in nats: ``log_marginal`` with ``standard_error`` (Monte Carlo) and
        ``data_standard_error``, ``elbo``, ``rate``, ``distortion``, ``num_samples``, ``num_data``;
        with both methods, annealing's under ``annealed``.

    Raises:
        InputError: no run there, data that changed since, or options out of range.

    Warns:
        UserWarning: the number is a pseudo-likelihood, or can't be trusted for some data.
    """
    check_evaluation(how)
    if picture is not None:
        picture = picture_path(picture)
    place = resolve_device(device)
    vae, settings, _ = opened_run(run, place)
    dataset = data_of_run(run, settings, data_root)
    if is_pseudo(vae, dataset):
        warnings.warn(
            "grey values under a Bernoulli: log p(x) is a pseudo-likelihood, not comparable with a "
            "density",
            stacklevel=2,
        )
    test = dataset.test[: how.num_data].to(place)
    methods = ("importance", "annealed") if how.method == "both" else (how.method,)
    # The target is importance sampling's; annealing has its chains and steps.
    targets = {"importance": how.target_standard_error, "annealed": None}
    if how.method == "both":
        ways = [replace(how, method=m, target_standard_error=targets[m]) for m in methods]
    else:
        ways = [how]
    estimates = [estimated(vae, test, way) for way in ways]
    if picture is not None:
        save_picture(diagnostics_picture(estimates[0]), picture)
    values = as_dict(estimates[0])
    if how.method == "both":
        values["annealed"] = as_dict(estimates[1])
    return values


def print_estimate(values: dict[str, Any], *, as_json: bool) -> None:
    """Print an estimate as one JSON object alone on standard output, or as a table."""
    if as_json:
        sys.stdout.write(json.dumps(finite_or_none(values)) + "\n")
        return
    columns = [values, *([values["annealed"]] if "annealed" in values else [])]
    table = Table(title="Test part, nats per datum", title_justify="left", min_width=52)
    table.add_column("quantity")
    for column in columns:
        table.add_column(column["method"], justify="right")
    for name, label in _LABELS.items():
        table.add_row(label, *(_cell(column[name]) for column in columns))
    Console().print(table)


def sample(
    run: Path, *, number: int | None, mean: bool | None, **options: Unpack[PictureOptions]
) -> Path:
    """Draw new data from a run's model and write them as a picture; return its path."""
    check_pictured(number)
    picture = RunPicture(run, "samples", **options)
    # Only vectors are shown beside the data.
    image = plots.is_image(data_shape_of(picture.vae))
    data = None if image else picture.dataset.test
    figure = sample_picture(
        picture.vae, data, picture.limits, number=number, mean=mean, seed=picture.seed
    )
    return picture.saved(figure)


def reconstruct(run: Path, *, number: int | None, **options: Unpack[PictureOptions]) -> Path:
    """Reconstruct a run's first test data and write them as a picture; return its path."""
    check_pictured(number)
    picture = RunPicture(run, "reconstructions", **options)
    data = picture.dataset.test
    figure = reconstruction_picture(
        picture.vae, data, picture.limits, number=number, seed=picture.seed
    )
    return picture.saved(figure)


def _cell(value: float | int | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
