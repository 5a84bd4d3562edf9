"""Distributions of single values that Pyro lacks, or has without the precision or a mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, constraints
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

# Of these 1 - u differs from 1 for the smallest u that counts in a sum over pixels.
_EXACT_NEAR_ONE = (torch.float32, torch.float64)


class _Precise:
    """Score in float64: the log-gammas cancel where the distribution is nearly a simpler one."""

    parameters: tuple[str, ...]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability, or the log-density, in nats."""
        given = {name: getattr(self, name).double() for name in self.parameters}
        kind: Any = type(self)
        precise: Any = super(_Precise, kind(**given, validate_args=False))
        return precise.log_prob(value.double()).to(getattr(self, self.parameters[0]).dtype)


class PreciseNegativeBinomial(_Precise, dist.NegativeBinomial):
    """Negative binomial that may be nearly a Poisson."""

    parameters = ("total_count", "logits")


class PreciseStudentT(_Precise, dist.StudentT):
    """Student t that may be nearly a normal."""

    parameters = ("df", "loc", "scale")

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor, validate_args: Any = None) -> None:
        self.df, self.loc, self.scale = broadcast_all(df, loc, scale)
        # torch's own checks this one's argument always, which waits for the device.
        self._chi2 = dist.Chi2(self.df, validate_args=validate_args)
        Distribution.__init__(self, self.df.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PreciseStudentT:
        """Return the distribution with another batch shape."""
        df, loc, scale = (getattr(self, name).expand(batch_shape) for name in self.parameters)
        return PreciseStudentT(df, loc, scale, validate_args=self._validate_args)


class NumberedCategorical(dist.Categorical):
    """Categorical over 0, 1, ..., K - 1 as numbers: draws of the logits' type, with a mean."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws as floating-point numbers."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """The mean of the numbers, which is meaningful for ordered categories."""
        return self.probs @ torch.arange(self.probs.shape[-1]).to(self.probs)


class _Levels(constraints.Constraint):
    """Equal steps from 0 to 1."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.steps = levels - 1

    def check(self, value: Tensor) -> Tensor:
        off = (value * self.steps).round().clamp(0, self.steps) / self.steps - value
        return off.abs() < 1e-3 / self.steps


class LevelsOfLogistic(dist.TorchDistribution):
    r"""Logistic distribution rounded to ``levels`` equal steps from 0 to 1; the ends take the tails.

    .. math:: P(x) = \mathrm{sigmoid}((x + h - \mu)/s) - \mathrm{sigmoid}((x - h - \mu)/s)

    with h half a step: Kingma et al. 2016, "Improving Variational Inference with Inverse
    Autoregressive Flow"; Salimans et al. 2017, "PixelCNN++", equation 2.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale, self.levels, self.half = loc, scale, levels, 0.5 / (levels - 1)
        super().__init__(loc.shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return _Levels(self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability in nats."""
        below = F.logsigmoid((value + self.half - self.loc) / self.scale)
        above = F.logsigmoid((self.loc + self.half - value) / self.scale)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)) keeps its digits far out.
        inside = below + above + torch.log(-torch.expm1(-2 * self.half / self.scale))
        inside = torch.where(value > 1 - self.half, above, inside)
        return torch.where(value < self.half, below, inside)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws, each one of the levels."""
        loc, steps = self.loc.detach(), self.levels - 1
        uniform = torch.rand_like(loc.expand(self._extended_shape(sample_shape)))
        drawn = loc + self.scale.detach() * torch.logit(uniform, eps=1e-7)
        return (drawn * steps).round().clamp(0, steps) / steps

    @property
    def mean(self) -> Tensor:
        """The mean after rounding: one step for each level that a draw lies above."""
        mean = torch.zeros_like(self.loc)
        for edge in (torch.arange(self.levels - 1) + 0.5).tolist():  # at once they fill the memory
            mean += torch.sigmoid((self.loc - 2 * self.half * edge) / self.scale)
        return 2 * self.half * mean


class StableBeta(dist.Beta):
    r"""Beta distribution whose draws are made of the logarithms of two Gamma variables.

    .. math:: z = 1 / (1 + g_b / g_a), \quad \log g_a = \log g_{a+1} + \log(u) / a

    with u uniform: torch's divides the variables, which underflow at concentrations well below 0.1.

    Source:
        Marsaglia, Tsang 2000, "A Simple Method for Generating Gamma Variables", section 6.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape)``, with gradients."""
        shape, logarithms = self._extended_shape(sample_shape), []
        for each in (self.concentration1.expand(shape), self.concentration0.expand(shape)):
            larger = dist.Gamma(each + 1, torch.ones_like(each), validate_args=False).rsample()
            logarithms.append(larger.log() + torch.log1p(-torch.rand_like(each)) / each)
        drawn = torch.sigmoid(logarithms[0] - logarithms[1])
        limits = torch.finfo(drawn.dtype)
        return drawn.clamp(limits.tiny, 1 - limits.eps / 2)


class StableContinuousBernoulli(dist.ContinuousBernoulli):
    """Continuous Bernoulli computed from its natural parameter eta alone.

    torch's own goes through lambda = sigmoid(eta), loses half of float32's digits near 1/2 and
    saturates at eta = 16. In eta the density is exp(eta (x - 1/2)) (eta/2) / sinh(eta/2).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats."""
        if not torch.is_grad_enabled():  # where eta is small the value is precise, its slope is not
            size = self.logits.abs().clamp(min=1e-9)
            log_ratio = 0.5 * size + torch.expm1(-size).neg_().div_(size).log_()
            return self.logits * (value - 0.5) - log_ratio
        # log(sinh(eta/2) / (eta/2)), even in eta.
        small, square, size = _near_and_far(self.logits)
        series = square * _even_series(square, lambda n: 1 / (2 * n))
        closed = 0.5 * size + torch.log1p(-torch.exp(-size)) - size.log()
        return self.logits * (value - 0.5) - torch.where(small, series, closed)

    @property
    def mean(self) -> Tensor:
        """The mean, in (0, 1)."""
        return continuous_bernoulli_mean(self.logits)

    @property
    def variance(self) -> Tensor:
        """The variance 1/eta^2 - 1 / (4 sinh(eta/2)^2), the derivative of the mean."""
        small, square, size = _near_and_far(self.logits)
        closed = 1 / size.square() - torch.exp(-size) / torch.expm1(-size).square()
        return torch.where(small, _even_series(square, lambda n: 2 * n - 1), closed)

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats: the log-ratio less eta times the mean's part."""
        small, square, size = _near_and_far(self.logits)
        series = square * _even_series(square, lambda n: 1 / (2 * n) - 1)
        below = torch.exp(-size)
        closed = 1 + torch.log1p(-below) - size.log() - size * below / (1 - below)
        return torch.where(small, series, closed)

    def cdf(self, value: Tensor) -> Tensor:
        """Return (exp(eta x) - 1) / (exp(eta) - 1), 0 below 0 and 1 above 1."""
        # By symmetry the case eta < 0 is enough, where nothing overflows.
        positive, flat = self.logits > 0, self.logits == 0
        x = torch.where(positive, 1 - value, value).clamp(0, 1)
        rate = torch.where(flat, -1.0, -self.logits.abs())
        below = torch.where(flat, x, torch.expm1(rate * x) / torch.expm1(rate))
        return torch.where(positive, 1 - below, below)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile log(1 + u (exp(eta) - 1)) / eta, from which the draws are made."""
        # By symmetry the case eta < 0 is enough, where nothing overflows or cancels.
        positive, rate = self.logits > 0, -self.logits.abs()
        u = torch.where(positive, 1 - value, value)
        flat, steep = rate > -1e-3, rate < -1
        # The series log(1 + u (r + r^2/2 + r^3/6)) / r, up to terms below r^3.
        series = u + u * (1 - u) * (rate / 2 + rate.square() * (1 - 2 * u) / 6)
        safe = torch.where(flat, -1.0, rate)
        curved = torch.log1p(u * torch.expm1(safe.clamp(min=-1.0))) / safe
        # log(1 - u + u exp(r)) / r, which reaches 1 where u does.
        bent = torch.logaddexp(torch.log1p(-u), u.log() + safe) / safe
        quantile = torch.where(flat, series, torch.where(steep, bent, curved))
        return torch.where(positive, 1 - quantile, quantile)


def continuous_bernoulli_mean(eta: Tensor) -> Tensor:
    """Return 1/2 + coth(eta/2)/2 - 1/eta, which is 1/2 plus the derivative of the log-ratio."""
    small = eta.abs() < 0.5
    inside = torch.where(small, eta, 0.0)
    series = inside * _even_series(inside.square(), lambda n: 1.0)
    outside = torch.where(small, 1.0, eta)
    closed = 0.5 / torch.tanh(0.5 * outside) - 1 / outside
    return 0.5 + torch.where(small, series, closed)


def _near_and_far(eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the series holds, its eta^2 there and |eta| elsewhere: neither makes NaNs."""
    small = eta.abs() < 0.5
    return small, torch.where(small, eta, 0.0).square(), torch.where(small, 1.0, eta.abs())


