"""The family of mixtures of normals, with a gradient through its draws."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions.normal import DiagonalNormalMixture, variance_of_means
from pyro_vae.errors import size
from pyro_vae.guides.base import VariationalFamily
from pyro_vae.networks import Head, feature_shape


class MixtureOfNormals(VariationalFamily):
    r"""Mixture of K normals with independent coordinates for each datum.

    .. math:: q(z | x) = \sum_k \pi_k(x) N(z; \mu_k(x), diag(\sigma_k^2(x)))

    The gradient of the ELBO is unbiased for the weights too. The components start apart, or they
    would learn in step: their means are drawn as in :class:`pyro_vae.priors.GaussianMixture`.

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.
        num_components: number of components, K.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Raises:
        InputError: a size below 1, or an encoder without ``out_shape``.

    Source:
        Jaakkola, Jordan 1998, "Improving the Mean Field Approximation via the Use of Mixture
        Distributions"; the gradient: see :class:`DiagonalNormalMixture`.

    Example:
        >>> from pyro_vae.networks import MLPEncoder
        >>> MixtureOfNormals(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, *, num_components: int = 5) -> None:
        super().__init__(encoder, latent_dim)
        features = feature_shape(encoder)
        self.num_components = size("num_components", num_components)
        shape = (self.num_components, self.latent_dim)
        self.logits = Head(features, (self.num_components,))
        self.loc = Head(features, shape)
        self.log_variance = Head(features, shape)
        share = variance_of_means(self.latent_dim)
        self.loc.start_at(bias=math.sqrt(share) * torch.randn(shape))
        self.log_variance.start_at(bias=math.log(1 - share))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``logits`` ``(*batch, K)``, ``loc`` and ``log_variance`` ``(*batch, K, dim)``."""
        features = self.encoder(x)
        return {
            "logits": self.logits(features),
            "loc": self.loc(features),
            "log_variance": self.log_variance(features),
        }

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the mixture with these weights, means and log-variances."""
        scale = (0.5 * parameters["log_variance"]).exp()
        return DiagonalNormalMixture(parameters["logits"], parameters["loc"], scale)
