"""What a pair must keep: refused here, by the site's name, in the same words whoever asks."""

import enum
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.distributions.util import is_identically_zero
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor
from torch import Tensor
from torch.distributions.constraints import _Cat, _Stack

from pyro_vae.beta import latent_scale_of
from pyro_vae.distributions.sphere import unit_sphere
from pyro_vae.errors import InputError
from pyro_vae.pair import sites as traced
from pyro_vae.pair.enumeration import summed_sites
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import Site


class Serves(enum.Flag):
    """What a function takes besides latents of each data point alone, drawn by the guide."""

    NOTHING = 0
    WHOLE = enum.auto()  # ``plate=None``: the whole data set as one datum
    SHARED = enum.auto()  # sites outside the data plate
    SUMMED = enum.auto()  # latents that the model enumerates
    NO_LATENT = enum.auto()  # models that draw none


def check_pair(
    model_trace: Trace, guide_trace: Trace, plate: str | None, num_data: int | None, serves: Serves
) -> None:
    """Refuse a traced pair that has no densities per data point, or is of a kind that is not served.

    The data plate is to hold ``num_data`` points (None: as many as it says).
    """
    observed = traced.observed_names(guide_trace)
    if observed:
        wanted, advice = "a guide that observes nothing", "pass the model before the guide"
        raise InputError(f"expected {wanted}, {observed[0]!r} is observed in it: {advice}")
    summed = {site["name"] for site in summed_sites(model_trace, guide_trace)}
    may_draw_nothing = Serves.NO_LATENT in serves or (summed and Serves.SUMMED in serves)
    if not traced.latent_sites(guide_trace) and not may_draw_nothing:
        raise InputError("expected a guide that draws a latent, got none: add pyro.sample to it")
    _check_latents(model_trace, guide_trace, summed, Serves.SUMMED in serves)
    for function, trace in (("guide", guide_trace), ("model", model_trace)):
        for site in traced.sample_sites(trace):
            # A value that is summed over is one of all the data only where these are one datum.
            own = serves & ~Serves.SHARED if site["name"] in summed else serves
            _check_site(function, site, plate, num_data, own)
    observed_sites = [site for site in traced.sample_sites(model_trace) if site["is_observed"]]
    if not observed_sites:
        raise traced.nothing_observed()
    if plate is not None and not any(traced.is_inside(site, plate) for site in observed_sites):
        raise _outside_plate("model", observed_sites[0], plate, serves)
    for site in traced.sample_sites(guide_trace):
        if site_is_factor(site):
            wanted = "a guide of densities alone"
            advice = "it may or may not belong to log q; move the term into the model"
            raise InputError(f"expected {wanted}, {site['name']!r} is a factor: {advice}")
        if site["name"] in model_trace.nodes:
            check_guide_support(site, model_trace.nodes[site["name"]])


def check_devices(function: str, trace: Trace, device: torch.device) -> None:
    """Refuse a site whose parameters are on another device than the pair, by its name."""
    for site in traced.sample_sites(trace):
        fn = traced.innermost(site["fn"])
        for value in map(vars(fn).get, fn.arg_constraints):
            # A number, a tensor without dimensions, is taken from anywhere.
            if isinstance(value, Tensor) and value.dim() and value.device != device:
                wanted = f"the parameters of site {site['name']!r} of the {function} on {device}"
                advice = "make it by torch.zeros(..., device=x.device)"
                raise InputError(f"expected {wanted}, got one on {value.device}: {advice}")


def why_unweighable(model_trace: Trace, guide_trace: Trace, plate: str | None) -> str | None:
    """Return the refusal of what can be trained, but has no weight per data point; None without."""
    try:
        _check_auxiliary(model_trace, guide_trace)
        for function, trace in (("guide", guide_trace), ("model", model_trace)):
            for site in traced.sample_sites(trace):
                if plate is not None and not traced.is_inside(site, plate):
                    raise _outside_plate(function, site, plate, Serves.WHOLE)
                _refuse_subsampling(site, plate)
                _check_scale(function, site)
        _check_masks(model_trace, guide_trace)
    except InputError as error:
        return str(error)
    return None


