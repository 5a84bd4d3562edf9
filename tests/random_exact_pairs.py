"""Random pairs of six kinds whose log p(x) is known exactly, with guides that are good or poor."""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

F64 = torch.float64


class Problem(NamedTuple):
    """A pair, its data ``(N, ...)``, and their log p(x), ``(N,)``."""

    model: object
    guide: object
    x: Tensor
    log_prob: Tensor


def _pair(prior, likelihood, proposal):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", proposal(x))

    return model, guide


def _moments_on_a_grid(prior, likelihood, x, low=-60.0, high=60.0, count=240_001):
    """Return log p(x), and the posterior's mean and deviation, of one real latent."""
    grid = torch.linspace(low, high, count, dtype=F64)
    joint = prior().log_prob(grid) + likelihood(grid[:, None]).log_prob(x).sum(-1)
    total = joint.logsumexp(0)
    weight = (joint - total).exp()
    mean = (weight * grid).sum()
    deviation = (weight * (grid - mean).square()).sum().sqrt()
    return total + math.log((high - low) / (count - 1)), mean, deviation


def _one_real_latent(prior, likelihood, x, scale, shift):
    """Make a problem of one latent and several pixels; the guide is a normal near the posterior."""

    def observed(z):
        return likelihood(z[..., None]).expand((*z.shape, x.shape[1])).to_event(1)

    rows = [_moments_on_a_grid(prior, likelihood, row) for row in x]
    exact, mean, deviation = (torch.stack(column) for column in zip(*rows, strict=True))
    table = {row.sum().item(): (m, s) for row, m, s in zip(x, mean, deviation, strict=True)}

    def proposal(x):
        found = [table[row.sum().item()] for row in x]
        means, deviations = (torch.stack(column) for column in zip(*found, strict=True))
        return dist.Normal(means + shift * deviations, scale * deviations)

    return Problem(*_pair(prior, observed, proposal), x, exact)


def factor_analysis(number, rand, scale, shift):
    """A linear Gaussian model; the guide has no correlations."""
    latents, pixels = 1 + int(8 * rand()), 4 + int(12 * rand())
    W = torch.randn(pixels, latents, dtype=F64)
    noise = 0.2 + torch.rand(pixels, dtype=F64)
    whole = dist.MultivariateNormal(torch.zeros(pixels, dtype=F64), W @ W.T + noise.square().diag())
    precision = torch.eye(latents, dtype=F64) + W.T @ (W / noise.square()[:, None])
    deviation = precision.diagonal().rsqrt()

    def proposal(x):
        mean = (x / noise.square()) @ W @ torch.linalg.inv(precision)
        return dist.Normal(mean + shift * deviation, scale * deviation).to_event(1)

    zeros = torch.zeros(latents, dtype=F64)
    model, guide = _pair(
        lambda: dist.Normal(zeros, 1.0).to_event(1),
        lambda z: dist.Normal(z @ W.T, noise).to_event(1),
        proposal,
    )
    x = whole.sample((number,))
    return Problem(model, guide, x, whole.log_prob(x))


