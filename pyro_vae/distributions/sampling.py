"""Exact draws from the von Mises-Fisher law: the polar angle, and a direction around the mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# Wood's proposal is accepted with a probability that falls with k, towards
# (e/(4a))^a Gamma(2a)/Gamma(a), a = (m-1)/2: sqrt(e/(2 pi)) = 0.6577 at m = 2, more for every
# larger m (1/sqrt(2) in the limit). The proposals of the first round all miss with chance at most
# 0.3423^4 < 0.0138, those of the second with 0.3423^32 < 1.4e-15: under 2e-17 per draw that none
# of the 36 is accepted.
_FIRST_ROUND = 4
_SECOND_ROUND = 32
_FIRST_ROUND_MISS = 0.0138
# Up to this many draws a second round costs more in calls than it saves in proposals.
_SINGLE_ROUND_COUNT = 128


def sample_angle(concentration: Tensor, m: int) -> Tensor:
    """Draw the polar angle for a vector of concentrations, shape ``(N,)``, by rejection.

    All shapes are fixed, so nothing waits for the device and a captured graph stays valid. A first
    round of few proposals settles most draws. Those it misses are gathered into a buffer of fixed
    size, which gets many more proposals, and put back. What both rounds miss, and what finds no
    place in the buffer, comes out as NaN.
    """
    count = len(concentration)
    if count <= _SINGLE_ROUND_COUNT:
        return _first_accepted(concentration, _FIRST_ROUND + _SECOND_ROUND, m)
    angle = _first_accepted(concentration, _FIRST_ROUND, m)
    # The number of misses is at most binomial with mean mu = 0.0138 N; Bernstein's inequality at
    # mu + x, x = 10 sqrt(mu) + 30, bounds the chance of an overflow by
    # exp(-x^2 / (2 mu + 2 x / 3)) <= exp(-45) < 1e-19, at every mu.
    expected = _FIRST_ROUND_MISS * count
    buffer_size = min(count, math.ceil(expected + 10.0 * math.sqrt(expected) + 30.0))
    missed = angle.isnan()
    rank = missed.cumsum(0)  # the i-th missed draw has rank i, from 1
    places = torch.arange(1, buffer_size + 1, device=angle.device)
    source = torch.searchsorted(rank, places).clamp(max=count - 1)
    refill = _first_accepted(concentration[source], _SECOND_ROUND, m)
    place = (rank - 1).clamp(0, max(buffer_size - 1, 0))
    return torch.where(missed & (rank <= buffer_size), refill[place], angle)


def _first_accepted(concentration: Tensor, num_proposals: int, m: int) -> Tensor:
    """Return one accepted of ``num_proposals`` angles for each concentration, NaN if none is.

    Wood's proposal (1994, algorithm VM*) is the image of a uniform point of polar angle theta_0
    under tan(theta/2) = sqrt(b) tan(theta_0/2), a boost of the sphere. In terms of its rapidity,
    2h = asinh(2k/(m-1)), b = e^(-2h), and Wood's x_0 is tanh(h): both without the cancellation
    that made him approximate b. With xi = x_0 cos(theta_0) his test
    k w + (m-1) log(1 - x_0 w) - c >= log U reads (m-1) (xi/(1+xi) - log(1+xi)) >= log U.
    """
    h = 0.5 * torch.asinh(concentration.unsqueeze(-1) * (2.0 / (m - 1)))
    uniform, turn, level = torch.rand(
        (3, len(concentration), num_proposals), dtype=h.dtype, device=h.device
    ).unbind(0)

    # A uniform point, projected on a plane through the pole, has squared radius 1 - U^(2/(m-2))
    # and a uniform direction psi; its height is cos(theta_0) = radius cos(psi) (Ulrich 1984). The
    # distances 1 -+ cos(theta_0) are sums of positive terms: small angles keep their digits.
    log_outside = uniform.log() * (2.0 / (m - 2)) if m > 2 else torch.full_like(uniform, -math.inf)
    radius = (-torch.expm1(log_outside)).sqrt()
    gap = log_outside.exp() / (1.0 + radius)
    half_psi = math.pi * turn
    near = gap + 2.0 * radius * half_psi.sin().square()
    far = gap + 2.0 * radius * half_psi.cos().square()

    xi = torch.tanh(h) * (1.0 - near)
    log_acceptance = (m - 1) * (xi / (1.0 + xi) - torch.log1p(xi))
    # Any accepted proposal will do as long as its value has no say in the choice.
    found, chosen = (level < log_acceptance.exp()).max(-1, keepdim=True)
    half_tangent = ((near / far).gather(-1, chosen).sqrt() * torch.exp(-h)).squeeze(-1)
    return torch.where(found.squeeze(-1), 2.0 * half_tangent.atan(), math.nan)


def tangent(loc: Tensor, directions: Tensor) -> Tensor:
    """Carry unit vectors of R^(m-1) into the tangent space at ``loc``, isometrically.

    With e the first axis and s the sign of mu's first coordinate, the Householder reflection along
    u = mu + s e takes e to -s mu, hence the axes orthogonal to e to the tangent space at mu. u is
    never shorter than sqrt(2), so all is defined and well conditioned at every mu, the poles +-e
    included. Where s flips the map jumps, but each side yields the same law of samples, and each
    is smooth across the flip: gradients of expectations stay unbiased.
    """
    m = loc.shape[-1]
    sign = torch.where(loc.detach()[..., :1] >= 0, 1.0, -1.0).to(loc.dtype)
    u = loc + pad(sign, (0, m - 1))
    y = pad(directions, (1, 0))
    scale = 2.0 * (u * y).sum(-1, keepdim=True) / u.square().sum(-1, keepdim=True)
    return y - scale * u
