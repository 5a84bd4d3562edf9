"""Priors p(z): modules whose call returns the distribution of one datum's latent vector.

Shapes, errors and the argument that all of them share are described in :class:`Prior`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae import distributions
from pyro_vae.data_scale import moments, without_missing
from pyro_vae.distributions.flows import FlowDistribution, Inverse, spline_layers, standard_normal
from pyro_vae.distributions.normal import lower_cholesky, raw_cholesky, variance_of_means
from pyro_vae.distributions.values import StableBeta
from pyro_vae.errors import InputError, positive_number, size, sizes
from pyro_vae.networks import Standardized, check_range, check_shape

__all__ = [
    "Beta", "FlowPrior", "GaussianMixture", "HypersphericalUniform", "Prior", "StandardNormal",
    "VampPrior", "VonMisesFisher",
]  # fmt: skip


class Prior(nn.Module):
    """Base of the priors; also the recipe for one of your own.

    A prior is any callable that takes nothing and returns a Pyro distribution with batch shape ``()``
    and event shape ``(latent_dim,)``; a lambda will do where nothing is learned. A class of three
    lines becomes a full citizen (moved to the GPU, trained, saved) by deriving from this one:

    1. keep every constructor argument under its own name (``self.latent_dim = latent_dim``), so that
       a saved run can be built again;
    2. say where the latents live in ``latent_support``;
    3. return the distribution from ``forward``, its tensors on the module's device.

    Shapes:
        the call returns batch shape ``()``, event shape ``(latent_dim,)``.

    Attributes:
        latent_dim: size of the latent vector.
        latent_support: ``"real"``, ``"unit sphere"`` or ``"unit interval"``.

    Raises:
        InputError: of the priors here, a size below 1, or a scale, bound or concentration that is
            not positive and finite.

    Example:
        >>> StandardNormal(2)().event_shape
        torch.Size([2])
    """

    latent_support: str = "real"
    latent_dim: int

    def forward(self) -> dist.Distribution:
        """Return p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        raise NotImplementedError

    def keep(self, name: str, value: Tensor, *, learn: bool, persistent: bool = True) -> None:
        """Store a tensor as a parameter where it is learned, as a buffer where it is fixed."""
        if learn:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value, persistent=persistent)


