"""`pyro-vae train`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.cli.app import Device, app, one_of
from pyro_vae.names import ACTIVATIONS, FAMILIES, LIKELIHOODS, PRIORS, TrainSettings

_default = TrainSettings()


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
    prior: Annotated[str, typer.Option(help=one_of(PRIORS))] = _default.prior,
    num_components: Annotated[
        int | None,
        typer.Option(help="Components of gaussian-mixture (10) or vamp (a tenth of the data)."),
    ] = None,
    likelihood: Annotated[str, typer.Option(help=one_of(LIKELIHOODS))] = _default.likelihood,
    sigma: Annotated[
        str, typer.Option(help="Gaussian likelihood: a number, learned, or per-pixel.")
    ] = _default.sigma,
    guide: Annotated[str, typer.Option(help=one_of(FAMILIES))] = _default.guide,
    latent_dim: Annotated[int, typer.Option(help="Size of the latent vector.")] = _default.latent_dim,
    hidden: Annotated[
        str, typer.Option(help="Widths from the data to the latent side; the decoder mirrors them.")
    ] = _default.hidden,
    activation: Annotated[str, typer.Option(help=one_of(ACTIVATIONS))] = _default.activation,
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
    device: Device = "auto",
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
