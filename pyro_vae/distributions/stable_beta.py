"""The Beta distribution with draws that are right at small concentrations."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Gamma


class StableBeta(dist.Beta):
    r"""Beta distribution whose draws are made of the logarithms of two Gamma variables.

    .. math:: z = 1 / (1 + g_b / g_a), \quad \log g_a = \log g_{a+1} + \log(u) / a

    with u uniform. torch's own divides the variables themselves, which underflow at concentrations
    well below 0.1: their quotient is then 1/2. Draws are strictly inside (0, 1).

    Source:
        Marsaglia, Tsang 2000, "A Simple Method for Generating Gamma Variables", section 6.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape)``, with gradients."""
        shape = self._extended_shape(sample_shape)
        concentrations = self.concentration1.expand(shape), self.concentration0.expand(shape)
        drawn = torch.sigmoid(torch.sub(*map(_log_gamma_draw, concentrations)))
        limits = torch.finfo(drawn.dtype)
        return drawn.clamp(limits.tiny, 1 - limits.eps / 2)


def _log_gamma_draw(concentration: Tensor) -> Tensor:
    larger = Gamma(concentration + 1, torch.ones_like(concentration), validate_args=False).rsample()
    return larger.log() + torch.log1p(-torch.rand_like(concentration)) / concentration
