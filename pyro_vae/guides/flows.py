"""The flow families: inverse autoregressive flow and neural spline flow, conditioned on the datum."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions.flows import FlowDistribution, Shift, autoregressive_layers, spline_layers
from pyro_vae.errors import positive_number, size, sizes
from pyro_vae.guides.base import VariationalFamily
from pyro_vae.networks import Head, feature_shape


class _FlowFamily(VariationalFamily):
    """What the flow families share: heads for a location, a scale and a context, layers for the rest.

    The layers' networks are shared by all data; a datum speaks to them through its context.
    """

    layers: nn.ModuleList

    def __init__(self, encoder: nn.Module, latent_dim: int, context_features: int) -> None:
        super().__init__(encoder, latent_dim)
        features = feature_shape(encoder)
        self.context_features = size("context_features", context_features)
        self.loc = Head(features, (self.latent_dim,))
        self.log_scale = Head(features, (self.latent_dim,))
        self.context = Head(features, (self.context_features,))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``loc`` and ``log_scale`` ``(*batch, latent_dim)``, and ``context``."""
        features = self.encoder(x)
        return {
            "loc": self.loc(features),
            "log_scale": self.log_scale(features),
            "context": self.context(features),
        }


class InverseAutoregressiveFlow(_FlowFamily):
    r"""Normal pushed through autoregressive affine layers: draws in one pass, cheaply scored.

    .. math:: z_0 = \mu(x) + \sigma(x) e, \quad z_t = g_t z_{t-1} + (1 - g_t) m_t

    where coordinate i of the gate g_t in (0, 1) and of m_t depends on the coordinates of z_{t-1}
    before i and on the datum. A point that q has just drawn is scored with what drawing computed; any
    other point costs one pass per coordinate and layer.

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.
        num_layers: number of layers T; the order of the coordinates is reversed from one to the next.
        hidden: widths of each layer's masked network.
        context_features: size of the context.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Raises:
        InputError: a size below 1, or an encoder without ``out_shape``.

    Source:
        Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow",
        algorithm 1, equations 13 and 14.

    Example:
        >>> from pyro_vae.networks import MLPEncoder
        >>> InverseAutoregressiveFlow(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        *,
        num_layers: int = 2,
        hidden: Sequence[int] = (128,),
        context_features: int = 32,
    ) -> None:
        super().__init__(encoder, latent_dim, context_features)
        self.num_layers = size("num_layers", num_layers)
        self.hidden = sizes("hidden widths", hidden)
        self.layers = autoregressive_layers(
            self.latent_dim,
            self.num_layers,
            hidden=self.hidden,
            context_features=self.context_features,
        )

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the flow that starts at this location and scale, with this context."""
        shift = Shift(parameters["loc"], parameters["log_scale"])
        layers = [shift, *self.layers]
        return FlowDistribution(_standard_normal(shift.loc), layers, parameters["context"])


class NeuralSplineFlow(_FlowFamily):
    r"""Standard normal bent by coupling layers of splines, then shifted and scaled.

    .. math:: z = \mu(x) + \sigma(x) f(e; x), \quad e \sim N(0, I)

    The shift comes last so that the splines see standardised numbers, which fill their box
    [-bound, bound] whatever the datum. Drawing takes one pass of each layer's network, scoring any
    other point two.

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.
        num_layers: number of coupling layers.
        hidden: widths of each layer's network.
        num_bins: bins of each spline.
        bound: the splines bend [-bound, bound] and leave the rest as it is.
        context_features: size of the context.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Raises:
        InputError: a size below 1, a bound that is not positive, or an encoder without ``out_shape``.

    Source:
        Durkan et al. 2019, "Neural Spline Flows", section 3; as posterior: section 5.2.

    Example:
        >>> from pyro_vae.networks import MLPEncoder
        >>> NeuralSplineFlow(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        *,
        num_layers: int = 2,
        hidden: Sequence[int] = (64,),
        num_bins: int = 8,
        bound: float = 5.0,
        context_features: int = 32,
    ) -> None:
        super().__init__(encoder, latent_dim, context_features)
        self.num_layers = size("num_layers", num_layers)
        self.hidden = sizes("hidden widths", hidden)
        self.num_bins = size("num_bins", num_bins, least=2)
        self.bound = positive_number("bound", bound)
        self.layers = spline_layers(
            self.latent_dim,
            self.num_layers,
            hidden=self.hidden,
            num_bins=self.num_bins,
            bound=self.bound,
            context_features=self.context_features,
        )

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the flow that ends at this location and scale, with this context."""
        shift = Shift(parameters["loc"], parameters["log_scale"])
        layers = [*self.layers, shift]
        return FlowDistribution(_standard_normal(shift.loc), layers, parameters["context"])


def _standard_normal(like: Tensor) -> dist.Distribution:
    """Return independent standard normals ``(*batch, dim)`` shaped like ``like``."""
    zero = torch.zeros_like(like)
    return dist.Normal(zero, torch.ones_like(like), validate_args=False).to_event(1)
