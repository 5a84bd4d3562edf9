"""Data drawn from a model in place of those it observes, with the latents that made them."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.pair.functions import PairFunction
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

    Raises:
        InputError: a pair that can't be weighed, or not with so many data; an observed site that is
            not one of the inputs as it is, or a model that uses such an input elsewhere too.
    """
    model = template.model
    observed = sample_sites(poutine.trace(model).get_trace(*template.inputs))
    sources = {s["name"]: _source(s, template.inputs) for s in observed if s["is_observed"]}
    _check_one_site_each(sources)
    inputs = list(template.part(torch.arange(num_data) % template.num_data).inputs)
    with any_number_of_data("pair", num_data):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*inputs)
        for name, index in sources.items():
            site = trace.nodes[name]
            inputs[index] = _in_place_of(inputs[index], site["value"], name)
            site["value"] = inputs[index].reshape(site["value"].shape)
        drawn = [site for site in latent_sites(trace) if site["name"] not in sources]
        _check_sources(model, tuple(inputs), trace, {site["name"]: site["value"] for site in drawn})
        pair = template.on(tuple(inputs))
        if num_data != template.num_data:
            pair.knowledge = Knowledge()  # whether it takes so many is to be seen
            pair.structure  # noqa: B018
    return pair, {s["name"]: s["value"].movedim(value_axis(s, template.plate), 0) for s in drawn}


def changed_site(first: Trace, other: Trace) -> str | None:
    """Return the name of a sample site whose log-density differs between two traces, if one does."""
    others = {site["name"]: site_log_prob(site) for site in sample_sites(other)}
    for site in sample_sites(first):
        name: str = site["name"]
        log_prob = site_log_prob(site)
        if not torch.allclose(log_prob, others[name], rtol=1e-4, atol=1e-4, equal_nan=True):
            return name
    return None


def _source(site: Site, template: Inputs) -> int:
    """Return which input an observed site observes, be it in another shape."""
    value: Any = site["value"]
    for index, given in enumerate(template):
        if isinstance(value, Tensor) and not isinstance(site["fn"], dist.Unit):
            same_memory = value.data_ptr() == given.data_ptr() and value.numel() == given.numel()
            contiguous = value.is_contiguous() and given.is_contiguous()
            if same_memory and (contiguous or _laid_out_alike(value, given)):
                return index
    raise InputError(
        f"expected observed site {site['name']!r} to observe an input as it is, got other values: "
        "simulated data can't be put in their place; pass what is observed as an input of its own"
    )


def _laid_out_alike(value: Tensor, given: Tensor) -> bool:
    return value.shape == given.shape and value.stride() == given.stride()


def _check_one_site_each(sources: dict[str, int]) -> None:
    for name, index in sources.items():
        for other, its in sources.items():
            if other != name and its == index:
                raise InputError(
                    f"expected one observed site for each input, {name!r} and {other!r} observe the "
                    "same: simulated data would differ between them; pass it as two inputs"
                )


def _in_place_of(given: Tensor, drawn: Tensor, name: str) -> Tensor:
    """Return drawn values in the shape and type of the input they take the place of."""
    value = drawn.reshape(given.shape).to(given.dtype)
    if not given.is_floating_point() and (value != drawn.reshape(given.shape)).any():
        raise InputError(
            f"expected floating-point data at {name!r}, whose simulated values are no whole numbers, "
            f"got {given.dtype}: convert them"
        )
    return value


def _check_sources(model: PairFunction, inputs: Inputs, trace: Trace, latents: Latents) -> None:
    """Refuse a model that looks at the data it observes: what it drew is then not what it says."""
    with Given(latents):
        name = changed_site(trace, poutine.trace(model).get_trace(*inputs))
    if name is not None:
        raise InputError(
            "expected a model that uses the data at its observed sites alone, the density at "
            f"{name!r} changes with them: no data can be simulated from it"
        )
