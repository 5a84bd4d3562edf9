"""The normal families: independent coordinates, and a full covariance for each datum."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions.normal import CholeskyNormal, lower_cholesky, raw_cholesky
from pyro_vae.guides.base import VariationalFamily
from pyro_vae.networks import Head, feature_shape


class MeanFieldNormal(VariationalFamily):
    r"""Normal with independent coordinates: heads for the mean and the log-variance.

    .. math:: q(z | x) = N(z; \mu(x), diag(\sigma^2(x)))

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 1, or an encoder without ``out_shape``.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", section 3, equation 9.

    Example:
        >>> from pyro_vae.networks import MLPEncoder
        >>> MeanFieldNormal(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        features = feature_shape(encoder)
        self.loc = Head(features, (self.latent_dim,))
        self.log_variance = Head(features, (self.latent_dim,))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``loc`` and ``log_variance``, each ``(*batch, latent_dim)``."""
        features = self.encoder(x)
        return {"loc": self.loc(features), "log_variance": self.log_variance(features)}

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the normal with these means and log-variances."""
        scale = (0.5 * parameters["log_variance"]).exp()
        return dist.Normal(parameters["loc"], scale, validate_args=False).to_event(1)


class FullRankNormal(VariationalFamily):
    r"""Normal with a full covariance for each datum, through its Cholesky factor.

    .. math:: q(z | x) = N(z; \mu(x), L(x) L(x)^T)

    L is lower triangular with a positive diagonal (through softplus) and starts near the identity.

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 1, or an encoder without ``out_shape``.

    Source:
        Kingma, Welling 2019, "An Introduction to Variational Autoencoders", section 2.5.1.

    Example:
        >>> from pyro_vae.networks import MLPEncoder
        >>> FullRankNormal(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        features = feature_shape(encoder)
        start = raw_cholesky(torch.eye(self.latent_dim))
        self.loc = Head(features, (self.latent_dim,))
        self.raw_cholesky = Head(features, (len(start),))
        # A row of L has up to latent_dim random entries: small weights keep q at the prior's scale.
        self.raw_cholesky.start_at(weight_scale=0.1, bias=start)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``loc`` ``(*batch, latent_dim)`` and ``raw_cholesky``, the rows of L's triangle."""
        features = self.encoder(x)
        return {"loc": self.loc(features), "raw_cholesky": self.raw_cholesky(features)}

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the normal with these means and factors."""
        factor = lower_cholesky(parameters["raw_cholesky"], self.latent_dim)
        return CholeskyNormal(parameters["loc"], scale_tril=factor, validate_args=False)
