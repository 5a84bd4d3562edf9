"""Distributions of single values that Pyro lacks, or has without the precision or a mean."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F


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
        """The mean of the numbers, which says something of categories that have an order."""
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

    with u uniform. torch's own divides the variables themselves, which underflow at concentrations
    well below 0.1: their quotient is then 1/2. Draws are strictly inside (0, 1).

    Source:
        Marsaglia, Tsang 2000, "A Simple Method for Generating Gamma Variables", section 6.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape)``, with gradients."""
        shape = self._extended_shape(sample_shape)
        logarithms = []
        for each in (self.concentration1.expand(shape), self.concentration0.expand(shape)):
            larger = dist.Gamma(each + 1, torch.ones_like(each), validate_args=False).rsample()
            logarithms.append(larger.log() + torch.log1p(-torch.rand_like(each)) / each)
        drawn = torch.sigmoid(logarithms[0] - logarithms[1])
        limits = torch.finfo(drawn.dtype)
        return drawn.clamp(limits.tiny, 1 - limits.eps / 2)
