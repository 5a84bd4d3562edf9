"""The normalising flow as a prior."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.distributions.flows import FlowDistribution, Inverse, spline_layers
from pyro_vae.errors import positive_number, size, sizes
from pyro_vae.priors.base import Prior


class FlowPrior(Prior):
    r"""Standard normal pushed through coupling layers of rational-quadratic splines.

    .. math:: z = f(e),\ e \sim N(0, I): \log p(z) = \log N(f^{-1}(z); 0, I) + \log |\det df^{-1}/dz|

    Scoring a point, which training does at every step, takes one pass of each layer's network,
    drawing one takes two. The flow starts near the identity. With one latent coordinate each layer is
    one learned spline.

    Args:
        latent_dim: size of the latent vector.
        num_layers: number of coupling layers.
        hidden: widths of each layer's network.
        num_bins: bins of each spline.
        bound: the splines bend [-bound, bound] and leave the rest as it is.

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Raises:
        InputError: a size below 1, or a bound that is not positive and finite.

    Source:
        Durkan et al. 2019, "Neural Spline Flows", section 3; as a prior: Chen et al. 2017,
        "Variational Lossy Autoencoder", section 3.2.

    Example:
        >>> FlowPrior(2)().event_shape
        torch.Size([2])
    """

    loc: Tensor

    def __init__(
        self,
        latent_dim: int,
        *,
        num_layers: int = 4,
        hidden: Sequence[int] = (64, 64),
        num_bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.num_layers = size("num_layers", num_layers)
        self.hidden = sizes("hidden widths", hidden)
        self.num_bins = size("num_bins", num_bins, least=2)
        self.bound = positive_number("bound", bound)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.layers = spline_layers(
            self.latent_dim,
            self.num_layers,
            hidden=self.hidden,
            num_bins=self.num_bins,
            bound=self.bound,
        )

    def forward(self) -> dist.Distribution:
        """Return the flow's distribution."""
        base = dist.Normal(self.loc, torch.ones_like(self.loc), validate_args=False).to_event(1)
        return FlowDistribution(base, [Inverse(layer) for layer in self.layers])
