"""The commands that use a trained run: sample, reconstruct."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.app import DataRoot, Picture, Run, app


@app.command()
def sample(
    run: Run,
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
    output: Picture = None,
    data_root: DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Draw new data from a run's model into a picture."""
    from pyro_vae import commands

    typer.echo(
        commands.sample(run, number=num, mean=mean, data_root=data_root, output=output, seed=seed)
    )


@app.command()
def reconstruct(
    run: Run,
    num: Annotated[
        int | None, typer.Option(help="How many; default: 12 images or 500 vectors.")
    ] = None,
    output: Picture = None,
    data_root: DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Reconstruct a run's first test data into a picture."""
    from pyro_vae import commands

    typer.echo(commands.reconstruct(run, number=num, data_root=data_root, output=output, seed=seed))
