"""Encode data into latents, and decode latents into data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_optional_counts
from pyro_vae.evaluation.latent_codes import choose_site, draw_codes, mean_codes
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import OpenedFunction, open_function
from pyro_vae.pair.sites import Given, Site, latent_sites, observed_site, value_axis

# Draws a mean without closed form rests on: its error is a thirtieth of the posterior's deviation.
_MEAN_DRAWS = 1000


def encode(
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    mean: bool = True,
    num_draws: int | None = None,
    site: str | None = None,
    plate: str = "data",
    seed: int | None = None,
) -> Tensor:
    """Return the latent codes of data: posterior means, or draws of the guide.

    Args:
        guide: the variational function of a pair.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``guide(*x)``.
        mean: return E_q[z given x]; otherwise draws. On a sphere the mean lies inside it.
        num_draws: draws returned (by default 1), or those that a mean rests on which the distribution
            does not have in closed form (by default 1,000).
        site: name of the latent; needed where the guide has several.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        means ``(N, *shape of one latent)``, or draws ``(num_draws, N, *shape of one latent)``.

    Raises:
        InputError: no latent, several without a name, one of another name or outside the data plate.

    Warns:
        UserWarning: the mean has no closed form and comes from draws.
    """
    check_optional_counts(num_draws=num_draws)
    opened = open_function(guide, x, plate=plate)
    with opened.evaluating(seed):
        if not mean:
            drawn = draw_codes(opened, num_draws or 1)
            return drawn[choose_site(drawn, site)].detach()
        codes = mean_codes(opened, num_draws or _MEAN_DRAWS)
    name = choose_site(codes, site)
    code = codes[name]
    if not code.exact:
        warnings.warn(
            f"the mean of latent {name!r} has no closed form: it is that of "
            f"{num_draws or _MEAN_DRAWS:,} draws",
            stacklevel=2,
        )
    return code.mean


def decode(
    model: PairFunction,
    z: Tensor | Mapping[str, Tensor],
    like: Tensor | Sequence[Tensor],
    *,
    mean: bool = True,
    observed: str | None = None,
    plate: str = "data",
    seed: int | None = None,
) -> Tensor:
    """Return the data that latents stand for: the likelihood's mean or a draw from it.

    Args:
        model: the generative function of a pair.
        z: latents ``(N, *shape of one latent)``, in the model's type or another; of several sites by
            name. Sites that are not named are drawn from the prior.
        like: inputs ``(N, ...)`` that give shape and conditions of the data; the values of the
            observed site are not looked at.
        mean: return the likelihood's mean instead of a draw from it.
        observed: name of the observed site; needed where the model has several.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        ``(N, *data_shape)``.

    Raises:
        InputError: latents of another name, number or shape, an observed site that can't be told or
            has no mean, or a model that does not run on any number of data.
    """
    opened = open_function(model, like, plate=plate)
    with opened.evaluating(seed):
        return decode_latents(opened, z, mean=mean, observed=observed)


def decode_latents(
    model: OpenedFunction,
    z: Tensor | Mapping[str, Tensor],
    *,
    mean: bool = True,
    observed: str | None = None,
) -> Tensor:
    """Do the work of :func:`decode` for a model that is open."""
    trace = model.first().trace(explain="model")
    sites = {site["name"]: site for site in latent_sites(trace)}
    named = dict(z) if isinstance(z, Mapping) else {choose_site(sites, None): z}
    given = {}
    for name, value in named.items():
        site = sites[choose_site(sites, name)]
        axis, like = value_axis(site, model.plate), site["value"]
        value = torch.as_tensor(value).to(like)
        wanted = (model.num_data, *like.movedim(axis, 0).shape[1:])
        if value.shape != wanted:
            raise InputError(
                f"expected latents {name!r} of shape {wanted}, one for each datum, got "
                f"{tuple(value.shape)}"
            )
        given[name] = value.movedim(0, axis)
    with Given(given):
        trace = model.trace(explain="model")
    site = trace.nodes[observed_site(trace, observed)]
    check_rows("model", site, model.plate, model.num_data)
    return mean_of(site) if mean else site["fn"].sample()


def mean_of(site: Site) -> Tensor:
    """Return the mean of a site's distribution; refuse one without (categories, a Cauchy), or NaN."""
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        mean = torch.tensor(torch.nan)
    if mean.isnan().any():
        raise InputError(
            f"expected {type(site['fn']).__name__} at {site['name']!r} to have a mean, got NaN: draw "
            "from it by mean=False, or look for NaN in data and parameters"
        )
    return mean.detach().clone()  # not the parameter that a model may hand on
