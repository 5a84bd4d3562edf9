"""Cumulants of the cosine under a von Mises-Fisher law, and how its quantiles move.

With x von Mises-Fisher on S^(m-1) around mu at concentration k, the cosine w = mu.x = cos(theta)
has density proportional to (1 - w^2)^((m-3)/2) e^(k w), and theta in [0, pi] has density
proportional to h(theta) = sin(theta)^(m-2) e^(k cos theta). The moment generating function of w
under the *uniform* law on the sphere,

    M(k) = 0F1(; m/2; k^2/4) = Gamma(m/2) (2/k)^(m/2-1) I_(m/2-1)(k),

carries everything: log M is the log normaliser up to the sphere's area, its derivative
A = I_(m/2)(k) / I_(m/2-1)(k) is E[w], its second derivative is Var[w]. All is float64, because
entropies and divergences are differences: at k = 10^5 a float32 k A has an error of 4e-3.
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial.polynomial import polyadd, polyder, polymul
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# From order 20 on, eight terms of the asymptotic series leave a relative error under 5e-13 for every
# k >= 0 in log M, A and Var[w] (checked against 60-digit arithmetic), near what rounding leaves.
_SMALLEST_ORDER = 20.0
_NUM_TERMS = 8

# The quadrature stops where slope and curvature at the quantile predict a fall by e^-60 (past the
# equator the density can fall more slowly). With 24 Gauss-Legendre nodes the relative error is under
# 1e-10 for m = 2 to 1024, k = 1e-3 to 1e5 and ranks from 1e-6 to 1 - 1e-6 (against 30 digits).
_LOG_DENSITY_FALL = 60.0
_NUM_NODES = 24

_Polynomial = Any  # coefficients as an array, constant first; exact fractions unless it is said


class CosineCumulants(NamedTuple):
    """Functions of the concentration k, float64, of its shape and without a gradient."""

    log_partition: Tensor  # log M(k) = log E[e^(k w)] under the uniform law, nats
    mean: Tensor  # E[w] = A(k), its first derivative
    variance: Tensor  # Var[w] = A'(k), its second derivative


def cosine_cumulants(concentration: Tensor, m: int) -> CosineCumulants:
    """Log partition function of the cosine and its first two derivatives.

    Write M_a for 0F1(; a+1; k^2/4), so that M = M_nu with nu = m/2 - 1 and A = (k/m) M_(nu+1)/M_nu.
    At a large order N the uniform expansion of I_N (Olver 1974, DLMF 10.41.3) gives M_N and
    s = M_(N+1)/M_N. From there M_a = M_(a+1) + y M_(a+2) / (4(a+1)(a+2)), y = k^2 (DLMF 10.29.1),
    taken downwards, makes M_nu and M_(nu+1) combinations of M_N and M_(N+1) whose coefficients are
    polynomials in y without a negative coefficient: nothing cancels, at any k. Its powers overflow
    from about 1e13 on.
    """
    order = 0.5 * m - 1.0
    large_order = order + max(0, math.ceil(_SMALLEST_ORDER - order))
    k = concentration.detach().double()
    table = _constants(k.device, _polynomial_table, m)
    num_powers = math.ceil(large_order - order) // 2 + 2

    # Uniform expansion: z = k/N, t = 1/sqrt(1 + z^2), p = 1/t - 1 (without cancellation).
    z = k / large_order
    root = torch.hypot(torch.ones_like(z), z)
    p = z * z / (1.0 + root)
    t = 1.0 / root
    remainder, ratio_part, slope_part = (_powers(t, table.shape[1]) @ table[:3].T).unbind(-1)
    log_m = large_order * (p - torch.log1p(0.5 * p)) - 0.5 * torch.log1p(p) - p * t * remainder
    s = (2.0 + 2.0 / large_order) * t / (1.0 + t) * ratio_part
    log_s_slope = (1.0 + t) * slope_part / ratio_part - 2.0  # d log s / d log k

    # Down to the order asked for: M_nu / M_N - 1 and M_(nu+1) / M_N, and their slopes in log k.
    shifted = _powers(k * k, num_powers) @ table[3:, :num_powers].T
    q = shifted[..., 4:] * s.unsqueeze(-1)
    derivative = 2.0 * (shifted[..., 2:4] + q[..., 2:]) + q[..., :2] * log_s_slope.unsqueeze(-1)
    excess, upper = (shifted[..., :2] + q[..., :2]).unbind(-1)
    lower_slope, upper_slope = derivative.unbind(-1)
    lower = 1.0 + excess
    ratio = upper / (m * lower)
    return CosineCumulants(
        log_partition=log_m + torch.log1p(excess),
        mean=k * ratio,
        variance=ratio * (1.0 + upper_slope / upper - lower_slope / lower),
    )


@functools.lru_cache(maxsize=64)
def _constants(device: torch.device, table: Callable[..., Any], *arguments: int) -> Tensor:
    """Return a table's numbers on a device, moved there once: each move waits for the device."""
    with _disable_current_modes():  # a tensor of a recording would be of use to it alone
        return torch.tensor(table(*arguments), dtype=torch.float64, device=device)


