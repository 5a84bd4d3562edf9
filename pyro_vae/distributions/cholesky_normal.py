"""The multivariate normal that scores its own draws exactly, and its Cholesky factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_vae.distributions.latest import LatestDraw


def lower_cholesky(raw: Tensor, size: int) -> Tensor:
    """Return lower triangular matrices ``(*batch, size, size)`` with a positive diagonal.

    Args:
        raw: the lower triangles row by row, ``(*batch, size * (size + 1) / 2)``; the diagonal goes
            through softplus.
        size: rows of one matrix.
    """
    # Entry (row, column) of the triangle stands at row (row + 1) / 2 + column. Gathering, unlike
    # writing into a matrix of zeros, works under vmap.
    row = torch.arange(size, device=raw.device)
    position = (row * (row + 1) // 2)[:, None] + row[None, :]
    full = raw[..., position.clamp(max=raw.shape[-1] - 1)]
    return full.tril(-1) + torch.diag_embed(F.softplus(full.diagonal(dim1=-2, dim2=-1)))


def raw_cholesky(factor: Tensor) -> Tensor:
    """Return what :func:`lower_cholesky` turns into ``factor``, ``(*batch, size, size)``."""
    diagonal = softplus_inverse(factor.diagonal(dim1=-2, dim2=-1))
    full = factor.tril(-1) + torch.diag_embed(diagonal)
    rows, columns = torch.tril_indices(*factor.shape[-2:], device=factor.device)
    return full[..., rows, columns]


class CholeskyNormal(LatestDraw, dist.MultivariateNormal):
    r"""Multivariate normal that scores its latest draw by the noise it was made of.

    .. math:: \log N(m + L e; m, L L^T) = -|e|^2 / 2 - \sum_d \log L_{dd} - D/2 \log 2\pi

    Solving L for e row by row multiplies the rounding of z by L's condition number. That may grow
    like the D-th power of an off-diagonal entry over a diagonal one: with entries of 1/2 and 1/30,
    eight dimensions leave a float32 no digit, and somewhat smaller diagonals overflow. A point that
    was not drawn here is scored in this way all the same, for its e is not known otherwise.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return ``(*sample_shape, *batch, dim)``, differentiable."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        z: Tensor = self.loc + (self.scale_tril @ noise[..., None]).squeeze(-1)
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * shape[-1] * math.log(2 * math.pi)
        self._remember(z, -0.5 * noise.square().sum(-1) - log_volume - constant)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats, ``(*sample_shape, *batch)``."""
        log_prob = self._remembered(value)
        return super().log_prob(value) if log_prob is None else log_prob


def softplus_inverse(value: Tensor) -> Tensor:
    """Return the raw number whose softplus is ``value``."""
    return value + torch.log(-torch.expm1(-value))
