"""`pyro-vae sweep`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.app.cli.app import command
from pyro_vae.app.cli.options import gathers
from pyro_vae.app.names import TrainSettings


@command()
@gathers(TrainSettings, without=("beta",))
def sweep(
    *,
    output: Annotated[Path, typer.Option(help="Folder to write, or to continue where it stopped.")],
    betas: Annotated[
        str, typer.Option(help="Weights of the KL term between commas, in the order of training.")
    ] = "0.25,0.5,1,2,4",
    warm_start: Annotated[
        bool, typer.Option(help="Start each run from the weights of the one before.")
    ] = False,
    settings: TrainSettings,
) -> None:
    """Train a series of runs over beta; write its rate-distortion table, picture and page."""
    from pyro_vae.app.sweep import sweep as run_sweep

    run_sweep(settings, betas, warm_start=warm_start, output=output)
