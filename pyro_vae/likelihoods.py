"""Likelihoods p(x given z): modules whose call turns latents into the distribution of the data.

Arguments, shapes and errors that all of them share are described in :class:`Likelihood`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae.data_scale import moments
from pyro_vae.distributions import values
from pyro_vae.errors import InputError, check_choice, positive_number, size
from pyro_vae.networks import Head, check_range, check_shape, feature_shape

__all__ = [
    "Bernoulli", "Categorical", "ContinuousBernoulli", "DiscretizedLogistic", "Gaussian",
    "Likelihood", "NegativeBinomial", "Poisson", "StudentT",
]  # fmt: skip

SIGMAS = ("learned", "per-column", "per-pixel")


class Likelihood(nn.Module):
    """Base of the likelihoods; also the recipe for one of your own.

    A likelihood is any callable that takes latents ``(*batch, latent_dim)`` and returns a Pyro
    distribution with batch shape ``batch`` and event shape ``data_shape``. To derive from this class:

    1. keep every constructor argument under its own name;
    2. build a :class:`pyro_vae.networks.Head` per parameter on the decoder's features;
    3. set ``accepts`` to the closed interval of values the density is defined for, and ``step`` to
       the distance of its values from each other where they are discrete;
    4. return the distribution from ``forward``, with ``.to_event(len(self.data_shape))``.

    Args:
        decoder: network from latents to features.
        data_shape: shape of one datum.

    Shapes:
        z ``(*batch, latent_dim)``; the call returns batch shape ``batch``, event ``data_shape``.

    Raises:
        InputError: a decoder without ``out_shape``; of the likelihoods here, an option out of range.

    Attributes:
        accepts: the closed interval of the data's values.
        step: distance between two of the data's values; None where any value is accepted.
        takes_sizes: whether the call takes size factors ``(N,)`` after z, as counts may.

    Example:
        >>> from pyro_vae.networks import MLPDecoder
        >>> Bernoulli(MLPDecoder(2), (64,))(torch.zeros(5, 2)).event_shape
        torch.Size([64])
    """

    accepts: tuple[float, float] = (-math.inf, math.inf)
    step: float | None = None
    takes_sizes: bool = False
    instead: ClassVar[str] = "check the data"
    data_shape: tuple[int, ...]

    def __init__(self, decoder: nn.Module, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.decoder = decoder
        self.data_shape = tuple(int(size) for size in data_shape)
        self.latent_dim = getattr(decoder, "latent_dim", None)

    def forward(self, z: Tensor, *given: Tensor) -> dist.Distribution:
        """Return p(x given z): batch shape ``z.shape[:-1]``, event shape ``data_shape``.

        What is ``given`` after z, such as a condition, goes on to the decoder.
        """
        raise NotImplementedError

    def start_at_mean(self, mean: Tensor) -> None:
        """Start training from the best constant datum, given the data's ``mean`` ``data_shape``."""
        raise NotImplementedError

    def standardize(self, loc: Tensor, scale: Tensor) -> None:
        """Take the decoder's output as that of ``(x - loc) / scale``; the density stays that of x.

        Both have ``data_shape``. Refused by a likelihood of values with a range of their own.
        """
        wanted = "a likelihood of real values to standardise"
        advice = "its data stay as they are; divide x by one number yourself, or use Gaussian"
        raise InputError(f"expected {wanted}, got {type(self).__name__}: {advice}")

    def check(self, x: Tensor) -> None:
        """Refuse data ``(N, *data_shape)`` this density is not defined for, once per data set.

        Raises:
            InputError: another shape, a value that is not finite, or one outside ``accepts``.
        """
        check_shape(x, self.data_shape, "likelihood", batch="N")
        check_range(x, self.accepts, type(self).__name__, self.instead)
        off = torch.zeros(()) if self.step is None else x / self.step
        off = (off - off.round()).abs()
        if off.max() > 1e-3:
            kind = "whole numbers" if self.step == 1 else f"multiples of {self.step:.6g}"
            wanted = f"{kind} for {type(self).__name__}"
            raise InputError(f"expected {wanted}, got {x.flatten()[off.argmax()]:g}: {self.instead}")

    def bits_per_dimension(self, log_prob: float) -> float:
        """Return log p(x) in nats as bits per value: a code length where x is discrete."""
        return -log_prob / (math.log(2) * math.prod(self.data_shape))


