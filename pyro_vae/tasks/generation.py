"""From data to latents and back: encode, decode, reconstruct given data, generate new ones."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, distributions

from pyro_vae.distributions.flows import FlowDistribution
from pyro_vae.distributions.normal import DiagonalNormalMixture
from pyro_vae.errors import InputError, check_optional_counts, positive_number
from pyro_vae.evaluation.latent_codes import choose_site, draw_codes, mean_codes
from pyro_vae.pair import sites as traced
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import OpenedFunction, OpenedPair, open_function, open_pair
from pyro_vae.pair.sites import Given, Latents, Site

# Families with a location and a scale: the temperature multiplies the scale.
_KINDS = ("Normal", "Laplace", "Cauchy", "StudentT")
_LOCATION_SCALE = tuple(getattr(distributions, kind) for kind in _KINDS)

# Draws a mean without closed form rests on: its error is a thirtieth of the posterior's deviation.
_MEAN_DRAWS = 1000


def encode(
    guide: PairFunction, x: Tensor | Sequence[Tensor], *, mean: bool = True,
    num_draws: int | None = None, site: str | None = None, plate: str = "data",
    seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Return the latent codes of data: posterior means ``(N, ...)`` or draws ``(num_draws, N, ...)``.

    Args:
        guide, plate, seed: as in :func:`pyro_vae.log_marginal`.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``guide(*x)``.
        mean: return E_q[z given x]; otherwise draws. On a sphere the mean lies inside it.
        num_draws: draws returned (default 1), or for a mean without closed form (default 1,000).
        site: name of the latent; needed where the guide has several.

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
        told = f"the mean of latent {name!r} has no closed form: the result"
        warnings.warn(f"{told} is the mean of {num_draws or _MEAN_DRAWS:,} draws", stacklevel=2)
    return code.mean


def decode(
    model: PairFunction, z: Tensor | Mapping[str, Tensor], like: Tensor | Sequence[Tensor], *,
    mean: bool = True, observed: str | None = None, plate: str = "data", seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Decode latents to data ``(N, *data_shape)``: the likelihood's mean or a draw.

    Args:
        model, plate, seed: as in :func:`pyro_vae.log_marginal`.
        z: latents ``(N, *shape of one latent)``, in the model's type or another; of several sites by
            name. Sites that are not named are drawn from the prior.
        like: inputs ``(N, ...)`` that give shape and conditions; observed values are not used.
        mean: return the likelihood's mean instead of a draw from it.
        observed: name of the observed site; needed where the model has several.

    Raises:
        InputError: latents of another name, number or shape, an observed site that is not named or
            has no mean, or a model that does not run on any number of data points.
    """
    opened = open_function(model, like, plate=plate)
    with opened.evaluating(seed):
        return decode_latents(opened, z, observed, mean)


def decode_latents(model: OpenedFunction, z: Any, observed: str | None, mean: bool = True) -> Tensor:
    """Do the work of :func:`decode` for a model that is open."""
    trace = model.first().trace(explain="model")
    sites = {site["name"]: site for site in traced.latent_sites(trace)}
    named = dict(z) if isinstance(z, Mapping) else {choose_site(sites, None): z}
    given = {}
    for name, value in named.items():
        site = sites[choose_site(sites, name)]
        axis, like = traced.value_axis(site, model.plate), site["value"]
        value = torch.as_tensor(value).to(like)
        wanted = (model.num_data, *like.movedim(axis, 0).shape[1:])
        if value.shape != wanted:
            what = f"latents {name!r} of shape {wanted}, one for each datum"
            raise InputError(f"expected {what}, got {tuple(value.shape)}")
        given[name] = value.movedim(0, axis)
    with Given(given):
        trace = model.trace(explain="model")
    site = trace.nodes[traced.observed_site(trace, observed)]
    check_rows("model", site, model.plate, model.num_data)
    return mean_of(site) if mean else site["fn"].sample()


def generate(
    model: PairFunction, like: Tensor | Sequence[Tensor], *, guide: PairFunction | None = None,
    data: Tensor | Sequence[Tensor] | None = None, temperature: float = 1.0, mean: bool = True,
    observed: str | None = None, plate: str = "data", seed: int | None = None,
) -> Tensor:  # fmt: skip
    r"""Draw new data ``(N, *data_shape)``: latents of prior or aggregate posterior, data given these.

    .. math:: z \sim p(z) \quad\text{or}\quad z \sim \frac{1}{M} \sum_m q(z | x_m),
        \qquad x \sim p(x | z)

    Args:
        model, plate, seed: as in :func:`pyro_vae.log_marginal`.
        like: inputs ``(N, ...)`` that give number, shape and conditions, not the observed values.
        guide: the variational function. With it latents come from the aggregate posterior: for each
            new datum one of ``data`` is picked at random, with replacement, and its posterior drawn
            from. Conditions are those of ``like``: where p(z) depends on them, ``data`` share them.
        data: inputs ``(M, ...)`` whose posteriors are mixed; by default ``like``.
        temperature: factor of the spread (standard deviation) of the distributions that latents are
            drawn from: location-scale families, mixtures (each component's), flows (the base's).
        mean, observed: as in :func:`pyro_vae.tasks.decode`.

    Raises:
        InputError: no observed site, several without a name, one of another name or without a mean;
            a plate that subsamples; data without a guide; a temperature not above 0, or of no scale.

    Source:
        Aggregate posterior: Makhzani et al. 2016, "Adversarial Autoencoders", equation 1.
    """
    opened = open_function(model, like, plate=plate)
    positive_number("temperature", temperature)
    if data is not None and guide is None:
        raise InputError("expected a guide with data, got none: pass guide=, or leave out data=")
    source = like if data is None else data
    pair = None if guide is None else open_pair(model, guide, source, plate=plate)
    with opened.evaluating(seed, guide):
        name = traced.observed_site(opened.trace(), observed)
        latents: Latents = {}
        if pair is not None:
            latents = _draw_aggregate_posterior(pair, opened.num_data, temperature)
        with _Freed(name), _AtTemperature(temperature), Given(latents):
            trace = opened.trace()
    site = trace.nodes[name]
    # Of a plate that subsamples, which data were drawn is not known.
    if traced.is_inside(site, plate):
        check_rows("model", site, plate, opened.num_data)
    return mean_of(site) if mean else site["value"]


