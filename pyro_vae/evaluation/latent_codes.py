"""Latent codes: what a guide says of each datum's latents, as means or as draws."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.distributions.sphere import unit_sphere
from pyro_vae.errors import InputError
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import Site, data_dim, latent_sites

# Draws held at once for a mean that has no closed form.
_CHUNK = 100


class Code(NamedTuple):
    """The posterior mean of one latent site.

    Attributes:
        mean: E[z given x], ``(N, *shape of one latent)``.
        standard_error: Monte Carlo standard error of the same shape; 0 where the mean is exact.
        exact: whether the mean comes from the distribution, or from draws.
    """

    mean: Tensor
    standard_error: Tensor
    exact: bool


def code_sites(guide: PairFunction, inputs: Inputs, plate: str) -> dict[str, Site]:
    """Run the guide once and return its latent sites by name, auxiliary ones left out.

    Raises:
        InputError: no latent, or one without one row per datum (outside the data plate, subsampled).
    """
    sites = {
        site["name"]: site
        for site in latent_sites(poutine.trace(guide).get_trace(*inputs))
        if not site["infer"].get("is_auxiliary")
    }
    if not sites:
        raise InputError("expected a guide that draws a latent, got none: add pyro.sample to it")
    for site in sites.values():
        check_rows("guide", site, plate, len(inputs[0]))
    return sites


def chosen_site(sites: dict[str, Any], site: str | None) -> str:
    """Return the name that was asked for, or the only one there is.

    Raises:
        InputError: several sites and no name, or a name that is not there.
    """
    if site is None and len(sites) == 1:
        return next(iter(sites))
    if site is None or site not in sites:
        wanted = "one latent" if site is None else f"a latent {site!r}"
        raise InputError(f"expected {wanted}, there are {', '.join(sites)}: name one by site=")
    return site


def code_axes(sites: dict[str, Site], plate: str) -> dict[str, int]:
    """Return for each site the (negative) axis of its value that counts the data."""
    return {name: data_dim(site, plate) - site["fn"].event_dim for name, site in sites.items()}


def draw_codes(guide: PairFunction, inputs: Inputs, num_draws: int, plate: str) -> dict[str, Tensor]:
    """Draw each latent ``num_draws`` times, ``(num_draws, N, *shape of one latent)``."""
    sites = code_sites(guide, inputs, plate)
    axes = code_axes(sites, plate)
    if len(sites) == 1 and _stands_alone(guide, inputs):
        ((name, site),) = sites.items()
        drawn = {name: site["fn"].sample((num_draws,))}
    else:
        rows = [code_sites(guide, inputs, plate) for _ in range(num_draws)]
        drawn = {name: torch.stack([row[name]["value"] for row in rows]) for name in sites}
    return {name: value.movedim(axes[name], 1) for name, value in drawn.items()}


def mean_codes(guide: PairFunction, inputs: Inputs, num_draws: int, plate: str) -> dict[str, Code]:
    """Return the posterior mean of each latent: in closed form where there is one.

    The mean of a site's distribution is that of q(z given x) if it is the same whatever the other
    latents drew; a mean that moves with them, or that the distribution doesn't have, is taken from
    ``num_draws`` draws.
    """
    sites, again = (code_sites(guide, inputs, plate) for _ in range(2))
    axes = code_axes(sites, plate)
    codes = {}
    for name, site in sites.items():
        mean, other = _mean_of(site), _mean_of(again[name])
        if mean is not None and other is not None and torch.equal(mean, other):
            # Not the parameter that a guide without an encoder hands on.
            mean = mean.detach().expand_as(site["value"]).movedim(axes[name], 0).clone()
            codes[name] = Code(mean, torch.zeros_like(mean), True)
    if len(codes) < len(sites):
        codes = _mean_of_draws(guide, inputs, num_draws, plate) | codes
    return {name: codes[name] for name in sites}


def decodable_codes(
    guide: PairFunction, inputs: Inputs, num_draws: int, plate: str
) -> dict[str, Tensor]:
    """Return one value of each latent that its support holds: what a code is decoded from.

    It is the posterior mean, on a sphere its direction, and for a discrete latent a draw.
    """
    sites = code_sites(guide, inputs, plate)
    axes = code_axes(sites, plate)
    values = {}
    codes = mean_codes(guide, inputs, num_draws, plate)
    for name, site in sites.items():
        support = support_of(site)
        if support == "discrete":
            values[name] = site["value"].movedim(axes[name], 0)
        else:
            mean = codes[name].mean
            values[name] = mean / mean.norm(dim=-1, keepdim=True) if support == "sphere" else mean
    return values


def support_of(site: Site) -> str:
    """Return where a site's latents live: "sphere", "discrete" or "other" (a convex set)."""
    try:
        support = site["fn"].support
    except (AttributeError, NotImplementedError):
        return "other"
    if support is unit_sphere or support is constraints.sphere:
        return "sphere"
    return "discrete" if support.is_discrete else "other"


def _stands_alone(guide: PairFunction, inputs: Inputs) -> bool:
    """Tell whether the guide draws one latent and no auxiliary one."""
    return len(latent_sites(poutine.trace(guide).get_trace(*inputs))) == 1


def _mean_of(site: Site) -> Tensor | None:
    try:
        mean: Tensor = site["fn"].mean
    except (AttributeError, NotImplementedError):
        return None
    return mean if bool(mean.isfinite().all()) else None


def _mean_of_draws(
    guide: PairFunction, inputs: Inputs, num_draws: int, plate: str
) -> dict[str, Code]:
    if num_draws < 2:
        raise InputError(f"expected at least 2 draws for a mean without closed form, got {num_draws}")
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    dtype = torch.get_default_dtype()
    for start in range(0, num_draws, _CHUNK):
        drawn = draw_codes(guide, inputs, min(_CHUNK, num_draws - start), plate)
        for name, value in drawn.items():
            dtype = value.dtype if value.is_floating_point() else dtype
            value = value.double()
            sums[name] = sums.get(name, 0) + value.sum(0)
            squares[name] = squares.get(name, 0) + value.square().sum(0)
    codes = {}
    for name, total in sums.items():
        mean = total / num_draws
        variance = (squares[name] / num_draws - mean.square()).clamp(min=0) / (num_draws - 1)
        codes[name] = Code(mean.to(dtype), variance.sqrt().to(dtype), False)
    return codes
