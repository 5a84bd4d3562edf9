"""The coordinates of a multivariate distribution one by one, where their densities are known."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import Distribution, Independent
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from pyro_vae.distributions.normal import DiagonalNormalMixture


def independent_coordinates(distribution: Distribution) -> Distribution | None:
    """Return the distribution of the coordinates if they are independent, else None.

    Args:
        distribution: batch shape ``batch``, event shape ``(D,)``.

    Returns:
        batch shape ``(*batch, D)``, event shape ``()``.
    """
    if isinstance(distribution, ExpandedDistribution):
        inner = independent_coordinates(distribution.base_dist)
        if inner is None:
            return None
        return inner.expand(distribution.batch_shape + inner.batch_shape[-1:])
    if not isinstance(distribution, Independent) or len(distribution.event_shape) != 1:
        return None
    base = distribution.base_dist
    return None if base.event_shape else base


def coordinate_marginals(distribution: Distribution) -> Distribution | None:
    """Return the distribution of each coordinate on its own, dependent or not, else None."""
    if isinstance(distribution, TorchMultivariateNormal):
        scale = distribution.variance.sqrt()
        return dist.Normal(distribution.loc, scale, validate_args=False)
    if isinstance(distribution, DiagonalNormalMixture):
        components = dist.Normal(distribution.loc.mT, distribution.scale.mT, validate_args=False)
        logits = distribution.log_weights[..., None, :].expand(components.batch_shape)
        weights = dist.Categorical(logits=logits, validate_args=False)
        return dist.MixtureSameFamily(weights, components, validate_args=False)
    return independent_coordinates(distribution)
