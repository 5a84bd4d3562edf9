"""What the commands of the command line do; imported by a command, never by ``--help``."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vae
from pyro_vae import datasets, guides, likelihoods, networks, plots, priors, runs, tasks
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.evaluation.importance import LogMarginal, log_marginal
from pyro_vae.infer.pair import seeded
from pyro_vae.infer.training import FitResult, fit, resolve_device
from pyro_vae.names import ACTIVATIONS, FAMILIES, LIKELIHOODS, PRIORS, TrainSettings
from pyro_vae.vae import VAE

__all__ = ["build_vae", "evaluate", "print_estimate", "reconstruct", "sample", "train"]

# The estimate at the end of a training run is a first look: at most so many data and samples.
_QUICK_DATA, _QUICK_SAMPLES = 1000, 500
_PICTURE_SEED = 0


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
    """
    settings = _checked(settings)
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
        for part in (dataset.train, dataset.validation, dataset.test):
            if len(part):
                vae.check_data(part)
        record = _record(settings, dataset, device)
        runs.make_folder(folder)
        runs.write_json(folder / runs.CONFIG, runs.describe(vae, record))
        try:
            result = _fit(vae, dataset, settings, device, progress)
        except InputError:
            (folder / runs.CONFIG).unlink()
            folder.rmdir()
            raise
    runs.save_weights(vae, folder)
    test = dataset.test[:_QUICK_DATA].to(device)
    estimate = log_marginal(
        vae.model, vae.guide, test, num_samples=_QUICK_SAMPLES, seed=_PICTURE_SEED
    )
    runs.write_json(folder / "metrics.json", _metrics(result, estimate, dataset))
    _write_pictures(vae, dataset, result, folder, device)
    _print_summary(folder, result, estimate, dataset)
    return folder


def evaluate(
    run: Path, *, num_samples: int, data_root: str | None, device: str, seed: int
) -> dict[str, Any]:
    """Estimate log p(x) of a run's whole test part.

    Returns:
        means per datum in nats: ``log_marginal`` with ``standard_error`` (Monte Carlo) and
        ``data_standard_error``, ``elbo``, ``rate``, ``distortion``, ``num_samples``, ``num_data``.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    place = resolve_device(device)
    vae, dataset = _open(run, data_root, place)
    estimate = log_marginal(
        vae.model, vae.guide, dataset.test.to(place), num_samples=num_samples, seed=seed
    )
    return _estimate_as_dict(estimate)


def print_estimate(values: dict[str, Any], *, as_json: bool) -> None:
    """Print an estimate as one JSON object alone on standard output, or as a table."""
    if as_json:
        sys.stdout.write(json.dumps(runs.finite_or_none(values)) + "\n")
        return
    table = Table(title="Whole test part, nats per datum", title_justify="left", min_width=52)
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if name[:3] == "num" else f"{value:.3f}")
    Console().print(table)


def sample(run: Path, *, number: int, mean: bool, output: Path | None, seed: int) -> Path:
    """Draw new data from a run's model and write them as a picture; return its path."""
    if number < 1:
        raise InputError(f"expected a number of samples of at least 1, got {number}")
    vae, dataset = _open(run, None, torch.device("cpu"), data_needed=False)
    path = _picture_path(output, run / f"samples-seed-{seed}.png")
    like = torch.zeros(number, *_data_shape(vae))
    drawn = tasks.generate(vae.model, like, mean=mean, seed=seed)
    data = like if dataset is None else dataset.test
    _save_picture(_sample_picture(drawn, data, mean), path)
    return path


def reconstruct(
    run: Path, *, number: int, data_root: str | None, output: Path | None, seed: int
) -> Path:
    """Reconstruct a run's first test data and write them as a picture; return its path."""
    if number < 1:
        raise InputError(f"expected a number of data of at least 1, got {number}")
    vae, dataset = _open(run, data_root, torch.device("cpu"))
    path = _picture_path(output, run / f"reconstructions-seed-{seed}.png")
    _save_picture(_reconstruction_picture(vae, dataset.test[:number], seed), path)
    return path


