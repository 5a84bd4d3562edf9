"""Memory of long runs: resident size along a training of the digits and along repeated evaluations.

Run ``python tests/benchmarks/memory.py``; options ``--epochs`` (2000) and ``--evaluations`` (100).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path

import torch

import pyro_vae as pv


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def digits_vae(dataset: pv.datasets.Dataset) -> pv.VAE:
    """A small VAE of the digits."""
    torch.manual_seed(0)
    shape = dataset.data_shape
    decoder, encoder = pv.networks.MLPDecoder(2, (16,)), pv.networks.MLPEncoder(shape, (16,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, shape),
        pv.guides.MeanFieldNormal(encoder, 2),
    )


def along_training(epochs: int) -> list[tuple[int, float]]:
    """Resident size after a twentieth of the epochs (the warm-up) and after each further fifth.

    The run validates, keeps its best values and writes a checkpoint every 100 epochs.
    """
    dataset, sizes = pv.datasets.load("digits"), []
    vae = digits_vae(dataset)
    asked = {max(epochs // 20, 1), *(epochs * part // 5 for part in range(1, 6))}

    def note(epoch: int, _: dict[str, float]) -> None:
        if epoch in asked:
            sizes.append((epoch, resident()))

    with tempfile.TemporaryDirectory() as folder:
        pv.fit(
            vae.model, vae.guide, dataset, epochs=epochs, batch_size=512, patience=epochs,
            compile=False, on_epoch=note, checkpoint=folder, checkpoint_every=100, seed=0,
        )  # fmt: skip
    return sizes


def along_evaluations(number: int) -> list[tuple[int, float]]:
    """Resident size after a twentieth of the evaluations and after each further fifth."""
    dataset, sizes = pv.datasets.load("digits"), []
    vae = digits_vae(dataset)
    asked = {max(number // 20, 1), *(number * part // 5 for part in range(1, 6))}
    for count in range(1, number + 1):
        pv.log_marginal(vae.model, vae.guide, dataset.test[:50], num_samples=100, seed=count)
        if count in asked:
            sizes.append((count, resident()))
    return sizes


def main() -> None:
    """Print both curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, sizes in (
        ("epochs", along_training(options.epochs)),
        ("evaluations", along_evaluations(options.evaluations)),
    ):
        for count, size in sizes:
            print(f"{count:6} {name:12} {size:8.1f} MiB", flush=True)
        print(f"growth after the warm-up: {sizes[-1][1] - sizes[0][1]:+.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
