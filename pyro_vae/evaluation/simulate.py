"""Data drawn from a model in place of those it observes, with the latents that made them."""

from __future__ import annotations

import itertools
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import Knowledge, OpenedPair, any_number_of_data
from pyro_vae.pair.sites import (
    Given,
    Latents,
    Site,
    latent_sites,
    sample_sites,
    site_log_prob,
    value_axis,
)


def simulate(template: OpenedPair, num_data: int) -> tuple[OpenedPair, Latents]:
    """Draw data from the model of an open pair; return their pair, and their latents, data first.

    Each input that is observed is replaced: it is to be observed at one site, and used nowhere else.
    """
    model = template.model
    observed = sample_sites(poutine.trace(model).get_trace(*template.inputs))
    sources = {s["name"]: _source(s, template.inputs) for s in observed if s["is_observed"]}
    for (name, index), (other, its) in itertools.combinations(sources.items(), 2):
        if index == its:
            raise InputError(
                f"expected one observed site for each input, {name!r} and {other!r} observe the "
                "same: simulated data would differ between them; pass it as two inputs"
            )
    inputs = list(template.part(torch.arange(num_data) % template.num_data).inputs)
    with any_number_of_data("pair", num_data):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*inputs)
        for name, index in sources.items():
            site = trace.nodes[name]
            inputs[index] = _in_place_of(inputs[index], site["value"], name)
            site["value"] = inputs[index].reshape(site["value"].shape)
        drawn = [site for site in latent_sites(trace) if site["name"] not in sources]
        with Given({site["name"]: site["value"] for site in drawn}):
            changed = changed_site(trace, poutine.trace(model).get_trace(*inputs))
        if changed is not None:  # what it drew is then not what it says
            raise InputError(
                "expected a model that uses the data at its observed sites alone, the density at "
                f"{changed!r} changes with them: no data can be simulated from it"
            )
        pair = template.on(tuple(inputs))
        if num_data != template.num_data:
            pair.knowledge = Knowledge()  # whether it takes so many is to be seen
            pair.structure  # noqa: B018
    return pair, {s["name"]: s["value"].movedim(value_axis(s, template.plate), 0) for s in drawn}


def changed_site(first: Trace, other: Trace) -> str | None:
    """Return the name of a sample site whose log-density differs between two traces, if one does."""
    for site in sample_sites(first):
        name: str = site["name"]
        both = site_log_prob(site), site_log_prob(other.nodes[name])
        if not torch.allclose(*both, rtol=1e-4, atol=1e-4, equal_nan=True):
            return name
    return None


def _source(site: Site, template: Inputs) -> int:
    """Return which input an observed site observes, be it in another shape."""
    value: Any = site["value"]
    if isinstance(value, Tensor) and not isinstance(site["fn"], dist.Unit):
        for index, given in enumerate(template):
            same_memory = value.data_ptr() == given.data_ptr() and value.numel() == given.numel()
            contiguous = value.is_contiguous() and given.is_contiguous()
            alike = value.shape == given.shape and value.stride() == given.stride()
            if same_memory and (contiguous or alike):
                return index
    raise InputError(
        f"expected observed site {site['name']!r} to observe an input as it is, got other values: "
        "simulated data can't be put in their place; pass what is observed as an input of its own"
    )


def _in_place_of(given: Tensor, drawn: Tensor, name: str) -> Tensor:
    """Return drawn values in the shape and type of the input they take the place of."""
    drawn = drawn.reshape(given.shape)
    value = drawn.to(given.dtype)
    if not given.is_floating_point() and (value != drawn).any():
        raise InputError(
            f"expected floating-point data at {name!r}, whose simulated values are no whole numbers, "
            f"got {given.dtype}: convert them"
        )
    return value
