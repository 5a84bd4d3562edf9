"""Pairs whose log p(x) is known exactly, with guides that are good but not perfect."""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions import HypersphericalUniform, VonMisesFisher

F64 = torch.float64


class Exact(NamedTuple):
    """A pair, data, and their log p(x)."""

    model: object
    guide: object
    x: Tensor
    log_prob: Tensor


def pair(prior, likelihood, guide):
    """Make the two functions of a pair with one latent and one observed site."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def guide_function(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide(x))

    return model, guide_function


class LinearGaussian(NamedTuple):
    """x = W z + b + noise, with its posterior."""

    W: Tensor
    b: Tensor
    variance: float

    def likelihood(self, z):
        return dist.Normal(z @ self.W.T + self.b, math.sqrt(self.variance)).to_event(1)

    def posterior(self, x):
        precision = self.W.T @ self.W + self.variance * torch.eye(self.W.shape[1], dtype=F64)
        mean = (x - self.b) @ self.W @ torch.linalg.inv(precision)
        return mean, self.variance * torch.linalg.inv(precision)

    def marginal(self, mean, covariance):
        noise = self.variance * torch.eye(len(self.W), dtype=F64)
        return dist.MultivariateNormal(self.W @ mean + self.b, self.W @ covariance @ self.W.T + noise)


def linear_gaussian(num_pixels, num_latents, variance=0.3):
    generator = torch.Generator().manual_seed(num_pixels + 100 * num_latents)
    W = torch.randn(num_pixels, num_latents, dtype=F64, generator=generator)
    b = torch.randn(num_pixels, dtype=F64, generator=generator)
    return LinearGaussian(W, b, variance)


def probabilistic_pca(
    num_data=40, num_pixels=12, num_latents=6, covariance_scale=1.3, shift=0.1, prior=None
):
    """Exact model 1: the guide is the posterior, shifted and scaled."""
    linear = linear_gaussian(num_pixels, num_latents)
    zeros, eye = torch.zeros(num_latents, dtype=F64), torch.eye(num_latents, dtype=F64)
    marginal = linear.marginal(zeros, eye)

    def guide(x):
        mean, covariance = linear.posterior(x)
        return dist.MultivariateNormal(mean + shift, covariance_scale * covariance)

    x = marginal.sample((num_data,))
    model, guide = pair(lambda: dist.Normal(zeros, 1.0).to_event(1), linear.likelihood, guide)
    return Exact(model, guide, x, marginal.log_prob(x))


def gaussian(num_data=40, posterior_variance=0.5, proposal_variance=0.8):
    """Exact model 2: one latent; proposal N(0, t2) against the posterior N(0, v) of x = 0."""
    noise = posterior_variance / (1 - posterior_variance)  # 1 / v = 1 + 1 / noise
    zero = torch.zeros(1, dtype=F64)
    x = torch.zeros(num_data, 1, dtype=F64)
    model, guide = pair(
        lambda: dist.Normal(zero, 1.0).to_event(1),
        lambda z: dist.Normal(z, math.sqrt(noise)).to_event(1),
        lambda x: dist.Normal(torch.zeros_like(x), math.sqrt(proposal_variance)).to_event(1),
    )
    return Exact(model, guide, x, dist.Normal(zero, math.sqrt(1 + noise)).log_prob(x)[:, 0])


def beta_bernoulli(num_data=30, num_pixels=12):
    """Exact model 4: Beta prior, Bernoulli pixels that share one probability."""
    a, b = torch.tensor(1.5, dtype=F64), torch.tensor(2.5, dtype=F64)

    def log_beta(a, b):
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    p = dist.Beta(a, b).sample((num_data, 1))
    x = (torch.rand(num_data, num_pixels, dtype=F64) < p).to(F64)
    ones = x.sum(1)
    model, guide = pair(
        lambda: dist.Beta(a, b),
        lambda z: dist.Bernoulli(z[..., None].expand(*z.shape, num_pixels)).to_event(1),
        lambda x: dist.Beta(0.8 * (a + x.sum(1)), 0.7 * (b + num_pixels - x.sum(1))),
    )
    return Exact(model, guide, x, log_beta(a + ones, b + num_pixels - ones) - log_beta(a, b))


def log_normalizer(dimension, concentration):
    """Log of the von Mises-Fisher density's constant C_m(k)."""
    unit = torch.zeros(dimension, dtype=F64)
    unit[0] = 1.0
    flat = concentration.reshape(-1)
    value = VonMisesFisher(unit.expand(len(flat), -1), flat).log_prob(unit) - flat
    return value.reshape(concentration.shape)


