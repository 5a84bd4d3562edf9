"""The Beta prior on the open unit cube."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.errors import positive_number, size
from pyro_vae.priors.base import Prior


class Beta(Prior):
    r"""Independent Beta coordinates on (0, 1); the default is the uniform distribution.

    .. math:: p(z) = \prod_d Beta(z_d; a, b)

    Draws lie strictly inside, at the last number before 0 or 1 if need be. In float32 that happens
    near 1 to 2 draws in 10,000 at b = 1/2, one in 10^7 at 1, and to many well below 1/2.

    Args:
        latent_dim: size of the latent vector.
        concentration1: a, or its start where it is learned.
        concentration0: b, or its start where it is learned.
        learn_concentrations: whether a and b are trained, one pair per coordinate (through their
            logarithms).

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 1, or a concentration that is not positive and finite.

    Source:
        Figurnov, Mohamed, Mnih 2018, "Implicit Reparameterization Gradients", section 6.

    Example:
        >>> Beta(2, concentration1=2.0)().event_shape
        torch.Size([2])
    """

    latent_support = "unit interval"
    log_concentration1: Tensor
    log_concentration0: Tensor

    def __init__(
        self,
        latent_dim: int,
        *,
        concentration1: float = 1.0,
        concentration0: float = 1.0,
        learn_concentrations: bool = False,
    ) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.concentration1 = positive_number("concentration1", concentration1)
        self.concentration0 = positive_number("concentration0", concentration0)
        self.learn_concentrations = learn_concentrations
        for name, start in (
            ("log_concentration1", self.concentration1),
            ("log_concentration0", self.concentration0),
        ):
            self.keep(name, torch.full((self.latent_dim,), start).log(), learn=learn_concentrations)

    def forward(self) -> dist.Distribution:
        """Return independent Betas."""
        concentration1, concentration0 = self.log_concentration1.exp(), self.log_concentration0.exp()
        return dist.Beta(concentration1, concentration0, validate_args=False).to_event(1)
