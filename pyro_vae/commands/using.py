"""What is done with a finished run: ``pyro-vae evaluate``, ``sample`` and ``reconstruct``."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pyro_vae import datasets, plots, runs
from pyro_vae.commands.measuring import as_dict, estimated, is_pseudo
from pyro_vae.commands.pictures import (
    data_shape_of,
    diagnostics_picture,
    reconstruction_picture,
    sample_picture,
    save_picture,
)
from pyro_vae.commands.settings import check_evaluation, check_seed
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.infer.devices import resolve_device
from pyro_vae.names import EvaluateSettings, TrainSettings
from pyro_vae.vae import VAE

_MOST_PICTURED = 10_000


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
        picture = picture_path(picture, picture)
    place = resolve_device(device)
    vae, settings, _ = opened(run, place)
    dataset = data_of(run, settings, data_root)
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
        sys.stdout.write(json.dumps(runs.finite_or_none(values)) + "\n")
        return
    columns = [values, *([values["annealed"]] if "annealed" in values else [])]
    title = "Means over the test data; bounds and errors in nats"
    table = Table(title=title, title_justify="left", min_width=52)
    table.add_column("quantity")
    for column in columns:
        table.add_column(column["method"], justify="right")
    for name in values:
        if name not in ("method", "annealed"):
            table.add_row(name.replace("_", " "), *(_cell(column[name]) for column in columns))
    Console().print(table)


def sample(
    run: Path,
    *,
    number: int | None,
    mean: bool | None,
    data_root: str | None,
    output: Path | None,
    seed: int,
) -> Path:
    """Draw new data from a run's model and write them as a picture; return its path."""
    check_pictured(number)
    check_seed(seed)
    path = picture_path(output, run / f"samples-seed-{seed}.png")
    vae, settings, limits = opened(run, torch.device("cpu"))
    # Only vectors are shown beside the data.
    image = plots.is_image(data_shape_of(vae))
    data = None if image else data_of(run, settings, data_root).test
    save_picture(sample_picture(vae, data, limits, number=number, mean=mean, seed=seed), path)
    return path


def reconstruct(
    run: Path, *, number: int | None, data_root: str | None, output: Path | None, seed: int
) -> Path:
    """Reconstruct a run's first test data and write them as a picture; return its path."""
    check_pictured(number)
    check_seed(seed)
    path = picture_path(output, run / f"reconstructions-seed-{seed}.png")
    vae, settings, limits = opened(run, torch.device("cpu"))
    data = data_of(run, settings, data_root).test
    save_picture(reconstruction_picture(vae, data, limits, number=number, seed=seed), path)
    return path


def _cell(value: float | int | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def opened(run: Path, device: torch.device) -> tuple[VAE, TrainSettings, tuple[float, float]]:
    """Load a run's VAE, its settings, and the values shown as white and as black."""
    config = runs.read_config(run)
    vae = runs.load(run, device=str(device))
    try:
        low, high = config["run"]["limits"]
        return vae, TrainSettings(**config["run"]["settings"]), (low, high)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"expected the settings of `pyro-vae train` in {run}, got a folder by pv.save: use the "
            "library on it"
        ) from error


def data_of(run: Path, settings: TrainSettings, data_root: str | None) -> Dataset:
    """Load the data a run was trained on; refuse others."""
    source = Path(settings.dataset)
    if data_root is not None and source.suffix in datasets.FILE_TYPES:
        source = Path(data_root) / source.name
    dataset = datasets.load(
        source,
        data_root or settings.data_root,
        binarize=settings.binarize or "none",
        validation_size=settings.validation_size,
        seed=settings.split_seed,
    )
    if dataset.checksums != runs.read_config(run)["run"].get("checksums"):
        raise InputError(
            f"expected the data that {run} was trained on, got others by the checksum: restore them "
            "or give --data-root"
        )
    return dataset


def check_pictured(number: int | None) -> None:
    """Refuse a number of data that no picture shows."""
    if number is not None and not 1 <= number <= _MOST_PICTURED:
        raise InputError(f"expected a number from 1 to {_MOST_PICTURED:,} to show, got {number}")


def picture_path(output: Path | None, default: Path) -> Path:
    """Return the file to write a picture to, or refuse one of another kind."""
    path = (output or default).expanduser()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture file .png, .svg or .pdf, got {path.name!r}")
    return path
