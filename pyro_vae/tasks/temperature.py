"""Temperature: latents drawn from the same distribution with its spread scaled."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import distributions

from pyro_vae.distributions.flows import FlowDistribution
from pyro_vae.distributions.normal import DiagonalNormalMixture
from pyro_vae.errors import InputError, real_number
from pyro_vae.pair.sites import is_delta

# Families with a location and a scale: the temperature multiplies the scale.
_LOCATION_SCALE = (
    distributions.Normal,
    distributions.Laplace,
    distributions.Cauchy,
    distributions.StudentT,
)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0."""
    if not 0 < real_number("temperature", temperature) < math.inf:
        raise InputError(f"expected a finite temperature above 0, got {temperature}")


class AtTemperature(Messenger):
    """Multiply the spread of every latent's distribution by the temperature.

    A location-scale family and a multivariate normal have their scale multiplied; a mixture has each
    component's, its weights unchanged; a flow has its base's (as in Kingma, Dhariwal 2018, "Glow",
    section 6). Whatever else is drawn is refused by name.

    Args:
        temperature: factor of the standard deviation; 1 changes nothing.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, message: Any) -> None:
        if self.temperature == 1 or message["is_observed"] or message["value"] is not None:
            return
        # A point mass follows from the other sites.
        if site_is_subsample(message) or is_delta(message["fn"]):
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
        factors = fn.scale_tril * factor
        return dist.MultivariateNormal(fn.loc, scale_tril=factors, validate_args=False)
    if isinstance(fn, distributions.MixtureSameFamily):
        components = _spread(name, fn.component_distribution, factor)
        weights = fn.mixture_distribution
        return dist.MixtureSameFamily(weights, components, validate_args=False)
    if isinstance(fn, DiagonalNormalMixture):
        return DiagonalNormalMixture(fn.log_weights, fn.loc, fn.scale * factor)
    if isinstance(fn, FlowDistribution):
        return FlowDistribution(_spread(name, fn.base, factor), fn.layers, fn.context)
    if isinstance(fn, distributions.TransformedDistribution):
        base = _spread(name, fn.base_dist, factor)
        return dist.TransformedDistribution(base, fn.transforms)
    raise InputError(
        f"expected latents with a scale that a temperature multiplies, {name!r} is "
        f"{type(fn).__name__}: leave temperature at 1"
    )