def build_vae(settings: TrainSettings, dataset: Dataset) -> VAE:
    """Build the VAE that the settings name for data of this shape."""
    shape, hidden = dataset.data_shape, _hidden(settings.hidden)
    activation = settings.activation
    encoder = networks.MLPEncoder(shape, hidden, activation=activation)
    decoder = networks.MLPDecoder(settings.latent_dim, hidden[::-1], activation=activation)
    guide = getattr(guides, FAMILIES[settings.guide])(encoder, settings.latent_dim)
    prior = getattr(priors, PRIORS[settings.prior])(settings.latent_dim)
    options: dict[str, Any] = {}
    if settings.likelihood == "gaussian":
        options["sigma"] = _sigma(settings.sigma)
    likelihood = getattr(likelihoods, LIKELIHOODS[settings.likelihood])(decoder, shape, **options)
    likelihood.check(dataset.train)
    likelihood.start_at_mean(dataset.train.mean(0))
    return VAE(prior, likelihood, guide)


def _checked(settings: TrainSettings) -> TrainSettings:
    """Refuse names and numbers out of range before anything heavy happens."""
    for kind, name, known in (
        ("prior", settings.prior, PRIORS),
        ("likelihood", settings.likelihood, LIKELIHOODS),
        ("guide", settings.guide, FAMILIES),
        ("activation", settings.activation, ACTIVATIONS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    if settings.binarize is not None and settings.binarize not in datasets.BINARIZATIONS:
        raise unknown_name("binarisation", settings.binarize, datasets.BINARIZATIONS)
    _hidden(settings.hidden)
    _sigma(settings.sigma)
    if settings.binarize is None:
        bits = settings.likelihood == "bernoulli"
        settings = replace(settings, binarize="dynamic" if bits else "none")
    return settings


def _hidden(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise InputError(
            f"expected hidden widths as whole numbers of at least 1 between commas, got {text!r}: "
            "e.g. 512,256"
        )
    return widths


def _sigma(text: str) -> float | str:
    if text in ("learned", "per-pixel"):
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"expected sigma as a positive number, 'learned' or 'per-pixel', got {text!r}"
        ) from None


def _new_folder(output: Path | None, settings: TrainSettings) -> Path:
    if output is None:
        name = f"{Path(settings.dataset).stem}-{settings.prior}-{settings.guide}"
        output = Path("runs") / name
        number = 1
        while output.exists():
            number += 1
            output = Path("runs") / f"{name}-{number}"
    if output.exists() and not output.is_dir():
        raise InputError(f"expected a folder as output, {output} is a file: choose another")
    if runs.is_run(output):
        raise InputError(f"expected a folder without a run, {output} holds one: choose another")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"expected a new or empty folder, {output} has files in it: choose another")
    return output


def _record(settings: TrainSettings, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Return what a run must know about itself from its first second on."""
    return {
        "settings": asdict(settings),
        "checksums": dataset.checksums,
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
        warmup_epochs=_warmup_epochs(settings),
        patience=settings.patience,
        device=device,
        progress=progress,
    )


def _warmup_epochs(settings: TrainSettings) -> int:
    """Return the warm-up as told; by default a tenth of the run, which keeps the latents in use."""
    if settings.warmup_epochs is None:
        return settings.epochs // 10
    return settings.warmup_epochs


def _open(
    run: Path, data_root: str | None, device: torch.device, *, data_needed: bool = True
) -> tuple[VAE, Any]:
    """Load a run's VAE and data; refuse data that changed since the training."""
    config = runs.read_config(run)
    vae = runs.load(run, device=str(device))
    try:
        settings = TrainSettings(**config["run"]["settings"])
        checksums = config["run"]["checksums"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"expected the settings of `pyro-vae train` in {run}, got a folder by pv.save: use the "
            "library on it"
        ) from error
    image = plots.is_image(_data_shape(vae))
    if image and not data_needed:
        return vae, None
    dataset = datasets.load(
        settings.dataset,
        data_root or settings.data_root,
        binarize=settings.binarize or "none",
        validation_size=settings.validation_size,
        seed=settings.seed,
    )
    if dataset.checksums != checksums:
        raise InputError(
            f"expected the data that {run} was trained on, got others by the checksum: restore them "
            "or give --data-root"
        )
    return vae, dataset


def _metrics(result: FitResult, estimate: LogMarginal, dataset: Dataset) -> dict[str, Any]:
    return {
        "history": {name: curve.tolist() for name, curve in result.history.items()},
        "best_epoch": result.best_epoch,
        "training_seconds": result.seconds,
        "num_parameters": result.num_parameters,
        "test": _estimate_as_dict(estimate),
        "test_part": f"first {len(estimate.log_prob)} of {len(dataset.test)} test data, "
        f"{estimate.num_samples} samples",
        "pseudo_likelihood": _is_pseudo(dataset),
    }


def _data_shape(vae: VAE) -> tuple[int, ...]:
    assert isinstance(vae.likelihood, likelihoods.Likelihood)  # the commands build no other
    return vae.likelihood.data_shape


def _is_pseudo(dataset: Dataset) -> bool:
    """Say whether a Bernoulli would score grey values, which is no density."""
    return bool(((dataset.test > 0) & (dataset.test < 1)).any())


def _estimate_as_dict(estimate: LogMarginal) -> dict[str, Any]:
    return {
        "log_marginal": estimate.mean,
        "standard_error": estimate.mean_standard_error,
        "data_standard_error": estimate.data_standard_error,
        "elbo": estimate.elbo.mean().item(),
        "rate": estimate.rate.mean().item(),
        "distortion": estimate.distortion.mean().item(),
        "num_samples": estimate.num_samples,
        "num_data": len(estimate.log_prob),
    }


def _write_pictures(
    vae: VAE, dataset: Dataset, result: FitResult, folder: Path, device: torch.device
) -> None:
    like = dataset.test[:1].expand(64, *dataset.data_shape).to(device)
    drawn = tasks.generate(vae.model, like, seed=_PICTURE_SEED)
    _save_picture(_sample_picture(drawn, dataset.test, True), folder / "samples.png")
    rebuilt = _reconstruction_picture(vae, dataset.test[:12].to(device), _PICTURE_SEED)
    _save_picture(rebuilt, folder / "reconstructions.png")
    if len(result.history["train_elbo"]):
        title = f"Training: {dataset.name}, {result.num_parameters:,} parameters"
        _save_picture(plots.training_curves(result.history, title=title), folder / "training.png")


def _sample_picture(drawn: Tensor, data: Tensor, mean: bool) -> Figure:
    what = "means of p(x|z)" if mean else "draws of p(x|z)"
    title = f"{len(drawn)} samples: z from the prior, {what}"
    values = drawn.cpu().numpy()
    return plots.samples(values, data.numpy(), title=title, limits=_limits(data))


def _reconstruction_picture(vae: VAE, x: Tensor, seed: int) -> Figure:
    rebuilt = tasks.reconstruct(vae.model, vae.guide, x, seed=seed)
    title = "Held-out data and their reconstructions (z from the guide, mean of p(x|z))"
    data = x.cpu()
    return plots.reconstructions(
        data.numpy(), rebuilt.cpu().numpy(), title=title, limits=_limits(data)
    )


def _limits(data: Tensor) -> tuple[float, float]:
    """Return the values shown as white and black: [0, 1], or the data's range if it is another."""
    low, high = data.min().item(), data.max().item()
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _picture_path(output: Path | None, default: Path) -> Path:
    path = output or default
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture file .png, .svg or .pdf, got {path.name!r}")
    return path


def _save_picture(figure: Figure, path: Path) -> None:
    runs.make_folder(path.parent)
    figure.savefig(path)


def _print_summary(folder: Path, result: FitResult, estimate: LogMarginal, dataset: Dataset) -> None:
    table = Table(title="Test data, nats per datum", title_justify="left", min_width=52)
    table.add_column("quantity")
    table.add_column("mean", justify="right")
    table.add_column("standard error", justify="right")
    count = len(estimate.log_prob) ** 0.5
    name = "log p(x)" + (" (pseudo-likelihood)" if _is_pseudo(dataset) else "")
    table.add_row(name, f"{estimate.mean:.2f}", f"{estimate.data_standard_error:.2f}")
    for label, values in (
        ("ELBO", estimate.elbo),
        ("rate (KL)", estimate.rate),
        ("distortion", estimate.distortion),
    ):
        error = values.std().item() / count if len(values) > 1 else float("nan")
        table.add_row(label, f"{values.mean().item():.2f}", f"{error:.2f}")
    table.caption = (
        f"{len(estimate.log_prob)} of {len(dataset.test)} test data, {estimate.num_samples} samples; "
        f"errors over data;\nMonte Carlo error of log p(x) {estimate.mean_standard_error:.3f}"
    )
    table.caption_justify = "left"
    console = Console()
    console.print(table)
    epochs = len(result.history["train_elbo"])
    console.print(f"{epochs} epochs in {result.seconds:.1f} s on {result.device}")
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
