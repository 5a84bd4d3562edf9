"""A file of several GB trained by ``pyro-vae train``: private memory beside a small one, and rate."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import pyro_vae as pv

COLUMNS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the large file")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed after it")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each way of the rate")
    parser.add_argument("--rate-megabytes", type=float, default=400.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        peaks = []
        for number in (20_000, round(options.gigabytes * 1e9 / (4 * COLUMNS))):
            path = folder / f"{number}.npy"
            write_table(path, number)
            peaks.append(private_memory_of_training(path))
            print(f"{number:,} rows: peak of RssAnon {peaks[-1]:.0f} MB", flush=True)
            path.unlink()
        print(f"difference {peaks[1] - peaks[0]:.0f} MB")
        path = folder / "rate.npy"
        write_table(path, round(options.rate_megabytes * 1e6 / (4 * COLUMNS)))
        compare_rates(path, options.rounds)


def write_table(path: Path, number: int) -> None:
    """Write a table of four factors and noise, block by block."""
    generator = np.random.default_rng(0)
    loadings = generator.normal(size=(4, COLUMNS)).astype(np.float32)
    table = np.lib.format.open_memmap(path, "w+", np.float32, (number, COLUMNS))
    for start in range(0, number, 10_000):
        rows = table[start : start + 10_000]
        rows[:] = generator.standard_normal((len(rows), 4), np.float32) @ loadings
        rows += 0.3 * generator.standard_normal(rows.shape, np.float32)
    table.flush()


def private_memory_of_training(path: Path) -> float:
    """Return the peak of a training's private memory in MB, sampled through the run."""
    small = ["--hidden", "32", "--latent-dim", "4", "--batch-size", "2048", "--epochs", "1"]
    command = ["train", "--dataset", path, "--likelihood", "gaussian", "--compile", "off", *small]
    run = [sys.executable, "-m", "pyro_vae", *command, "--output", path.with_suffix("")]
    process = subprocess.Popen([str(word) for word in run], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"training ended with {process.returncode}")
    return peak / 1024


def compare_rates(path: Path, rounds: int) -> None:
    """Train on a mapped file and on the same rows in memory by turns."""
    mapped = np.load(path, mmap_mode="r")
    rates: dict[str, list[float]] = {"mapped": [], "in memory": []}
    for _ in range(rounds):
        for name, data in (("mapped", mapped), ("in memory", np.array(mapped))):
            torch.manual_seed(0)
            encoder = pv.networks.MLPEncoder((COLUMNS,), (32,))
            decoder = pv.networks.MLPDecoder(4, (32,))
            vae = pv.VAE(
                pv.priors.StandardNormal(4),
                pv.likelihoods.Gaussian(decoder, (COLUMNS,), sigma="learned"),
                pv.guides.MeanFieldNormal(encoder, 4),
            )
            result = pv.fit(vae.model, vae.guide, data, epochs=2, compile=False, seed=0)
            rates[name].append(float(result.history["data_per_second"][-1]))
    medians = {name: float(np.median(each)) for name, each in rates.items()}
    ratio = medians["mapped"] / medians["in memory"]
    print(json.dumps({"data points per second": medians, "ratio": ratio, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