def hierarchy(number, rand, scale, shift):
    """A latent scale above a latent vector of pixels' means, whose integral is known given it."""
    pixels, noise = 2 + int(4 * rand()), 0.3 + rand()

    def model(x):
        with pyro.plate("data", len(x)):
            log_scale = pyro.sample("log_scale", dist.Normal(torch.zeros((), dtype=F64), 0.7))
            means = dist.Normal(torch.zeros(pixels, dtype=F64), log_scale.exp()[..., None])
            z = pyro.sample("z", means.to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            about = (x.square().mean(1) / 2 + 0.3).log() / 2
            log_scale = pyro.sample("log_scale", dist.Normal(about + 0.3 * shift, 0.5 * scale))
            ratio = (2 * log_scale).exp() / ((2 * log_scale).exp() + noise**2)
            own = dist.Normal(ratio[..., None] * x, scale * noise * ratio.sqrt()[..., None])
            pyro.sample("z", own.to_event(1))

    log_scale = 0.7 * torch.randn(number, 1, dtype=F64)
    x = log_scale.exp() * torch.randn(number, pixels, dtype=F64)
    x = x + noise * torch.randn(number, pixels, dtype=F64)
    grid = torch.linspace(-7, 7, 20_001, dtype=F64)
    spread = ((2 * grid).exp() + noise**2).sqrt()
    joint = dist.Normal(0.0, spread[:, None]).log_prob(x[:, None]).sum(-1)
    joint = joint + dist.Normal(torch.zeros((), dtype=F64), 0.7).log_prob(grid)
    return Problem(model, guide, x, joint.logsumexp(1) + math.log(14 / 20_000))


def mixture_prior(number, rand, scale, shift):
    """A prior of three normals in a plane; the guide is the likelihood's normal."""
    means = 3 * torch.randn(3, 2, dtype=F64)
    components = dist.MultivariateNormal(means, 0.3 * torch.eye(2, dtype=F64).expand(3, 2, 2))
    logits = torch.randn(3, dtype=F64).log_softmax(0)
    W, noise = torch.randn(3, 2, dtype=F64), 0.5 + rand()
    own = noise**2 * torch.linalg.inv(W.T @ W + 0.1 * torch.eye(2, dtype=F64))

    def prior():
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)

    def proposal(x):
        return dist.MultivariateNormal(x @ W @ own / noise**2 + 0.3 * shift, scale**2 * own)

    model, guide = _pair(prior, lambda z: dist.Normal(z @ W.T, noise).to_event(1), proposal)
    x = dist.Normal(prior().sample((number,)) @ W.T, noise).sample()
    covariance = W @ W.T * 0.3 + noise**2 * torch.eye(3, dtype=F64)
    parts = [dist.MultivariateNormal(W @ mean, covariance).log_prob(x) for mean in means]
    return Problem(model, guide, x, (torch.stack(parts, 1) + logits).logsumexp(1))


def heavy_tails(number, rand, scale, shift):
    """A Student prior whose few pixels sometimes contradict it."""
    degrees, noise = 2 + 3 * rand(), 0.5 + 2 * rand()

    def prior():
        return dist.StudentT(degrees, torch.zeros((), dtype=F64), 1.0)

    def likelihood(z):
        return dist.Normal(z, noise)

    x = prior().sample((number, 1)).clamp(-30, 30) + noise * torch.randn(number, 2, dtype=F64)
    return _one_real_latent(prior, likelihood, x, scale, shift)


def two_modes(number, rand, scale, shift):
    """The square of a latent is seen, sometimes with its sign; the guide sits on one mode."""
    noise, tilt = 0.3 + 0.7 * rand(), 0.2 * rand()
    x = (torch.randn(number, 1, dtype=F64).abs() + 1).square() + noise * torch.randn(
        number, 1, dtype=F64
    )

    def prior():
        return dist.Normal(torch.zeros((), dtype=F64), 1.0)

    def likelihood(z):
        return dist.Normal(z.square() + tilt * z, noise)

    problem = _one_real_latent(prior, likelihood, x, scale, shift)

    def proposal(x):
        at = x[:, 0].clamp(min=0.25).sqrt()
        return dist.Normal(at, scale * 0.6 * noise / at)

    _, guide = _pair(prior, likelihood, proposal)
    return problem._replace(guide=guide)


def beta(number, rand, scale, shift):
    """A Beta latent behind bits that share it."""
    a, b = (torch.tensor(0.7 + 3 * rand(), dtype=F64) for _ in range(2))
    pixels = 3 + int(20 * rand())
    x = (torch.rand(number, pixels, dtype=F64) < dist.Beta(a, b).sample((number, 1))).to(F64)

    def log_beta(a, b):
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    ones = x.sum(1)
    model, guide = _pair(
        lambda: dist.Beta(a, b),
        lambda z: dist.Bernoulli(z[..., None].expand(*z.shape, pixels)).to_event(1),
        lambda x: dist.Beta(
            (a + x.sum(1)) / scale**2 + max(shift, 0.0), (b + pixels - x.sum(1)) / scale**2
        ),
    )
    return Problem(model, guide, x, log_beta(a + ones, b + pixels - ones) - log_beta(a, b))


KINDS = [factor_analysis, hierarchy, mixture_prior, heavy_tails, two_modes, beta]


def make(seed, number=10):
    """Make the problem of a seed: kinds by turns, guides from far too narrow to a little too wide."""
    torch.manual_seed(seed)

    def rand():
        return torch.rand(()).item()

    scale, shift = 0.3 + 1.1 * rand(), 1.2 * (rand() - 0.5)
    return KINDS[seed % len(KINDS)](number, rand, scale, shift)
