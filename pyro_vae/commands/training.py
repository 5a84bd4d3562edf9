"""``pyro-vae train``: from settings to a run folder."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.table import Table

import pyro_vae
from pyro_vae import datasets, plots, runs
from pyro_vae.commands.measuring import as_dict, estimated, is_pseudo
from pyro_vae.commands.pictures import (
    limits_of,
    reconstruction_picture,
    sample_picture,
    save_picture,
)
from pyro_vae.commands.settings import build_vae, checked, warmup_epochs
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.evaluation.importance import LogMarginal
from pyro_vae.infer.pair import seeded
from pyro_vae.infer.training import FitResult, bound_terms, fit, resolve_device
from pyro_vae.names import EvaluateSettings, TrainSettings
from pyro_vae.vae import VAE

# The estimate at the end of a training run is a first look: at most so many data and samples.
_QUICK_DATA, _QUICK_SAMPLES = 1000, 500
_SEED = 0  # of what is drawn from the trained model


def train(settings: TrainSettings, output: Path | None, *, progress: bool | None = None) -> Path:
    """Train a VAE as told, evaluate it, and write a run folder.

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
    folder = _new_folder(output, settings)
    device = resolve_device(settings.device)
    dataset = datasets.load(
        settings.dataset,
        settings.data_root,
        binarize=settings.binarize or "none",
        validation_size=settings.validation_size,
        seed=settings.seed,
        download=settings.download,
    )
    with seeded(settings.seed):
        vae = build_vae(settings, dataset)
        record = _record(settings, dataset, device)
        with runs.new_run(folder, runs.describe(vae, record)):
            result = _fit(vae, dataset, settings, device, progress)
            runs.save_weights(vae, folder)
    test = dataset.test.to(device)
    with seeded(_SEED):
        bound = bound_terms(vae.model, vae.guide, test)
    estimate = estimated(
        vae, test[:_QUICK_DATA], EvaluateSettings(num_samples=_QUICK_SAMPLES, seed=_SEED)
    )
    metrics = _metrics(result, bound, estimate, len(test)) | {
        "pseudo_likelihood": is_pseudo(vae, dataset)
    }
    runs.write_json(folder / "metrics.json", metrics)
    _write_pictures(vae, dataset, result, folder)
    _print_summary(folder, metrics)
    return folder


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
        "command": shlex.join(["pyro-vae", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyro_vae": pyro_vae.__version__,
        },
    }


def _fit(
    vae: VAE,
    dataset: Dataset,
    settings: TrainSettings,
    device: torch.device,
    progress: bool | None,
) -> FitResult:
    return fit(
        vae.model,
        vae.guide,
        dataset,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        beta=settings.beta,
        warmup_epochs=warmup_epochs(settings),
        patience=settings.patience,
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
        # The bound is the whole test part's; log p(x) is a first look at its first data.
        "test": {**bound, "num_data": num_test},
        "test_log_marginal": as_dict(estimate),
    }


def _write_pictures(vae: VAE, dataset: Dataset, result: FitResult, folder: Path) -> None:
    limits, seed = limits_of(dataset), _SEED
    save_picture(sample_picture(vae, dataset.test, limits, seed=seed), folder / "samples.png")
    rebuilt = reconstruction_picture(vae, dataset.test, limits, seed=seed)
    save_picture(rebuilt, folder / "reconstructions.png")
    if len(result.history["train_elbo"]):
        title = f"Training: {Path(dataset.name).name}, {result.num_parameters:,} parameters"
        save_picture(plots.training_curves(result.history, title=title), folder / "training.png")


def _print_summary(folder: Path, metrics: dict[str, Any]) -> None:
    bound, estimate = metrics["test"], metrics["test_log_marginal"]
    table = Table(title="Test part, nats per datum", title_justify="left")
    table.add_column("quantity")
    table.add_column("mean", justify="right")
    table.add_column("data x samples", justify="right")
    name = "log p(x)" + (" (pseudo-likelihood)" if metrics["pseudo_likelihood"] else "")
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
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
