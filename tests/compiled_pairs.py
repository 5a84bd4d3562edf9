"""What the tests of the compiled step share: a small VAE, an objective that counts its replays."""

import pyro
import pyro.distributions as dist
from torch import nn

from pyro_vae.infer.compiled import CompiledTrace_ELBO


def compiled(*args, backend="eager", **kwargs):
    """The captured graph run operator by operator: what is captured is the point here."""
    return CompiledTrace_ELBO(*args, backend=backend, **kwargs)


class CountingELBO(CompiledTrace_ELBO):
    """Counts the steps taken by a graph."""

    replays = 0

    def _replay(self, replay):
        self.replays += 1
        return super()._replay(replay)


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
