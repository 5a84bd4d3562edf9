"""`pyro-vae autoencoder`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.app.cli.app import command
from pyro_vae.app.cli.options import gathers
from pyro_vae.app.names import TrainSettings


@command()
@gathers(
    TrainSettings,
    without=(
        *("prior", "num_components", "guide", "beta"),
        *("schedule", "gradient_clip", "precision"),  # the autoencoder's training has none
    ),
)
def autoencoder(
    *,
    output: Annotated[Path, typer.Option(help="Folder; the same command goes on in one it began.")],
    loss: Annotated[
        str | None,
        typer.Option(help="The autoencoder's: mse or bce; default: mse for gaussian, else bce."),
    ] = None,
    settings: TrainSettings,
) -> None:
    """Train an autoencoder and a VAE on the same data; compare them in a table and a picture."""
    from pyro_vae.app.autoencoder import autoencoder as run_autoencoder

    run_autoencoder(settings, loss, output=output)