def reconstruct(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *, mean: bool = True,
    observed: str | None = None, plate: str = "data", seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Encode data and decode them again, ``(N, *data_shape)``: from the guide, then the likelihood.

    Args:
        model, guide, x, plate, seed: as in :func:`pyro_vae.log_marginal`.
        mean, observed: as in :func:`pyro_vae.tasks.decode`.

    Raises:
        InputError: no observed site, several without a name, one of another name or without a mean,
            a latent that the guide misses, or a plate that subsamples the data.
    """
    pair = open_pair(model, guide, x, plate=plate)
    with pair.evaluating(seed):
        trace, _ = pair.trace()
        site = trace.nodes[traced.observed_site(trace, observed)]
        return mean_of(site) if mean else site["fn"].sample()


def mean_of(site: Site) -> Tensor:
    """Return the mean of a site's distribution; refuse one without (categories, a Cauchy), or NaN."""
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        mean = torch.tensor(torch.nan)
    if mean.isnan().any():
        wanted = f"{type(site['fn']).__name__} at {site['name']!r} to have a mean"
        advice = "draw from it by mean=False, or look for NaN in data and parameters"
        raise InputError(f"expected {wanted}, got NaN: {advice}")
    return mean.detach().clone()  # not the parameter that a model may hand on


class _Freed(Messenger):
    """Draw one observed site anew; the others keep what they observed, as conditions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == self.name:
            message.update(is_observed=False, value=None, done=False)


def _draw_aggregate_posterior(pair: OpenedPair, number: int, temperature: float) -> Latents:
    """Draw latents of this many data points, each from the posterior of a datum picked at random."""

    def draw(part: OpenedPair) -> Latents:
        with _AtTemperature(temperature):
            trace = part.alone(part.guide).trace()
        return {name: trace.nodes[name]["value"] for name in pair.axes}

    picked = torch.randint(pair.num_data, (number,), device=pair.device)
    if pair.is_divisible():
        return draw(pair.part(picked))
    # A guide with parameters per datum takes all its data: one picked again gets the next draw.
    values, order = picked.sort(stable=True)
    before = torch.arange(len(picked), device=picked.device) - torch.searchsorted(values, values)
    turn = torch.empty_like(picked).scatter_(0, order, before)
    draws = [draw(pair.part()) for _ in range(int(turn.max()) + 1)]
    rows = {n: torch.stack([each[n].movedim(a, 0) for each in draws]) for n, a in pair.axes.items()}
    return {n: rows[n][turn, picked].movedim(0, a) for n, a in pair.axes.items()}


class _AtTemperature(Messenger):
    """Multiply the spread of latents, of a flow's base as in Kingma, Dhariwal 2018, "Glow", 6."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, message: Any) -> None:
        if self.temperature == 1 or message["is_observed"] or message["value"] is not None:
            return
        # A point mass follows from the other sites.
        if site_is_subsample(message) or traced.is_delta(message["fn"]):
            return
        message["fn"] = _spread(message["name"], message["fn"], self.temperature)


def _spread(name: str, fn: Any, factor: float) -> Any:
    if isinstance(fn, distributions.Independent):
        return _spread(name, fn.base_dist, factor).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _spread(name, fn.base_dist, factor).mask(fn._mask)
    if isinstance(fn, _LOCATION_SCALE) and not fn.event_shape:
        # y = loc + factor (x - loc)
        shift = distributions.AffineTransform(fn.loc * (1 - factor), factor)
        return dist.TransformedDistribution(fn, [shift])
    if isinstance(fn, distributions.MultivariateNormal):
        how = {"scale_tril": fn.scale_tril * factor, "validate_args": False}
        return dist.MultivariateNormal(fn.loc, **how)
    if isinstance(fn, distributions.MixtureSameFamily):
        parts = fn.mixture_distribution, _spread(name, fn.component_distribution, factor)
        return dist.MixtureSameFamily(*parts, validate_args=False)
    if isinstance(fn, DiagonalNormalMixture):
        return DiagonalNormalMixture(fn.log_weights, fn.loc, fn.scale * factor)
    if isinstance(fn, FlowDistribution):
        return FlowDistribution(_spread(name, fn.base, factor), fn.layers, fn.context)
    if isinstance(fn, distributions.TransformedDistribution):
        return dist.TransformedDistribution(_spread(name, fn.base_dist, factor), fn.transforms)
    wanted = "latents with a scale that a temperature multiplies"
    raise InputError(f"expected {wanted}, {name!r} is {type(fn).__name__}: leave temperature at 1")
