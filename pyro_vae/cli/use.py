"""The commands that use a trained run: samples, reconstructions, completions, latent space."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.app import DataRoot, Picture, Run, app, one_of
from pyro_vae.names import COMPLETIONS, PLANES, VIEWS

_Seed = Annotated[int, typer.Option(help="Seed of the draws.")]


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
    seed: _Seed = 0,
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
    seed: _Seed = 0,
) -> None:
    """Reconstruct a run's first test data into a picture."""
    from pyro_vae import commands

    typer.echo(commands.reconstruct(run, number=num, data_root=data_root, output=output, seed=seed))


@app.command()
def complete(
    run: Run,
    missing: Annotated[
        str,
        typer.Option(help="lower, upper, left, right (of vectors left, right), or random:SHARE."),
    ] = "right",
    method: Annotated[str, typer.Option(help=one_of(COMPLETIONS))] = COMPLETIONS[0],
    num: Annotated[
        int | None, typer.Option(help="How many; default: 8 images or 200 vectors.")
    ] = None,
    num_draws: Annotated[int, typer.Option(help="Completions of each.")] = 6,
    num_steps: Annotated[int, typer.Option(help="Steps of each chain.")] = 200,
    num_samples: Annotated[int, typer.Option(help="Importance samples per datum.")] = 1000,
    output: Picture = None,
    data_root: DataRoot = None,
    seed: _Seed = 0,
) -> None:
    """Hide a part of a run's first test data and fill it in, into a picture."""
    from pyro_vae import commands

    typer.echo(
        commands.complete(
            run,
            missing=missing,
            method=method,
            number=num,
            num_draws=num_draws,
            num_steps=num_steps,
            num_samples=num_samples,
            data_root=data_root,
            output=output,
            seed=seed,
        )
    )


@app.command()
def latent(
    run: Run,
    view: Annotated[
        str, typer.Option(help="scatter of the codes, or manifold: what a grid decodes to.")
    ] = VIEWS[0],
    plane: Annotated[
        str, typer.Option(help="Scatter of more than two latents: the two most active, or pca.")
    ] = PLANES[0],
    num: Annotated[int | None, typer.Option(help="How many test data; default: 5000.")] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Values per latent of the grid; default: 16, of vectors 40.")
    ] = None,
    output: Picture = None,
    data_root: DataRoot = None,
    seed: _Seed = 0,
) -> None:
    """Show a run's latent space in a picture: the test data's codes, or the manifold."""
    from pyro_vae import commands

    typer.echo(
        commands.latent(
            run,
            view=view,
            plane=plane,
            number=num,
            num_steps=num_steps,
            data_root=data_root,
            output=output,
            seed=seed,
        )
    )


@app.command()
def traverse(
    run: Run,
    datum: Annotated[int, typer.Option(help="Which test datum, from 1.")] = 1,
    num: Annotated[int, typer.Option(help="How many latents at most, the most active.")] = 8,
    num_steps: Annotated[int, typer.Option(help="Values per latent.")] = 11,
    output: Picture = None,
    data_root: DataRoot = None,
    seed: _Seed = 0,
) -> None:
    """Move one latent of a test datum after the other, into a picture."""
    from pyro_vae import commands

    typer.echo(
        commands.traverse(
            run,
            datum=datum,
            number=num,
            num_steps=num_steps,
            data_root=data_root,
            output=output,
            seed=seed,
        )
    )


@app.command()
def interpolate(
    run: Run,
    num: Annotated[int, typer.Option(help="How many ways.")] = 6,
    num_steps: Annotated[int, typer.Option(help="Points on each way.")] = 11,
    output: Picture = None,
    data_root: DataRoot = None,
    seed: _Seed = 0,
) -> None:
    """Walk between the codes of a run's first test data, into a picture."""
    from pyro_vae import commands

    typer.echo(
        commands.interpolate(
            run, number=num, num_steps=num_steps, data_root=data_root, output=output, seed=seed
        )
    )
