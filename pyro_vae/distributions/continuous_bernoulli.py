"""The continuous Bernoulli, computed from its natural parameter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor


class StableContinuousBernoulli(dist.ContinuousBernoulli):
    """Continuous Bernoulli computed from its natural parameter eta alone.

    torch's own goes through lambda = sigmoid(eta), loses half of float32's digits near 1/2 and
    saturates at eta = 16. In eta the density is exp(eta (x - 1/2)) (eta/2) / sinh(eta/2).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats."""
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
        positive = self.logits > 0
        rate = -self.logits.abs()
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
