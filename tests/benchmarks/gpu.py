"""All that only a GPU can tell, in less than eight minutes on one card: a JSON line for each part.

    python tests/benchmarks/gpu.py --output gpu.jsonl [--mnist mnist.npz] [--parts graphs tests ...]
    python tests/cuda_stand_in.py tests/benchmarks/gpu.py --output dry.jsonl --dry

Each part is a process of its own with a time limit, at the end of which it is killed with its
children; the limits add up to less than eight minutes. A part that fails leaves its exit status and
last lines. Needs nothing from a network: torch, pyro-ppl, pyro-api, pytest for the tests, and MNIST
as one file ``mnist.npz`` with arrays ``train`` and ``test`` of bytes, ``(N, 28, 28)``; without it the
images are drawn at random, which costs the same, and their log p(x) means nothing. ``--dry`` makes
everything small.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TESTS, ROOT = HERE.parents[1], HERE.parents[2]
sys.path[:0] = [str(TESTS), str(HERE.parent)]

SHAPE = (1, 28, 28)

Row = dict[str, Any]


# --- parts, each in a process of its own -----------------------------------------------------


def dataset(options: argparse.Namespace) -> Any:
    """MNIST, binarised afresh in training and once for the test, or random images of its shape."""
    import numpy as np
    import torch

    import pyro_vae as pv

    torch.manual_seed(0)
    if options.mnist is None:
        train, test = (torch.rand(count, *SHAPE) for count in (60_000, 10_000))
    else:
        with np.load(options.mnist) as arrays:
            images = (torch.from_numpy(arrays[name]) for name in ("train", "test"))
            train, test = (image.float().view(-1, *SHAPE) / 255 for image in images)
    if options.dry:
        train, test = train[:256], test[:32]
    return pv.datasets.Dataset("mnist", train, test[:0], test.bernoulli(), binarize="dynamic")


def burda(options: argparse.Namespace) -> Any:
    """The networks of Burda et al. 2016 with one layer of latents: 784-200-200-50, tanh."""
    import torch

    import pyro_vae as pv

    torch.manual_seed(0)
    latent_dim, hidden = (5, (16,)) if options.dry else (50, (200, 200))
    encoder = pv.networks.MLPEncoder(SHAPE, hidden, activation="tanh")
    decoder = pv.networks.MLPDecoder(latent_dim, hidden, activation="tanh")
    return pv.VAE(
        pv.priors.StandardNormal(latent_dim),
        pv.likelihoods.Bernoulli(decoder, SHAPE),
        pv.guides.MeanFieldNormal(encoder, latent_dim),
    )


def seconds_of(work: Callable[[], object], repeats: int = 1) -> float:
    """Median seconds of a call on the device, after one that warms up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def graphs(options: argparse.Namespace) -> Row:
    """Is a step one CUDA graph: what is skipped and launched, what waits, memory over many fits."""
    import torch
    from torch._dynamo.utils import counters
    from torch.profiler import ProfilerActivity, profile

    import pyro_vae as pv

    data, vae, row = dataset(options), burda(options), {}
    images = data.train[: 2 * 128 if options.dry else 10 * 128].round()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        result = pv.fit(vae.model, vae.guide, data, epochs=2, seed=0, compile=True)
        torch.cuda.set_sync_debug_mode("default")
    said = [w for w in seen if "called a synchronizing" in str(w.message)]
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in said]
    row["choice"], row["epoch seconds"] = result.compile_choice, list(result.history["seconds"])
    row["waits"] = {line: lines.count(line) for line in sorted(set(lines))}
    row["cudagraph counters"] = {n: c for n, c in counters["inductor"].items() if "cudagraph" in n}
    if not options.dry:  # the stand-in has no kernels to trace
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            pv.fit(vae.model, vae.guide, images, epochs=6, seed=0, compile=True)
        calls = ("cudaGraphLaunch", "cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync")
        found = {event.key: event.count for event in profiled.key_averages()}
        row["60 steps"] = {call: found.get(call, 0) for call in calls}
    row["reserved MiB after each fit"] = []
    for _ in range(2 if options.dry else 5):
        pv.fit(vae.model, vae.guide, images, epochs=1, seed=0, compile=True)
        row["reserved MiB after each fit"].append(torch.cuda.memory_reserved() >> 20)
    objectives = [pv.infer.IWAE(5), pv.infer.StickingTheLanding(), pv.infer.AnalyticKL()]
    for objective in objectives:
        fitted = pv.fit(vae.model, vae.guide, images, objective=objective, epochs=1, compile=True)
        row[type(objective).__name__] = fitted.compile_choice
    return row


