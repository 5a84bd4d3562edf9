"""A trial at an offset: does a data point get the same values whatever other ones stand beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pair.agreement import CALLING_ERRORS, agree, all_close
from pyro_vae.pair.functions import PairFunction, modules_of, new_names_forgotten, tensors_of
from pyro_vae.pair.inputs import Inputs, take_rows
from pyro_vae.pair.sites import (
    Given,
    Latents,
    draw_traces,
    is_delta,
    is_inside,
    latent_sites,
    sample_sites,
    total,
    value_axis,
)

# Data points of a trial: few, and enough for statistics over them to differ from those of a half.
_TRIED = 64


class Trial(NamedTuple):
    """What a trial is of: the functions of a pair, its inputs, and the device that it computes on."""

    model: PairFunction
    guide: PairFunction
    inputs: Inputs
    plate: str
    device: torch.device
    whole: int  # data points of the whole set, of which the inputs may be a part

    @property
    def num_data(self) -> int:
        """Number of data points, N."""
        return len(self.inputs[0])

    def part(self, rows: slice | Tensor) -> Inputs:
        """Return some rows of the inputs on the device."""
        return take_rows(self.inputs, rows, self.device)


def gives_data_their_own_values(pair: Trial, *, in_any_company: bool = True) -> bool:
    """Run a pair on some of its data and on these in another way: the densities must agree.

    The other way is the later half of them alone or, where the company may matter (statistics over
    the batch), all of them in reverse.

    A table with a row for each data point that is sliced by their number gives them the rows of
    others; parameters per data point do not fit at all. Where such a table is constant so far (as
    parameters often start) the other way would not show: whatever tensor has as many rows as there
    are data is therefore moved for a second trial, and put back.

    The caller holds the lock, without gradients, in eval mode.
    """
    count = min(pair.num_data, _TRIED)
    # At least two: one alone would broadcast against parameters of any number of data.
    later = torch.arange(min(count // 2, count - 2), count)
    rows = later if in_any_company else torch.arange(count).flip(0)
    with new_names_forgotten() as new_names:
        try:
            if not _holds_for(pair, count, rows):
                return False
            if not in_any_company:
                draw_traces(pair.model, pair.guide, pair.part(later))
            made = _made_for(pair, new_names(), {count, len(later)})
            if made:  # for a part of the data: what are they made like for all of them?
                for name in made:
                    del pyro.get_param_store()[name]
                draw_traces(pair.model, pair.guide, pair.part(slice(None)))
            suspects = list(_tables_of(pair))
            if not suspects:
                return True
            with _moved(suspects):
                return _holds_for(pair, count, rows)
        except CALLING_ERRORS:
            return False


def _made_for(pair: Trial, names: list[str], numbers: set[int]) -> list[str]:
    """Return which new parameters, no module's, have as many rows as a part of the data."""
    modules = modules_of(pair.model, pair.guide)
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    tensors = {name: pyro.get_param_store()._params[name] for name in names}
    return [n for n, v in tensors.items() if id(v) not in known and numbers & set(v.shape)]


def _holds_for(pair: Trial, count: int, rows: Tensor) -> bool:
    """Compare the densities of some rows of the first data points with those of all of these."""
    whole, others = pair.part(slice(count)), pair.part(rows)
    rows = rows.to(pair.device)
    guide_trace = poutine.trace(pair.guide).get_trace(*whole)
    sites = [site for site in latent_sites(guide_trace) if is_inside(site, pair.plate)]
    axes = {site["name"]: value_axis(site, pair.plate) for site in sites}
    # A point mass follows from the other sites.
    random = {site["name"]: site["value"] for site in sites if not is_delta(site["fn"])}
    expected = _densities(pair, whole, random)
    shown = {n: v.movedim(axes[n], 0)[rows].movedim(0, axes[n]) for n, v in random.items()}
    found = _densities(pair, others, shown)

    def plain(latents: Latents) -> tuple[Tensor, ...]:
        filled = {}
        for name, value in latents.items():
            values = random[name].movedim(axes[name], 0).clone()
            values[rows] = value.movedim(axes[name], 0)
            filled[name] = values.movedim(0, axes[name])
        return tuple(term[rows] for term in _densities(pair, whole, filled))

    if any(term.shape != other[rows].shape for term, other in zip(found, expected, strict=True)):
        return False
    # What is drawn outside the sites (noise on the data) says nothing about a data point's place.
    return agree(found, plain, shown) or not all_close(_densities(pair, whole, random), expected)


def _densities(pair: Trial, inputs: Inputs, latents: Latents) -> tuple[Tensor, ...]:
    """Return log q, log p(x|z) and log p(z) of given latents per data point, each ``(N,)``."""
    with Given(latents):
        guide_trace = poutine.trace(pair.guide).get_trace(*inputs)
    drawn = {site["name"]: site["value"] for site in latent_sites(guide_trace)}
    with Given(drawn):
        model_trace = poutine.trace(pair.model).get_trace(*inputs)
    sites = sample_sites(model_trace)
    groups = (
        sample_sites(guide_trace),
        [site for site in sites if site["is_observed"]],
        [site for site in sites if not site["is_observed"]],
    )
    return tuple(total(group, pair.plate, inputs) for group in groups)


def _tables_of(pair: Trial) -> Iterator[Tensor]:
    """Yield what the pair can reach with a dimension of the data's number, its inputs left out."""
    given = {value.data_ptr() for value in pair.inputs}
    values = list(pyro.get_param_store()._params.values())
    for module in modules_of(pair.model, pair.guide):
        values += [*module.parameters(), *module.buffers()]
    values += tensors_of(pair.model, pair.guide)
    for value in {id(value): value for value in values}.values():
        if {pair.num_data, pair.whole} & set(value.shape) and value.data_ptr() not in given:
            yield value


@contextmanager
def _moved(tables: list[Tensor]) -> Iterator[None]:
    """Move the entries of tables, each by another amount, and put them back."""
    kept = [table.detach().clone() for table in tables]
    try:
        for table in tables:
            if table.is_floating_point():
                share = torch.rand(table.shape, device=table.device).to(table.dtype)
                # Towards 0, so that what is in a range stays so; zeros are parameters' starts.
                table.data.copy_(torch.where(table == 0, 0.1 * share, table * (1 - 0.1 * share)))
            else:
                for dim, size in enumerate(table.shape):
                    table.data.copy_(table.index_select(dim, torch.randperm(size).to(table.device)))
        yield
    finally:
        for table, value in zip(tables, kept, strict=True):
            table.data.copy_(value)
