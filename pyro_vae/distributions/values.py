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
        numbers = torch.arange(self.logits.shape[-1], device=self.logits.device)
        return self.probs @ numbers.to(self.logits.dtype)


class _Levels(constraints.Constraint):
    """Equal steps from 0 to 1."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        steps = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((steps - steps.round()).abs() < 1e-3)


class LevelsOfLogistic(dist.TorchDistribution):
    r"""Logistic distribution rounded to ``levels`` equal steps from 0 to 1; the ends take the tails.

    .. math:: P(x) = \mathrm{sigmoid}((x + h - \mu)/s) - \mathrm{sigmoid}((x - h - \mu)/s)

    with h half a step. ``loc`` and ``scale`` are those of the logistic, on the scale of [0, 1].

    Source:
        Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow",
        appendix; Salimans et al. 2017, "PixelCNN++", equation 2.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        self.half_step = 0.5 / (levels - 1)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return _Levels(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LevelsOfLogistic:
        """Return the distribution with another batch shape."""
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return LevelsOfLogistic(loc, scale, self.levels, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability in nats."""
        if self._validate_args:
            self._validate_sample(value)
        below = F.logsigmoid((value + self.half_step - self.loc) / self.scale)
        above = F.logsigmoid((self.loc + self.half_step - value) / self.scale)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)) keeps its digits far out.
        inside = below + above + torch.log(-torch.expm1(-2 * self.half_step / self.scale))
        inside = torch.where(value > 1 - self.half_step, above, inside)
        return torch.where(value < self.half_step, below, inside)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws, each one of the levels."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            drawn = self.loc + self.scale * torch.logit(uniform, eps=1e-7)
            steps = self.levels - 1
            return (drawn * steps).round().clamp(0, steps) / steps

    @property
    def mean(self) -> Tensor:
        """The mean after rounding: one step for each level that a draw lies above."""
        mean = torch.zeros_like(self.loc)
        for level in range(self.levels - 1):
            edge = (2 * level + 1) * self.half_step
            mean = mean + 2 * self.half_step * torch.sigmoid((self.loc - edge) / self.scale)
        return mean
