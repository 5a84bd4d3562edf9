"""Encode data into latents, and decode latents into data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.blocks import rows_of
from pyro_vae.evaluation.latent_codes import chosen_site, code_sites, draw_codes, mean_codes
from pyro_vae.evaluation.options import check_counts
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, evaluation_mode, seeded
from pyro_vae.pair.inputs import Inputs, as_inputs
from pyro_vae.pair.opened import any_number_of_data
from pyro_vae.pair.sites import Given, Site, data_dim, latent_sites, observed_site

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
    inputs = as_inputs(x, guide)
    if num_draws is not None:
        check_counts(num_draws=num_draws)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(guide), seeded(seed):
        name = chosen_site(code_sites(guide, inputs, plate), site)
        if not mean:
            return draw_codes(guide, inputs, num_draws or 1, plate)[name].detach()
        code = mean_codes(guide, inputs, num_draws or _MEAN_DRAWS, plate)[name]
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
    inputs = as_inputs(like, model)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model), seeded(seed):
        return decoded(model, z, inputs, mean=mean, observed=observed, plate=plate)


def decoded(
    model: PairFunction,
    z: Tensor | Mapping[str, Tensor],
    inputs: Inputs,
    *,
    mean: bool = True,
    observed: str | None = None,
    plate: str = "data",
) -> Tensor:
    """Do the work of :func:`decode` for callers that hold the lock and have set the mode."""
    with any_number_of_data("model", 1):
        trace = poutine.trace(model).get_trace(*rows_of(inputs, slice(1)))
    sites = {site["name"]: site for site in latent_sites(trace)}
    named = dict(z) if isinstance(z, Mapping) else {chosen_site(sites, None): z}
    given = {}
    for name, value in named.items():
        site = sites[chosen_site(sites, name)]
        axis = data_dim(site, plate) - site["fn"].event_dim
        like = site["value"]
        value = torch.as_tensor(value).to(like)
        wanted = (len(inputs[0]), *like.movedim(axis, 0).shape[1:])
        if value.shape != wanted:
            raise InputError(
                f"expected latents {name!r} of shape {wanted}, one for each datum, got "
                f"{tuple(value.shape)}"
            )
        given[name] = value.movedim(0, axis)
    num_data = len(inputs[0])
    with any_number_of_data("model", num_data), Given(given):
        trace = poutine.trace(model).get_trace(*inputs)
    site = trace.nodes[observed_site(trace, observed)]
    check_rows("model", site, plate, num_data)
    return mean_of(site) if mean else site["fn"].sample()


def mean_of(site: Site) -> Tensor:
    """Return the mean of a site's distribution.

    Raises:
        InputError: a distribution without one (categories, a Cauchy), or NaN.
    """
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
