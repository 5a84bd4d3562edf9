"""The base of the priors: the recipe for one of your own, and the checks they share."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn


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

    latent_support: str = "real"
    latent_dim: int

    def forward(self) -> dist.Distribution:
        """Return p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        raise NotImplementedError

    def keep(self, name: str, value: Tensor, *, learn: bool) -> None:
        """Store a tensor as a parameter where it is learned, as a buffer where it is fixed."""
        if learn:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)
