"""What went wrong in a run is named, and nothing is said of one that went well."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

PIXELS = 6


def make_vae(likelihood=pv.likelihoods.Bernoulli, **options):
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (16,)), pv.networks.MLPEncoder((PIXELS,), (16,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        likelihood(decoder, (PIXELS,), **options),
        pv.guides.MeanFieldNormal(encoder, 2),
    )


def two_kinds(number=64):
    probability = torch.where(torch.arange(number)[:, None] % 2 == 0, 0.9, 0.1)
    return torch.bernoulli(probability.expand(number, PIXELS))


def warned(pair, data, **options):
    given = {"epochs": 40, "batch_size": 32, "learning_rate": 0.02, "seed": 0, **options}
    return pv.fit(pair.model, pair.guide, data, **given).warnings


def test_collapse_is_named_with_its_units():
    data = torch.bernoulli(torch.full((256, PIXELS), 0.5))
    (text,) = warned(make_vae(), data, beta=5.0, batch_size=64, learning_rate=1e-2)
    assert text.startswith("posterior collapse: all 2 latent units together code ")
    assert "warmup_epochs" in text


@pytest.mark.slow
def test_a_run_that_learns_and_one_still_warming_up_are_not_called_collapsed():
    assert warned(make_vae(), two_kinds(), warmup_epochs=10, epochs=60, learning_rate=0.03) == ()
    assert warned(make_vae(), two_kinds(), warmup_epochs=20, epochs=20, beta=20.0) == ()


def test_sigma_running_to_0_is_named():
    data = torch.randn(64, 1).expand(64, PIXELS).contiguous()  # one unit explains all of it
    vae = make_vae(pv.likelihoods.Gaussian, sigma="learned", floor=1e-6)
    (text,) = warned(vae, data, epochs=1, learning_rate=1e-3)[:1] or ("",)
    assert text == ""
    with torch.no_grad():
        vae.likelihood.raw_sigma.fill_(-8.0)  # sigma = 3e-4
    found = warned(vae, data, epochs=1, learning_rate=1e-5)
    assert len(found) == 1
    assert found[0].startswith("sigma runs to 0: at site 'x' it is 0.0003")
    assert "larger floor" in found[0]


def test_a_small_sigma_that_was_asked_for_is_not_called_running_away():
    data = torch.randn(64, PIXELS)
    assert warned(make_vae(pv.likelihoods.Gaussian, sigma=1e-3), data, epochs=1) == ()


class Explosive(nn.Module):
    """A pair whose loss is a quartic: too large a step overshoots ever further."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def model(self, x):
        pyro.module("explosive", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("fit", -1e-3 * self.weight**4 + 0 * z)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()) + 0.5, 1.0))


def test_exploding_gradients_are_named():
    # The rate grows a thousandfold at a third of the run.
    found = warned(
        Explosive(),
        torch.randn(32),
        epochs=9,
        learning_rate=0.01,
        schedule=lambda fraction: 1.0 if fraction < 0.33 else 2000.0,
    )
    assert len(found) == 1
    assert found[0].startswith("exploding gradients: their norm rose to ")
    assert "in epoch 5" in found[0]
    assert "gradient_clip" in found[0]
    pyro.clear_param_store()  # the name of the module is free again
    assert warned(Explosive(), torch.randn(32), epochs=9, learning_rate=0.01) == ()
