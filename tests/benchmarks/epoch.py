"""Seconds per training epoch: ``fit`` beside a hand-written PyTorch loop of the same net.

    python tests/benchmarks/epoch.py --data-root DATA [--epochs 5] [--batch-size 128]

Both train the 784-400-20 VAE on the 60,000 MNIST images with grey pixels as Bernoulli targets, in
turns within one process, so that they meet the same machine; medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_vae as pv

PIXELS, HIDDEN, LATENT = 784, 400, 20


class HandWritten(nn.Module):
    """The VAE as one would write it without a library."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(PIXELS, HIDDEN)
        self.loc = nn.Linear(HIDDEN, LATENT)
        self.log_variance = nn.Linear(HIDDEN, LATENT)
        self.decode = nn.Linear(LATENT, HIDDEN)
        self.logits = nn.Linear(HIDDEN, PIXELS)

    def loss(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.encode(x))
        loc, log_variance = self.loc(hidden), self.log_variance(hidden)
        z = loc + torch.randn_like(loc) * (0.5 * log_variance).exp()
        logits = self.logits(F.relu(self.decode(z)))
        distortion = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        rate = -0.5 * (1 + log_variance - loc**2 - log_variance.exp()).sum()
        return (distortion + rate) / len(x)


class HandWrittenRun:
    """Epochs of the hand-written loop with PyTorch's default Adam."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.batch_size, self.net = x.flatten(1), batch_size, HandWritten()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def epoch(self) -> float:
        start = time.perf_counter()
        total = 0.0
        for index in torch.randperm(len(self.x)).split(self.batch_size):
            self.optimizer.zero_grad()
            loss = self.net.loss(self.x[index])
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(index)
        return time.perf_counter() - start


class FitRun:
    """Epochs of :func:`pyro_vae.fit` on a pair of the library's components."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        shape = tuple(x.shape[1:])
        encoder = pv.networks.MLPEncoder(shape, (HIDDEN,))
        decoder = pv.networks.MLPDecoder(LATENT, (HIDDEN,))
        self.vae = pv.VAE(
            pv.priors.StandardNormal(LATENT),
            pv.likelihoods.Bernoulli(decoder, shape),
            pv.guides.MeanFieldNormal(encoder, LATENT),
        )
        self.x, self.batch_size = x, batch_size

    def epoch(self) -> float:
        result = pv.fit(
            self.vae.model,
            self.vae.guide,
            self.x,
            epochs=1,
            batch_size=self.batch_size,
            device="cpu",
            progress=False,
        )
        return result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = pv.datasets.load("mnist", options.data_root, binarize="none", validation_size=0).train
    runs = {
        "hand-written": HandWrittenRun(x, options.batch_size),
        "fit": FitRun(x, options.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.epochs):
        for name, run in runs.items():
            seconds[name].append(run.epoch())
    ratios = [a / b for a, b in zip(seconds["fit"], seconds["hand-written"], strict=True)]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in seconds.items():
        print(f"{name:14s} median {statistics.median(values):6.2f} s per epoch")
    print(
        f"ratio          median {statistics.median(ratios):6.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds"
    )


if __name__ == "__main__":
    main()