def von_mises_fisher(num_data=30, dimension=5):
    """Exact model 5: von Mises-Fisher prior and likelihood."""
    mean = torch.nn.functional.normalize(torch.randn(dimension, dtype=F64), dim=0)
    k0, k = torch.tensor(3.0, dtype=F64), torch.tensor(6.0, dtype=F64)
    z = VonMisesFisher(mean, k0).sample((num_data,))
    x = VonMisesFisher(z, k.expand(num_data)).sample()
    together = k0 * mean + k * x

    def guide(x):
        total = k0 * mean + k * x
        length = total.norm(dim=-1)
        return VonMisesFisher(total / length[..., None], 0.7 * length)

    exact = (
        log_normalizer(dimension, k0)
        + log_normalizer(dimension, k)
        - log_normalizer(dimension, together.norm(dim=-1))
    )
    model, guide = pair(
        lambda: VonMisesFisher(mean, k0), lambda z: VonMisesFisher(z, k.expand(z.shape[:-1])), guide
    )
    return Exact(model, guide, x, exact)


def sphere(num_data=30, dimension=3, num_pixels=6):
    """Exact model 6: a latent on the sphere (uniform prior), seen through Gaussian pixels."""
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(num_pixels, dimension, dtype=F64, generator=generator)
    Q, radius, variance = torch.linalg.qr(random).Q, 1.5, 0.4
    z = HypersphericalUniform(dimension).sample((num_data,)).to(F64)
    x = radius * z @ Q.T + math.sqrt(variance) * torch.randn(num_data, num_pixels, dtype=F64)
    pull = radius * x @ Q / variance
    zero = torch.zeros((), dtype=F64)
    exact = (
        -0.5 * num_pixels * math.log(2 * math.pi * variance)
        - (x.square().sum(1) + radius**2) / (2 * variance)
        + log_normalizer(dimension, zero)
        - log_normalizer(dimension, pull.norm(dim=-1))
    )

    def guide(x):
        total = radius * x @ Q / variance
        length = total.norm(dim=-1)
        return VonMisesFisher(total / length[..., None], 0.7 * length)

    uniform = torch.zeros(dimension, dtype=F64)
    uniform[0] = 1.0
    model, guide = pair(
        lambda: VonMisesFisher(uniform, zero),
        lambda z: dist.Normal(radius * z @ Q.T, math.sqrt(variance)).to_event(1),
        guide,
    )
    return Exact(model, guide, x, exact)


def mixture_prior(num_data=30, num_latents=2, num_components=3):
    """Exact model 7: a mixture of full Gaussians as prior, seen through a linear Gaussian."""
    generator = torch.Generator().manual_seed(4)
    linear = linear_gaussian(6, num_latents)
    means = 2 * torch.randn(num_components, num_latents, dtype=F64, generator=generator)
    factors = torch.randn(num_components, num_latents, num_latents, dtype=F64, generator=generator)
    covariances = factors @ factors.mT + 0.3 * torch.eye(num_latents, dtype=F64)
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log()
    components = dist.MultivariateNormal(means, covariances)

    def prior():
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)

    marginals = [linear.marginal(m, c) for m, c in zip(means, covariances, strict=True)]
    x = linear.likelihood(prior().sample((num_data,))).sample()
    terms = torch.stack([marginal.log_prob(x) for marginal in marginals], 1) + logits

    def guide(x):
        # The likelihood alone, a little wider.
        covariance = linear.variance * torch.linalg.inv(linear.W.T @ linear.W)
        mean = (x - linear.b) @ linear.W @ covariance / linear.variance
        return dist.MultivariateNormal(mean, 1.5 * covariance)

    model, guide = pair(prior, linear.likelihood, guide)
    return Exact(model, guide, x, terms.logsumexp(1))


def small_decoder(num_data=10):
    """Exact model 8: a network decodes one latent; quadrature on a grid."""
    decoder = pv.networks.MLPDecoder(1, (8,), activation="tanh").to(F64)
    likelihood = pv.likelihoods.Bernoulli(decoder, (10,)).to(F64)
    for weight in likelihood.parameters():
        weight.data.mul_(3)
    prior = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
    with torch.no_grad():
        x = likelihood(prior.sample((num_data,))).sample()
        grid = torch.linspace(-9, 9, 20_001, dtype=F64)[:, None]
        joint = likelihood(grid).log_prob(x[:, None]) + prior.log_prob(grid)
        exact = joint.logsumexp(1) + math.log(18 / 20_000)
    model, guide = pair(
        lambda: prior,
        likelihood,
        lambda x: dist.Normal(x.new_zeros(len(x), 1), 1.2).to_event(1),
    )
    return Exact(model, guide, x, exact)


@pytest.fixture(scope="session")
def exact():
    """Builders of the exact models, by name."""
    return {
        "probabilistic_pca": probabilistic_pca,
        "gaussian": gaussian,
        "beta_bernoulli": beta_bernoulli,
        "von_mises_fisher": von_mises_fisher,
        "sphere": sphere,
        "mixture_prior": mixture_prior,
        "small_decoder": small_decoder,
    }
