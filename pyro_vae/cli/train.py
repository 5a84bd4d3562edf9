"""`pyro-vae train`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.cli.app import app
from pyro_vae.cli.options import gathers
from pyro_vae.names import TrainSettings


@app.command()
@gathers(TrainSettings)
def train(
    settings: TrainSettings,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; default: a new one below runs/.")
    ] = None,
) -> None:
    """Train a VAE, estimate log p(x) on its test data, write a run folder with a page to read."""
    from pyro_vae import commands
    from pyro_vae.infer.processes import joined

    with joined(settings.device):
        commands.train(settings, output)
