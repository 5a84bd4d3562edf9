"""`pyro-vae evaluate`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.app.cli.app import command
from pyro_vae.app.cli.options import Run, gathers
from pyro_vae.app.names import EvaluateSettings


@command()
@gathers(EvaluateSettings)
def evaluate(
    run: Run,
    how: EvaluateSettings,
    picture: Annotated[
        Path | None,
        typer.Option(help="Picture of Pareto k per datum and of the estimate's convergence."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    data_root: Annotated[
        str | None, typer.Option(help="Folder of the data set; default: the run's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Estimate log p(x) of a run's test part by importance sampling, annealing, or both."""
    from pyro_vae.app.using import evaluate as run_evaluate
    from pyro_vae.app.using import print_estimate as run_print_estimate
    from pyro_vae.distributed import joined

    with joined(device) as processes:
        own = picture if processes.is_first else None
        values = run_evaluate(run, how, data_root=data_root, device=device, picture=own)
        run_print_estimate(values, as_json=as_json)