def tests(options: argparse.Namespace) -> Row:
    """Run the tests that need a CUDA device."""
    chosen = ["tests/test_cuda.py"] if options.dry else ["tests"]
    arguments = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", *chosen]
    if options.dry:
        arguments += ["-k", "flags or wait"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT)
    return {"status": done.returncode, "last lines": done.stdout.splitlines()[-15:]}


def speed(options: argparse.Namespace) -> Row:
    """Time a step and an epoch beside stock Pyro and loops written by hand."""
    import torch
    import training

    rounds, length, epochs = (1, 2, 1) if options.dry else (9, 100, 5)
    times = {}
    if not options.dry:  # its contenders are processes that would miss the stand-in
        times = training.measure("cuda", 128, rounds, length)
    x = torch.rand(256 if options.dry else 60_000, training.PIXELS)
    by_epoch, choice = training.measure_epochs(x, epochs, 128, "cuda")
    return {
        "milliseconds a step": {name: statistics.median(each) for name, each in times.items()},
        "seconds an epoch": {name: statistics.median(each) for name, each in by_epoch.items()},
        "choice": choice,
    }


def weights(options: argparse.Namespace) -> Row:
    """K = 5,000 on 10,000 images (20-256-512-784), in each precision, beside the bare decoder."""
    import log_marginal
    import torch

    import pyro_vae as pv
    from pyro_vae.pair.precision import PRECISIONS, compute_in, multiply_in

    warnings.simplefilter("ignore")  # an untrained guide, and Pareto k says so
    num_data, num_samples, rows = (20, 50, 1 << 10) if options.dry else (10_000, 5_000, 1 << 18)
    pair, x = log_marginal.build("cuda", num_data)
    z, row = torch.randn(rows, log_marginal.LATENT, device="cuda"), {}

    def by_hand() -> None:
        """The decoder, the likelihood of each image and a running sum: nothing else."""
        total = torch.full((num_data,), -torch.inf, device="cuda", dtype=torch.float64)
        some = max(1, rows // num_data)
        for _ in range(0, num_samples, some):
            drawn = torch.randn(some, num_data, log_marginal.LATENT, device="cuda")
            logits = pair.decoder(drawn)
            loss = torch.nn.functional.binary_cross_entropy_with_logits
            terms = -loss(logits, x.expand_as(logits), reduction="none").sum(-1)
            total = torch.logaddexp(total, terms.double().logsumexp(0))

    for precision in PRECISIONS:
        cell: Row = {}
        with torch.no_grad(), compute_in(precision, x.device), multiply_in(precision):
            per_pass = seconds_of(lambda: pair.decoder(z), repeats=5)
            cell["bare decoder, s"] = per_pass * num_data * num_samples / rows
            cell["by hand, s"] = seconds_of(by_hand)
        for compile in (False, True):

            def estimate(precision: str = precision, compile: bool = compile) -> object:
                given = {"precision": precision, "compile": compile, "seed": 0}
                return pv.log_marginal(pair.model, pair.guide, x, num_samples=num_samples, **given)

            cell["compiled, s" if compile else "eager, s"] = seconds_of(estimate)
        row[precision] = cell
    row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def precisions(options: argparse.Namespace) -> Row:
    """An epoch of training in each precision."""
    import pyro_vae as pv
    from pyro_vae.pair.precision import PRECISIONS

    data, row = dataset(options), {}
    for precision in PRECISIONS:
        vae = burda(options)
        result = pv.fit(vae.model, vae.guide, data, epochs=4, precision=precision, seed=0)
        row[precision] = {
            "epoch seconds": list(result.history["seconds"]),
            "train ELBO": result.history["train_elbo"][-1],
            "choice": result.compile_choice,
        }
    return row


def annealing(options: argparse.Namespace) -> Row:
    """Annealing of 1,000 images by 16 chains and 100 steps."""
    import log_marginal

    import pyro_vae as pv

    warnings.simplefilter("ignore")
    num_data, num_steps, num_chains = (2, 1, 2) if options.dry else (1_000, 100, 16)
    pair, x = log_marginal.build("cuda", num_data)
    given = {"method": "annealed", "num_chains": num_chains, "num_steps": num_steps, "seed": 0}
    if options.dry:
        given["num_leapfrog_steps"] = 1
    seconds = seconds_of(lambda: pv.log_marginal(pair.model, pair.guide, x, **given))
    return {"seconds": seconds, "data points": num_data, "steps": num_steps}


def quality(options: argparse.Namespace) -> Row:
    """Train IWAE-50 for 2.5 minutes in TF32 and weigh the test images by 5,000 draws."""
    import pyro_vae as pv

    data, vae = dataset(options), burda(options)
    num_particles, num_samples = (3, 20) if options.dry else (50, 5_000)
    vae.start_at_data(data.train)
    given = {"objective": pv.infer.IWAE(num_particles), "precision": "tf32", "seed": 0}
    start = time.perf_counter()
    probe = pv.fit(vae.model, vae.guide, data, epochs=3, **given).history["seconds"][1:].mean()
    left = 150 - (time.perf_counter() - start)
    epochs = 1 if options.dry else max(1, int(0.9 * left / probe))
    given |= {"learning_rate": 2e-3, "schedule": "cosine"}
    result = pv.fit(vae.model, vae.guide, data, epochs=epochs, **given)
    warnings.simplefilter("ignore")
    estimate = pv.log_marginal(vae.model, vae.guide, data.test, num_samples=num_samples, seed=0)
    return {
        "epochs": epochs,
        "epoch seconds": probe,
        "log p(x)": estimate.mean,
        "standard error": estimate.mean_standard_error,
        "share with k-hat > 0.7": float((estimate.pareto_k > 0.7).double().mean()),
        "choice": result.compile_choice,
    }


# Name -> part, seconds it may take. First the faults, then the speed, then the quality.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Row], int]] = {
    "graphs": (graphs, 60),
    "tests": (tests, 80),
    "speed": (speed, 60),
    "weights": (weights, 50),
    "annealing": (annealing, 20),
    "precisions": (precisions, 30),
    "quality": (quality, 175),
}


