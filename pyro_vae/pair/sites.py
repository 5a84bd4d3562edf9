"""Sample sites of a traced pair: their densities, plates and latents, and when two results agree."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.distributions.values import log_prob_of
from pyro_vae.errors import InputError

Latents = dict[str, Tensor]
Terms = tuple[Tensor, ...]
Site = dict[str, Any]


class Given(Messenger):
    """Give sample sites the values named here, as ``poutine.replay`` does from a trace."""

    def __init__(self, values: Latents) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.values and not message["is_observed"]:
            message["value"] = self.values[message["name"]]
            message["done"] = True


_SHARE = "pyro_vae_share_of_data"


class SharedTerms(Messenger):
    """Let a batch count its share of what stands outside the data plate: once per data set in all."""

    def __init__(self, plate: str | None, share: float) -> None:
        super().__init__()
        self.plate, self.share = plate, share

    def _pyro_sample(self, message: Any) -> None:
        if self.share != 1 and not (site_is_subsample(message) or is_inside(message, self.plate)):
            message["scale"] = message["scale"] * self.share
            message["infer"] = {**message["infer"], _SHARE: self.share}


def share_terms(trace: Trace, plate: str | None, share: float) -> None:
    """Mark what a trace has outside the data plate, as :class:`SharedTerms` does while it runs."""
    for site in sample_sites(trace):
        if share != 1 and not is_inside(site, plate):
            site["infer"][_SHARE] = share


def sample_sites(trace: Trace) -> list[Site]:
    """Return the sample sites that have a density: no subsampling, no ``pyro.deterministic``."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    sites = [site for site in sites if not site_is_subsample(site)]
    return [site for site in sites if not site["infer"].get("_deterministic")]


def latent_sites(trace: Trace) -> list[Site]:
    """Return the sample sites that are not observed."""
    return [site for site in sample_sites(trace) if not site["is_observed"]]


def observed_names(trace: Trace) -> list[str]:
    """Return the names of the observed sites; factors observe nothing."""
    sites = (site for site in sample_sites(trace) if site["is_observed"])
    return [site["name"] for site in sites if not site_is_factor(site)]


def nothing_observed() -> InputError:
    """Return the refusal of a model without an observed site."""
    advice = "pass obs= to pyro.sample, and the model before the guide"
    return InputError(f"expected a model that observes data, got none observed: {advice}")


def observed_site(trace: Trace, name: str | None) -> str:
    """Return the name of the site that observes the data: the one asked for, or the only one."""
    sites = observed_names(trace)
    if name is None and len(sites) == 1:
        return sites[0]
    if not sites:
        raise nothing_observed()
    if name is None or name not in sites:
        wanted = "one observed site" if name is None else f"an observed site {name!r}"
        there = ", ".join(sites)
        raise InputError(f"expected {wanted}, the model has {there}: name one with observed=")
    return name


def likelihood_kind(site: Site) -> str:
    """Return what an observed site's log-probability is the logarithm of.

    A ``"density"``, a ``"density on the sphere"``, a ``"probability"`` (of discrete values), or a
    ``"pseudo-likelihood"``: a discrete distribution given values that it can't take. NaN is missing.
    """
    support, values = innermost(site["fn"].support, "base_constraint"), site["value"]
    if not support.is_discrete:
        return "density on the sphere" if support is constraints.sphere else "density"
    missing = values.isnan()
    for _ in range(support.event_dim):
        missing = missing.any(-1)
    return "probability" if (support.check(values) | missing).all() else "pseudo-likelihood"


def site_log_prob(site: Site) -> Tensor:
    """Return a traced site's log-probability with its mask and without its scale."""
    log_prob = log_prob_of(site["fn"], site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def counted_values(site: Site) -> Tensor | None:
    """Return which values of a site its masks let count, in the value's shape; None: all of them."""
    level, masks = site["fn"], [(site["mask"], site["fn"].event_dim)]
    while isinstance(level, Independent | MaskedDistribution):
        if isinstance(level, MaskedDistribution):
            masks.append((level._mask, level.event_dim))
        level = level.base_dist
    counted = None
    for mask, event_dim in masks:
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask, device=site["value"].device)
        of_values = mask.reshape(*mask.shape, *[1] * event_dim).expand(site["value"].shape)
        counted = of_values if counted is None else counted & of_values
    return None if counted is None or bool(counted.all()) else counted


def changed_site(first: Trace, other: Trace) -> str | None:
    """Return the name of a sample site whose log-density differs between two traces, if one does."""
    for site in sample_sites(first):
        name: str = site["name"]
        both = site_log_prob(site), site_log_prob(other.nodes[name])
        if not torch.allclose(*both, rtol=1e-4, atol=1e-4, equal_nan=True):
            return name
    return None


