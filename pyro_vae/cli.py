"""The command line: options and their help; ``commands`` does the work, imported when needed."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.errors import InputError
from pyro_vae.names import (
    ACTIVATIONS,
    FAMILIES,
    LIKELIHOODS,
    METHODS,
    PRIORS,
    EvaluateSettings,
    TrainSettings,
)

__all__ = ["app", "main"]

app = typer.Typer(
    help="Variational autoencoders in Pyro: train, measure log p(x), look at what was learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_default, _how = TrainSettings(), EvaluateSettings()
_Run = Annotated[Path, typer.Argument(help="Run folder written by `pyro-vae train`.")]
_DataRoot = Annotated[str | None, typer.Option(help="Folder of the data set; default: the run's.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_Picture = Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.")]


def _one_of(names: object) -> str:
    return ", ".join(map(str, names))  # type: ignore[call-overload]


@app.command()
def train(
    dataset: Annotated[
        str, typer.Option(help="digits, mnist, fashion-mnist, kmnist, omniglot, or a .npy/.npz file.")
    ] = _default.dataset,
    data_root: Annotated[
        str | None, typer.Option(help="Folder of the named sets; default: $PYRO_VAE_DATA.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download a named set that is missing.")
    ] = False,
    validation_size: Annotated[
        int | None, typer.Option(help="Data held out of training; default a tenth, 0 = none.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; default: a new one below runs/.")
    ] = None,
    prior: Annotated[str, typer.Option(help=_one_of(PRIORS))] = _default.prior,
    num_components: Annotated[
        int | None,
        typer.Option(help="Components of gaussian-mixture (10) or vamp (a tenth of the data)."),
    ] = None,
    likelihood: Annotated[str, typer.Option(help=_one_of(LIKELIHOODS))] = _default.likelihood,
    sigma: Annotated[
        str, typer.Option(help="Gaussian likelihood: a number, learned, or per-pixel.")
    ] = _default.sigma,
    guide: Annotated[str, typer.Option(help=_one_of(FAMILIES))] = _default.guide,
    latent_dim: Annotated[int, typer.Option(help="Size of the latent vector.")] = _default.latent_dim,
    hidden: Annotated[
        str, typer.Option(help="Widths from the data to the latent side; the decoder mirrors them.")
    ] = _default.hidden,
    activation: Annotated[str, typer.Option(help=_one_of(ACTIVATIONS))] = _default.activation,
    beta: Annotated[float, typer.Option(help="Weight of the KL term.")] = _default.beta,
    warmup_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs over which beta rises from 0; default: a tenth of the epochs."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = _default.epochs,
    batch_size: Annotated[int, typer.Option(help="Data per step.")] = _default.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Adam's step size.")] = _default.learning_rate,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better validation ELBO.")
    ] = None,
    binarize: Annotated[
        str | None,
        typer.Option(
            help="dynamic, static, threshold or none; default: dynamic for bernoulli, else none."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of split, initial weights and training.")] = 0,
    device: _Device = "auto",
) -> None:
    """Train a VAE, estimate log p(x) on its test data, write a run folder with pictures."""
    from pyro_vae import commands

    settings = TrainSettings(
        dataset=dataset,
        data_root=data_root,
        download=download,
        validation_size=validation_size,
        binarize=binarize,
        prior=prior,
        num_components=num_components,
        likelihood=likelihood,
        sigma=sigma,
        guide=guide,
        latent_dim=latent_dim,
        hidden=hidden,
        activation=activation,
        beta=beta,
        warmup_epochs=warmup_epochs,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        seed=seed,
        device=device,
    )
    commands.train(settings, output)


@app.command()
def evaluate(
    run: _Run,
    method: Annotated[str, typer.Option(help=_one_of(METHODS))] = _how.method,
    num_samples: Annotated[
        int, typer.Option(help="Importance samples per datum.")
    ] = _how.num_samples,
    target_standard_error: Annotated[
        float | None,
        typer.Option(help="Nats; the samples become a pilot that decides each datum's number."),
    ] = None,
    num_chains: Annotated[int, typer.Option(help="Annealing: chains per datum.")] = _how.num_chains,
    num_steps: Annotated[int, typer.Option(help="Annealing: steps.")] = _how.num_steps,
    num_data: Annotated[int | None, typer.Option(help="Only the first so many test data.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Picture of Pareto k per datum and of the estimate's convergence."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    data_root: _DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: _Device = "auto",
) -> None:
    """Estimate log p(x) of a run's test part by importance sampling, annealing, or both."""
    from pyro_vae import commands

    how = EvaluateSettings(
        method=method,
        num_samples=num_samples,
        target_standard_error=target_standard_error,
        num_chains=num_chains,
        num_steps=num_steps,
        num_data=num_data,
        seed=seed,
    )
    commands.print_estimate(
        commands.evaluate(run, how, data_root=data_root, device=device, picture=picture),
        as_json=as_json,
    )


@app.command()
def sample(
    run: _Run,
    num: Annotated[
        int | None, typer.Option(help="How many; default: 64 images or 1000 vectors.")
    ] = None,
    mean: Annotated[
        bool | None,
        typer.Option(
            "--mean/--draw",
            help="Means of the likelihood or draws; default: draws for real vectors, else means.",
        ),
    ] = None,
    output: _Picture = None,
    data_root: _DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Draw new data from a run's model into a picture."""
    from pyro_vae import commands

    typer.echo(
        commands.sample(run, number=num, mean=mean, data_root=data_root, output=output, seed=seed)
    )


@app.command()
def reconstruct(
    run: _Run,
    num: Annotated[
        int | None, typer.Option(help="How many; default: 12 images or 500 vectors.")
    ] = None,
    output: _Picture = None,
    data_root: _DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Reconstruct a run's first test data into a picture."""
    from pyro_vae import commands

    typer.echo(commands.reconstruct(run, number=num, data_root=data_root, output=output, seed=seed))


def main() -> None:
    """Run the command line.

    A user's mistake, and a file that can't be read or written, is one line on standard error and exit
    code 2; a warning is one line on standard error.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        try:
            app()
        except InputError as error:
            _tell(str(error))
            sys.exit(2)
        except OSError as error:
            where = error.filename or "the output"
            _tell(f"expected to read or write {where}, got: {error.strerror}")
            sys.exit(2)


def _tell(text: str) -> None:
    sys.stderr.write(f"pyro-vae: {text}\n")
