"""``pyro-vae train``: from settings to a run folder."""

from __future__ import annotations

import platform
import shlex
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import pyro_vae
from pyro_vae import datasets, plots, runs
from pyro_vae.commands.holding import frozen, take_over_model
from pyro_vae.commands.measuring import (
    active_units,
    as_dict,
    data_standard_errors,
    estimated,
    is_pseudo,
)
from pyro_vae.commands.pages import log_prob_name, write_run_page
from pyro_vae.commands.pictures import (
    diagnostics_picture,
    limits_of,
    reconstruction_picture,
    sample_picture,
    save_picture,
)
from pyro_vae.commands.settings import build_vae, checked, objective_of, warmup_epochs
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.evaluation.importance import LogMarginal
from pyro_vae.infer.pair import seeded
from pyro_vae.infer.processes import Processes
from pyro_vae.infer.training import FitResult, bound_terms, fit, resolve_device
from pyro_vae.names import COMPILE, EvaluateSettings, TrainSettings
from pyro_vae.vae import VAE

# Written last: a run folder that has it is whole.
METRICS = "metrics.json"

# The estimate at the end of a training run is a first look: at most so many data and samples.
_QUICK_DATA, _QUICK_SAMPLES = 1000, 500
_SEED = 0  # of what is drawn from the trained model


def train(settings: TrainSettings, output: Path | None, *, progress: bool | None = None) -> Path:
    """Train a VAE as told, evaluate it, and write a run folder.

    Several processes (see :func:`pyro_vae.fit`) do so together; the first one writes.

    Args:
        settings: what to train on what, and how.
        output: the run folder; by default a new one below ``runs``.
        progress: show a progress bar; by default on a terminal.

    Returns:
        the run folder.

    Raises:
        InputError: settings or data out of range, or a folder that is in use.
        OSError: a folder that can't be written.
    """
    settings = checked(settings)
    processes = Processes.current()
    folder = processes.decided(lambda: _new_folder(output, settings))
    resolve_device(settings.device)
    # One process fetches or unpacks what is missing, and the others find it.
    dataset = processes.first_before_others(lambda: data_of(settings))
    metrics = train_run(settings, dataset, folder, progress=progress)[1]
    _print_summary(folder, metrics)
    return folder


def train_run(
    settings: TrainSettings,
    dataset: Dataset,
    folder: Path,
    *,
    start: VAE | None = None,
    held: VAE | None = None,
    progress: bool | None = None,
) -> tuple[VAE, dict[str, Any]]:
    """Train into a new run folder; nothing is left of a run that does not finish its training.

    Args:
        settings: checked settings.
        dataset: the data they name.
        folder: the run folder to create.
        start: a VAE of the same shape whose weights are the starting point.
        held: a VAE whose prior and likelihood are taken over and stay as they are; the guide alone is
            trained.
        progress: show a progress bar; by default on a terminal.

    Returns:
        the trained VAE and what ``metrics.json`` holds.
    """
    device, processes = resolve_device(settings.device), Processes.current()
    with seeded(settings.seed):
        vae = build_vae(settings, dataset)
        if start is not None:
            vae.load_state_dict(start.state_dict())
        if held is not None:
            take_over_model(vae, held)
        config = runs.describe(vae, _record(settings, dataset, device))
        with ExitStack() as stack:
            processes.decided(lambda: stack.enter_context(runs.new_run(folder, config)))
            result = _fit(vae, dataset, settings, device, progress, hold=held is not None)
            if processes.is_first:
                runs.save_weights(vae, folder)
    test = dataset.test.to(device)
    with seeded(processes.own_seed(_SEED)):
        bound = bound_terms(vae.model, vae.guide, test, processes=processes)
    how = EvaluateSettings(num_samples=_QUICK_SAMPLES, seed=_SEED)
    estimate = estimated(vae, test[:_QUICK_DATA], how)
    metrics = _metrics(result, bound, estimate, len(test)) | {
        "active_units": active_units(vae, test[:_QUICK_DATA]),
        "pseudo_likelihood": is_pseudo(vae, dataset),
    }
    if processes.is_first:
        pictures = _write_pictures(vae, dataset, result, folder)
        pictures["diagnostics"] = diagnostics_picture(estimate)
        write_run_page(folder, config, metrics, pictures)
        runs.write_json(folder / METRICS, metrics)
    return vae, metrics


