"""Sample sites of a traced pair: their log-probabilities, their latents, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_vae.beta import latent_scale_of
from pyro_vae.errors import InputError

Latents = dict[str, Tensor]
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


def sample_sites(trace: Trace) -> list[Site]:
    """Return the sample sites of a trace that have a density.

    Not among them: sites that subsample a plate, and those of ``pyro.deterministic``.
    """
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    ]


def latent_sites(trace: Trace) -> list[Site]:
    """Return the sample sites that are not observed."""
    return [site for site in sample_sites(trace) if not site["is_observed"]]


def observed_site(trace: Trace, name: str | None) -> str:
    """Return the name of the site that observes the data: the one asked for, or the only one.

    Factors observe nothing.

    Raises:
        InputError: no observed site, several and no name, or a name that is not there.
    """
    sites = [
        site["name"]
        for site in sample_sites(trace)
        if site["is_observed"] and not site_is_factor(site)
    ]
    if name is None and len(sites) == 1:
        return sites[0]
    if not sites:
        raise InputError(
            "expected a model that observes data, got none observed: pass obs= to pyro.sample, and "
            "the model before the guide"
        )
    if name is None or name not in sites:
        wanted = "one observed site" if name is None else f"an observed site {name!r}"
        there = ", ".join(sites)
        raise InputError(f"expected {wanted}, the model has {there}: name one by observed=")
    return name


def site_log_prob(site: Site) -> Tensor:
    """Return a traced site's log-probability with its mask and without its scale."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def sum_to(log_prob: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Sum over all but the kept (negative) dimensions, in float64."""
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
    log_prob = log_prob.double()
    return log_prob.sum(others) if others else log_prob


def data_dim(site: Site, plate: str) -> int:
    """Return the (negative) batch dimension of the data plate at a site.

    Raises:
        InputError: a site outside that plate.
    """
    for frame in site["cond_indep_stack"]:
        if frame.name == plate and frame.vectorized:
            dim: int = frame.dim
            return dim
    raise InputError(
        f"expected site {site['name']!r} inside the data plate {plate!r}, got one outside: move it "
        "there, or name your plate by plate="
    )


def is_inside(site: Site, plate: str) -> bool:
    """Tell whether a site is inside the data plate."""
    return any(frame.name == plate and frame.vectorized for frame in site["cond_indep_stack"])


def check_rows(function: str, site: Site, plate: str, num_data: int) -> None:
    """Refuse a site without one row per datum: outside the data plate, of other size, subsampled.

    Args:
        function: "model" or "guide", for the message.
        site: a traced sample site.
        plate: name of the data plate.
        num_data: number of data, N.
    """
    shape, dim = site["fn"].batch_shape, data_dim(site, plate)
    rows = shape[dim] if len(shape) >= -dim else 1
    if rows != num_data:
        raise InputError(
            f"expected site {site['name']!r} of the {function} to have {num_data} data along plate "
            f"{plate!r}, got {rows}: use pyro.plate({plate!r}, len(x))"
        )


def check_site(function: str, site: Site, plate: str, num_data: int) -> None:
    """Refuse a site that has no log-probability per datum, or none that can be told.

    Args:
        function: "model" or "guide", for the message.
        site: a traced sample site.
        plate: name of the data plate.
        num_data: number of data, N.
    """
    name = site["name"]
    frames = [frame for frame in site["cond_indep_stack"] if frame.name == plate]
    if not frames or not frames[0].vectorized:
        kind = "observed site" if site["is_observed"] else "latent"
        raise InputError(
            f"expected {kind} {name!r} of the {function} inside the data plate "
            f"{plate!r}: a site that the data share has no weight per datum"
        )
    try:
        log_prob = site_log_prob(site)
    except ValueError as error:  # of torch's validation
        raise InputError(
            f"expected values at site {name!r} of the {function} in its support and shape, got "
            f"others of shape {tuple(site['value'].shape)}: look for NaN, or scale the data"
        ) from error
    size = log_prob.shape[frames[0].dim] if log_prob.dim() >= -frames[0].dim else 1
    if size != num_data:
        raise InputError(
            f"expected site {name!r} of the {function} to have {num_data} data along "
            f"plate {plate!r}, got {size}: use pyro.plate({plate!r}, len(x))"
        )
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    stray = [
        dim for dim in range(-log_prob.dim(), 0) if log_prob.shape[dim] > 1 and dim not in plates
    ]
    if stray:
        raise InputError(
            f"expected site {name!r} of the {function} to have one log-probability per datum, got "
            f"shape {tuple(log_prob.shape)}: declare event dimensions by .to_event(k), or squeeze"
        )
    known = latent_scale_of(site)
    for frame in site["cond_indep_stack"]:
        if frame.full_size and frame.full_size > 0:
            known = known * frame.full_size / frame.size
    scale = site["scale"]
    # A scale that differs from datum to datum is a tensor, and certainly the user's own.
    same = not isinstance(scale, Tensor) or scale.numel() == 1
    if not same or not math.isclose(float(scale), float(known), rel_tol=1e-6):
        got = f"{float(scale):g}" if same else f"one of shape {tuple(scale.shape)}"
        raise InputError(
            f"expected no scale on site {name!r} of the {function} but the plates', got "
            f"{got}: a weight can't be told from a poutine.scale; remove it"
        )


