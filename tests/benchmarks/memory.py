"""Memory and open files of long runs, along a training of the digits and repeated evaluations.

Run ``python tests/benchmarks/memory.py``; options ``--epochs`` (3000) and ``--evaluations`` (300).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path

import torch

import pyro_vae as pv

Held = tuple[int, float, int]  # after so many epochs or evaluations: MiB, and open descriptors


def held(count: int) -> Held:
    """What this process holds (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mebibytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return count, mebibytes, len(os.listdir("/proc/self/fd"))


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


def along_training(epochs: int) -> list[Held]:
    """What is held after a twentieth of the epochs (the warm-up) and after each further fifth.

    The run validates, keeps its best values and writes a checkpoint every 100 epochs.
    """
    dataset, sizes = pv.datasets.load("digits"), []
    vae = digits_vae(dataset)
    asked = {max(epochs // 20, 1), *(epochs * part // 5 for part in range(1, 6))}

    def note(epoch: int, _: dict[str, float]) -> None:
        if epoch in asked:
            sizes.append(held(epoch))

    with tempfile.TemporaryDirectory() as folder:
        pv.fit(
            vae.model, vae.guide, dataset, epochs=epochs, batch_size=512, patience=epochs,
            compile=False, on_epoch=note, checkpoint=folder, checkpoint_every=100, seed=0,
        )  # fmt: skip
    return sizes


def along_evaluations(number: int) -> list[Held]:
    """What is held after a twentieth of the evaluations and after each further fifth."""
    dataset, sizes = pv.datasets.load("digits"), []
    vae = digits_vae(dataset)
    asked = {max(number // 20, 1), *(number * part // 5 for part in range(1, 6))}
    for count in range(1, number + 1):
        pv.log_marginal(vae.model, vae.guide, dataset.test[:50], num_samples=100, seed=count)
        if count in asked:
            sizes.append(held(count))
    return sizes


def main() -> None:
    """Print both curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3000)
    parser.add_argument("--evaluations", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, sizes in (
        ("epochs", along_training(options.epochs)),
        ("evaluations", along_evaluations(options.evaluations)),
    ):
        for count, size, files in sizes:
            print(f"{count:6} {name:12} {size:8.1f} MiB {files:4} descriptors", flush=True)
        growth, opened = (sizes[-1][part] - sizes[0][part] for part in (1, 2))
        print(f"growth after the warm-up: {growth:+.1f} MiB, {opened:+} descriptors", flush=True)


if __name__ == "__main__":
    main()
