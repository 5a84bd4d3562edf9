"""The normal families: independent coordinates, and a full covariance for each datum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions.latest import LatestDraw
from pyro_vae.guides.base import VariationalFamily
from pyro_vae.networks import Head, feature_shape
from pyro_vae.priors.gaussian_mixture import lower_cholesky, raw_cholesky


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


class CholeskyNormal(LatestDraw, dist.MultivariateNormal):
    r"""Multivariate normal that scores its latest draw by the noise it was made of.

    .. math:: \log N(m + L e; m, L L^T) = -|e|^2 / 2 - \sum_d \log L_{dd} - D/2 \log 2\pi

    Solving L for e row by row multiplies the rounding of z by L's condition number. That may grow
    like the D-th power of an off-diagonal entry over a diagonal one: with entries of 1/2 and 1/30,
    eight dimensions leave a float32 no digit, and somewhat smaller diagonals overflow. A point that
    was not drawn here is scored in this way all the same, for its e is not known otherwise.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return ``(*sample_shape, *batch, dim)``, differentiable."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        z: Tensor = self.loc + (self.scale_tril @ noise[..., None]).squeeze(-1)
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * shape[-1] * math.log(2 * math.pi)
        self._remember(z, -0.5 * noise.square().sum(-1) - log_volume - constant)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats, ``(*sample_shape, *batch)``."""
        log_prob = self._remembered(value)
        return super().log_prob(value) if log_prob is None else log_prob


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