def sum_to(log_prob: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Sum over all but the kept (negative) dimensions, in float64."""
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
    log_prob = log_prob.double()
    return log_prob.sum(others) if others else log_prob


def data_dim(site: Site, plate: str | None) -> int:
    """Return the (negative) batch dimension of the data plate at a site; refuse one outside it."""
    for frame in vectorized_frames(site):
        if frame.name == plate:
            return int(frame.dim)
    wanted = f"site {site['name']!r} inside the data plate {plate!r}"
    advice = "move it there, or name your plate with plate="
    raise InputError(f"expected {wanted}, got one outside: {advice}")


def value_axis(site: Site, plate: str | None) -> int:
    """Return the (negative) axis of a site's value that counts the data (see :func:`data_dim`)."""
    return int(data_dim(site, plate) - site["fn"].event_dim)


def is_inside(site: Site, plate: str | None) -> bool:
    """Tell whether a site is inside the data plate."""
    return any(frame.name == plate for frame in vectorized_frames(site))


def is_delta(distribution: Any) -> bool:
    """Tell whether a distribution is a point mass, whatever it is wrapped in."""
    return isinstance(innermost(distribution), Delta)


TracePair = tuple[Any, Any]  # a model trace and the guide trace it was replayed against


def draw_traces(model: Any, guide: Any, arguments: Any, keywords: Any = None) -> TracePair:
    """Trace the guide, then the model with the guide's draws."""
    guide_trace = poutine.trace(guide).get_trace(*arguments, **(keywords or {}))
    replayed = poutine.replay(model, trace=guide_trace)
    return poutine.trace(replayed).get_trace(*arguments, **(keywords or {})), guide_trace


def plate_scale(site: dict[str, Any]) -> float:
    """Return by how much plates that subsample scale a site, or :class:`SharedTerms` one outside."""
    frames = (frame for frame in site["cond_indep_stack"] if frame.full_size and frame.full_size > 0)
    share = float(site["infer"].get(_SHARE, 1.0))
    return share * math.prod(frame.full_size / frame.size for frame in frames)


def subsamples(trace: Trace, plate: str | None) -> bool:
    """Tell whether a plate draws some of its elements, or stands for more than it is given."""
    frames = (frame for site in sample_sites(trace) for frame in vectorized_frames(site))
    known = (frame for frame in frames if frame.name == plate and frame.full_size)
    return any(frame.full_size != frame.size for frame in known)


def vectorized_frames(site: Site) -> list[Any]:
    """Return the vectorised plates around a site."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def innermost(wrapper: Any, inside: str = "base_dist") -> Any:
    """Return what a distribution (independent, masked, expanded, transformed) wraps at last."""
    while hasattr(wrapper, inside):
        wrapper = getattr(wrapper, inside)
    return wrapper


def total(sites: list[Site], plate: str | None, inputs: tuple[Tensor, ...]) -> Tensor:
    """Sum the sites' log-probabilities per datum, ``(N,)``, float64; each has those of none."""
    kept = [(data_dim(site, plate),) if is_inside(site, plate) else () for site in sites]
    terms = [sum_to(site_log_prob(site), dims) for site, dims in zip(sites, kept, strict=True)]
    nothing = torch.zeros(len(inputs[0]), dtype=torch.float64, device=inputs[0].device)
    return torch.stack(torch.broadcast_tensors(nothing, *terms)).sum(0)


# What a pair may raise when it is called in a way it was not written for.
CALLING_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


def raise_out_of_memory(error: Exception) -> None:
    """Raise a calling error again that says nothing about the pair: the memory was too small."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise error


# Batched and plain kernels round differently (about 1e-6 of the sum of the terms in float32); a
# particle that met another particle's or another datum's numbers is off by much more.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3
# Sums of many terms are off by several units in the last place, and a few directions tell only up to
# a small factor how steep a density is in the direction of such an error. Both are generous: they are
# multiplied by a steepness that is nothing where a wrong result could hide.
_LAST_DIGITS, _STEEP = 8, 8


def all_close(batched: Terms, plain: Terms) -> bool:
    """Tell whether batched and plain results are the same up to rounding."""
    how: Any = {"rtol": _RELATIVE, "atol": _ABSOLUTE, "equal_nan": True}
    both = [*zip(batched, plain, strict=True)]
    return all(one.shape == other.shape and torch.allclose(one, other, **how) for one, other in both)


def agree(batched: Terms, plain: Callable[[Latents], Terms], latents: Latents) -> bool:
    """Tell whether batched results are those of plain calls, as far as rounding determines these.

    A steep density multiplies the rounding of the latents, and more so one that a flow or a full-rank
    normal knows from drawing while a plain call must find it from the point. By how much is seen from
    plain calls at latents moved in their last digits. Whole numbers are taken for a discrete latent.
    """
    expected = plain(latents)
    if all_close(batched, expected):
        return True
    if any(left.shape != right.shape for left, right in zip(batched, expected, strict=True)):
        return False
    if not all(map(torch.equal, plain(latents), expected)):
        return False  # what is drawn anew in every call would pass for steep
    slack = [torch.zeros_like(value) for value in expected]
    with pyro.validation_enabled(False):
        for period in (1, 2, 4):
            moved = plain({name: _moved(value, period) for name, value in latents.items()})
            each = zip(slack, moved, expected, strict=True)
            slack = [torch.maximum(most, (left - right).abs()) for most, left, right in each]
    # A latent that was moved over an edge says nothing of how steep the density is before it.
    slack = [most.where(most.isfinite(), 0.0) for most in slack]
    off = [(left - right).abs() for left, right in zip(batched, expected, strict=True)]
    allowed = zip(off, expected, slack, strict=True)
    return all(bool((o <= _ABSOLUTE + _RELATIVE * e.abs() + _STEEP * s).all()) for o, e, s in allowed)


def _moved(value: Tensor, period: int) -> Tensor:
    """Move a latent by some units in its last place, up and down by turns of ``period`` numbers."""
    if not value.is_floating_point() or torch.equal(value, value.round()):
        return value
    turns = torch.arange(value.numel(), device=value.device).div(period, rounding_mode="floor") % 2
    size = _LAST_DIGITS * torch.finfo(value.dtype).eps
    return value * (1 + size * (2 * turns - 1).to(value.dtype).view(value.shape))
