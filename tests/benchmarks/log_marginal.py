"""Time log p(x) by importance sampling against the bare decoder, and watch its peak memory.

Run ``python tests/benchmarks/log_marginal.py``. The pair is a plain Pyro pair with a 20-256-512-784
decoder on MNIST shapes. In every round each contender takes the same number of particles, one
contender after the other, so that a slow spell of the machine falls on all of them; the table gives
medians over the rounds, with ratios taken within each round. Memory is the peak of a fresh process
less that of one which only imports and builds the pair.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

PIXELS, HIDDEN, LATENT = 784, (256, 512), 20
# Particles per call of the bare decoder: the one faster in the median is what is compared against.
ROWS = (2_000, 8_000)


class Pair(nn.Module):
    """A pair as a user of Pyro writes it; nothing of this package in it."""

    def __init__(self) -> None:
        super().__init__()
        low, high = HIDDEN
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, low),
            nn.ReLU(),
            nn.Linear(low, high),
            nn.ReLU(),
            nn.Linear(high, PIXELS),
        )
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, high), nn.ReLU(), nn.Linear(high, low), nn.ReLU()
        )
        self.loc, self.log_scale = nn.Linear(low, LATENT), nn.Linear(low, LATENT)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            features = self.encoder(x)
            scale = self.log_scale(features).exp()
            pyro.sample("z", dist.Normal(self.loc(features), scale).to_event(1))


def build(device: str, num_data: int) -> tuple[Pair, Tensor]:
    pyro.set_rng_seed(0)
    x = (torch.rand(num_data, PIXELS) < 0.13).float()
    return Pair().to(device), x.to(device)


def estimate(pair: Pair, x: Tensor, num_samples: int, compile: bool | None) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained guide, and Pareto k says so
        return pv.log_marginal(
            pair.model, pair.guide, x, num_samples=num_samples, seed=0, compile=compile
        ).mean


def timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def throughput(options: argparse.Namespace) -> None:
    pair, x = build(options.device, options.data)
    particles = options.data * options.samples

    def bare(rows: int) -> Callable[[], None]:
        z = torch.randn(rows, LATENT, device=options.device)

        def run() -> None:
            with torch.no_grad():
                for _ in range(particles // rows):
                    pair.decoder(z)

        return run

    contenders: dict[str, Callable[[], object]] = {
        **{f"bare decoder, {rows} rows": bare(rows) for rows in ROWS},
        "log_marginal, compiled": lambda: estimate(pair, x, options.samples, True),
        "log_marginal, recorded": lambda: estimate(pair, x, options.samples, None),
        "log_marginal, eager": lambda: estimate(pair, x, options.samples, False),
    }
    first = timed(contenders["log_marginal, compiled"], options.device)
    for work in contenders.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, work in contenders.items():
            times[name].append(timed(work, options.device))
    # The bare decoder at its better number of rows; a minimum taken in every round would compare
    # against the luckier of two.
    best = min(list(times.values())[: len(ROWS)], key=statistics.median)
    print(f"{'':28}{'particles/s':>14}{'of the bare decoder':>24}")
    for name, values in times.items():
        rate = statistics.median(particles / value for value in values)
        ratios = [base / value for base, value in zip(best, values, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:28}{rate:14,.0f}{spread:>24}")
    repeat = statistics.median(times["log_marginal, compiled"])
    print(f"first compiled call {first:.1f} s, repeated {repeat:.1f} s")


def peak_memory(options: argparse.Namespace) -> None:
    baseline = 0.0
    for count in (0, 1_000, 100_000):
        command = [sys.executable, __file__, "--device", options.device, "--only-memory", str(count)]
        # Freed blocks go back at once: the peak is then what was in use, not what the C library's
        # heap kept in pieces.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peak = float(done.stdout)
        baseline = baseline or peak
        print(
            f"peak memory at {count:7,} samples of 16 data: {peak - baseline:6.0f} MiB above building"
        )


def memory_of_one(device: str, num_samples: int) -> None:
    pair, x = build(device, 16)
    if num_samples:
        estimate(pair, x, num_samples, False)
    else:
        pair.decoder(torch.zeros(10, LATENT, device=device))
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        # Not getrusage: its peak is inherited from the parent process.
        with open("/proc/self/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=int, default=500)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only_memory is not None:
        memory_of_one(options.device, options.only_memory)
        return
    machine = platform.machine()
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}, {options.threads} threads, torch {torch.__version__}, Pyro {pyro.__version__}")
    throughput(options)
    peak_memory(options)


if __name__ == "__main__":
    main()
