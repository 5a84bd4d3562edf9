"""Variational families q(z given x): modules that turn data into an approximate posterior.

Arguments, shapes and errors that all of them share are described in :class:`VariationalFamily`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae import distributions
from pyro_vae.distributions import flows, normal
from pyro_vae.errors import positive_number, size, sizes
from pyro_vae.networks import Head, feature_shape

__all__ = [
    "Beta", "FullRankNormal", "InverseAutoregressiveFlow", "MeanFieldNormal", "MixtureOfNormals",
    "NeuralSplineFlow", "VariationalFamily", "VonMisesFisher",
]  # fmt: skip


class VariationalFamily(nn.Module):
    """Base of the variational families; also the recipe for one of your own.

    A family is any callable that takes data ``(*batch, *data_shape)`` and returns a Pyro distribution
    with batch shape ``batch`` and event shape ``(latent_dim,)``. Deriving from this class splits the
    call in two, ``distribution(encode(x))``:

    1. keep every constructor argument under its own name;
    2. ``encode`` returns a dict of unconstrained per-datum tensors ``(*batch, ...)``: let
       :meth:`add_heads` build one for each, or write it;
    3. ``distribution`` turns such a dict into q, whatever the values of its tensors;
    4. say where the latents live in ``latent_support``.

    The split is what lets the best member of the family for one datum be found by optimising what
    ``encode`` would have given.

    Args:
        encoder: network from data to features.
        latent_dim: size of the latent vector.

    Shapes:
        x ``(*batch, *data_shape)``; the call returns batch shape ``batch``, event ``(latent_dim,)``.

    Attributes:
        latent_support: ``"real"``, ``"unit sphere"`` or ``"unit interval"``.
        parameter_names: the heads whose outputs ``encode`` returns.

    Raises:
        InputError: a size below 1, another option out of range, or an encoder without ``out_shape``.

    Example:
        >>> from pyro_vae.networks import MLPEncoder
        >>> MeanFieldNormal(MLPEncoder((64,)), 2)(torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    latent_support: str = "real"
    parameter_names: tuple[str, ...] = ()
    latent_dim: int

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = size("latent_dim", latent_dim)

    def add_heads(self, **shapes: tuple[int, ...]) -> None:
        """Build a head on the encoder's features for each parameter of q, by name and shape."""
        for name, shape in shapes.items():
            setattr(self, name, Head(feature_shape(self.encoder), shape))
        self.parameter_names = tuple(shapes)

    def encode(self, x: Tensor, *given: Tensor) -> dict[str, Tensor]:
        """Return the unconstrained parameters of q for each datum, each ``(*batch, ...)``.

        As it stands: what the heads named in ``parameter_names`` make of the encoder's features,
        which depend on what is ``given`` beside x too.
        """
        features = self.encoder(x, *given)
        return {name: getattr(self, name)(features) for name in self.parameter_names}

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return q: batch shape ``batch``, event shape ``(latent_dim,)``."""
        raise NotImplementedError

    def forward(self, x: Tensor, *given: Tensor) -> dist.Distribution:
        """Return q(z given x) for data ``(*batch, *data_shape)``."""
        return self.distribution(self.encode(x, *given))


class MeanFieldNormal(VariationalFamily):
    r"""Normal with independent coordinates: heads for the mean and the log-variance.

    .. math:: q(z | x) = N(z; \mu(x), diag(\sigma^2(x)))

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", section 3, equation 9.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        self.add_heads(loc=(self.latent_dim,), log_variance=(self.latent_dim,))

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the normal with ``loc`` and ``log_variance``, each ``(*batch, latent_dim)``."""
        scale = (0.5 * parameters["log_variance"]).exp()
        return dist.Normal(parameters["loc"], scale, validate_args=False).to_event(1)


class FullRankNormal(VariationalFamily):
    r"""Normal with a full covariance for each datum, through its Cholesky factor.

    .. math:: q(z | x) = N(z; \mu(x), L(x) L(x)^T)

    L is lower triangular with a positive diagonal (through softplus) and starts near the identity.

    Source:
        Kingma, Welling 2019, "An Introduction to Variational Autoencoders", section 2.5.1.
    """

    raw_cholesky: Head

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        start = normal.raw_cholesky(torch.eye(self.latent_dim))
        self.add_heads(loc=(self.latent_dim,), raw_cholesky=(len(start),))
        # A row of L has up to latent_dim random entries: small weights keep q at the prior's scale.
        self.raw_cholesky.start_at(weight_scale=0.1, bias=start)

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the normal with ``loc`` and ``raw_cholesky``, the rows of L's triangle."""
        factor = normal.lower_cholesky(parameters["raw_cholesky"], self.latent_dim)
        return normal.CholeskyNormal(parameters["loc"], scale_tril=factor, validate_args=False)


class MixtureOfNormals(VariationalFamily):
    r"""Mixture of K normals with independent coordinates for each datum.

    .. math:: q(z | x) = \sum_k \pi_k(x) N(z; \mu_k(x), diag(\sigma_k^2(x)))

    The gradient of the ELBO is unbiased for the weights too. The components start apart, or they
    would learn in step: their means are drawn as in :class:`pyro_vae.priors.GaussianMixture`.

    Args:
        num_components: number of components, K.

    Source:
        Jaakkola, Jordan 1998, "Improving the Mean Field Approximation via the Use of Mixture
        Distributions"; the gradient: see :class:`DiagonalNormalMixture`.
    """

    loc: Head
    log_variance: Head

    def __init__(self, encoder: nn.Module, latent_dim: int, *, num_components: int = 5) -> None:
        super().__init__(encoder, latent_dim)
        self.num_components = size("num_components", num_components)
        shape = (self.num_components, self.latent_dim)
        self.add_heads(logits=(self.num_components,), loc=shape, log_variance=shape)
        share = normal.variance_of_means(self.latent_dim)
        self.loc.start_at(bias=math.sqrt(share) * torch.randn(shape))
        self.log_variance.start_at(bias=math.log(1 - share))

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the mixture; ``logits`` ``(*batch, K)``, the others ``(*batch, K, latent_dim)``."""
        scale = (0.5 * parameters["log_variance"]).exp()
        return normal.DiagonalNormalMixture(parameters["logits"], parameters["loc"], scale)


class _FlowFamily(VariationalFamily):
    """What the flow families share: heads for a location, a scale and the context of the layers."""

    layers: nn.ModuleList
    starts_shifted: ClassVar[bool] = True

    def __init__(self, encoder: nn.Module, latent_dim: int, context_features: int) -> None:
        super().__init__(encoder, latent_dim)
        self.context_features, shape = size("context_features", context_features), (self.latent_dim,)
        self.add_heads(loc=shape, log_scale=shape, context=(self.context_features,))

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the flow with ``loc`` and ``log_scale`` at one end, and this ``context``."""
        shift = flows.Shift(parameters["loc"], parameters["log_scale"])
        layers = [shift, *self.layers] if self.starts_shifted else [*self.layers, shift]
        return flows.FlowDistribution(flows.standard_normal(shift.loc), layers, parameters["context"])


class InverseAutoregressiveFlow(_FlowFamily):
    r"""Normal pushed through autoregressive affine layers: draws in one pass, cheaply scored.

    .. math:: z_0 = \mu(x) + \sigma(x) e, \quad z_t = g_t z_{t-1} + (1 - g_t) m_t

    where coordinate i of the gate g_t in (0, 1) and of m_t depends on the coordinates of z_{t-1}
    before i and on the datum. A point that q has just drawn is scored with what drawing computed; any
    other point costs one pass per coordinate and layer.

    Args:
        num_layers: number of layers T; the order of the coordinates is reversed from one to the next.
        hidden: widths of each layer's masked network.
        context_features: size of the context.

    Source:
        Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow",
        algorithm 1, equations 13 and 14.
    """

    def __init__(
        self, encoder: nn.Module, latent_dim: int, *, num_layers: int = 2,
        hidden: Sequence[int] = (128,), context_features: int = 32,
    ) -> None:  # fmt: skip
        super().__init__(encoder, latent_dim, context_features)
        self.num_layers = size("num_layers", num_layers)
        self.hidden = sizes("hidden widths", hidden)
        how: Any = {"hidden": self.hidden, "context_features": self.context_features}
        self.layers = flows.autoregressive_layers(self.latent_dim, self.num_layers, **how)


class NeuralSplineFlow(_FlowFamily):
    r"""Standard normal bent by coupling layers of splines, then shifted and scaled.

    .. math:: z = \mu(x) + \sigma(x) f(e; x), \quad e \sim N(0, I)

    The shift comes last so that the splines see standardised numbers, which fill their box
    [-bound, bound] whatever the datum. Drawing takes one pass of each layer's network, scoring any
    other point two.

    Args:
        num_layers: number of coupling layers.
        hidden: widths of each layer's network.
        num_bins: bins of each spline.
        bound: the splines bend [-bound, bound] and leave the rest as it is.
        context_features: size of the context.

    Source:
        Durkan et al. 2019, "Neural Spline Flows", section 3; as posterior: section 5.2.
    """

    starts_shifted = False

    def __init__(
        self, encoder: nn.Module, latent_dim: int, *, num_layers: int = 2,
        hidden: Sequence[int] = (64,), num_bins: int = 8, bound: float = 5.0,
        context_features: int = 32,
    ) -> None:  # fmt: skip
        super().__init__(encoder, latent_dim, context_features)
        self.num_layers = size("num_layers", num_layers)
        self.hidden = sizes("hidden widths", hidden)
        self.num_bins = size("num_bins", num_bins, least=2)
        self.bound = positive_number("bound", bound)
        how: Any = {"num_bins": self.num_bins, "bound": self.bound, "hidden": self.hidden}
        how["context_features"] = self.context_features
        self.layers = flows.spline_layers(self.latent_dim, self.num_layers, **how)


# The concentration per dimension says how far q is from uniform, whatever m. At 1/4 (mean resultant
# length 0.24) it costs about 0.03 nats per dimension and leaves the mean direction felt.
STARTING_CONCENTRATION_PER_DIMENSION = 0.25


class VonMisesFisher(VariationalFamily):
    r"""Von Mises-Fisher distribution on the unit sphere of R^m, m = latent_dim, at least 2.

    .. math:: q(z | x) = C_m(k(x)) \exp(k(x) \mu(x) \cdot z)

    The mean direction is a head's output divided by its length; the concentration is m times the
    softplus of another's, so that the same head serves few dimensions and many.

    Source:
        Davidson et al. 2018, "Hyperspherical Variational Auto-Encoders", section 3.
    """

    latent_support = "unit sphere"
    raw_concentration: Head

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, size("latent_dim", latent_dim, least=2))
        self.add_heads(direction=(self.latent_dim,), raw_concentration=(1,))
        start = math.log(math.expm1(STARTING_CONCENTRATION_PER_DIMENSION))
        self.raw_concentration.start_at(bias=start)

    def encode(self, x: Tensor, *given: Tensor) -> dict[str, Tensor]:
        """Return ``direction`` ``(*batch, latent_dim)`` and ``raw_concentration`` ``(*batch,)``."""
        parameters = super().encode(x, *given)
        return {**parameters, "raw_concentration": parameters["raw_concentration"].squeeze(-1)}

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the von Mises-Fisher distribution."""
        loc = F.normalize(parameters["direction"], dim=-1)
        concentration = self.latent_dim * F.softplus(parameters["raw_concentration"])
        return distributions.VonMisesFisher(loc, concentration, validate_args=False)


# Below 1/2 the density piles up so close to 1 that float32 can't hold its draws: at 1/2 two draws in
# 10,000 lie within a rounding unit of 1, at 1/10 one in 10.
LEAST_CONCENTRATION = 0.5


class Beta(VariationalFamily):
    r"""Independent Beta coordinates on (0, 1), starting near the uniform distribution.

    .. math:: q(z | x) = \prod_d Beta(z_d; a_d(x), b_d(x)), \quad a_d, b_d > 1/2

    Gradients pass through the draws by implicit differentiation.

    Source:
        Figurnov, Mohamed, Mnih 2018, "Implicit Reparameterization Gradients"; Jankowiak, Obermeyer
        2018, "Pathwise Derivatives Beyond the Reparameterization Trick".
    """

    latent_support = "unit interval"

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        self.add_heads(raw_concentration1=(self.latent_dim,), raw_concentration0=(self.latent_dim,))

    def distribution(self, parameters: dict[str, Tensor]) -> dist.Distribution:
        """Return the Betas with concentrations 1/2 + softplus(raw)."""
        raw = (parameters[name] for name in self.parameter_names)
        concentrations = (LEAST_CONCENTRATION + F.softplus(value) for value in raw)
        return dist.Beta(*concentrations, validate_args=False).to_event(1)
