"""How a data set is cut into blocks, within which memory, and who is told of the progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.weights.particles import PairScorer


class Progress(NamedTuple):
    """Who is told how far the work has come."""

    data: Callable[[int, int], None] | None
    mean: Callable[[float], None] | None


def block_scorers(
    model: PairFunction,
    guide: PairFunction,
    inputs: Inputs,
    plate: str,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[slice, PairScorer]]:
    """Bind the pair to one block of the data after another (see :func:`blocks_of`).

    Yields:
        the rows of a block and the pair bound to them. When the next block is asked for, or the end
        is reached, ``progress`` is called with (data done, N).
    """
    pair = OpenedPair(model, guide, inputs, plate=plate)
    for rows, part in pair.blocks(size, progress):
        yield rows, PairScorer.of(part)


def blocks_of(
    model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str, size: int
) -> list[slice]:
    """Cut the data into blocks (see :meth:`OpenedPair.split`)."""
    return OpenedPair(model, guide, inputs, plate=plate).split(size)


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """Return some rows of every input."""
    return tuple(value[rows] for value in inputs)


def few_of(model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str, most: int) -> Inputs:
    """Return a few of the data to look at a pair with; all where it accepts no part of them."""
    return OpenedPair(model, guide, inputs, plate=plate).few(most).inputs


def can_be_split(model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str) -> bool:
    """Tell whether the pair accepts a part of its data."""
    return OpenedPair(model, guide, inputs, plate=plate).is_divisible()


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
