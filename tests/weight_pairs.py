"""Pairs of every kind for the tests of the importance weight: (model, guide, inputs)."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv

N = 7


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


def hierarchical():
    inner, outer, encoder = nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", normal(torch.zeros(2)))
            low = pyro.sample("low", normal(inner(top)))
            pyro.sample("x", normal(outer(low), 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", normal(encoder(x), 0.4))
            pyro.sample("top", normal(low[..., :2], 0.7))

    return model, guide, (torch.randn(N, 5),)


def conditional():
    decoder, encoder = nn.Linear(2 + 3, 5), nn.Linear(5 + 3, 2)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(decoder(torch.cat([z, y], -1))), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(encoder(torch.cat([x, y], -1)), 0.5))

    return model, guide, (torch.randn(N, 5), torch.eye(3)[torch.arange(N) % 3])


def conditional_hierarchical_guide():
    """Concatenation inside the guide breaks under a particle plate and must be tiled."""
    decoder, first, second = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5 + 2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(torch.zeros(2)))
            b = pyro.sample("b", normal(a))
            pyro.sample("x", normal(decoder(torch.cat([a, b], -1))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(first(x)))
            pyro.sample("b", normal(second(torch.cat([x, a], -1))))

    return model, guide, (torch.randn(N, 5),)


def convolutional():
    decoder = pv.networks.ConvDecoder(2, (1, 6, 6), channels=(4, 3))
    encoder = pv.networks.ConvEncoder((1, 6, 6), channels=(3,), features=8)
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (1, 6, 6)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )
    return vae.model, vae.guide, (torch.rand(N, 1, 6, 6).round(),)


def raw_convolution():
    """A decoder that takes exactly four dimensions, and an encoder likewise."""
    decoder, encoder = nn.ConvTranspose2d(2, 1, 4), nn.Conv2d(1, 2, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            assert z.dim() == 2
            logits = decoder(z[:, :, None, None])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(encoder(x)[:, :, 0, 0]))

    return model, guide, (torch.rand(N, 1, 4, 4).round(),)


def several_plates():
    """A latent per pixel beside one per datum; the data's plate is not the innermost."""
    weight = torch.randn(4)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 4, dim=-1):
                noise = pyro.sample("noise", dist.Normal(z * weight, 1.0))
                pyro.sample("x", dist.Normal(noise, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 1.0))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("noise", dist.Normal(x, 0.5))

    return model, guide, (torch.randn(N, 4),)


def discrete():
    probabilities, means = torch.tensor([0.2, 0.5, 0.3]), torch.randn(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probabilities))
            pyro.sample("x", normal(means[k]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x @ means.T))

    return model, guide, (torch.randn(N, 2),)


def auxiliary():
    encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(decoder(z)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", normal(torch.zeros(2)), infer={"is_auxiliary": True})
            z = encoder(x) + 0.5 * noise
            density = z.new_full(z.shape[:-1], -2 * math.log(0.5))
            pyro.sample("z", dist.Delta(z, log_density=density, event_dim=1))

    return model, guide, (torch.randn(N, 5),)


def masked():
    decoder = nn.Linear(2, 5)

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).mask(seen).to_event(1), obs=x)
            with poutine.mask(mask=seen[:, 0]):
                pyro.sample("flag", dist.Bernoulli(0.3), obs=seen[:, 1].float())

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(torch.where(seen, x, 0.0)[:, :2]))

    return model, guide, (torch.randn(N, 5), torch.rand(N, 5) < 0.6)


def not_amortised():
    decoder = nn.Linear(2, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(decoder(z)), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.arange(14.0).reshape(N, 2) / 10)
        scale = pyro.param("scale", torch.ones(N, 2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(loc, scale))

    return model, guide, (torch.randn(N, 5),)


def with_deterministic():
    decoder = nn.Linear(2, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            mean = pyro.deterministic("mean", decoder(z), event_dim=1)
            pyro.sample("x", normal(mean), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x[:, :2]))

    return model, guide, (torch.randn(N, 5),)


PAIRS = [
    hierarchical,
    conditional,
    conditional_hierarchical_guide,
    convolutional,
    raw_convolution,
    several_plates,
    discrete,
    masked,
    not_amortised,
    with_deterministic,
]
