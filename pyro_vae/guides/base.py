"""The base of the variational families: the recipe for one of your own."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.errors import size


class VariationalFamily(nn.Module):
    """Base of the variational families; also the recipe for one of your own.

    A family is any callable that takes data ``(*batch, *data_shape)`` and returns a Pyro distribution
    with batch shape ``batch`` and event shape ``(latent_dim,)``. Deriving from this class splits the
    call in two, ``distribution(encode(x))``:

    1. keep every constructor argument under its own name;
    2. ``encode`` returns a dict of unconstrained per-datum tensors ``(*batch, ...)``;
    3. ``distribution`` turns such a dict into q, whatever the values of its tensors;
    4. say where the latents live in ``latent_support``.

    The split is what lets the best member of the family for one datum be found by optimising what
    ``encode`` would have given.

    Attributes:
        latent_dim: size of the latent vector.
        latent_support: ``"real"``, ``"unit sphere"`` or ``"unit interval"``.
    """

    latent_support: str = "real"
    latent_dim: int

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = size("latent_dim", latent_dim)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return the unconstrained parameters of q for each datum, each ``(*batch, ...)``."""
        raise NotImplementedError

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return q: batch shape ``batch``, event shape ``(latent_dim,)``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z given x) for data ``(*batch, *data_shape)``."""
        return self.distribution(self.encode(x))
