"""`pyro-vae train`: its options."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.cli.app import app
from pyro_vae.cli.options import gathers
from pyro_vae.errors import InputError
from pyro_vae.names import TrainSettings


@app.command()
@gathers(TrainSettings)
def train(
    context: typer.Context,
    settings: TrainSettings,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; default: a new one below runs/.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Write the run's state every so many epochs.")
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Write the run's state every so many minutes; 0: every step.")
    ] = 1.0,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with this interrupted run folder; it knows all other options."),
    ] = None,
) -> None:
    """Train a VAE, estimate log p(x) on its test data, write a run folder with a page to read."""
    from pyro_vae import commands
    from pyro_vae.infer.checkpoints import Interrupted
    from pyro_vae.infer.processes import joined

    try:
        if resume is None:
            when = commands.Checkpointing(checkpoint_every, checkpoint_minutes)
            with joined(settings.device):
                commands.train(settings, output, checkpointing=when)
            return
        told = {name for name in context.params if _is_told(context, name)} - {"resume"}
        other = sorted(told - asdict(settings).keys())
        if other:
            raise InputError(
                f"expected --resume without --{other[0].replace('_', '-')}: the run folder knows it"
            )
        with joined(settings.device):
            commands.resume(resume, {name: getattr(settings, name) for name in told})
    except Interrupted as interruption:
        folder = shlex.quote(str(interruption.folder.parent))
        sys.stderr.write(f"pyro-vae: interrupted: go on by `pyro-vae train --resume {folder}`\n")
        raise typer.Exit(128 + interruption.number) from None


def _is_told(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
