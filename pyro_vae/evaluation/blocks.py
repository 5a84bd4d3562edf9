"""How a data set is cut into blocks, within which memory, and who is told of the progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from pyro_vae.infer.log_weights import PairScorer
from pyro_vae.infer.pair import Inputs, PairFunction
from pyro_vae.infer.particles import BATCHING_ERRORS

__all__ = ["Progress", "blocks_of", "can_be_split", "memory_budget"]


class Progress(NamedTuple):
    """Who is told how far the work has come."""

    data: Callable[[int, int], None] | None
    mean: Callable[[float], None] | None


def blocks_of(
    model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str, size: int
) -> list[slice]:
    """Cut the data into blocks of equal size (the last may be smaller), or not at all.

    A pair with parameters per datum (a guide that is not amortised) only fits its whole data set.
    """
    num_data = len(inputs[0])
    count = -(-num_data // size)
    if count > 1 and not can_be_split(model, guide, inputs, plate):
        count = 1
    size = -(-num_data // count)
    return [slice(start, start + size) for start in range(0, num_data, size)]


def can_be_split(model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str) -> bool:
    """Tell whether the pair accepts a part of its data."""
    if len(inputs[0]) < 3:
        return False
    try:
        # Two data: one alone would broadcast against parameters of any number of data.
        PairScorer(model, guide, tuple(value[:2] for value in inputs), plate=plate)
    except BATCHING_ERRORS:
        return False
    return True


def memory_budget(device: torch.device) -> int:
    """Return the bytes a chunk may need by default."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 4
    most = 1 << 27
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system says what is free
        return most
    # Larger tensors than this leads to (32 MiB) are mapped anew by the C library for every operation,
    # which costs more than their arithmetic.
    return max(1 << 24, min(most, available // 4))
