"""Pairs of several makes, for the tests of saving them; run as a script it loads and weighs them."""

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn

import pyro_vae as pv

PIXELS = 4
constraints = dist.constraints


def make_x():
    return torch.randn(6, PIXELS, generator=torch.Generator().manual_seed(5))


def functions():
    """Plain functions: two nets of one shape, a buffer, and parameters under constraints."""
    nets = [nn.Sequential(nn.Linear(PIXELS, 2), nn.BatchNorm1d(2)), nn.Linear(2, PIXELS)]
    encode, decode = nets
    other = nn.Linear(2, PIXELS)

    def model(x):
        pyro.module("decode", decode)
        pyro.module("other", other)
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        tilt = pyro.param("tilt", torch.tensor(0.3), constraint=constraints.interval(-1.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = decode(z) + tilt * other(z).tanh()
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    several = constraints.independent(constraints.greater_than(0.1), 1)

    def guide(x):
        pyro.module("encode", encode)
        spread = pyro.param("spread", torch.full((2,), 0.5), constraint=several)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encode(x), spread).to_event(1))

    return model, guide


class Line(PyroModule):
    """A PyroModule with a parameter under a constraint."""

    def __init__(self):
        super().__init__()
        self.decode = PyroModule[nn.Linear](2, PIXELS)
        self.encode = PyroModule[nn.Linear](PIXELS, 2)
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.greater_than(0.1))

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), self.scale).to_event(1), obs=x)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 0.5).to_event(1))


def pyro_module():
    line = Line()
    return line.model, line


class Shifted(pv.priors.Prior):
    """A prior of the user's own that could not be built from its attributes."""

    def __init__(self, start):
        super().__init__()
        self.loc = nn.Parameter(torch.full((2,), float(start)))
        self.latent_dim = 2

    def forward(self):
        return dist.Normal(self.loc, 1.0).to_event(1)


def own_vae():
    encoder, decoder = pv.networks.MLPEncoder((PIXELS,), (8,)), pv.networks.MLPDecoder(2, (8,))
    family = pv.guides.MeanFieldNormal(encoder, 2)
    vae = pv.VAE(Shifted(0.5), pv.likelihoods.Gaussian(decoder, (PIXELS,)), family)
    return vae.model, vae.guide


def auto_guide():
    """A guide that makes its parameters at its first call, one for each data point."""
    model, _ = functions()
    return model, AutoNormal(pyro.poutine.block(model, hide=["x"]))


PAIRS = {"functions": functions, "pyro_module": pyro_module, "own_vae": own_vae}


def weigh(model, guide):
    estimate = pv.log_marginal(model, guide, make_x(), num_samples=20, seed=0)
    return estimate.log_prob


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, make in PAIRS.items():
        folder = Path(sys.argv[1]) / name
        pyro.clear_param_store()
        torch.manual_seed(77)
        pair = make()
        pv.load_pair(folder, *pair)
        torch.save(weigh(*pair), folder / "weighed.pt")