# log(sinh(x/2) / (x/2)) = sum_n B_2n x^2n / (2n (2n)!) with Bernoulli's numbers B_2, B_4, ...; below
# x = 1/2, what comes after the seventh term is less than 1e-18.
_BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)


def _even_series(square: Tensor, factor: Callable[[int], float]) -> Tensor:
    """Return ``sum_n factor(n) B_2n / (2n)! square^(n-1)``, by Horner's rule."""
    total = torch.zeros_like(square)
    for n in range(len(_BERNOULLI_NUMBERS), 0, -1):
        total = total * square + factor(n) * _BERNOULLI_NUMBERS[n - 1] / math.factorial(2 * n)
    return total


def log_prob_of(fn: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a distribution's log-probability; of normals and Bernoulli logits in fewer passes.

    By torch's own formulas the pixels of an image take half as long as a decoder of three layers.
    """
    is_independent = isinstance(fn, Independent)
    pixels = fn.base_dist if is_independent else fn
    score = _SCORES.get(type(pixels))
    if score is None or args or kwargs or not isinstance(value, Tensor):
        return fn.log_prob(value, *args, **kwargs)
    if pixels._validate_args:
        pixels._validate_sample(value)
    return score(pixels, value, fn.reinterpreted_batch_ndims if is_independent else 0)


def _score_normal(fn: Normal, value: Tensor, dims: int) -> Tensor:
    """Score normals; the logarithm of a scale that several pixels share is taken once."""
    shared = tuple(slice(1 if stride == 0 else None) for stride in fn.scale.stride())
    scale = fn.scale[shared]
    squares = ((value - fn.loc) / scale).square()
    volume = _sum_last(scale.log() + 0.5 * math.log(2 * math.pi), dims)
    events = fn.scale.shape[-dims:].numel() // max(1, scale.shape[-dims:].numel()) if dims else 1
    return -0.5 * _sum_last(squares, dims) - events * volume


def _score_bernoulli(fn: Bernoulli, value: Tensor, dims: int) -> Tensor:
    if (logits := vars(fn).get("logits")) is None:
        return _sum_last(fn.log_prob(value), dims)
    value = value.to(logits)
    if dims and logits.dtype in _EXACT_NEAR_ONE and not torch.is_grad_enabled():
        rest = torch.addcmul(logits.relu(), value, logits, value=-1)
        return _sum_log_sigmoid(logits, dims) - _sum_last(rest, dims)
    return -_sum_last(torch.addcmul(F.softplus(logits), value, logits, value=-1), dims)


def _sum_log_sigmoid(logits: Tensor, dims: int) -> Tensor:
    """Sum ``log sigmoid(|logits|)`` over the last dimensions: one logarithm for eight of them.

    Each factor is at least 1/2, so that no product underflows. Its gradient is wrong at 0, as is that
    of relu: for values alone.
    """
    factors = logits.abs().sigmoid_().flatten(-dims)
    if lacking := -factors.shape[-1] % 8:
        factors = F.pad(factors, (0, lacking), value=1.0)
    return factors.unflatten(-1, (8, -1)).prod(-2).log_().sum(-1)


def _sum_last(terms: Tensor, dims: int) -> Tensor:
    return terms.sum(tuple(range(-dims, 0))) if dims else terms


_SCORES: dict[type, Callable[[Any, Tensor, int], Tensor]] = {
    **dict.fromkeys((Normal, dist.Normal), _score_normal),
    **dict.fromkeys((Bernoulli, dist.Bernoulli), _score_bernoulli),
}
