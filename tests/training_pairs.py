"""Pairs of plain functions, and data they can learn, for the tests of training."""

import pyro
import pyro.distributions as dist
import torch
from small_vae import PIXELS
from torch import nn


def make_data(number=40):
    """Two kinds of data, so that there is something to learn."""
    probability = torch.where(torch.arange(number)[:, None] % 2 == 0, 0.9, 0.1)
    return torch.bernoulli(probability.expand(number, PIXELS))


def make_data_fixed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make_data()


def two_level_pair(prefix):
    """A pair of plain functions with two latent sites; ``cat`` in the guide and in the model."""
    nets = nn.ModuleDict(
        {
            "lower": nn.Linear(PIXELS, 4),
            "upper": nn.Linear(2 + PIXELS, 4),
            "prior": nn.Linear(2, 2),
            "data": nn.Linear(4, PIXELS),
        }
    )

    def model(x):
        pyro.module(f"{prefix}.prior", nets["prior"])
        pyro.module(f"{prefix}.data", nets["data"])
        with pyro.plate("data", len(x)):
            upper = pyro.sample("upper", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            lower = pyro.sample("lower", dist.Normal(nets["prior"](upper), 1.0).to_event(1))
            logits = nets["data"](torch.cat([upper, lower], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"{prefix}.lower", nets["lower"])
        pyro.module(f"{prefix}.upper", nets["upper"])
        with pyro.plate("data", len(x)):
            loc, raw = nets["lower"](x).chunk(2, -1)
            lower = pyro.sample("lower", dist.Normal(loc, raw.exp()).to_event(1))
            loc, raw = nets["upper"](torch.cat([lower, x], -1)).chunk(2, -1)
            pyro.sample("upper", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, nets


def conditional_pair(prefix):
    """A pair that takes (x, y): a label beside the data."""
    nets = nn.ModuleDict({"encode": nn.Linear(PIXELS + 2, 4), "decode": nn.Linear(2 + 2, PIXELS)})

    def model(x, y):
        pyro.module(f"{prefix}.decode", nets["decode"])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = nets["decode"](torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, y):
        pyro.module(f"{prefix}.encode", nets["encode"])
        with pyro.plate("data", len(x)):
            loc, raw = nets["encode"](torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, nets


def delta_pair(prefix, start, plate_size=None):
    """A pair without randomness; its data plate may stand for ``plate_size`` data."""
    net = nn.Linear(PIXELS, 2)

    def model(x):
        pyro.module(f"{prefix}.net", net)
        with pyro.plate("data", plate_size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = pyro.param(f"{prefix}.scale", torch.tensor(1.5), dist.constraints.positive)
            weight = pyro.param(f"{prefix}.weight", start.clone())
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"{prefix}.net", net)
        with pyro.plate("data", plate_size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Delta(net(x)).to_event(1))

    return model, guide, net


def unregistered_pair():
    """A pair whose decoder no pyro.module names."""
    net = nn.Linear(2, PIXELS)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide, net


def changed(module, before):
    return {
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }
