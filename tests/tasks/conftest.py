"""Probabilistic PCA with its exact posterior, and its exact conditionals."""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

F64 = torch.float64


class PCA(NamedTuple):
    """x = W z + b + noise: data, and a pair whose guide is the posterior, shifted and scaled."""

    W: Tensor
    b: Tensor
    variance: float
    x: Tensor
    model: object
    guide: object

    @property
    def covariance(self):
        return self.W @ self.W.T + self.variance * torch.eye(len(self.W), dtype=F64)

    def conditional(self, x, missing):
        """Mean and covariance of the missing values of one datum given the others."""
        S, hidden, seen = self.covariance, missing, ~missing
        gain = S[hidden][:, seen] @ torch.linalg.inv(S[seen][:, seen])
        mean = self.b[hidden] + gain @ (x[seen] - self.b[seen])
        return mean, S[hidden][:, hidden] - gain @ S[seen][:, hidden]

    def log_prob_observed(self, missing):
        """log p(x_obs) of every datum."""
        rows = []
        for x, hidden in zip(self.x, missing, strict=True):
            seen = ~hidden
            if not seen.any():
                rows.append(torch.zeros((), dtype=F64))
                continue
            marginal = dist.MultivariateNormal(self.b[seen], self.covariance[seen][:, seen])
            rows.append(marginal.log_prob(x[seen]))
        return torch.stack(rows)


def probabilistic_pca(
    num_data=3, num_pixels=8, num_latents=2, variance=0.4, shift=0.0, covariance_scale=1.0
):
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(num_pixels, num_latents, dtype=F64, generator=generator)
    b = torch.randn(num_pixels, dtype=F64, generator=generator)
    M = W.T @ W + variance * torch.eye(num_latents, dtype=F64)
    posterior = covariance_scale * variance * torch.linalg.inv(M)
    zeros = torch.zeros(num_latents, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + b, math.sqrt(variance)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = (x - b) @ W @ torch.linalg.inv(M) + shift
            pyro.sample("z", dist.MultivariateNormal(mean, posterior))

    z = torch.randn(num_data, num_latents, dtype=F64, generator=generator)
    noise = torch.randn(num_data, num_pixels, dtype=F64, generator=generator)
    x = z @ W.T + b + math.sqrt(variance) * noise
    return PCA(W, b, variance, x, model, guide)


def half_missing(x):
    """Hide half of the coordinates of each datum, others of each."""
    order = torch.rand(x.shape, generator=torch.Generator().manual_seed(6)).argsort(1)
    return order < x.shape[1] // 2


@pytest.fixture
def pca():
    """Builder of the exact model."""
    return probabilistic_pca


@pytest.fixture
def hide():
    """How half of the data is hidden."""
    return half_missing