def check_rest(trace: Trace, looked_at: Inputs, inputs: Inputs) -> None:
    """Refuse values that an observed site can't take beyond the first rows, which were looked at."""
    for site in traced.sample_sites(trace):
        for seen, whole in zip(looked_at, inputs, strict=True):
            if site["is_observed"] and site["value"] is seen:
                blocks = whole[len(seen) :].split(len(seen))
                if not all(_takes(site["fn"], block.to(seen.device)) for block in blocks):
                    raise _outside("model", {**site, "value": whole})


def check_rows(kind: str, site: Site, plate: str | None, num_data: int, shape: Any = None) -> None:
    """Refuse a site without one row per datum: outside the data plate, of other size, subsampled."""
    dim, shape = traced.data_dim(site, plate), site["fn"].batch_shape if shape is None else shape
    rows = shape[dim] if len(shape) >= -dim else 1
    if rows != num_data:
        wanted = f"of the {kind} to have {num_data} data points along plate {plate!r}"
        use = f"use pyro.plate({plate!r}, len(x))"
        raise InputError(f"expected site {site['name']!r} {wanted}, got {rows}: {use}")


def _outside_plate(function: str, site: Site, plate: str, serves: Serves) -> InputError:
    kind = "observed site" if site["is_observed"] else "latent"
    whole = ", or take the whole data set as one datum by plate=None" * (Serves.WHOLE in serves)
    return InputError(
        f"expected {kind} {site['name']!r} of the {function} inside the data plate {plate!r}: a site "
        "that the data share has no weight per datum; move it there, or name your plate by "
        f"plate={whole}"
    )


def _check_site(kind: str, site: Site, plate: str | None, rows: int | None, serves: Serves) -> None:
    """Refuse a site without one log-probability per data point."""
    name = site["name"]
    frames = [frame for frame in traced.vectorized_frames(site) if frame.name == plate]
    if plate is not None and not frames and Serves.SHARED not in serves:
        raise _outside_plate(kind, site, plate, serves)
    try:
        log_prob, takes = traced.site_log_prob(site), _takes(site["fn"], site["value"])
    except ValueError as error:  # of torch's validation
        raise _outside(kind, site) from error
    if not takes:
        raise _outside(kind, site)
    if frames:
        check_rows(kind, site, plate, frames[0].size if rows is None else rows, log_prob.shape)
    wide = {dim for dim in range(-log_prob.dim(), 0) if log_prob.shape[dim] > 1}
    if wide - {frame.dim for frame in traced.vectorized_frames(site)}:
        what = f"site {name!r} of the {kind} to have one log-probability per datum"
        advice = "declare event dimensions by .to_event(k), or squeeze"
        raise InputError(f"expected {what}, got shape {tuple(log_prob.shape)}: {advice}")


def _takes(distribution: Any, values: Tensor) -> bool:
    """Tell whether values are in a distribution's support, or nothing is known against them."""
    # The pair is looked at with validation on: where it is off, it was for this very distribution.
    if traced.innermost(distribution)._validate_args is False:
        return True
    try:
        return bool(distribution.support.check(values).all())
    except (NotImplementedError, AttributeError, RuntimeError):
        return True  # nothing is known of its support, or it differs from row to row


def _outside(function: str, site: Site) -> InputError:
    wanted = f"values at site {site['name']!r} of the {function} in its support and shape"
    mend = "look for NaN, also under a mask, or scale the data"
    return InputError(f"expected {wanted}, got others of shape {tuple(site['value'].shape)}: {mend}")


def _check_scale(function: str, site: Site) -> None:
    known = latent_scale_of(site) * traced.plate_scale(site)
    scale = site["scale"]
    # A scale that differs from datum to datum is a tensor, and certainly the user's own.
    same = not isinstance(scale, Tensor) or scale.numel() == 1
    if not same or not math.isclose(float(scale), float(known), rel_tol=1e-6):
        got = f"{float(scale):g}" if same else f"one of shape {tuple(scale.shape)}"
        wanted = f"no scale on site {site['name']!r} of the {function} but the plates'"
        advice = "a poutine.scale can't be separated from the weight; remove it"
        raise InputError(f"expected {wanted}, got {got}: {advice}")


