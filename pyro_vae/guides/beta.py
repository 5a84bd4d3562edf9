"""The Beta family on the open unit cube."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae.guides.base import VariationalFamily
from pyro_vae.networks import Head, feature_shape

# Below 1/2 the density piles up so close to 1 that float32 can't hold its draws: at 1/2 two draws in
# 10,000 lie within a rounding unit of 1, at 1/10 one in 10.
LEAST_CONCENTRATION = 0.5


class Beta(VariationalFamily):
    r"""Independent Beta coordinates on (0, 1), starting near the uniform distribution.

    .. math:: q(z | x) = \prod_d Beta(z_d; a_d(x), b_d(x)), \quad a_d, b_d > 1/2

    Gradients pass through the draws by implicit differentiation.

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 1, or an encoder without ``out_shape``.

    Source:
        Figurnov, Mohamed, Mnih 2018, "Implicit Reparameterization Gradients"; Jankowiak, Obermeyer
        2018, "Pathwise Derivatives Beyond the Reparameterization Trick".

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLPEncoder
        >>> Beta(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    latent_support = "unit interval"

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        features = feature_shape(encoder)
        self.raw_concentration1 = Head(features, (self.latent_dim,))
        self.raw_concentration0 = Head(features, (self.latent_dim,))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``raw_concentration1`` and ``raw_concentration0``, ``(*batch, latent_dim)``."""
        features = self.encoder(x)
        return {
            "raw_concentration1": self.raw_concentration1(features),
            "raw_concentration0": self.raw_concentration0(features),
        }

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the Betas with concentrations 1/2 + softplus(raw)."""
        concentration1, concentration0 = (
            LEAST_CONCENTRATION + F.softplus(parameters[name])
            for name in ("raw_concentration1", "raw_concentration0")
        )
        return dist.Beta(concentration1, concentration0, validate_args=False).to_event(1)
