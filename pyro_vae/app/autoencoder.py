"""``pyro-vae autoencoder``: the deterministic baseline beside a VAE of the same networks."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pyro_vae import plots
from pyro_vae.app.names import COMPILE, TrainSettings
from pyro_vae.app.pictures import limits_of, save_picture
from pyro_vae.app.run import check_new_folder, describe_origin, load_data
from pyro_vae.app.settings import build_vae, check_settings, objective_of, tell_defaults
from pyro_vae.autoencoder import LOSSES, Autoencoder, AutoencoderFit
from pyro_vae.datasets import Dataset
from pyro_vae.errors import unknown_name
from pyro_vae.guides import VariationalFamily
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.likelihoods import Likelihood
from pyro_vae.pair.functions import resolve_device, seeded
from pyro_vae.runs.files import write_json
from pyro_vae.tasks.autoencoder_comparison import AutoencoderComparison, compare_autoencoder
from pyro_vae.vae import VAE

_SEED = 0  # of what is drawn from the trained models


def autoencoder(
    settings: TrainSettings,
    loss: str | None,
    *,
    output: Path,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train an autoencoder and a VAE on the same data and compare them.

    Both start from the same weights of encoder and decoder. Writes ``autoencoder.png`` and
    ``autoencoder.json``.

    Args:
        settings: what to train on what, and how; schedule, gradient clipping and precision, which the
            autoencoder's training does not have, are not used, nor is beta.
        loss: of the autoencoder; by default ``mse`` beside a Gaussian likelihood, else ``bce``.
        output: a new or empty folder.
        progress: show a progress bar; by default on a terminal.

    Returns:
        what the JSON holds: ``table`` (row by row, for ``autoencoder`` and ``vae``), both histories,
        the settings and their origin.

    Raises:
        InputError: settings or data out of range, or a folder with files in it.
        OSError: a folder that can't be written.
    """
    settings = check_settings(settings)
    loss = loss or ("mse" if settings.likelihood == "gaussian" else "bce")
    if loss not in LOSSES:
        raise unknown_name("loss", loss, LOSSES)
    folder = output.expanduser()
    check_new_folder(folder)
    resolve_device(settings.device)
    dataset = load_data(settings)
    settings = tell_defaults(settings, len(dataset.train))
    comparison, fits = _trained(settings, loss, dataset, progress)
    result = {
        "table": comparison.table(),
        "loss": loss,
        "history": {
            side: {name: curve.tolist() for name, curve in made.history.items()}
            for side, made in fits.items()
        },
        "training_seconds": {side: made.seconds for side, made in fits.items()},
        "num_parameters": {side: made.num_parameters for side, made in fits.items()},
        "settings": asdict(settings),
        "checksums": dataset.checksums,
        **describe_origin(),
    }
    figure = plots.autoencoder_and_vae(
        comparison.held_out.numpy(),
        *(_as_arrays(side) for side in (comparison.autoencoder, comparison.vae)),
        title=f"Autoencoder ({loss}) and VAE on {Path(dataset.name).name}: test data",
        limits=limits_of(dataset),
    )
    save_picture(figure, folder / "autoencoder.png")
    write_json(folder / "autoencoder.json", result)
    _print(comparison, fits, folder)
    return result


def _trained(
    settings: TrainSettings, loss: str, dataset: Dataset, progress: bool | None
) -> tuple[AutoencoderComparison, dict[str, AutoencoderFit | FitResult]]:
    """Train both on the same data and measure them."""
    options: dict[str, Any] = {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "patience": settings.patience,
        "device": settings.device,
        "progress": progress,
    }
    with seeded(settings.seed):
        vae = build_vae(settings, dataset)
        baseline = _autoencoder_like(vae)
        deterministic = baseline.fit(dataset, loss=loss, **options)
        variational = fit(
            vae.model,
            vae.guide,
            dataset,
            objective=objective_of(settings),
            warmup_epochs=settings.warmup_epochs or 0,
            compile=COMPILE[settings.compile],
            **options,
        )
    device = next(vae.parameters()).device
    with seeded(_SEED):
        train = dataset.draw(dataset.train.to(device))
    comparison = compare_autoencoder(
        baseline, vae.model, vae.guide, train, dataset.test.to(device), seed=_SEED
    )
    return comparison, {"autoencoder": deterministic, "vae": variational}


def _autoencoder_like(vae: VAE) -> Autoencoder:
    """Return an autoencoder with copies of a VAE's networks."""
    # The commands build no other components.
    assert isinstance(vae.variational_family, VariationalFamily)
    assert isinstance(vae.likelihood, Likelihood)
    encoder = copy.deepcopy(vae.variational_family.encoder)
    return Autoencoder(encoder, copy.deepcopy(vae.likelihood.decoder))


def _as_arrays(side: Any) -> Any:
    return side._replace(**{name: value.numpy() for name, value in side._asdict().items()})


def _print(
    comparison: AutoencoderComparison, fits: dict[str, AutoencoderFit | FitResult], folder: Path
) -> None:
    title = "Test data: root-mean-square errors per value, median distances"
    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    table.add_column("autoencoder", justify="right")
    table.add_column("VAE", justify="right")
    for name, values in comparison.table().items():
        table.add_row(name, f"{values['autoencoder']:.3f}", f"{values['vae']:.3f}")
    seconds = [f"{fits[side].seconds:.1f}" for side in ("autoencoder", "vae")]
    table.add_row("training seconds", *seconds)
    console = Console()
    console.print(table)
    console.print(f"written: {folder}", soft_wrap=True, highlight=False)