def _powers(x: Tensor, count: int) -> Tensor:
    """1, x, ..., x^(count-1) along a new last dimension."""
    return torch.linalg.vander(x.unsqueeze(-1), N=count).squeeze(-2)


@functools.lru_cache(maxsize=64)
def _polynomial_table(m: int) -> list[list[float]]:
    """Coefficients for `cosine_cumulants`, one polynomial a row, padded with zeros.

    Rows 0 to 2 are in t. With D the log of the asymptotic series at order N and F = 1/2 + t D',
    log M_N = N (p - log(1 + p/2)) - log(1 + p)/2 + D(t) - D(1), whose first and second derivative
    in log k are, up to the factors written in `cosine_cumulants`,

        (D(t) - D(1))/(t - 1),    1 - t (1 + t) F/N,    1 + (t^2 (1 - t^2) F' - 2 t^3 F)/N.

    Rows 3 to 10 are in y: with M_nu = P M_N + Q M_(N+1) and the same for nu+1, the two P (less 1
    in the first), their y d/dy, the two Q, their y d/dy.
    """
    order = 0.5 * m - 1.0
    steps = max(0, math.ceil(_SMALLEST_ORDER - order))
    large_order = Fraction(m - 2 + 2 * steps, 2)
    slope = _fractions(0)
    for power, polynomial in enumerate(_log_debye_slopes(_NUM_TERMS), start=1):
        slope = polyadd(slope, polynomial / large_order**power)
    series = [coefficient / (degree + 1) for degree, coefficient in enumerate(slope)]
    # (t^i - 1)/(t - 1) = 1 + t + ... + t^(i-1): a sum of the coefficients from the top.
    remainder = list(accumulate(reversed(series)))[::-1]
    f = [Fraction(1, 2), *slope]
    ratio_part = polymul(_fractions(0, -1, -1), f)
    flat = polymul(_fractions(0, 0, 0, -2), f)
    slope_part = polyadd(polymul(_fractions(0, 0, 1, 0, -1), polyder(f)), flat)
    in_t = [remainder, *(polyadd([1], row / large_order) for row in (ratio_part, slope_part))]

    p_lower, q_lower = _shift_order([1.0], [0.0], order, steps)
    p_upper, q_upper = _shift_order([0.0], [1.0], order, steps)
    in_y = [[0.0, *p_lower[1:]], p_upper]
    in_y += [np.arange(len(row)) * row for row in (p_lower, p_upper)]
    in_y += [q_lower, q_upper, *(np.arange(len(row)) * row for row in (q_lower, q_upper))]
    rows = [[float(c) for c in row] for row in (*in_t, *in_y)]
    length = max(len(row) for row in rows)
    return [row + [0.0] * (length - len(row)) for row in rows]


