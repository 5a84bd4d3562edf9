"""Exact values for the sphere's distributions, in arbitrary precision and apart from our code."""

import functools
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch


class ExactCosine(NamedTuple):
    log_partition: mpmath.mpf
    mean: mpmath.mpf
    variance: mpmath.mpf
    log_area: mpmath.mpf
    log_normalizing_constant: mpmath.mpf
    entropy: mpmath.mpf
    kl_to_uniform: mpmath.mpf


@functools.cache
def exact_cosine(m: int, concentration: float) -> ExactCosine:
    with mpmath.workdps(60):
        k, order = mpmath.mpf(concentration), mpmath.mpf(m) / 2 - 1
        bessel = mpmath.besseli(order, k)
        mean = mpmath.besseli(order + 1, k) / bessel
        log_area = mpmath.log(2) + (order + 1) * mpmath.log(mpmath.pi) - mpmath.loggamma(order + 1)
        log_constant = (
            order * mpmath.log(k) - (order + 1) * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        )
        kl = k * mean + log_constant + log_area
        return ExactCosine(
            log_partition=-log_constant - log_area,
            mean=mean,
            variance=1 - mean**2 - (m - 1) * mean / k,
            log_area=log_area,
            log_normalizing_constant=log_constant,
            entropy=log_area - kl,
            kl_to_uniform=kl,
        )


def relative_error(value: torch.Tensor | float, exact: mpmath.mpf) -> float:
    with mpmath.workdps(60):
        return float(abs((mpmath.mpf(float(value)) - exact) / exact))


class AngleCdf(NamedTuple):
    """Distribution function of the polar angle, integrated numerically on a fine grid."""

    angles: np.ndarray
    values: np.ndarray

    def __call__(self, angle: np.ndarray) -> np.ndarray:
        return np.interp(angle, self.angles, self.values)

    def quantile(self, probability: float) -> float:
        return float(np.interp(probability, self.values, self.angles))


@functools.cache
def angle_cdf(m: int, concentration: float) -> AngleCdf:
    k = concentration
    mode = np.arctan2(np.sqrt((m - 2) * 2), np.sqrt((m - 2) + 2 * k) if k else 0.0)
    coarse = np.linspace(0.0, np.pi, 200_001)[1:-1]
    log_density = (m - 2) * np.log(np.sin(coarse)) + k * (np.cos(coarse) - np.cos(mode))
    inside = coarse[log_density > log_density.max() - 60.0]
    angles = np.linspace(max(inside[0] - 1e-4, 0.0), min(inside[-1] + 1e-4, np.pi), 400_001)
    with np.errstate(divide="ignore"):
        log_sine = np.log(np.clip(np.sin(angles), 0.0, None)) if m > 2 else np.zeros_like(angles)
    log_density = (m - 2) * log_sine - 2.0 * k * np.sin(angles / 2) ** 2
    density = np.exp(log_density - log_density.max())
    steps = (density[1:] + density[:-1]) / 2
    values = np.concatenate([[0.0], np.cumsum(steps)])
    return AngleCdf(angles, values / values[-1])


@pytest.fixture(scope="session")
def exact():
    return exact_cosine


@pytest.fixture(scope="session")
def error():
    return relative_error


@pytest.fixture(scope="session")
def cdf():
    return angle_cdf
