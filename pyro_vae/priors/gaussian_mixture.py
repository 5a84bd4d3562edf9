"""The mixture of normals with full covariances as a prior."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.distributions.normal import lower_cholesky, raw_cholesky, variance_of_means
from pyro_vae.errors import InputError, size
from pyro_vae.priors.base import Prior


class GaussianMixture(Prior):
    r"""Mixture of K normals with weights, means and full covariances.

    .. math:: p(z) = \sum_k \pi_k N(z; m_k, L_k L_k^T)

    The factors L_k are lower triangular with a positive diagonal (through softplus). The mixture
    starts with equal weights, randomly drawn means (by torch's global generator: seed it to repeat
    the draw) and equal spherical covariances; together they have the mean and the covariance of the
    standard normal, about which a fresh encoder scatters (see :func:`variance_of_means`).

    Args:
        latent_dim: size of the latent vector.
        num_components: number of components, K.
        learn_weights: whether the weights are trained; if not, they stay as they are.
        learn_components: whether means and covariances are trained.

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Raises:
        InputError: a size below 1.

    Source:
        Dilokthanakul et al. 2016, "Deep Unsupervised Clustering with Gaussian Mixture Variational
        Autoencoders"; Jiang et al. 2017, "Variational Deep Embedding", section 3.

    Example:
        >>> GaussianMixture(2, num_components=3)().event_shape
        torch.Size([2])
    """

    logits: Tensor
    means: Tensor
    raw_cholesky: Tensor

    def __init__(
        self,
        latent_dim: int,
        num_components: int = 10,
        *,
        learn_weights: bool = True,
        learn_components: bool = True,
    ) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.num_components = size("num_components", num_components)
        self.learn_weights = learn_weights
        self.learn_components = learn_components
        share = variance_of_means(self.latent_dim)
        means = math.sqrt(share) * torch.randn(self.num_components, self.latent_dim)
        factor = math.sqrt(1 - share) * torch.eye(self.latent_dim)
        raw = raw_cholesky(factor).repeat(self.num_components, 1)
        self.keep("logits", torch.zeros(self.num_components), learn=learn_weights)
        self.keep("means", means, learn=learn_components)
        self.keep("raw_cholesky", raw, learn=learn_components)

    @classmethod
    def from_parameters(
        cls,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        learn_weights: bool = False,
        learn_components: bool = False,
    ) -> GaussianMixture:
        """Return the mixture with these parameters, by default all fixed.

        Args:
            weights: positive, summing to 1, ``(K,)``.
            means: ``(K, latent_dim)``.
            covariances: positive definite, ``(K, latent_dim, latent_dim)``.
            learn_weights: as for the class.
            learn_components: as for the class.

        Raises:
            InputError: shapes that do not fit, weights that are no distribution, or a covariance that
                is not positive definite.
        """
        num_components, latent_dim = means.shape
        wanted = (num_components, latent_dim, latent_dim)
        if weights.shape != (num_components,) or covariances.shape != wanted:
            raise InputError(
                f"expected weights ({num_components},) and covariances {wanted} beside means "
                f"{tuple(means.shape)}, got {tuple(weights.shape)} and {tuple(covariances.shape)}"
            )
        if not (weights > 0).all() or not torch.isclose(weights.sum(), weights.new_ones(())):
            raise InputError(f"expected positive weights summing to 1, got {weights.tolist()}")
        factors, failures = torch.linalg.cholesky_ex(covariances)
        if failures.any():
            raise InputError("expected positive definite covariances, got one that is not")
        mixture = cls(
            latent_dim,
            num_components,
            learn_weights=learn_weights,
            learn_components=learn_components,
        ).to(means)
        with torch.no_grad():
            mixture.logits.copy_(weights.log())
            mixture.means.copy_(means)
            mixture.raw_cholesky.copy_(raw_cholesky(factors))
        return mixture

    def forward(self) -> dist.Distribution:
        """Return the mixture."""
        factors = lower_cholesky(self.raw_cholesky, self.latent_dim)
        components = dist.MultivariateNormal(self.means, scale_tril=factors, validate_args=False)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, components, validate_args=False)
