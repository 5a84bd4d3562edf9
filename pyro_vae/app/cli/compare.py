"""`pyro-vae compare`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.app.cli.app import command
from pyro_vae.app.cli.options import gathers
from pyro_vae.app.names import EvaluateSettings, TrainSettings


@command()
@gathers(
    EvaluateSettings,
    without=("seed", "target_standard_error"),
    defaults={"num_samples": 1000},
)
@gathers(TrainSettings, without=("prior", "likelihood", "guide"), defaults={"epochs": 60})
def compare(
    *,
    output: Annotated[Path, typer.Option(help="Folder to write, or to continue where it stopped.")],
    guides: Annotated[
        str,
        typer.Option(
            help="Variational families between commas, as `train --guide` names them; default: "
            "mean-field, full-rank, iaf, spline and mixture.",
            show_default=False,
        ),
    ] = "mean-field,full-rank,iaf,spline,mixture",
    priors: Annotated[str, typer.Option(help="Priors between commas.")] = "standard-normal",
    likelihoods: Annotated[str, typer.Option(help="Likelihoods between commas.")] = "bernoulli",
    seeds: Annotated[
        int, typer.Option(help="Runs of each combination, from --seed on; all see the same data.")
    ] = 3,
    hold: Annotated[
        str | None,
        typer.Option(help="model: train every guide against the first one's frozen model."),
    ] = None,
    settings: TrainSettings,
    how: EvaluateSettings,
) -> None:
    """Train every combination with several seeds; write tables, figures and a page to compare."""
    from pyro_vae.app.compare import compare_families as run_compare_families

    run_compare_families(
        settings,
        how,
        guides=guides,
        priors=priors,
        likelihoods=likelihoods,
        seeds=seeds,
        hold=hold,
        output=output,
    )