class _UnitInterval(Likelihood):
    """What the likelihoods of values in [0, 1] share: their range, a head for logits, the call."""

    pixels: ClassVar[type[dist.Distribution]]
    accepts = (0.0, 1.0)
    instead = "divide by the largest possible value (255 for bytes) or use Gaussian"

    def __init__(self, decoder: nn.Module, data_shape: Sequence[int]) -> None:
        super().__init__(decoder, data_shape)
        self.logits = Head(feature_shape(decoder), self.data_shape)

    def forward(self, z: Tensor, *given: Tensor) -> dist.Distribution:
        """Return independent pixels with the logits that the head gives."""
        pixels = self.pixels(logits=self.logits(self.decoder(z, *given)), validate_args=False)
        return pixels.to_event(len(self.data_shape))


class Bernoulli(_UnitInterval):
    """Independent Bernoulli pixels with the logits from a head on the decoder's features.

    Grey values in [0, 1] are accepted. The result is then a pseudo-likelihood (the cross-entropy with
    the grey values as probabilities), not a density, and is not comparable with one.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", appendix C.1, equation 11.
    """

    pixels = dist.Bernoulli

    def start_at_mean(self, mean: Tensor) -> None:
        """Set the output bias to the logit of ``mean``."""
        # A pixel that is never on in the training set may be on in the next one: keep its
        # probability away from 0 and 1.
        self.logits.start_at(bias=torch.logit(mean.clamp(1e-3, 1 - 1e-3)))


class ContinuousBernoulli(_UnitInterval):
    r"""Independent continuous Bernoulli pixels: a proper density for grey values in [0, 1].

    .. math:: p(x | z) = \prod_i \exp(\eta_i x_i) \eta_i / (\exp(\eta_i) - 1), \quad \eta = f(z)

    The Bernoulli's cross-entropy with the normaliser it lacks for grey values. eta is the logit of
    the parameter lambda of the source.

    Source:
        Loaiza-Ganem, Cunningham 2019, "The Continuous Bernoulli: Fixing a Pervasive Error in
        Variational Autoencoders", equation 6.
    """

    pixels = values.StableContinuousBernoulli

    def start_at_mean(self, mean: Tensor) -> None:
        """Set the output bias to the natural parameter whose mean is ``mean``."""
        # The mean approaches the ends as 1/eta, so a pixel that is always off would ask for an eta of
        # minus infinity. At 0.05 it is about -20.
        mean = mean.clamp(0.05, 0.95)
        low, high = torch.full_like(mean, -32.0), torch.full_like(mean, 32.0)
        for _ in range(40):  # bisection: the mean rises with eta
            middle = (low + high) / 2
            below = values.continuous_bernoulli_mean(middle) < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.logits.start_at(bias=low)


