"""The priors on the unit sphere: von Mises-Fisher and uniform."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_vae import distributions
from pyro_vae.errors import positive_number, size
from pyro_vae.priors.base import Prior


class VonMisesFisher(Prior):
    r"""Von Mises-Fisher prior on the unit sphere of R^m, m = latent_dim.

    .. math:: p(z) = C_m(k) \exp(k \mu \cdot z)

    The mean direction mu starts at the first axis.

    Args:
        latent_dim: m, the dimension of the ambient space; the sphere has one less.
        concentration: k, or its start where it is learned.
        learn_loc: whether mu is trained (as a vector that is divided by its length).
        learn_concentration: whether k is trained (through its logarithm).

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 2, or a concentration that is not positive and finite.

    Source:
        Davidson et al. 2018, "Hyperspherical Variational Auto-Encoders", section 3.1.

    Example:
        >>> VonMisesFisher(3, concentration=5.0)().event_shape
        torch.Size([3])
    """

    latent_support = "unit sphere"
    direction: Tensor
    log_concentration: Tensor

    def __init__(
        self,
        latent_dim: int,
        *,
        concentration: float = 1.0,
        learn_loc: bool = False,
        learn_concentration: bool = False,
    ) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim, least=2)
        self.concentration = positive_number("concentration", concentration)
        self.learn_loc = learn_loc
        self.learn_concentration = learn_concentration
        self.keep("direction", torch.eye(self.latent_dim)[0], learn=learn_loc)
        log_concentration = torch.tensor(self.concentration).log()
        self.keep("log_concentration", log_concentration, learn=learn_concentration)

    def forward(self) -> dist.Distribution:
        """Return the von Mises-Fisher distribution."""
        loc = F.normalize(self.direction, dim=-1)
        return distributions.VonMisesFisher(loc, self.log_concentration.exp(), validate_args=False)


class HypersphericalUniform(Prior):
    r"""Uniform prior on the unit sphere of R^m, m = latent_dim.

    .. math:: p(z) = \Gamma(m/2) / (2 \pi^{m/2})

    Args:
        latent_dim: m, the dimension of the ambient space; the sphere has one less.

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 2.

    Source:
        Davidson et al. 2018, "Hyperspherical Variational Auto-Encoders", section 3.1.

    Example:
        >>> HypersphericalUniform(3)().event_shape
        torch.Size([3])
    """

    latent_support = "unit sphere"
    origin: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim, least=2)
        # Nothing but its device and dtype matters.
        self.register_buffer("origin", torch.zeros(()), persistent=False)

    def forward(self) -> dist.Distribution:
        """Return the uniform distribution."""
        return distributions.HypersphericalUniform(
            self.latent_dim,
            dtype=self.origin.dtype,
            device=self.origin.device,
            validate_args=False,
        )
