"""Approximation and amortisation gap of trained runs on MNIST's test images, family beside family.

    python tests/benchmarks/inference_gaps_mnist.py --data-root DATA RUN [RUN ...]

Each run is one of ``pyro-vae train --dataset mnist``. log p(x) of the first test images is annealed;
the best member of the guide's family is searched for each. With ``--encoder-epochs`` the encoder is
then trained on alone, the decoder as it is, and the gaps are told again. Prints a Markdown table.
Cremer, Li, Duvenaud 2018, "Inference Suboptimality in Variational Autoencoders", table 2: both gaps
are of the order of nats, and the amortisation gap is the larger one in most of its settings.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch

import pyro_vae as pv


def row(name: str, vae: pv.VAE, x: torch.Tensor, options: argparse.Namespace) -> str:
    """Return one line of the table: means over the images, with the errors of estimation."""
    begin = time.perf_counter()
    chains = {"num_chains": options.num_chains, "num_steps": options.num_steps, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table has a column for it
        annealed = pv.log_marginal(vae.model, vae.guide, x, method="annealed", **chains)
        gaps = pv.evaluation.inference_gaps(vae.model, vae.guide, x, estimate=annealed, seed=0)
    trusted = 1 - annealed.num_unreliable / len(x)
    cells = [f"{annealed.mean:.2f} ± {annealed.mean_standard_error:.2f}", f"{trusted:.0%}"]
    for name_of_gap in ("approximation", "amortization", "total"):
        gap, error = (getattr(gaps, name_of_gap + end) for end in ("", "_standard_error"))
        cells.append(f"{gap.mean():.2f} ± {error.square().sum().sqrt() / len(x):.2f}")
    return " | ".join(["", name, *cells, f"{time.perf_counter() - begin:.0f}", ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--num-data", type=int, default=64)
    parser.add_argument("--num-chains", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--encoder-epochs", type=int, default=0)
    options = parser.parse_args()
    data = pv.datasets.load("mnist", options.data_root)
    x = data.test[: options.num_data]
    print("| run | log p(x) | trusted | approximation | amortisation | both | seconds |")
    print("| --- " * 7 + "|", flush=True)
    for run in options.runs:
        vae = pv.load(run)
        print(row(run.name, vae, x, options), flush=True)
        if options.encoder_epochs:
            vae.prior.requires_grad_(False)
            vae.likelihood.requires_grad_(False)
            pv.fit(vae.model, vae.guide, data, epochs=options.encoder_epochs, batch_size=128,
                   learning_rate=5e-4, schedule="cosine", seed=1, progress=False)  # fmt: skip
            name = f"{run.name}, encoder {options.encoder_epochs} epochs more"
            print(row(name, vae, x, options), flush=True)


if __name__ == "__main__":
    main()