class StandardNormal(Prior):
    """Normal prior with independent coordinates of mean 0 and one common scale.

    .. math:: p(z) = N(z; 0, s^2 I)

    Args:
        scale: the standard deviation s, or its start where it is learned.
        learn_scale: whether s is trained (through its logarithm).

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", section 3.
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, latent_dim: int, *, scale: float = 1.0, learn_scale: bool = False) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.scale = positive_number("scale", scale)
        self.learn_scale = learn_scale
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.keep("log_scale", torch.tensor(self.scale).log(), learn=learn_scale, persistent=False)

    def forward(self) -> dist.Distribution:
        """Return N(0, s^2 I)."""
        scale = self.log_scale.exp().expand(self.latent_dim)
        return dist.Normal(self.loc, scale, validate_args=False).to_event(1)


class GaussianMixture(Prior):
    r"""Mixture of K normals with weights, means and full covariances.

    .. math:: p(z) = \sum_k \pi_k N(z; m_k, L_k L_k^T)

    The factors L_k are lower triangular with a positive diagonal (through softplus). The mixture
    starts with equal weights, randomly drawn means (by torch's global generator: seed it to repeat
    the draw) and equal spherical covariances; together they have the mean and the covariance of the
    standard normal, about which a fresh encoder scatters (see :func:`variance_of_means`).

    Args:
        num_components: number of components, K.
        learn_weights: whether the weights are trained; if not, they stay as they are.
        learn_components: whether means and covariances are trained.

    Source:
        Dilokthanakul et al. 2016, "Deep Unsupervised Clustering with Gaussian Mixture Variational
        Autoencoders"; Jiang et al. 2017, "Variational Deep Embedding", section 3.
    """

    logits: Tensor
    means: Tensor
    raw_cholesky: Tensor

    def __init__(
        self, latent_dim: int, num_components: int = 10, *, learn_weights: bool = True,
        learn_components: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.num_components = size("num_components", num_components)
        self.learn_weights, self.learn_components = learn_weights, learn_components
        share = variance_of_means(self.latent_dim)
        means = math.sqrt(share) * torch.randn(self.num_components, self.latent_dim)
        factor = math.sqrt(1 - share) * torch.eye(self.latent_dim)
        raw = raw_cholesky(factor).repeat(self.num_components, 1)
        self.keep("logits", torch.zeros(self.num_components), learn=learn_weights)
        self.keep("means", means, learn=learn_components)
        self.keep("raw_cholesky", raw, learn=learn_components)

    @classmethod
    def from_parameters(
        cls, weights: Tensor, means: Tensor, covariances: Tensor, *, learn_weights: bool = False,
        learn_components: bool = False,
    ) -> Self:  # fmt: skip
        """Return the mixture with these parameters, by default all fixed.

        Weights ``(K,)`` are positive and sum to 1, means are ``(K, latent_dim)`` and covariances
        ``(K, latent_dim, latent_dim)``, positive definite.

        Raises:
            InputError: shapes that do not fit, weights that are no distribution, or a covariance that
                is not positive definite.
        """
        num_components, latent_dim = means.shape
        wanted = (num_components, latent_dim, latent_dim)
        if weights.shape != (num_components,) or covariances.shape != wanted:
            raise InputError(
                f"expected weights ({num_components},) and covariances {wanted} beside means "
                f"{tuple(means.shape)}, got {tuple(weights.shape)} and {tuple(covariances.shape)}"
            )
        if not (weights > 0).all() or not torch.isclose(weights.sum(), weights.new_ones(())):
            raise InputError(f"expected positive weights summing to 1, got {weights.tolist()}")
        factors, failures = torch.linalg.cholesky_ex(covariances)
        if failures.any():
            raise InputError("expected positive definite covariances, got one that is not")
        how = {"learn_weights": learn_weights, "learn_components": learn_components}
        mixture = cls(latent_dim, num_components, **how).to(means)
        with torch.no_grad():
            mixture.logits.copy_(weights.log())
            mixture.means.copy_(means)
            mixture.raw_cholesky.copy_(raw_cholesky(factors))
        return mixture

    def forward(self) -> dist.Distribution:
        """Return the mixture."""
        factors = lower_cholesky(self.raw_cholesky, self.latent_dim)
        components = dist.MultivariateNormal(self.means, scale_tril=factors, validate_args=False)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, components, validate_args=False)


class FlowPrior(Prior):
    r"""Standard normal pushed through coupling layers of rational-quadratic splines.

    .. math:: z = f(e),\ e \sim N(0, I): \log p(z) = \log N(f^{-1}(z); 0, I) + \log |\det df^{-1}/dz|

    Scoring a point, which training does at every step, takes one pass of each layer's network,
    drawing one takes two. The flow starts near the identity. With one latent coordinate each layer is
    one learned spline.

    Args:
        num_layers: number of coupling layers.
        hidden: widths of each layer's network.
        num_bins: bins of each spline.
        bound: the splines bend [-bound, bound] and leave the rest as it is.

    Source:
        Durkan et al. 2019, "Neural Spline Flows", section 3; as a prior: Chen et al. 2017,
        "Variational Lossy Autoencoder", section 3.2.
    """

    loc: Tensor

    def __init__(
        self, latent_dim: int, *, num_layers: int = 4, hidden: Sequence[int] = (64, 64),
        num_bins: int = 8, bound: float = 5.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.num_layers = size("num_layers", num_layers)
        self.hidden = sizes("hidden widths", hidden)
        self.num_bins = size("num_bins", num_bins, least=2)
        self.bound = positive_number("bound", bound)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        how: Any = {"num_bins": self.num_bins, "bound": self.bound, "hidden": self.hidden}
        self.layers = spline_layers(self.latent_dim, self.num_layers, **how)

    def forward(self) -> dist.Distribution:
        """Return the flow's distribution."""
        return FlowDistribution(standard_normal(self.loc), [Inverse(layer) for layer in self.layers])


