"""Likelihoods p(x given z): modules whose call turns latents into the distribution of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae.distributions.continuous_bernoulli import (
    StableContinuousBernoulli,
    continuous_bernoulli_mean,
)
from pyro_vae.errors import InputError, positive_number
from pyro_vae.networks import Head, check_shape, feature_shape
from pyro_vae.scale import moments

__all__ = ["Bernoulli", "ContinuousBernoulli", "Gaussian", "Likelihood"]

SIGMAS = ("learned", "per-column", "per-pixel")


class Likelihood(nn.Module):
    """Base of the likelihoods; also the recipe for one of your own.

    A likelihood is any callable that takes latents ``(*batch, latent_dim)`` and returns a Pyro
    distribution with batch shape ``batch`` and event shape ``data_shape``. To derive from this class:

    1. keep every constructor argument under its own name;
    2. build a :class:`pyro_vae.networks.Head` per parameter on the decoder's features;
    3. set ``accepts`` to the closed interval of values the density is defined for;
    4. return the distribution from ``forward``, with ``.to_event(len(self.data_shape))``.

    Attributes:
        accepts: the closed interval of the data's values.
        data_shape: shape of one datum.
    """

    accepts: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    instead: ClassVar[str] = "check the data"
    data_shape: tuple[int, ...]

    def __init__(self, decoder: nn.Module, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.decoder = decoder
        self.data_shape = tuple(int(size) for size in data_shape)
        self.latent_dim = getattr(decoder, "latent_dim", None)

    def forward(self, z: Tensor) -> dist.Distribution:
        """Return p(x given z): batch shape ``z.shape[:-1]``, event shape ``data_shape``."""
        raise NotImplementedError

    def start_at_mean(self, mean: Tensor) -> None:
        """Set the output bias so that training starts from the best constant datum.

        Args:
            mean: mean of the training data, ``data_shape``.
        """
        raise NotImplementedError

    def standardize(self, loc: Tensor, scale: Tensor) -> None:
        """Take the decoder's output as that of ``(x - loc) / scale``; the density stays that of x.

        Both have ``data_shape``. Refused by a likelihood of values with a range of their own.
        """
        raise InputError(
            f"expected a likelihood of real values to standardise, got {type(self).__name__}: its "
            "data stay as they are; divide x by one number yourself, or use Gaussian"
        )

    def check(self, x: Tensor) -> None:
        """Refuse data this density is not defined for; called once per data set.

        Args:
            x: data ``(N, *data_shape)``.

        Raises:
            InputError: another shape, a value that is not finite, or one outside ``accepts``.
        """
        check_shape(x, self.data_shape, "likelihood", batch="N")
        low, high = self.accepts
        smallest, largest = (value.item() for value in x.aminmax())
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise InputError("expected finite data, got NaN or infinity: remove or fill them")
        if smallest < low or largest > high:
            raise InputError(
                f"expected x in [{low:g}, {high:g}] for {type(self).__name__}, "
                f"got values from {smallest:g} to {largest:g}: {self.instead}"
            )


class _UnitInterval(Likelihood):
    """What the likelihoods of values in [0, 1] share: their range, a head for logits, the call."""

    pixels: ClassVar[type[dist.Distribution]]
    accepts = (0.0, 1.0)
    instead = "divide by the largest possible value (255 for bytes) or use Gaussian"

    def __init__(self, decoder: nn.Module, data_shape: Sequence[int]) -> None:
        super().__init__(decoder, data_shape)
        self.logits = Head(feature_shape(decoder), self.data_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        """Return independent pixels with the logits that the head gives."""
        pixels = self.pixels(logits=self.logits(self.decoder(z)), validate_args=False)
        return pixels.to_event(len(self.data_shape))


class Bernoulli(_UnitInterval):
    """Independent Bernoulli pixels with the logits from a head on the decoder's features.

    Grey values in [0, 1] are accepted. The result is then a pseudo-likelihood (the cross-entropy with
    the grey values as probabilities), not a density, and is not comparable with one.

    Args:
        decoder: network from latents to features.
        data_shape: shape of one datum.

    Shapes:
        z ``(*batch, latent_dim)``; the call returns batch shape ``batch``, event ``data_shape``.

    Raises:
        InputError: a decoder without ``out_shape``.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", appendix C.1, equation 11.

    Example:
        >>> from pyro_vae.networks import MLPDecoder
        >>> Bernoulli(MLPDecoder(2), (64,))(torch.zeros(5, 2)).event_shape
        torch.Size([64])
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

    Args:
        decoder: network from latents to features.
        data_shape: shape of one datum.

    Shapes:
        z ``(*batch, latent_dim)``; the call returns batch shape ``batch``, event ``data_shape``.

    Raises:
        InputError: a decoder without ``out_shape``.

    Source:
        Loaiza-Ganem, Cunningham 2019, "The Continuous Bernoulli: Fixing a Pervasive Error in
        Variational Autoencoders", equation 6.

    Example:
        >>> from pyro_vae.networks import MLPDecoder
        >>> ContinuousBernoulli(MLPDecoder(2), (64,))(torch.zeros(5, 2)).event_shape
        torch.Size([64])
    """

    pixels = StableContinuousBernoulli

    def start_at_mean(self, mean: Tensor) -> None:
        """Set the output bias to the natural parameter whose mean is ``mean``."""
        # The mean approaches the ends as 1/eta, so a pixel that is always off would ask for an eta of
        # minus infinity. At 0.05 it is about -20.
        mean = mean.clamp(0.05, 0.95)
        low, high = torch.full_like(mean, -32.0), torch.full_like(mean, 32.0)
        for _ in range(40):  # bisection: the mean rises with eta
            middle = (low + high) / 2
            below = continuous_bernoulli_mean(middle) < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.logits.start_at(bias=low)


class Gaussian(Likelihood):
    r"""Independent normal pixels around a mean from a head on the decoder's features.

    .. math:: p(x | z) = N(x; f(z), \sigma^2 I)

    Args:
        decoder: network from latents to features.
        data_shape: shape of one datum.
        sigma: a positive number (fixed), ``"learned"`` (one for all pixels), ``"per-column"`` (one
            learned for each value of a datum, whatever z) or ``"per-pixel"`` (from a second head,
            depending on z). Where it is learned it starts at the data's own deviation, through
            :func:`pyro_vae.fit` or :meth:`pyro_vae.VAE.start_at_data`.
        floor: least sigma where it is learned. Without one, a pixel that never changes drives sigma
            to 0 and the density to infinity. The default is half a grey level of an 8-bit image.
        standardized: whether mean, floor and learned sigma are in units of the buffers ``loc`` and
            ``scale`` (see :meth:`standardize`), so that f(z) = loc + scale * the head's output. x,
            its density and a fixed sigma are in the data's own units all the same.

    Shapes:
        z ``(*batch, latent_dim)``; the call returns batch shape ``batch``, event ``data_shape``.

    Raises:
        InputError: a sigma or a floor that is not positive, or an unknown word.

    Source:
        Kingma, Welling 2014, appendix C.2, equation 12; learned sigma: Rybkin, Daniilidis, Levine
        2021, "Simple and Effective VAE Training with Calibrated Decoders".

    Example:
        >>> from pyro_vae.networks import MLPDecoder
        >>> Gaussian(MLPDecoder(2), (64,), sigma="learned")(torch.zeros(5, 2)).batch_shape
        torch.Size([5])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: Sequence[int],
        *,
        sigma: float | str = 0.1,
        floor: float = 0.5 / 255,
        standardized: bool = False,
    ) -> None:
        super().__init__(decoder, data_shape)
        if isinstance(sigma, str) and sigma not in SIGMAS:
            raise InputError(
                f"expected sigma as a positive number, {', '.join(SIGMAS)}, got {sigma!r}"
            )
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
        raw = self.raw_sigma_head.map.bias if self.sigma == "per-pixel" else self.raw_sigma
        assert raw is not None
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

    def forward(self, z: Tensor) -> dist.Distribution:
        """Return independent normal pixels."""
        features = self.decoder(z)
        mean = self.mean(features)
        scale = self._scale(features)
        if self.standardized:
            mean = self.loc + self.scale * mean
        scale = scale.expand_as(mean)
        return dist.Normal(mean, scale, validate_args=False).to_event(len(self.data_shape))

    def _scale(self, features: Tensor) -> Tensor:
        if not isinstance(self.sigma, str):
            return features.new_full((), self.sigma)
        raw = self.raw_sigma_head(features) if self.sigma == "per-pixel" else self.raw_sigma
        scale = self.floor + F.softplus(raw)
        return self.scale * scale if self.standardized else scale
