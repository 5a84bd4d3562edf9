"""`pyro-vae evaluate`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.cli.app import DataRoot, Device, Run, app, one_of
from pyro_vae.names import METHODS, EvaluateSettings

_how = EvaluateSettings()


@app.command()
def evaluate(
    run: Run,
    method: Annotated[str, typer.Option(help=one_of(METHODS))] = _how.method,
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
    data_root: DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: Device = "auto",
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