def _check_masks(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a latent that is masked in one of the two alone: its weights would have no mean."""
    for site in traced.latent_sites(guide_trace):
        both = [traced.counted_values(site), None]
        if (own := model_trace.nodes.get(site["name"])) is not None:
            both[1] = traced.counted_values(own)
        if not are_same(*both):
            wanted = f"latent {site['name']!r} under one mask in model and guide"
            advice = "a value that counts in one alone has no weight; give both the same poutine.mask"
            raise InputError(f"expected {wanted}, got two: {advice}")


def are_same(first: Any, second: Any) -> bool:
    """Tell whether two masks or scales, tensors or numbers, are the same, or None both."""
    if first is None or second is None:
        return first is second
    return torch.equal(*torch.broadcast_tensors(*map(torch.as_tensor, (first, second))))


def why_masks_matter(name: str | None) -> str | None:
    """Return the refusal of a density that depends on masked latents; None where none does."""
    return name and (
        f"expected latents that nothing depends on where they are masked, the density at {name!r} "
        "changes with them: p(x) would be as the guide draws them; mask the ends of sequences, "
        "and for gaps in between mask the observed site alone"
    )


def _refuse_subsampling(site: Site, plate: str | None) -> None:
    for frame in site["cond_indep_stack"]:
        if frame.name != plate and frame.full_size and frame.full_size > frame.size:
            where = "one datum" if plate is None else "the data plate"
            raise InputError(
                f"expected no subsampling inside {where}, plate {frame.name!r} at site "
                f"{site['name']!r} does: the log of a mean of weights can't be subsampled"
            )


def check_latents_match(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse latents that only one of the two draws, and a guide that hides its density."""
    _check_latents(model_trace, guide_trace)
    _check_auxiliary(model_trace, guide_trace)


def _check_latents(
    model_trace: Trace, guide_trace: Trace, summed: Iterable[str] = (), sums_out: bool = False
) -> None:
    """Refuse latents that only one of model and guide draws, or draws in another shape."""
    in_model = {site["name"] for site in traced.latent_sites(model_trace)}
    in_model -= set(summed) if sums_out else set()
    guide_sites = {site["name"]: site for site in traced.latent_sites(guide_trace)}
    missing = sorted(in_model - set(guide_sites))
    if missing:
        enumerated = ", for here nothing is summed out" * (missing[0] in set(summed))
        what = "a guide that draws every latent"
        advice = f"add pyro.sample for it{enumerated}, or observe it in the model"
        raise InputError(f"expected {what}, {missing[0]!r} is missing: {advice}")
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
            wanted = f"one number of event dimensions for {name!r}"
            got = f"{ranks[0]} in the model and {ranks[1]} in the guide"
            raise InputError(f"expected {wanted}, got {got}: give both the same .to_event")


def _check_auxiliary(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse auxiliary sites that are not turned into latents of the model."""
    # Pyro's autoguides draw one auxiliary vector and place its pieces with Delta sites whose
    # log-density is the Jacobian: together they are q(z given x). One that is mixed over instead
    # leaves q(z given x) an integral nobody has: its weights would not average to p(x).
    guide_sites = {site["name"]: site for site in traced.latent_sites(guide_trace)}
    auxiliary = {name: site for name, site in guide_sites.items() if name not in model_trace.nodes}
    drawn = sum(site["value"].numel() for site in auxiliary.values())
    deltas = {name: site for name, site in guide_sites.items() if traced.is_delta(site["fn"])}
    placed = sum(site["value"].numel() for site in deltas.values())
    if drawn != placed:
        name = next(iter(auxiliary), None) or next(iter(deltas))
        raise InputError(
            f"expected auxiliary sites of the guide to become latents through Delta sites one to "
            f"one, got {drawn} auxiliary values for {placed} placed ones (site {name!r}): draw "
            "the auxiliary variable in the model too"
        )


def check_density_known(guide_sites: Iterable[Site], advice: str) -> None:
    """Refuse a guide whose density is known where it drew alone: point masses follow other sites."""
    for site in guide_sites:
        if traced.is_delta(site["fn"]):
            wanted = "a guide whose density is known at any point"
            raise InputError(f"expected {wanted}, {site['name']!r} is a point mass: {advice}")


def refuse_score_function(sites: Iterable[dict[str, Any]], objective: str) -> None:
    """Refuse guide sites whose draws carry no gradient."""
    for site in sites:
        if not is_identically_zero(site["score_parts"].score_function):
            raise InputError(
                f"expected reparameterised latents for {objective}, {site['name']!r} "
                f"({type(site['fn']).__name__}) is not: use Trace_ELBO or TraceBound"
            )


_BOXES = {
    constraints.boolean: (0, 1),
    constraints.real: (-math.inf, math.inf),
    constraints.simplex: (0.0, 1.0),
    constraints.sphere: (-1.0, 1.0),
    unit_sphere: (-1.0, 1.0),
}


class _Bounds(NamedTuple):
    """The smallest box that holds a support; open and closed ends are not told apart."""

    lower: Tensor
    upper: Tensor
    is_discrete: bool

    def __str__(self) -> str:
        kind = "whole numbers" if self.is_discrete else "numbers"
        return f"{kind} from {self.lower.min():g} to {self.upper.max():g}"


def check_guide_support(guide_site: Site, model_site: Site) -> None:
    """Refuse a guide that can't draw where the prior has mass, if both supports are boxes."""
    try:
        own, prior = (_bounds(site["fn"].support) for site in (guide_site, model_site))
    except (NotImplementedError, AttributeError):
        return
    if own is None or prior is None or (prior.is_discrete and not own.is_discrete):
        return
    try:
        misses = (own.lower > prior.lower) | (own.upper < prior.upper)
    except RuntimeError:  # shapes that do not broadcast are refused elsewhere
        return
    if bool(misses.any()) or (own.is_discrete and not prior.is_discrete):
        raise InputError(
            f"expected a guide that draws {guide_site['name']!r} wherever the prior has mass, got "
            f"{own} in the guide and {prior} in the model: log p(x) would be "
            "too low without a sign; widen the guide, or truncate the prior alike"
        )


def _bounds(support: Any) -> _Bounds | None:
    """Return a support's box with one entry per coordinate where they differ; None: unknown."""
    support = traced.innermost(support, "base_constraint")
    if isinstance(support, _Stack | _Cat):
        return _join(support)
    if support in _BOXES:
        return _box(*_BOXES[support], support is constraints.boolean)
    lower, upper = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    is_discrete = bool(support.is_discrete)
    if lower is None and (upper is None or is_discrete):
        return None
    ends = (-math.inf if lower is None else lower, math.inf if upper is None else upper)
    return _box(*ends, is_discrete)


def _join(support: Any) -> _Bounds | None:
    """Join the boxes of stacked or concatenated supports along their dimension."""
    parts = [_bounds(part) for part in support.cseq]
    known = [part for part in parts if part is not None]
    scalars = all(part.lower.dim() == 0 and part.upper.dim() == 0 for part in known)
    if len(known) < len(parts) or not scalars or support.dim not in (-1, 0):
        return None
    each = [*zip(known, getattr(support, "lengths", [1] * len(parts)), strict=True)]
    lower = torch.cat([part.lower.expand(n) for part, n in each])
    upper = torch.cat([part.upper.expand(n) for part, n in each])
    return _Bounds(lower, upper, any(part.is_discrete for part in known))


def _box(lower: Any, upper: Any, is_discrete: bool) -> _Bounds:
    low, high = (torch.as_tensor(end).detach().double().cpu() for end in (lower, upper))
    return _Bounds(low, high, is_discrete)