def check_latents_match(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse latents that only one of model and guide draws, and a guide that hides its density."""
    in_model = {site["name"] for site in latent_sites(model_trace)}
    guide_sites = {site["name"]: site for site in latent_sites(guide_trace)}
    missing = sorted(in_model - set(guide_sites))
    if missing:
        raise InputError(
            f"expected a guide that draws every latent, {missing[0]!r} is missing: "
            "add pyro.sample for it, or observe it in the model"
        )
    surplus = {name: site for name, site in guide_sites.items() if name not in in_model}
    named = sorted(name for name, site in surplus.items() if not site["infer"].get("is_auxiliary"))
    if named:
        raise InputError(
            f"expected latents of the guide to be the model's, {named[0]!r} is not: "
            'draw it in the model too, or mark it infer={"is_auxiliary": True}'
        )
    for name in sorted(in_model):
        ranks = [trace.nodes[name]["fn"].event_dim for trace in (model_trace, guide_trace)]
        if ranks[0] != ranks[1]:  # one of the densities would be a sum over the data
            raise InputError(
                f"expected one number of event dimensions for {name!r}, got {ranks[0]} in the model "
                f"and {ranks[1]} in the guide: give both the same .to_event"
            )
    _check_auxiliary(surplus, guide_sites)


def _check_auxiliary(auxiliary: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    """Refuse auxiliary sites that are not turned into latents of the model.

    Pyro's autoguides draw one auxiliary vector and place its pieces with Delta sites whose
    log-density is the Jacobian: together they are q(z given x). An auxiliary variable that is mixed
    over instead leaves q(z given x) an integral nobody has, and its weights would not average to
    p(x).
    """
    drawn = sum(site["value"].numel() for site in auxiliary.values())
    placed = sum(site["value"].numel() for site in guide_sites.values() if is_delta(site["fn"]))
    if drawn != placed:
        name = next(iter(auxiliary), None) or next(
            name for name, site in guide_sites.items() if is_delta(site["fn"])
        )
        raise InputError(
            f"expected auxiliary sites of the guide to become latents through Delta sites one to "
            f"one, got {drawn} auxiliary values for {placed} placed ones (site {name!r}): draw "
            "the auxiliary variable in the model too"
        )


def is_delta(distribution: Any) -> bool:
    """Tell whether a distribution is a point mass, whatever it is wrapped in."""
    while not isinstance(distribution, Delta) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, Delta)


def check_density_known(guide_sites: Iterable[Site], advice: str) -> None:
    """Refuse a guide whose density is known where it drew alone: point masses follow other sites."""
    for site in guide_sites:
        if is_delta(site["fn"]):
            raise InputError(
                f"expected a guide whose density is known at any point, {site['name']!r} is a point "
                f"mass: {advice}"
            )


TracePair = tuple[Any, Any]  # a model trace and the guide trace it was replayed against


def draw_traces(
    model: Callable[..., Any], guide: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> TracePair:
    """Trace the guide, then the model with the guide's draws."""
    guide_trace = poutine.trace(guide).get_trace(*inputs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*inputs)
    return model_trace, guide_trace


def plate_scale(site: dict[str, Any]) -> float:
    """Return by how much the plates around a site scale it because they subsample."""
    frames = (frame for frame in site["cond_indep_stack"] if frame.full_size and frame.full_size > 0)
    return math.prod(frame.full_size / frame.size for frame in frames)


def unscaled_log_prob(site: dict[str, Any]) -> Tensor:
    """Return a scored site's log-probability with its mask and without its scale.

    The value is the one of :func:`pyro_vae.pair.sites.site_log_prob`, taken from what Pyro has
    computed already.
    """
    return scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])


def refuse_score_function(sites: Iterable[dict[str, Any]], objective: str) -> None:
    """Refuse guide sites whose draws carry no gradient."""
    for site in sites:
        if not is_identically_zero(site["score_parts"].score_function):
            raise InputError(
                f"expected reparameterised latents for {objective}, {site['name']!r} "
                f"({type(site['fn']).__name__}) is not: use Trace_ELBO or TraceBound"
            )
