"""How a data set is cut into blocks, within which memory, and who is told of the progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from pyro_vae.errors import InputError, first_line
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.weights.log_weights import PairScorer
from pyro_vae.weights.particles import BATCHING_ERRORS


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
    num_data = len(inputs[0])
    for rows in blocks_of(model, guide, inputs, plate, size):
        yield rows, PairScorer(model, guide, rows_of(inputs, rows), plate=plate)
        if progress is not None:
            progress(min(rows.stop, num_data), num_data)


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


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """Return some rows of every input."""
    return tuple(value[rows] for value in inputs)


def few_of(model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str, most: int) -> Inputs:
    """Return a few of the data to look at a pair with; all where it accepts no part of them."""
    return rows_of(inputs, blocks_of(model, guide, inputs, plate, most)[0])


def can_be_split(model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str) -> bool:
    """Tell whether the pair accepts a part of its data."""
    if len(inputs[0]) < 3:
        return False
    try:
        # Two data: one alone would broadcast against parameters of any number of data.
        PairScorer(model, guide, rows_of(inputs, slice(2)), plate=plate)
    except BATCHING_ERRORS:
        return False
    return True


@contextmanager
def any_number_of_data(kind: str, num_data: int) -> Iterator[None]:
    """Explain what a function raises that is given another number of data than its user gave.

    Args:
        kind: "model", "guide" or "pair", for the message.
        num_data: how many data it is given inside.

    Raises:
        InputError: in place of what torch or Pyro raise.
    """
    try:
        yield
    except InputError:
        raise
    except BATCHING_ERRORS as error:
        raise InputError(
            f"expected a {kind} that takes any number of data, as one without parameters per datum "
            f"does, got an error for {num_data}: {first_line(error)}"
        ) from error


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
