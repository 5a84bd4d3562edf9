"""The commands that draw a picture of a trained run: samples, completions, latent space."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.app.cli.app import command
from pyro_vae.app.cli.options import OnlyWith, Run, gathers
from pyro_vae.app.names import COMPLETIONS, PLANES, VIEWS


@dataclass(frozen=True)
class _Picture:
    """The options of all of them; ``commands`` names them alike."""

    output: Path | None = field(default=None, metadata={"help": "Picture file: .png, .svg or .pdf."})
    data_root: str | None = field(
        default=None, metadata={"help": "Folder of the data set; default: the run's."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})


@command()
@gathers(_Picture)
def sample(
    run: Run,
    *,
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
    picture: _Picture,
) -> None:
    """Draw new data from a run's model into a picture."""
    from pyro_vae.app.using import sample as run_sample

    typer.echo(run_sample(run, number=num, mean=mean, **asdict(picture)))


@command()
@gathers(_Picture)
def reconstruct(
    run: Run,
    *,
    num: Annotated[
        int | None, typer.Option(help="How many; default: 12 images or 500 vectors.")
    ] = None,
    picture: _Picture,
) -> None:
    """Reconstruct a run's first test data into a picture."""
    from pyro_vae.app.using import reconstruct as run_reconstruct

    typer.echo(run_reconstruct(run, number=num, **asdict(picture)))


@command()
@gathers(_Picture)
def complete(
    run: Run,
    *,
    missing: Annotated[
        str,
        typer.Option(help="lower, upper, left, right (of vectors left, right), or random:SHARE."),
    ] = "right",
    method: Annotated[str, typer.Option(help=", ".join(COMPLETIONS))] = COMPLETIONS[0],
    num: Annotated[
        int | None, typer.Option(help="How many; default: 8 images or 200 vectors.")
    ] = None,
    num_draws: Annotated[int, typer.Option(help="Completions of each.")] = 6,
    num_steps: Annotated[
        int,
        typer.Option(help="Steps of each chain of metropolis or pseudo-gibbs."),
        OnlyWith("method", ("metropolis", "pseudo-gibbs")),
    ] = 200,
    num_samples: Annotated[
        int,
        typer.Option(help="Samples per datum of importance."),
        OnlyWith("method", ("importance",)),
    ] = 1000,
    picture: _Picture,
) -> None:
    """Hide a part of a run's first test data and fill it in, into a picture."""
    from pyro_vae.app.completing import complete as run_complete

    path = run_complete(
        run,
        missing=missing,
        method=method,
        number=num,
        num_draws=num_draws,
        num_steps=num_steps,
        num_samples=num_samples,
        **asdict(picture),
    )
    typer.echo(path)


@command()
@gathers(_Picture)
def latent(
    run: Run,
    *,
    view: Annotated[
        str, typer.Option(help="scatter of the codes, or manifold: what a grid decodes to.")
    ] = VIEWS[0],
    plane: Annotated[
        str,
        typer.Option(help="Axes of the scatter: active (the two most active latents) or pca."),
        OnlyWith("view", ("scatter",)),
    ] = PLANES[0],
    num: Annotated[int | None, typer.Option(help="How many test data; default: 5000.")] = None,
    num_steps: Annotated[
        int | None,
        typer.Option(help="Values per latent of the grid; default: 16, of vectors 40."),
        OnlyWith("view", ("manifold",)),
    ] = None,
    picture: _Picture,
) -> None:
    """Show a run's latent space in a picture: the test data's codes, or the manifold."""
    from pyro_vae.app.exploring import latent as run_latent

    path = run_latent(run, view=view, plane=plane, number=num, num_steps=num_steps, **asdict(picture))
    typer.echo(path)


@command()
@gathers(_Picture)
def traverse(
    run: Run,
    *,
    datum: Annotated[int, typer.Option(help="Which test datum, from 1.")] = 1,
    num: Annotated[int, typer.Option(help="How many latents at most, the most active.")] = 8,
    num_steps: Annotated[int, typer.Option(help="Values per latent.")] = 11,
    picture: _Picture,
) -> None:
    """Move one latent of a test datum after the other, into a picture."""
    from pyro_vae.app.exploring import traverse as run_traverse

    path = run_traverse(run, datum=datum, number=num, num_steps=num_steps, **asdict(picture))
    typer.echo(path)


@command()
@gathers(_Picture)
def interpolate(
    run: Run,
    *,
    num: Annotated[int, typer.Option(help="How many ways.")] = 6,
    num_steps: Annotated[int, typer.Option(help="Points on each way.")] = 11,
    picture: _Picture,
) -> None:
    """Walk between the codes of a run's first test data, into a picture."""
    from pyro_vae.app.exploring import interpolate as run_interpolate

    typer.echo(run_interpolate(run, number=num, num_steps=num_steps, **asdict(picture)))