class VampPrior(Prior):
    r"""Mixture of the posteriors of K pseudo-inputs, which are trained with the rest.

    .. math:: p(z) = \sum_k w_k q(z | u_k)

    The pseudo-inputs pass through the encoder once per call. The prior points to the family without
    owning it: its parameters, its state and its device are those of the pseudo-inputs alone, and the
    family is to be the one of the same VAE (another one would not be trained). It runs in whatever
    mode, training or evaluation, the family is in.

    Args:
        guide: the variational family q.
        data_shape: shape of one datum.
        num_pseudo_inputs: number of components, K.
        learn_weights: whether the weights w are trained; otherwise they are all 1/K.
        unit_interval: whether the data lie in [0, 1]; the pseudo-inputs are then kept inside (through
            a sigmoid, whose gradient, unlike a clamp's, vanishes nowhere).

    Raises:
        InputError: fewer than one pseudo-input, or a family that does not say its ``latent_dim``.

    Source:
        Tomczak, Welling 2018, "VAE with a VampPrior", equation 9.

    Example:
        >>> from pyro_vae.guides import MeanFieldNormal
        >>> from pyro_vae.networks import MLPEncoder
        >>> prior = VampPrior(MeanFieldNormal(MLPEncoder((64,)), 2), (64,), num_pseudo_inputs=20)
    """

    guide: Callable[[Tensor], dist.Distribution]
    logits: Tensor

    def __init__(
        self, guide: Callable[[Tensor], dist.Distribution], data_shape: Sequence[int], *,
        num_pseudo_inputs: int = 500, learn_weights: bool = False, unit_interval: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if getattr(guide, "latent_dim", None) is None:
            wanted = "a family with an attribute latent_dim"
            advice = "set it to the size of the latent vector"
            raise InputError(f"expected {wanted}, got {type(guide).__name__}: {advice}")
        # Past nn.Module's own __setattr__, which would register the family as a part of the prior and
        # so save it, list its parameters and hand it to Pyro a second time.
        object.__setattr__(self, "guide", guide)
        self.latent_dim = guide.latent_dim  # type: ignore[attr-defined]
        self.latent_support = getattr(guide, "latent_support", "real")
        self.data_shape = tuple(int(size) for size in data_shape)
        self.num_pseudo_inputs = size("num_pseudo_inputs", num_pseudo_inputs)
        self.learn_weights, self.unit_interval = learn_weights, unit_interval
        # Noise that fills the data's range, until start_at_data brings something better.
        self.raw_pseudo_inputs = nn.Parameter(torch.randn(self.num_pseudo_inputs, *self.data_shape))
        self.keep("logits", torch.zeros(self.num_pseudo_inputs), learn=learn_weights)

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs u, ``(num_pseudo_inputs, *data_shape)``."""
        raw: Tensor = self.raw_pseudo_inputs
        if isinstance(encoder := getattr(self.guide, "encoder", None), Standardized):
            raw = encoder.loc + encoder.scale * raw  # trained at the scale that the encoder sees
        return raw.sigmoid() if self.unit_interval else raw

    @torch.no_grad()
    def start_at_data(self, x: Tensor) -> None:
        """Start at data ``(N, *data_shape)``: at their mean, plus noise of their standard deviation.

        NaN, where values are missing, is left out.

        Raises:
            InputError: data of another shape, or beyond [0, 1] with ``unit_interval``.
        """
        check_shape(x, self.data_shape, "prior", batch="N")
        if self.unit_interval:
            for part in without_missing(x):
                check_range(part, (0.0, 1.0), "the prior", "build it with unit_interval=False")
        raw, whole = self.raw_pseudo_inputs, not x.amin().isnan()
        mean, spread = (x.mean(0), x.std(0, correction=0)) if whole else moments(x)
        mean, spread = mean.to(raw), spread.to(raw)
        start = mean + spread * torch.randn_like(raw)
        if self.unit_interval:
            # At the very ends the sigmoid would no longer move.
            start = start.clamp(0.01, 0.99).logit()
        if isinstance(encoder := getattr(self.guide, "encoder", None), Standardized):
            start = (start - encoder.loc) / encoder.scale
        raw.copy_(start)

    def forward(self) -> dist.Distribution:
        """Return the mixture of posteriors."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, self.guide(self.pseudo_inputs), validate_args=False)


class VonMisesFisher(Prior):
    r"""Von Mises-Fisher prior on the unit sphere of R^m, m = latent_dim.

    .. math:: p(z) = C_m(k) \exp(k \mu \cdot z)

    The mean direction mu starts at the first axis.

    Args:
        latent_dim: m, the dimension of the ambient space, at least 2; the sphere has one less.
        concentration: k, or its start where it is learned.
        learn_loc: whether mu is trained (as a vector that is divided by its length).
        learn_concentration: whether k is trained (through its logarithm).

    Source:
        Davidson et al. 2018, "Hyperspherical Variational Auto-Encoders", section 3.1.
    """

    latent_support = "unit sphere"
    direction: Tensor
    log_concentration: Tensor

    def __init__(
        self, latent_dim: int, *, concentration: float = 1.0, learn_loc: bool = False,
        learn_concentration: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim, least=2)
        self.concentration = positive_number("concentration", concentration)
        self.learn_loc, self.learn_concentration = learn_loc, learn_concentration
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
        latent_dim: m, the dimension of the ambient space, at least 2; the sphere has one less.

    Source:
        Davidson et al. 2018, "Hyperspherical Variational Auto-Encoders", section 3.1.
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
        how: Any = {"dtype": self.origin.dtype, "device": self.origin.device, "validate_args": False}
        return distributions.HypersphericalUniform(self.latent_dim, **how)


class Beta(Prior):
    r"""Independent Beta coordinates on (0, 1); the default is the uniform distribution.

    .. math:: p(z) = \prod_d Beta(z_d; a, b)

    Draws lie strictly inside, at the last number before 0 or 1 if need be. In float32 that happens
    near 1 to 2 draws in 10,000 at b = 1/2, one in 10^7 at 1, and to many well below 1/2; how many
    draws are near which end is right at any concentration.

    Args:
        concentration1: a, or its start where it is learned.
        concentration0: b, or its start where it is learned.
        learn_concentrations: whether a and b are trained, one pair per coordinate (through their
            logarithms).

    Source:
        Figurnov, Mohamed, Mnih 2018, "Implicit Reparameterization Gradients", section 6.
    """

    latent_support = "unit interval"
    log_concentration1: Tensor
    log_concentration0: Tensor

    def __init__(
        self, latent_dim: int, *, concentration1: float = 1.0, concentration0: float = 1.0,
        learn_concentrations: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.concentration1 = positive_number("concentration1", concentration1)
        self.concentration0 = positive_number("concentration0", concentration0)
        self.learn_concentrations = learn_concentrations
        for name in ("concentration1", "concentration0"):
            start = torch.full((self.latent_dim,), getattr(self, name)).log()
            self.keep(f"log_{name}", start, learn=learn_concentrations)

    def forward(self) -> dist.Distribution:
        """Return independent Betas."""
        concentration1, concentration0 = self.log_concentration1.exp(), self.log_concentration0.exp()
        return StableBeta(concentration1, concentration0, validate_args=False).to_event(1)
