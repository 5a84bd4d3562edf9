"""`pyro-vae train`: its options, and how an interrupted run is told and gone on with."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.app.cli.app import command
from pyro_vae.app.cli.options import gathers, is_given
from pyro_vae.app.names import TrainSettings
from pyro_vae.errors import InputError

# Decided when a run begins; --resume takes them from its folder.
_OF_THE_BEGINNING = ("output", "checkpoint_every", "checkpoint_minutes")


@command(unless="resume")
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
    from pyro_vae.app.train import Checkpointing
    from pyro_vae.app.train import resume as run_resume
    from pyro_vae.app.train import train as run_train
    from pyro_vae.distributed import joined
    from pyro_vae.infer.checkpoint import Interrupted

    try:
        if resume is None:
            when = Checkpointing(checkpoint_every, checkpoint_minutes)
            with joined(settings.device):
                run_train(settings, output, checkpointing=when)
            return
        for name in _OF_THE_BEGINNING:
            if is_given(context, name):
                flag = name.replace("_", "-")
                raise InputError(f"expected --resume without --{flag}: the run folder knows it")
        names = (field.name for field in fields(settings))
        given = {name: getattr(settings, name) for name in names if is_given(context, name)}
        with joined(settings.device):
            run_resume(resume, given)
    except Interrupted as interruption:
        folder = shlex.quote(str(interruption.folder.parent))
        sys.stderr.write(f"pyro-vae: interrupted: go on by `pyro-vae train --resume {folder}`\n")
        raise typer.Exit(128 + interruption.number) from None
