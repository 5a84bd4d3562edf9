"""What the tests of the compiled step share: small pairs, runs held against stock Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints

from pyro_vae.infer.compiled import CompiledTrace_ELBO


def compiled(*args, backend="eager", **kwargs):
    """The captured graph run operator by operator: what is captured is the point here."""
    return CompiledTrace_ELBO(*args, backend=backend, **kwargs)


class CountingELBO(CompiledTrace_ELBO):
    """Counts the steps taken by a graph."""

    replays = 0

    def _hand_over(self, *step):
        self.replays += 1
        return super()._hand_over(*step)


class VAE(nn.Module):
    def __init__(self, pixels=6, latent=2, layer=nn.Linear):
        super().__init__()
        self.encoder = nn.Sequential(layer(pixels, 5), nn.Tanh())
        self.loc, self.scale = nn.Linear(5, latent), nn.Linear(5, latent)
        self.decoder = nn.Sequential(layer(latent, 5), nn.Tanh(), nn.Linear(5, pixels))
        self.latent = latent

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            h = self.encoder(x)
            pyro.sample("z", dist.Normal(self.loc(h), self.scale(h).exp()).to_event(1))


def make_vae(**kwargs):
    vae = VAE(**kwargs)
    return vae.model, vae.guide


def scalar_pair(transform):
    """One latent and one parameter, which ``transform`` acts on."""

    def make():
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            loc = pyro.param("loc", torch.tensor(0.3))
            pyro.sample("z", dist.Normal(transform(loc), 1.0))

        return model, guide

    return make


def make_constrained():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(0.0, scale))

    return model, guide


def run(make_pair, elbo, batches, optim=None):
    """Losses and final parameters of a run from a fixed seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = make_pair()
    svi = SVI(model, guide, optim or pyro.optim.SGD({"lr": 1e-3}), elbo)
    losses = [svi.step(*batch) for batch in batches]
    store = pyro.get_param_store()
    return losses, {name: store[name].detach().clone() for name in sorted(store)}, (model, guide)


def assert_same_run(make_pair, *inputs, stock_steps=1, steps=4, **options):
    """Stock and captured runs agree; the captured one is stock only in ``stock_steps`` steps."""
    batches = [inputs] * steps
    losses, params, pair = run(make_pair, Trace_ELBO(**options), batches)
    elbo = CountingELBO(backend="eager", **options)
    found_losses, found, found_pair = run(make_pair, elbo, batches)
    assert elbo.replays == steps - stock_steps
    assert losses == pytest.approx(found_losses, rel=1e-6)
    assert len(set(losses)) == steps
    assert params.keys() == found.keys()
    for name, value in params.items():
        torch.testing.assert_close(found[name], value, msg=name)
    return pair, found_pair