# --- running them ----------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    """Return the command of a child: on the stand-in where this process is."""
    import cuda_stand_in

    if cuda_stand_in.is_active():
        return cuda_stand_in.command(*arguments)
    return [sys.executable, *arguments]


def run_part(name: str, limit: float, given: list[str]) -> Row:
    """Run a part by itself; what it printed last is its row, if it ended well."""
    start = time.perf_counter()
    arguments = command(str(HERE), "--part", name, *given)
    child = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        printed, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        printed, _ = child.communicate()
    lines = printed.strip().splitlines()
    row: Row = {"part": name, "seconds": round(time.perf_counter() - start, 1)}
    if child.returncode == 0 and lines:
        return row | json.loads(lines[-1])
    return row | {"failed with status": child.returncode, "limit": limit, "last lines": lines[-20:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file of JSON lines, one added for each part")
    parser.add_argument("--mnist", type=Path, help="mnist.npz: train and test, bytes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="everything small: does it run?")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        row = PARTS[options.part][0](options)
        print("\n" + json.dumps(row, default=float))
        return 0
    given = ["--dry"] if options.dry else []
    given += ["--mnist", str(options.mnist.resolve())] if options.mnist else []
    failed = 0
    for name in options.parts:
        # The stand-in is no fast device: a dry run is there to end, not to be in time.
        row = run_part(name, PARTS[name][1] * (5 if options.dry else 1), given)
        failed += "failed with status" in row
        line = json.dumps(row)
        print(line, flush=True)
        if options.output is not None:
            with options.output.open("a") as stream:
                stream.write(line + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
