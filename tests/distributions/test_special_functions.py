"""Cumulants of the cosine and the moving quantile against arbitrary precision."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, optimize

from pyro_vae.distributions.special_functions import angle_derivative, cosine_cumulants

DIMENSIONS = [2, 3, 4, 5, 8, 11, 21, 41, 101, 257, 513, 1024]
CONCENTRATIONS = [1e-6, 1e-3, 0.1, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 200.0, 1e3, 1e4, 1e5]


@pytest.mark.parametrize("m", DIMENSIONS)
def test_cumulants_match_arbitrary_precision(m, exact, error):
    k = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    cumulants = cosine_cumulants(k, m)
    for index, concentration in enumerate(CONCENTRATIONS):
        reference = exact(m, concentration)
        assert error(cumulants.log_partition[index], reference.log_partition) < 1e-12
        assert error(cumulants.mean[index], reference.mean) < 1e-12
        # The variance loses a factor of k in rounding: 1e-9 at k = 1e5.
        assert error(cumulants.variance[index], reference.variance) < 1e-11 + 3e-14 * concentration


@pytest.mark.parametrize("m", [2, 11, 1024])
def test_cumulants_are_those_of_the_uniform_law_at_zero(m):
    log_partition, mean, variance = cosine_cumulants(torch.zeros(()), m)
    assert log_partition == 0.0
    assert mean == 0.0
    assert abs(variance.item() * m - 1.0) < 1e-12


@pytest.mark.parametrize("m", [2, 3, 101])
def test_cumulants_follow_their_limits_far_beyond_the_grid(m):
    k = torch.tensor([1e7, 1e8], dtype=torch.float64)
    _, mean, variance = cosine_cumulants(k, m)
    # 1 - A -> (m-1)/(2k) up to a relative m/(4k); rounding adds about 1e-16 k to both.
    torch.testing.assert_close(2 * k * (1 - mean), torch.full_like(k, m - 1), rtol=1e-5, atol=0)
    torch.testing.assert_close(2 * k * k * variance, torch.full_like(k, m - 1), rtol=1e-5, atol=0)
    for value in cosine_cumulants(torch.tensor(1e13, dtype=torch.float64), m):
        assert torch.isfinite(value)


def test_cumulants_keep_any_shape():
    k = torch.rand(2, 3, 4) * 30.0
    whole = cosine_cumulants(k, 7)
    for value in whole:
        assert value.shape == k.shape
        assert value.dtype == torch.float64
    alone = cosine_cumulants(k[1, 2, 3], 7)
    torch.testing.assert_close(whole.mean[1, 2, 3], alone.mean, rtol=1e-14, atol=0)


def exact_angle_derivative(angle, concentration, mean, m):
    """The integral itself by adaptive quadrature, split where the integrand has its scale."""
    with mpmath.workdps(25):
        theta, k = mpmath.mpf(angle), mpmath.mpf(concentration)

        def integrand(phi):
            ratio = abs(mpmath.sin(phi) / mpmath.sin(theta)) ** (m - 2)
            exponent = k * (mpmath.cos(phi) - mpmath.cos(theta))
            return (mpmath.cos(phi) - mean) * ratio * mpmath.exp(exponent)

        sine, cosine = mpmath.sin(theta), mpmath.cos(theta)
        slope = abs((m - 2) * cosine / sine - k * sine)
        scale = 1 / (slope + mpmath.sqrt(max((m - 2) / sine**2 + k * cosine, 1)))
        below = cosine > mean
        steps = [0, 1, 3, 8, 20, 50, 120]
        points = [theta - scale * s if below else theta + scale * s for s in steps]
        points = [p for p in points if 0 < p < mpmath.pi]
        points.append(mpmath.mpf(0) if below else mpmath.pi)
        # Along the path outwards from theta: minus the integral from 0, or that up to pi.
        return mpmath.quad(integrand, points)


@pytest.mark.parametrize(
    "m", [2, 11, *(pytest.param(m, marks=pytest.mark.slow) for m in (3, 4, 101, 1024))]
)
def test_angle_derivative_matches_adaptive_quadrature(m, exact, error, cdf):
    for concentration in [1e-3, 1.0, 30.0, 1e3, 1e5]:
        mean = exact(m, concentration).mean
        for probability in [1e-6, 0.3, 1 - 1e-6]:
            angle = cdf(m, concentration).quantile(probability)
            k = torch.tensor(concentration, dtype=torch.float64)
            mean_cosine = torch.tensor(float(mean), dtype=torch.float64)
            value = angle_derivative(torch.tensor(angle, dtype=torch.float64), k, mean_cosine, m)
            reference = exact_angle_derivative(angle, concentration, mean, m)
            assert error(value, reference) < 1e-8, (concentration, probability)


def moved_quantile(angle, concentration, shift, m):
    """Solve H(theta; k + shift) = H(angle; k) for theta, with H by adaptive quadrature."""

    def cdf(theta, k):
        def density(phi):
            return np.sin(phi) ** (m - 2) * np.exp(k * (np.cos(phi) - 1.0))

        options = {"epsabs": 0.0, "epsrel": 1e-11, "limit": 200}
        below = integrate.quad(density, 0.0, theta, **options)[0]
        return below / (below + integrate.quad(density, theta, np.pi, **options)[0])

    rank = cdf(angle, concentration)
    return optimize.brentq(
        lambda theta: cdf(theta, concentration + shift) - rank, 1e-6, math.pi - 1e-6, xtol=1e-14
    )


@pytest.mark.parametrize(
    ("m", "concentration", "angle"),
    [(2, 0.5, 1.0), (2, 3.0, 2.5), (3, 10.0, 0.3), (5, 2.0, 1.2), (11, 11.0, 0.8), (41, 50.0, 1.0)],
)
def test_angle_derivative_matches_a_moved_quantile(m, concentration, angle):
    h = 1e-3 * concentration
    forward, backward = (moved_quantile(angle, concentration, s, m) for s in (h, -h))
    k = torch.tensor(concentration, dtype=torch.float64)
    value = angle_derivative(
        torch.tensor(angle, dtype=torch.float64), k, cosine_cumulants(k, m).mean, m
    )
    # Central differences err by h^2 relative to the scale k: 1e-6, times a modest constant.
    assert value.item() == pytest.approx((forward - backward) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("m", [2, 3, 50])
@pytest.mark.parametrize("concentration", [0.0, 1e-3, 5.0, 1e5])
def test_angle_derivative_vanishes_at_the_poles(m, concentration):
    k = torch.full((3,), concentration)
    angle = torch.tensor([0.0, 1e-20, math.pi])  # float32 pi lies beyond pi
    value = angle_derivative(angle, k, cosine_cumulants(k, m).mean, m)
    assert (value.abs() < 1e-6).all()


def test_angle_derivative_at_zero_concentration_is_that_of_the_uniform_law():
    # dH/dk at k = 0 is -int_0^theta cos(phi) sin^(m-2)(phi) = -sin^(m-1)(theta)/(m-1), over h.
    m, angle = 6, torch.linspace(0.1, 3.0, 9, dtype=torch.float64)
    zero = torch.zeros_like(angle)
    value = angle_derivative(angle, zero, zero, m)
    torch.testing.assert_close(value, -angle.sin() / (m - 1), rtol=1e-10, atol=0)