def data_of(settings: TrainSettings) -> Dataset:
    """Load the data that the settings name."""
    return datasets.load(
        settings.dataset,
        settings.data_root,
        binarize=settings.binarize or "none",
        validation_size=settings.validation_size,
        seed=settings.split_seed,
        download=settings.download,
    )


def origin() -> dict[str, Any]:
    """Return the command line that is running and the versions it runs with."""
    return {
        "command": shlex.join(["pyro-vae", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "matplotlib": matplotlib.__version__,
            "pyro_vae": pyro_vae.__version__,
        },
    }


def _new_folder(output: Path | None, settings: TrainSettings) -> Path:
    if output is None:
        name = f"{Path(settings.dataset).stem}-{settings.prior}-{settings.guide}"
        output = Path("runs") / name
        number = 1
        while output.exists():
            number += 1
            output = Path("runs") / f"{name}-{number}"
    output = output.expanduser()
    runs.check_free(output)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"expected a new or empty folder, {output} has files in it: choose another")
    return output


def _record(settings: TrainSettings, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Return what a run must know about itself from its first second on."""
    return {
        "settings": asdict(settings),
        "checksums": dataset.checksums,
        "limits": limits_of(dataset),
        "device": str(device),
        **origin(),
    }


def _fit(
    vae: VAE,
    dataset: Dataset,
    settings: TrainSettings,
    device: torch.device,
    progress: bool | None,
    *,
    hold: bool,
) -> FitResult:
    vae.to(device)
    with frozen(vae, dataset, device) if hold else nullcontext(vae.model) as model:
        return fit(
            model,
            vae.guide,
            dataset,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            objective=objective_of(settings),
            beta=settings.beta,
            warmup_epochs=warmup_epochs(settings),
            patience=settings.patience,
            schedule=settings.schedule,
            gradient_clip=settings.gradient_clip,
            precision=settings.precision,
            compile=COMPILE[settings.compile],
            device=device,
            progress=progress,
        )


def _metrics(
    result: FitResult, bound: dict[str, float], estimate: LogMarginal, num_test: int
) -> dict[str, Any]:
    return {
        "history": {name: curve.tolist() for name, curve in result.history.items()},
        "best_epoch": result.best_epoch,
        "training_seconds": result.seconds,
        "device": result.device,
        "num_parameters": result.num_parameters,
        "compiled": result.compiled,
        "compile_choice": result.compile_choice,
        # The bound is the whole test part's; log p(x) is a first look at its first data.
        "test": {**bound, "num_data": num_test},
        "test_log_marginal": as_dict(estimate),
        "test_data_standard_errors": data_standard_errors(estimate),
    }


def _write_pictures(vae: VAE, dataset: Dataset, result: FitResult, folder: Path) -> dict[str, Figure]:
    """Write the pictures of a run, each under its name; return them."""
    limits, seed = limits_of(dataset), _SEED
    pictures = {
        "samples": sample_picture(vae, dataset.test, limits, seed=seed),
        "reconstructions": reconstruction_picture(vae, dataset.test, limits, seed=seed),
    }
    if len(result.history["train_elbo"]):
        title = f"Training: {Path(dataset.name).name}, {result.num_parameters:,} parameters"
        pictures["training"] = plots.training_curves(result.history, title=title)
    for name, figure in pictures.items():
        save_picture(figure, folder / f"{name}.png")
    return pictures


def _print_summary(folder: Path, metrics: dict[str, Any]) -> None:
    bound, estimate = metrics["test"], metrics["test_log_marginal"]
    table = Table(title="Test part, nats per datum", title_justify="left")
    table.add_column("quantity")
    table.add_column("mean", justify="right")
    table.add_column("data x samples", justify="right")
    name = log_prob_name(metrics["pseudo_likelihood"])
    used = f"{estimate['num_data']:,} x {estimate['num_samples']}"
    table.add_row(name, f"{estimate['log_marginal']:.2f}", used)
    for label, key in (("ELBO", "elbo"), ("rate (KL)", "rate"), ("distortion", "distortion")):
        table.add_row(label, f"{bound[key]:.2f}", f"{bound['num_data']:,} x 1")
    console = Console()
    console.print(table)
    console.print(
        f"standard error of log p(x): {estimate['data_standard_error']:.2f} over data, "
        f"{estimate['standard_error']:.3f} Monte Carlo"
    )
    epochs = len(metrics["history"]["train_elbo"])
    console.print(f"{epochs} epochs in {metrics['training_seconds']:.1f} s on {metrics['device']}")
    console.print(f"training step: {metrics['compile_choice']}", soft_wrap=True, highlight=False)
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
