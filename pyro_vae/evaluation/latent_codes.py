"""Latent codes: each datum's latents by the guide, as means or as draws."""

from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.distributions.sphere import unit_sphere
from pyro_vae.errors import InputError
from pyro_vae.evaluation.elbo import Moments
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.opened import OpenedFunction
from pyro_vae.pair.sites import Site, latent_sites, value_axis


class Code(NamedTuple):
    """The posterior of one latent site; tensors are ``(N, *shape of one latent)``."""

    mean: Tensor
    standard_error: Tensor  # 0 where the mean is exact
    exact: bool  # from the distribution and not from draws
    draw: Tensor
    support: str  # "sphere", "discrete" or "other": some convex set

    def decodable(self) -> Tensor:
        """Return a value that the support holds: the mean, its direction on a sphere, or a draw."""
        if self.support == "sphere":
            return self.mean / self.mean.norm(dim=-1, keepdim=True)
        return self.draw if self.support == "discrete" else self.mean

    def continuous(self, name: str) -> Tensor:
        """Return :meth:`decodable`; refuse a discrete latent, of which no way leads to another."""
        if self.support == "discrete":
            raise InputError(f"expected a continuous latent to walk through, {name!r} is discrete")
        return self.decodable()


def choose_site(sites: dict[str, Any], site: str | None) -> str:
    """Return the name that was asked for, or the only one there is."""
    if site is None and len(sites) == 1:
        return next(iter(sites))
    if site is None or site not in sites:
        wanted = "one latent" if site is None else f"a latent {site!r}"
        raise InputError(f"expected {wanted}, there are {', '.join(sites)}: name one with site=")
    return site


def label_dimensions(columns: dict[str, Tensor]) -> list[str]:
    """Return a name for each column of some sites' matrices ``(N, D)``."""
    sizes = {name: matrix.shape[1] for name, matrix in columns.items()}
    several = {name: [f"{name}[{index}]" for index in range(size)] for name, size in sizes.items()}
    return [label for n, size in sizes.items() for label in ([n] if size == 1 else several[n])]


def draw_codes(guide: OpenedFunction, num_draws: int) -> dict[str, Tensor]:
    """Draw each latent that is not auxiliary, ``(num_draws, N, *shape of one latent)``."""
    sites, stands_alone = _draw_sites(guide)
    if stands_alone:
        drawn = {name: site["fn"].sample((num_draws,)) for name, site in sites.items()}
    else:
        rows = [sites, *(_draw_sites(guide)[0] for _ in range(num_draws - 1))]
        drawn = {name: torch.stack([row[name]["value"] for row in rows]) for name in sites}
    return {n: value.movedim(value_axis(sites[n], guide.plate), 1) for n, value in drawn.items()}


def mean_codes(guide: OpenedFunction, num_draws: int) -> dict[str, Code]:
    """Return the posterior mean of each latent: in closed form, or from ``num_draws`` draws.

    The mean of a site's distribution is that of q(z given x) if other latents don't move it.
    """
    (sites, _), (again, _) = _draw_sites(guide), _draw_sites(guide)
    codes, moments = {}, None
    for name, site in sites.items():
        axis = value_axis(site, guide.plate)
        draw = site["value"].movedim(axis, 0)
        try:
            mean, other = site["fn"].mean, again[name]["fn"].mean
            exact = bool(mean.isfinite().all()) and torch.equal(mean, other)
        except (AttributeError, NotImplementedError):
            exact = False
        if exact:
            # Not the parameter that a guide without an encoder hands on.
            mean = mean.detach().expand_as(site["value"]).movedim(axis, 0).clone()
            error = torch.zeros_like(mean)
        else:
            moments = moments or _moments_of_draws(guide, num_draws)
            dtype = draw.dtype if draw.is_floating_point() else torch.get_default_dtype()
            mean = moments[name].mean().to(dtype)
            error = moments[name].standard_error().to(dtype)
        codes[name] = Code(mean, error, exact, draw, _support_of(site))
    return codes


def _draw_sites(guide: OpenedFunction) -> tuple[dict[str, Site], bool]:
    """Run the guide; return its latents, auxiliary ones left out, and whether it draws one alone."""
    latents = latent_sites(guide.trace())
    sites = {s["name"]: s for s in latents if not s["infer"].get("is_auxiliary")}
    if not sites:
        raise InputError("expected a guide that draws a latent, got none: add pyro.sample to it")
    for site in sites.values():
        check_rows("guide", site, guide.plate, guide.num_data)
    return sites, len(latents) == 1


def _support_of(site: Site) -> str:
    try:
        support = site["fn"].support
    except (AttributeError, NotImplementedError):
        return "other"
    if support is unit_sphere or support is constraints.sphere:
        return "sphere"
    return "discrete" if support.is_discrete else "other"


def _moments_of_draws(guide: OpenedFunction, num_draws: int) -> dict[str, Moments]:
    if num_draws < 2:
        raise InputError(f"expected at least 2 draws for a mean without closed form, got {num_draws}")
    moments: dict[str, Moments] = {}
    for start in range(0, num_draws, 100):  # a hundred are held at once
        for name, value in draw_codes(guide, min(100, num_draws - start)).items():
            moments.setdefault(name, Moments()).add(value)
    return moments
