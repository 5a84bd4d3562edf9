"""Real data as they come, trained by the command line's defaults: no collapse, and no unit matters.

    python tests/benchmarks/own_units.py [--sets factors tables digits] [--folder RUNS]

Each run is ``pyro-vae train --dataset FILE --likelihood gaussian`` and nothing else. ``factors``:
1,400 grey vectors of 560 values of a linear-Gaussian model with four factors, whose log p(x) and
mutual information with the latents are known exactly. ``tables``: scikit-learn's breast_cancer, wine
and diabetes in their own units, and with each column standardised beforehand, of which log p(x) is
told after the Jacobian of that map is added by hand. ``digits``: grey digits, whose rate is 0 if the
latents collapsed. Told for each run, of its test part: log p(x), rate, latents in use, epochs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

import pyro_vae as pv

TABLES = {"breast_cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}
NUM_DATA, NUM_PIXELS, NUM_FACTORS, NOISE = 1400, 560, 4, 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=["factors", "tables", "digits"])
    parser.add_argument(
        "--folder", type=Path, help="where the runs are kept; one that is there counts"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for each in options.sets:
            {"factors": run_factors, "tables": run_tables, "digits": run_digits}[each](folder)


def run_factors(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(NUM_DATA, NUM_FACTORS, generator=generator)
    loadings = 0.06 * torch.randn(NUM_FACTORS, NUM_PIXELS, generator=generator)
    x = 0.5 + z @ loadings + NOISE * torch.randn(NUM_DATA, NUM_PIXELS, generator=generator)
    path = folder / "factors.npy"
    np.save(path, x.numpy())
    own = loadings.double()
    covariance = own.T @ own + NOISE**2 * torch.eye(NUM_PIXELS, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(torch.full((NUM_PIXELS,), 0.5).double(), covariance)
    test = pv.datasets.load(path, binarize="none").test.double()
    precision = torch.eye(NUM_FACTORS, dtype=torch.float64) + own @ own.T / NOISE**2
    print(
        f"factors: exact log p(x) of the test part {law.log_prob(test).mean():.1f}, of all "
        f"{law.log_prob(x.double()).mean():.1f}; mutual information {precision.logdet() / 2:.2f}",
        flush=True,
    )
    train("factors", path, folder)


def run_tables(folder: Path) -> None:
    for name, load in TABLES.items():
        x = load().data.astype(np.float32).astype(np.float64)
        deviation = x.std(0)
        jacobian = -np.log(deviation).sum()
        runs = {"raw": x, "standardised": (x - x.mean(0)) / deviation}
        found = []
        for kind, values in runs.items():
            path = folder / f"{name}-{kind}.npy"
            np.save(path, values)
            found.append(train(f"{name}, {kind}", path, folder) + jacobian * (kind != "raw"))
        print(
            f"{name}: log p(x) {found[0]:.3f} raw, {found[1]:.3f} standardised beforehand, "
            f"difference {found[0] - found[1]:.3f}",
            flush=True,
        )


def run_digits(folder: Path) -> None:
    train("digits, grey", "digits", folder)


def train(name: str, dataset: Path | str, folder: Path) -> float:
    """Train by the command line, tell what came of it, and return log p(x)."""
    output = folder / f"run-{Path(dataset).stem}"
    if not (output / "metrics.json").exists():
        words = ["--dataset", str(dataset), "--likelihood", "gaussian", "--output", str(output)]
        if (output / "config.json").exists():
            words = ["--resume", str(output)]
        command = [sys.executable, "-m", "pyro_vae", "train", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((output / "metrics.json").read_text())
    estimate = metrics["test_log_marginal"]
    print(
        f"{name}: log p(x) {estimate['log_marginal']:.2f} +- {estimate['standard_error']:.2f}, rate "
        f"{estimate['rate']:.2f}, {metrics['active_units']} latents in use, epoch "
        f"{metrics['best_epoch']} of {len(metrics['history']['train_elbo'])} kept, "
        f"{estimate['num_unreliable']} of {estimate['num_data']} data points not trusted",
        flush=True,
    )
    return float(estimate["log_marginal"])


if __name__ == "__main__":
    main()
