"""Which parts of an input the sites of a model observe: all of it, or views such as ``x[:, t]``."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, distributions

from pyro_vae.errors import InputError
from pyro_vae.pair.sites import Site, observed_names, observed_site

# Of a part of a contiguous tensor: its size, strides and offset, as ``as_strided`` takes them.
Place = tuple[torch.Size, tuple[int, ...], Any]


def part_observed(value: Any, x: Tensor) -> Place | None:
    """Return which part of a contiguous ``x`` a site's value is, a view of it; None: of no part."""
    if not isinstance(value, Tensor) or value.is_sparse:
        return None
    if value.untyped_storage()._cdata != x.untyped_storage()._cdata:
        return None
    offset = value.storage_offset() - x.storage_offset()
    steps = zip(value.shape, value.stride(), strict=True)
    last = offset + sum((size - 1) * stride for size, stride in steps)
    return (value.shape, value.stride(), offset) if offset >= 0 and last < x.numel() else None


def take_part(x: Tensor, place: Place) -> Tensor:
    """Return that part of a contiguous tensor, as a view."""
    size, strides, offset = place
    return x.as_strided(size, strides, x.storage_offset() + offset)


def observing_sites(trace: Trace, x: Tensor, observed: str | None) -> tuple[str, ...]:
    """Return names of the elementwise sites that observe ``x``, each value once; by default all."""
    if observed is None:
        parts = {n: part_observed(trace.nodes[n]["value"], x) for n in observed_names(trace)}
        names = tuple(name for name, place in parts.items() if place is not None)
    if observed is not None or not names:
        names = (observed_site(trace, observed),)
        value = trace.nodes[names[0]]["value"]
        if part_observed(value, x) is None and not (value.shape == x.shape and torch.equal(value, x)):
            raise InputError(
                f"expected site {names[0]!r} to observe the input or a part of it, shape "
                f"{tuple(x.shape)}, got other values of shape {tuple(value.shape)}: name it with "
                "observed=, the input with position="
            )
    times = torch.zeros(x.shape, device=x.device)
    for site, place in parts_of(trace, names, x):
        elementwise_base(site["name"], site["fn"])
        take_part(times, place).add_(1)
    if times.max() > 1:
        wanted = "each value observed at one site"
        advice = "they can't be filled in; name the site with observed="
        raise InputError(f"expected {wanted}, {names[-1]!r} observes some again: {advice}")
    return names


def parts_of(trace: Trace, names: Sequence[str], x: Tensor) -> list[tuple[Site, Place]]:
    """Return sites and which part of ``x`` each observes; a copy of its shape is all of it."""
    whole = (x.shape, x.contiguous().stride(), 0)
    sites = [trace.nodes[name] for name in names]
    return [(site, part_observed(site["value"], x) or whole) for site in sites]


def value_moments(parts: list[tuple[Site, Place]], x: Tensor) -> Tensor:
    """Return mean and mean square of the values of ``x`` given z, ``(N, 2, ...)``, or of draws."""
    mean = x.double().clone()
    square = mean.square()
    for site, place in parts:
        drawn = take_part(mean, place)
        try:
            own, variance = site["fn"].mean.double(), site["fn"].variance.double()
        except NotImplementedError:
            continue
        known = own.isfinite() & variance.isfinite()
        take_part(square, place).copy_(torch.where(known, variance + own**2, drawn.square()))
        drawn.copy_(torch.where(known, own, drawn))
    return torch.stack([mean, square], 1)


def elementwise_base(name: str, distribution: Any) -> tuple[Any, int]:
    """Return a site's distribution of single values, and how many dimensions are its event."""
    base, event_dim = distribution, 0
    while isinstance(base, distributions.Independent):
        event_dim += base.reinterpreted_batch_ndims
        base = base.base_dist
    if base.event_shape:
        raise InputError(
            f"expected site {name!r} to have independent values given the latents, got "
            f"{type(base).__name__} with events of shape {tuple(base.event_shape)}: only an "
            "elementwise distribution made an event by .to_event can be masked"
        )
    return base, event_dim
