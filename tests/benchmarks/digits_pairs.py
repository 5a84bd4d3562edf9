"""Every matching prior and family on the digits, several seeds each, as a Markdown table.

    python tests/benchmarks/digits_pairs.py --output FOLDER [--seeds 3] [--epochs 200]

Each row is what `pyro-vae train --prior P --guide Q --seed S` leaves in its run folder: the ELBO of
the 359 test digits (one draw each) and log p(x) by 500 importance samples. The error is the standard
error over seeds. A run folder that is there already is read instead of trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae.app.names import FAMILIES, PRIORS, TrainSettings
from pyro_vae.app.train import train

# A VampPrior's density inverts each component's flow, coordinate by coordinate: with a tenth of the
# data as pseudo-inputs (129, as elsewhere) one run of these takes hours.
FEW_COMPONENTS = {("vamp", "iaf"): 16, ("vamp", "spline"): 16}


def matching_pairs() -> list[tuple[str, str]]:
    """Return the pairs whose latents live in one place; a VampPrior lives where its guide does."""
    pairs = []
    for prior, prior_class in PRIORS.items():
        for guide, guide_class in FAMILIES.items():
            wanted = getattr(pv.priors, prior_class).latent_support
            got = getattr(pv.guides, guide_class).latent_support
            if prior == "vamp" or wanted == got:
                pairs.append((prior, guide))
    return pairs


def run(folder: Path, prior: str, guide: str, seed: int, epochs: int) -> dict[str, float]:
    path = folder / f"{prior}-{guide}-{seed}"
    if not (path / "metrics.json").exists():
        settings = TrainSettings(
            prior=prior,
            num_components=FEW_COMPONENTS.get((prior, guide)),
            guide=guide,
            seed=seed,
            epochs=epochs,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # k is read from the metrics
            train(settings, path, progress=False)
    metrics = json.loads((path / "metrics.json").read_text())
    return {
        "elbo": metrics["test"]["elbo"],
        "log_marginal": metrics["test_log_marginal"]["log_marginal"],
        "seconds": metrics["training_seconds"],
    }


def cell(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=TrainSettings.epochs)
    parser.add_argument("--priors", nargs="+", default=list(PRIORS))
    options = parser.parse_args()
    lines = ["| prior | family | ELBO | log p(x) | training s |", "| --- | --- | --- | --- | --- |"]
    for prior, guide in matching_pairs():
        if prior not in options.priors:
            continue
        rows = [
            run(options.output, prior, guide, seed, options.epochs) for seed in range(options.seeds)
        ]
        elbo, log_marginal = (cell([row[name] for row in rows]) for name in ("elbo", "log_marginal"))
        seconds = statistics.median(row["seconds"] for row in rows)
        lines.append(f"| {prior} | {guide} | {elbo} | {log_marginal} | {seconds:.0f} |")
    print(f"{options.seeds} seeds, {options.epochs} epochs, torch {torch.__version__}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
