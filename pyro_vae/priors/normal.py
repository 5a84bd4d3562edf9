"""The standard normal prior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import positive_number, size
from pyro_vae.priors.base import Prior


class StandardNormal(Prior):
    """Normal prior with independent coordinates of mean 0 and one common scale.

    .. math:: p(z) = N(z; 0, s^2 I)

    Args:
        latent_dim: size of the latent vector.
        scale: the standard deviation s, or its start where it is learned.
        learn_scale: whether s is trained (through its logarithm).

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Raises:
        InputError: a latent dimension below 1 or a scale that is not positive and finite.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", section 3.

    Example:
        >>> StandardNormal(2)().event_shape
        torch.Size([2])
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, latent_dim: int, *, scale: float = 1.0, learn_scale: bool = False) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.scale = positive_number("scale", scale)
        self.learn_scale = learn_scale
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        log_scale = torch.tensor(self.scale).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    def forward(self) -> dist.Distribution:
        """Return N(0, s^2 I)."""
        scale = self.log_scale.exp().expand(self.latent_dim)
        return dist.Normal(self.loc, scale, validate_args=False).to_event(1)
