"""What tests/test_distributed.py trains, alone in its own process and shared by several.

``python process_cases.py FOLDER`` with torchrun's variables set runs every case, and each process
saves what it got.
"""

import errno
import functools
import itertools
import os
import random
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.distributed import ALONE, Processes, join_processes
from pyro_vae.infer import CompiledTrace_ELBO
from pyro_vae.infer.checkpoint import Interrupted
from pyro_vae.infer.trainer import Trainer
from pyro_vae.infer.validation import bound_terms

PIXELS, SEEDS, MARK = 6, range(12), 77.0


def normal_data(number, seed=0):
    return torch.randn(number, PIXELS, generator=torch.Generator().manual_seed(seed))


def binary_data(number):
    """Two kinds of data, so that there is something to learn."""
    probability = torch.where(torch.arange(number)[:, None] % 2 == 0, 0.9, 0.1)
    generator = torch.Generator().manual_seed(0)
    return torch.bernoulli(probability.expand(number, PIXELS), generator=generator)


def make_vae(seed):
    torch.manual_seed(seed)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((PIXELS,), (8,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (PIXELS,)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )


class Exact(nn.Module):
    """A pair without randomness, with a parameter that nothing uses and a count of the data seen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(Processes.current().rank)
        self.weight = nn.Parameter(torch.randn(2, PIXELS, generator=generator))
        self.encode = nn.Parameter(torch.randn(PIXELS, 2, generator=generator))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def model(self, x):
        pyro.module("exact", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = pyro.param("exact.scale", torch.tensor(1.5), dist.constraints.positive)
            density = dist.Normal(z @ self.weight, scale, validate_args=False)
            pyro.sample("x", density.to_event(1), obs=x)
            # A datum marked so has an infinite loss whose gradient is finite.
            pyro.factor("mark", torch.where(x[:, 0] == MARK, -torch.inf, 0.0))

    def guide(self, x):
        pyro.module("exact", self)
        if self.training:
            self.seen += len(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.clamp(-10, 10) @ self.encode).to_event(1))


def trained(pair, data, **options):
    """Train and return all that the processes must agree on."""
    with pyro.get_param_store().scope():
        result = pv.fit(
            pair.model, pair.guide, data, **{"learning_rate": 0.02, "compile": False, **options}
        )
        store = pyro.get_param_store()
        named = {name: store[name].detach().clone() for name in sorted(store.keys())}
    history = {
        name: torch.from_numpy(curve)
        for name, curve in result.history.items()
        if name not in ("seconds", "data_per_second")
    }
    return {
        "parameters": torch.cat([value.flatten() for value in named.values()]),
        "buffers": torch.cat([value.flatten() for value in [*pair.buffers(), torch.zeros(1)]]),
        "history": history,
        "epochs": (result.best_epoch, result.stopped_early, len(history["beta"])),
        "skipped": result.skipped_steps,
        "compiled": result.compiled,
    }


# The last batch of 41 data by 20 is one datum: a second process gets none of it.


def exact(**options):
    return trained(Exact(), normal_data(41), epochs=4, batch_size=20, seed=3, **options)


def compiled():
    objective = CompiledTrace_ELBO(backend="eager")  # captured, and run as it was recorded
    return exact(objective=objective, compile=True, gradient_clip=0.1, validation=normal_data(7, 1))


def stopped():
    """The validation data are others: learning the training data makes their bound worse."""
    return trained(
        Exact(),
        normal_data(40),
        epochs=60,
        batch_size=8,
        seed=0,
        patience=3,
        validation=3 * normal_data(9, 1),
    )


def with_stray(limit, on_nonfinite="skip", value=torch.inf):
    """One datum is infinite, or marked: the process that has it in its share alone sees so."""
    data = normal_data(20)
    data[7] = value
    options = {"on_nonfinite": on_nonfinite, "nonfinite_limit": limit}
    return trained(Exact(), data, epochs=3, batch_size=5, seed=0, **options)


def noisy(seed):
    data = binary_data(50)
    options = {"epochs": 10, "batch_size": 10, "seed": seed, "validation": binary_data(400)}
    return trained(make_vae(seed + 1000 * Processes.current().rank), data, **options)


def drawn():
    """What each of the first steps draws, and the data it draws it for."""
    seen = []

    def transform(x):
        seen.append(torch.cat([torch.rand(1), x[:, 0]]))
        return x

    data = torch.arange(20.0)[:, None].expand(20, PIXELS)
    trained(Exact(), data, epochs=1, batch_size=10, seed=5, transform=transform)
    return seen[-2:]  # the first one also finds out what there is to train


def evaluated():
    data, pair = normal_data(9), Exact()
    with pyro.get_param_store().scope():
        Processes.current().take_first([*pair.parameters()])
        return bound_terms(pair.model, pair.guide, data, processes=Processes.current())


def decided():
    return Processes.current().decide(lambda: f"rank {Processes.current().rank}")


def refused():
    def refuse():
        raise pv.InputError(f"refused by {Processes.current().rank}")

    return Processes.current().decide(refuse)


def other_data():
    return trained(Exact(), normal_data(20 + Processes.current().rank), epochs=1)


def other_part():
    return trained(Exact(), normal_data(20, seed=Processes.current().rank), epochs=1)


def out_of_range():
    """One datum is no probability: the process that has it in its share alone sees so."""
    data = binary_data(20)
    data[7] = 2.0
    options = {"epochs": 1, "batch_size": 20, "seed": 0, "transform": lambda x: x}
    return trained(make_vae(0), data, **options)


# --- with checkpoints ---


class Drawing(nn.Module):
    """A pair that draws from every generator; its buffer, another one in each process, matters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(Processes.current().rank)
        self.encode, self.decode = nn.Linear(PIXELS, 4), nn.Linear(2, PIXELS)
        self.register_buffer("mean", torch.zeros(PIXELS))

    def model(self, x):
        pyro.module("drawing", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("drawing", self)
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        shift = random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
        loc, raw = self.encode(x - self.mean + shift).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def kept(folder, **options):
    """Five steps an epoch, twenty in all."""
    given = {"epochs": 4, "batch_size": 10, "seed": 3, "patience": 9, "checkpoint_minutes": None}
    validation = normal_data(9, 1)
    return trained(
        Drawing(), normal_data(41), validation=validation, checkpoint=folder, **{**given, **options}
    )


@contextmanager
def signalled(rank, count):
    """Send a signal to one of the processes in the middle of a step."""
    take = Trainer._step

    def step(self, *arguments):
        if self.count == count and Processes.current().rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *arguments)

    with mock.patch.object(Trainer, "_step", step):
        yield


def left(folder):
    """In the first step, in the middle and at the end of an epoch, in the last step."""
    for number, (rank, count) in enumerate(((1, 0), (0, 7), (1, 9), (0, 19))):
        try:
            with signalled(rank, count):
                kept(folder, resume=number > 0)
        except Interrupted:
            continue
        raise AssertionError("nobody was interrupted")
    return kept(folder, resume=True)


@contextmanager
def full_disk(first):
    """Let the disk of the first process be full from this write on, counted from 0."""
    writes, flush = itertools.count(), os.fsync

    def fail(descriptor):
        if next(writes) >= first and Processes.current().is_first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with mock.patch.object(os, "fsync", fail):
        yield


def on_a_full_disk(folder):
    with full_disk(3):
        return kept(folder, checkpoint_minutes=0)


def not_finite(folder):
    data = normal_data(41)
    data[7] = torch.inf
    options = {"epochs": 3, "batch_size": 5, "seed": 0, "checkpoint": folder}
    return trained(Exact(), data, **options)


# Each writes into its own folder below the one it is given; "alone" is there already, written by one
# process.
KEPT = {
    "whole": lambda folder: kept(folder / "whole"),
    "left": lambda folder: left(folder / "left"),
    "full disk": lambda folder: on_a_full_disk(folder / "full"),
    "room again": lambda folder: kept(folder / "full", checkpoint_minutes=0, resume=True),
    "last good": lambda folder: not_finite(folder / "good"),
    "alone": lambda folder: kept(folder / "alone", resume=True),
    "begun": lambda folder: kept(folder / "left"),
    "one of two": lambda folder: kept(folder / "one" if Processes.current().is_first else None),
}


CASES = {
    "exact": functools.partial(exact, validation=normal_data(7, 1)),
    "clipped": functools.partial(exact, gradient_clip=0.1),
    "compiled": compiled,
    "stopped": stopped,
    "skipped": functools.partial(with_stray, 10),
    "skipped by its loss": functools.partial(with_stray, 10, value=MARK),
    "over the limit": functools.partial(with_stray, 1),
    "not finite": functools.partial(with_stray, 0, "stop"),
    "drawn": drawn,
    "evaluated": evaluated,
    "decided": decided,
    "refused": refused,
    "out of range": out_of_range,
    "other data": other_data,
    "other part": other_part,
    **{f"noisy {seed}": functools.partial(noisy, seed) for seed in SEEDS},
}


def outcome(case, folder=None):
    """Return what a case gives: a result, or the text of its refusal."""
    try:
        return CASES[case]() if case in CASES else KEPT[case](folder)
    except pv.InputError as error:
        return str(error)


def main(folder):
    torch.set_num_threads(1)
    with join_processes("cpu") as processes:
        assert processes != ALONE
        outcomes = {case: outcome(case, Path(folder)) for case in (*CASES, *KEPT)}
        torch.save(outcomes, Path(folder) / f"{processes.rank}.pt")
        sys.stdout.write(f"written by {processes.rank}\n")


if __name__ == "__main__":
    main(sys.argv[1])
