"""Several processes that train one pair: each takes its share of every batch, sums are shared."""

import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor
from torch import distributed as dist

from pyro_vae.errors import InputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes of torch's default process group, seen from one of them."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """Return the processes of the default group; without one this process is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's share of rows, contiguous; of few rows some processes get none."""
        return rows.tensor_split(self.size)[self.rank] if self.are_several else rows

    def own_seed(self, seed: int) -> int:
        """Return the seed of this process's own draws: the first one's is the seed itself."""
        if self.is_first:
            return seed
        # Neighbouring seeds must not share streams: seed + rank would be another run's seed.
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])

    def draw_apart(self) -> None:
        """Let the random streams of the processes part here; the first one's stays as it is."""
        if not self.is_first:
            pyro.set_rng_seed(self.own_seed(int(torch.randint(2**32, ()))))

    @torch.no_grad()
    def sum_(self, values: Tensor) -> Tensor:
        """Sum values over the processes, in place: bit for bit the same in all of them."""
        if self.are_several:
            with _carry(values) as carried:
                dist.all_reduce(carried)
        return values

    @torch.no_grad()
    def take_first(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values into the tensors of all."""
        if self.are_several:
            for tensor in tensors:
                with _carry(tensor.detach()) as carried:
                    dist.broadcast(carried, src=0)

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes in the order of their ranks."""
        if not self.are_several:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def decide(self, function: Callable[[], Result]) -> Result:
        """Let the first process call a function, and return what it got in all of them."""
        if not self.are_several:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except (InputError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        result, refusal = outcome
        if refusal is not None:
            raise refusal
        return result

    def first_before_others(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process and then in the others, which find what it left."""
        results: list[Result] = []
        self.decide(lambda: results.append(function()))
        return results[0] if results else function()

    def check_together(self, check: Callable[[], None]) -> None:
        """Make a check in every process; what one of them refuses, all do."""
        refusal: InputError | None = None
        try:
            check()
        except InputError as error:
            refusal = error
        for found in self.gather(refusal):
            if found is not None:
                raise found

    def check_same(self, **settings: Hashable | tuple[Tensor, ...]) -> None:
        """Refuse settings and data (by shapes and ends) that differ between the processes."""
        if not self.are_several:
            return
        found = self.gather({name: _fingerprint(value) for name, value in settings.items()})
        for name in settings:
            values = [other[name] for other in found]
            if len(set(values)) > 1:
                wanted = f"the same {name.replace('_', ' ')} in every process"
                advice = "give each all the data and the same options; batches are shared out here"
                raise InputError(f"expected {wanted}, got {values}: {advice}")


ALONE = Processes()


def _fingerprint(value: Any) -> Hashable:
    """Return a setting as it is; of data what tells one part of them from another."""
    if isinstance(value, tuple):
        return ", ".join(map(str, map(_fingerprint, value)))
    if not isinstance(value, Tensor):
        return value
    return f"{tuple(value.shape)} {value[[0, -1]].double().sum().item():g}"


@contextmanager
def _carry(tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor as the group's backends take it, and what becomes of it back."""
    plain = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    # NCCL alone carries CUDA tensors only.
    device = "cuda" if dist.get_backend() == "nccl" and tensor.device.type == "cpu" else tensor.device
    carried = plain.to(device).contiguous()
    yield carried
    if carried is not tensor:
        plain.copy_(carried)


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the other processes that torchrun started, if it did; leave them at the end."""
    by_torchrun = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = dist.is_available() and all(name in os.environ for name in by_torchrun)
    if not told or dist.is_initialized():
        yield Processes.current()
        return
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(_local_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    processes = Processes.current()
    if processes.is_first:
        yield processes
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield processes
    # Not where an error leaves: the others may wait in a collective that would never end, and
    # torchrun stops them as soon as this process is gone.
    dist.destroy_process_group()


def _local_device(device: str) -> int:
    """Return the number of the CUDA device that is this process's own."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if together > 1 and device not in ("auto", "cuda"):
        wanted = "--device auto, cuda or cpu with several processes"
        advice = "each takes the device of its local rank"
        raise InputError(f"expected {wanted}, got {device!r}: {advice}")
    if together > count:
        wanted = "at most one process per CUDA device"
        advice = "lower --nproc-per-node or use --device cpu"
        raise InputError(f"expected {wanted}, got {together} for {count}: {advice}")
    return local