class Gaussian(Likelihood):
    r"""Independent normal pixels around a mean from a head on the decoder's features.

    .. math:: p(x | z) = N(x; f(z), \sigma^2 I)

    Args:
        sigma: a positive number (fixed), ``"learned"`` (one for all pixels), ``"per-column"`` (one
            learned for each value of a datum, whatever z) or ``"per-pixel"`` (from a second head,
            depending on z). Where it is learned it starts at the data's own deviation, through
            :func:`pyro_vae.fit` or :meth:`pyro_vae.VAE.start_at_data`.
        floor: least sigma where it is learned. Without one, a pixel that never changes drives sigma
            to 0 and the density to infinity. The default is half a grey level of an 8-bit image.
        standardized: whether mean, floor and learned sigma are in units of the buffers ``loc`` and
            ``scale`` (see :meth:`standardize`), so that f(z) = loc + scale * the head's output. x,
            its density and a fixed sigma are in the data's own units all the same.

    Source:
        Kingma, Welling 2014, appendix C.2, equation 12; learned sigma: Rybkin, Daniilidis, Levine
        2021, "Simple and Effective VAE Training with Calibrated Decoders".
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, decoder: nn.Module, data_shape: Sequence[int], *, sigma: float | str = 0.1,
        floor: float = 0.5 / 255, standardized: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(decoder, data_shape)
        if isinstance(sigma, str) and sigma not in SIGMAS:
            words = ", ".join(SIGMAS)
            raise InputError(f"expected sigma as a positive number, {words}, got {sigma!r}")
        self.sigma = sigma if isinstance(sigma, str) else positive_number("sigma", sigma)
        self.floor = positive_number("floor", floor)
        self.mean = Head(feature_shape(decoder), self.data_shape)
        # sigma = floor + softplus(raw); until it starts at the data's deviation, raw is 0.
        if self.sigma in ("learned", "per-column"):
            shape = () if self.sigma == "learned" else self.data_shape
            self.raw_sigma = nn.Parameter(torch.zeros(shape))
        elif self.sigma == "per-pixel":
            self.raw_sigma_head = Head(feature_shape(decoder), self.data_shape)
            self.raw_sigma_head.start_at(weight_scale=0.1)
        self.standardized = bool(standardized)
        if self.standardized:
            self.standardize(torch.zeros(self.data_shape), torch.ones(self.data_shape))

    def standardize(self, loc: Tensor, scale: Tensor) -> None:
        """Take mean, floor and learned sigma in units of ``scale``, the mean from ``loc`` on."""
        self.standardized = True
        weight = self.mean.map.weight
        self.register_buffer("loc", loc.to(weight))
        self.register_buffer("scale", scale.to(weight))

    def start_at_mean(self, mean: Tensor) -> None:
        """Set the output bias to ``mean``."""
        self.mean.start_at(bias=(mean - self.loc) / self.scale if self.standardized else mean)

    @torch.no_grad()
    def start_sigma(self, x: Tensor, *, again: bool = True) -> None:
        """Start a learned sigma at the deviation of data ``(N, *data_shape)``, ``again`` or once."""
        if not isinstance(self.sigma, str):
            return
        raw: Any = self.raw_sigma_head.map.bias if self.sigma == "per-pixel" else self.raw_sigma
        if raw.any() and not again:
            return
        deviation = moments(x)[1]
        if self.standardized:
            deviation = deviation / self.scale.to(deviation)
        start = deviation.square().mean().sqrt().clamp(min=2 * self.floor)
        if self.sigma != "learned":  # a value that does not vary says nothing of its noise
            start = torch.where(deviation > 2 * self.floor, deviation, start)
        start = start - self.floor
        start = start + (-torch.expm1(-start)).log()  # the inverse of softplus
        if self.sigma == "per-pixel":
            self.raw_sigma_head.start_at(bias=start)
        else:
            raw.copy_(start)

    def forward(self, z: Tensor, *given: Tensor) -> dist.Distribution:
        """Return independent pixels, normal ones unless a subclass has others."""
        features = self.decoder(z, *given)
        mean, scale = self.mean(features), self._scale(features)
        if self.standardized:
            mean = self.loc + self.scale * mean
        return self._pixels(mean, scale.expand_as(mean)).to_event(len(self.data_shape))

    def _pixels(self, mean: Tensor, scale: Tensor) -> dist.Distribution:
        return dist.Normal(mean, scale, validate_args=False)

    def _scale(self, features: Tensor) -> Tensor:
        if not isinstance(self.sigma, str):
            return features.new_full((), self.sigma)
        raw = self.raw_sigma_head(features) if self.sigma == "per-pixel" else self.raw_sigma
        scale = self.floor + F.softplus(raw)
        return self.scale * scale if self.standardized else scale


class StudentT(Gaussian):
    r"""Independent Student t pixels, whose outliers cost no more than their logarithm.

    .. math:: p(x | z) = \prod_i t_\nu(x_i; f_i(z), \sigma)

    Args:
        df: degrees of freedom nu, a positive number, or ``"learned"``: one for all pixels, above 1 so
            that there is a mean, starting at 5.
        sigma, floor, standardized: as in :class:`Gaussian`.

    Source:
        Takahashi et al. 2018, "Student-t Variational Autoencoder for Robust Density Estimation".
    """

    def __init__(
        self, decoder: nn.Module, data_shape: Sequence[int], *, df: float | str = "learned",
        sigma: float | str = "learned", floor: float = 0.5 / 255, standardized: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(decoder, data_shape, sigma=sigma, floor=floor, standardized=standardized)
        self.df = df if df == "learned" else positive_number("df", df)
        if self.df == "learned":
            self.raw_df = nn.Parameter(torch.tensor(4.0).expm1().log())

    def _pixels(self, mean: Tensor, scale: Tensor) -> dist.Distribution:
        df = mean.new_tensor(self.df) if isinstance(self.df, float) else 1 + F.softplus(self.raw_df)
        return values.PreciseStudentT(df, mean, scale, validate_args=False)


class DiscretizedLogistic(Gaussian):
    r"""Logistic pixels rounded to equal levels from 0 to 1: a probability of 8-bit images.

    .. math:: P(x | z) = \prod_i \int_{x_i - h}^{x_i + h} \mathrm{logistic}(t; f_i(z), s)\,dt

    with h half a step; the first and the last level take the tails. -log P(x) is the length of a
    lossless code, see :meth:`bits_per_dimension`.

    Args:
        levels: number of levels, at least 2; data are k / (levels - 1).
        sigma, floor: as in :class:`Gaussian`, of the deviation before it is rounded.

    Source:
        Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow".

    Example:
        >>> from pyro_vae.networks import MLPDecoder
        >>> likelihood = DiscretizedLogistic(MLPDecoder(2), (3, 8, 8))
        >>> likelihood.bits_per_dimension(-math.log(256) * 3 * 8 * 8)  # every level alike
        8.0
    """

    accepts = (0.0, 1.0)
    instead = "divide by the largest possible value (255 for bytes) and say how many levels there are"
    standardize = Likelihood.standardize  # levels have a range of their own

    def __init__(
        self, decoder: nn.Module, data_shape: Sequence[int], *, levels: int = 256,
        sigma: float | str = "learned", floor: float = 0.5 / 255,
    ) -> None:  # fmt: skip
        super().__init__(decoder, data_shape, sigma=sigma, floor=floor)
        self.levels = size("levels", levels, least=2)
        self.step = 1 / (self.levels - 1)

    def _pixels(self, mean: Tensor, scale: Tensor) -> dist.Distribution:
        # sqrt(3) / pi is the scale of a logistic whose deviation is 1.
        return values.LevelsOfLogistic(mean, scale * (math.sqrt(3) / math.pi), self.levels)


class Categorical(Likelihood):
    """Independent categories 0, 1, ..., K - 1, in columns of a table or as the levels of pixels.

    The mean is that of the numbers, for categories with an order; of others use draws.

    Args:
        num_categories: K, at least 2.
    """

    step = 1.0
    instead = "number the categories from 0, and say how many there are"

    def __init__(self, decoder: nn.Module, data_shape: Sequence[int], *, num_categories: int) -> None:
        super().__init__(decoder, data_shape)
        self.num_categories = size("num_categories", num_categories, least=2)
        self.accepts = (0.0, self.num_categories - 1.0)
        channels, *rest = self.data_shape
        self.logits = Head(feature_shape(decoder), (channels * self.num_categories, *rest))

    def start_at_mean(self, mean: Tensor) -> None:
        """Start with equal shares: a mean does not give those of the categories."""
        self.logits.start_at()

    def forward(self, z: Tensor, *given: Tensor) -> dist.Distribution:
        """Return independent categories."""
        logits, dims = self.logits(self.decoder(z, *given)), len(self.data_shape)
        logits = logits.unflatten(-dims, (self.data_shape[0], self.num_categories))
        pixels = values.NumberedCategorical(logits=logits.movedim(-dims, -1), validate_args=False)
        return pixels.to_event(dims)


class Poisson(Likelihood):
    r"""Independent Poisson counts, the logarithms of their rates from a head on the features.

    .. math:: p(x | z) = \prod_i Poisson(x_i; s \exp f_i(z))

    Args:
        size_factor: the s of a datum (its exposure, its sequencing depth): None is 1; ``"observed"``
            takes it as a last input, ``(N,)``, of model and guide, whose x is then a tuple;
            ``"learned"`` makes it log-normal: the last latent times a learned scale is log s, and
            the decoder has one latent less than prior and family.

    Raises:
        InputError: called without the size factors that are to be observed.

    Source:
        Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics".

    Example:
        >>> from pyro_vae.networks import MLPDecoder
        >>> counts = Poisson(MLPDecoder(2), (64,), size_factor="observed")
        >>> counts(torch.zeros(5, 2), torch.full((5,), 10.0)).batch_shape
        torch.Size([5])
    """

    accepts = (0.0, math.inf)
    step = 1.0
    instead = "these are no counts; use Gaussian, or StudentT"
    overdispersed: ClassVar[bool] = False

    def __init__(
        self, decoder: nn.Module, data_shape: Sequence[int], *, size_factor: str | None = None
    ) -> None:
        super().__init__(decoder, data_shape)
        check_choice("size_factor", size_factor, (None, "observed", "learned"))
        self.size_factor = size_factor
        self.log_rate = Head(feature_shape(decoder), self.data_shape)
        self.takes_sizes = size_factor == "observed"
        if self.overdispersed:
            self.log_theta = nn.Parameter(torch.zeros(self.data_shape))
        if size_factor == "learned":
            self.latent_dim = None if self.latent_dim is None else self.latent_dim + 1
            self.log_size_scale = nn.Parameter(torch.zeros(()))

    def start_at_mean(self, mean: Tensor) -> None:
        """Set the output bias to the logarithm of ``mean``, that of a size factor of 1."""
        self.log_rate.start_at(bias=mean.clamp(min=1e-3).log())

    def forward(self, z: Tensor, *given: Tensor) -> dist.Distribution:
        """Return independent counts; the last tensor given is the size factors, if observed."""
        log_size = z.new_zeros(())
        if self.size_factor == "observed":
            if not given:
                raise InputError("expected size factors, got x alone: give both functions (x, sizes)")
            given, log_size = given[:-1], given[-1].log()
        elif self.size_factor == "learned":
            z, log_size = z[..., :-1], self.log_size_scale.exp() * z[..., -1]
        log_size = log_size.reshape(*log_size.shape, *[1] * len(self.data_shape))
        counts = self._counts(self.log_rate(self.decoder(z, *given)) + log_size)
        return counts.to_event(len(self.data_shape))

    def _counts(self, log_rate: Tensor) -> dist.Distribution:
        return dist.Poisson(log_rate.exp(), validate_args=False)


class NegativeBinomial(Poisson):
    r"""Independent negative binomial counts: Poisson counts whose rates vary by a gamma.

    .. math:: E[x_i] = \mu_i = s \exp f_i(z), \quad Var[x_i] = \mu_i + \mu_i^2 / \theta_i

    theta is learned, one for each value of a datum, starting at 1. Arguments, errors and source are
    those of :class:`Poisson`.
    """

    overdispersed = True

    def _counts(self, log_rate: Tensor) -> dist.Distribution:
        logits, theta = log_rate - self.log_theta, self.log_theta.exp()
        return values.PreciseNegativeBinomial(theta, logits=logits, validate_args=False)