def _shift_order(p: list[float], q: list[float], order: float, steps: int) -> tuple[Any, Any]:
    """Rewrite p M_a + q M_(a+1) at a = order as the same form at a = order + steps, in floats."""
    lower, upper = np.array(p), np.array(q)
    for a in (order + step for step in range(steps)):
        shifted = lower / (4.0 * (a + 1.0) * (a + 2.0))
        lower, upper = polyadd(lower, upper), np.concatenate([[0.0], shifted])
    return lower, upper


@functools.cache
def _log_debye_slopes(count: int) -> list[_Polynomial]:
    """Polynomials W_1, ..., W_count in t: d/dt log(sum_j U_j(t)/N^j) = sum_j W_j(t)/N^j.

    With D the log of that sum and r = t^2 (1 - t^2)/2, DLMF 10.41.9 reads
    N D' = (r D')' + r D'^2 + (1 - 5 t^2)/8; the powers of 1/N give W_1 and the recurrence.
    """
    r = _fractions(0, 0, 1, 0, -1) / 2
    slopes: list[_Polynomial] = [_fractions(1, 0, -5) / 8]
    while len(slopes) < count:
        total = polyder(polymul(r, slopes[-1]))
        for left, right in zip(slopes[:-1], reversed(slopes[:-1]), strict=True):
            total = polyadd(total, polymul(r, polymul(left, right)))
        slopes.append(total)
    return slopes


def _fractions(*coefficients: int) -> _Polynomial:
    return np.array([Fraction(c) for c in coefficients])


def angle_derivative(angle: Tensor, concentration: Tensor, mean_cosine: Tensor, m: int) -> Tensor:
    """Derivative of a quantile theta of the polar angle in the concentration k.

    A draw that keeps its rank, H(theta; k) = const, moves by implicit differentiation of the
    distribution function H (Figurnov, Mohamed & Mnih 2018, section 3) as

        d theta/d k = -(dH/dk)/H' = -int_0^theta (cos phi - A) h(phi)/h(theta) d phi,

    equal to -int_theta^pi (A - cos phi) h(phi)/h(theta) d phi, which is used where cos theta <= A:
    the integrand keeps one sign and nothing cancels. Gauss-Legendre in phi, in which it is analytic
    at every m, where h is not negligible against h(theta). All in one shape; the result is float64.
    """
    # At the poles themselves the density ratio is 0/0; the derivative vanishes like sin(theta).
    theta = angle.double().clamp(1e-12, math.pi - 1e-12)
    k = concentration.double()
    sine, cosine = theta.sin(), theta.cos()
    towards_pole = cosine > mean_cosine
    outward = torch.where(towards_pole, -1.0, 1.0)  # away from the mean, into the tail

    # How far d into the tail log h falls by T, from h's slope and curvature at theta:
    # steepness d + curvature d^2 / 2 = T, solved in the form that divides by a positive number.
    steepness = outward * (k * sine - (m - 2) * cosine / sine)
    curvature = ((m - 2) / sine.square() + k * cosine).clamp(min=0.0)
    discriminant = steepness.square() + 2.0 * _LOG_DENSITY_FALL * curvature
    reach = 2.0 * _LOG_DENSITY_FALL / (steepness + discriminant.sqrt())
    reach = outward * torch.minimum(reach, torch.where(towards_pole, theta, math.pi - theta))

    nodes, weights = _constants(theta.device, _quadrature_rule)
    step = reach.unsqueeze(-1) * nodes
    theta, k, sine = theta.unsqueeze(-1), k.unsqueeze(-1), sine.unsqueeze(-1)
    phi = theta + step
    # cos phi - cos theta, as a product because k times the difference of the cosines cancels.
    cosine_change = -2.0 * (theta + 0.5 * step).sin() * (0.5 * step).sin()
    log_ratio = (m - 2) * (phi.sin() / sine).log() + k * cosine_change
    return reach * ((phi.cos() - mean_cosine.unsqueeze(-1)) * log_ratio.exp() @ weights)


@functools.cache
def _quadrature_rule() -> list[list[float]]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_NUM_NODES)
    return [(0.5 * (nodes + 1.0)).tolist(), (0.5 * weights).tolist()]
