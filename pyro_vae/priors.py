"""Priors p(z): modules whose call returns the distribution of one datum's latent vector."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import InputError

__all__ = ["Prior", "StandardNormal"]


class Prior(nn.Module):
    """Base of the priors; also the recipe for one of your own.

    A prior is any callable that takes nothing and returns a Pyro distribution with batch shape ``()``
    and event shape ``(latent_dim,)``; a lambda will do where nothing is learned. A class of three
    lines becomes a full citizen (moved to the GPU, trained, saved) by deriving from this one:

    1. keep every constructor argument under its own name (``self.latent_dim = latent_dim``), so that
       a saved run can be built again;
    2. say where the latents live in ``latent_support``;
    3. return the distribution from ``forward``, its tensors on the module's device.

    Attributes:
        latent_dim: size of the latent vector.
        latent_support: ``"real"``, ``"unit sphere"`` or ``"unit interval"``.
    """

    latent_support: ClassVar[str] = "real"
    latent_dim: int

    def forward(self) -> dist.Distribution:
        """Return p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        raise NotImplementedError


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
        InputError: a latent dimension below 1 or a scale that is not positive.

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
        self.latent_dim = check_latent_dim(latent_dim)
        if not scale > 0:
            raise InputError(f"expected a scale above 0, got {scale}")
        self.scale = scale
        self.learn_scale = learn_scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        log_scale = torch.tensor(float(scale)).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    def forward(self) -> dist.Distribution:
        """Return N(0, s^2 I)."""
        scale = self.log_scale.exp().expand(self.latent_dim)
        return dist.Normal(self.loc, scale, validate_args=False).to_event(1)


def check_latent_dim(latent_dim: int, *, at_least: int = 1) -> int:
    """Return ``latent_dim``, or refuse one that is not a whole number of at least ``at_least``."""
    if isinstance(latent_dim, bool) or int(latent_dim) != latent_dim or latent_dim < at_least:
        raise InputError(
            f"expected latent_dim as a whole number of at least {at_least}, got {latent_dim}"
        )
    return int(latent_dim)
