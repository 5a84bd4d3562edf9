"""The importance-weighted bound over pairs of every shape: how they are batched, what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_pairs import (
    Gaussian,
    assert_same_mean,
    gradients,
    hierarchical_pair,
    make_pair,
    standard_error_of,
)
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import IWAE, scale_latents


def same_as_particle_by_particle(model, guide, inputs, leaves, gradient):
    """The batched step has the loss and gradients of one that scores its draws one by one."""
    objective = IWAE(3, gradient)
    objective.loss(model, guide, *inputs)
    knowledge = next(objective._known.values())
    used = knowledge.ways["draws"], knowledge.ways["model"]
    found = []
    for way in (used[1], "_score_plain"):
        knowledge.ways["model"] = way
        pyro.set_rng_seed(4)
        terms = objective.terms(model, guide, inputs, {})
        grads = torch.autograd.grad(terms.surrogate, leaves, allow_unused=True)
        found.append((terms.loss, *(g for g in grads if g is not None)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    return used


@pytest.mark.parametrize("gradient", ["doubly-reparameterized", "plain"])
def test_convolutional_decoder(gradient):
    encoder = pv.networks.ConvEncoder((1, 8, 8), channels=(2, 3))
    decoder = pv.networks.ConvDecoder(2, (1, 8, 8), channels=(3, 2))
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (1, 8, 8)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )
    x = torch.rand(4, 1, 8, 8).bernoulli()
    leaves = list(vae.parameters())
    used = same_as_particle_by_particle(vae.model, vae.guide, (x,), leaves, gradient)
    assert used == ("_draw_under_plate", "_score_under_vmap")


@pytest.mark.parametrize(
    "gradient", ["doubly-reparameterized", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_guide_that_concatenates_is_drawn_as_more_data(gradient):
    model, guide, modules = hierarchical_pair(concatenates=True)
    x = torch.rand(5, 4).bernoulli()
    used = same_as_particle_by_particle(model, guide, (x,), list(modules.parameters()), gradient)
    assert used == ("_draw_tiled", "_score_under_vmap")
    repeated = x[:2].repeat(60, 1)
    one = [gradients(IWAE(3, "plain"), model, guide, modules, repeated, repeats=40)]
    assert_same_mean(one[0], gradients(IWAE(3), model, guide, modules, repeated, repeats=40))


class Conditional(nn.Module):
    """p(x given y): the decoder and the encoder read the label beside their input."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(4, 4), nn.Linear(6, 4)

    def model(self, x, y):
        pyro.module("conditional", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x, y):
        pyro.module("conditional", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_conditional_pair():
    pair, x, y = Conditional(), torch.rand(5, 4).bernoulli(), torch.eye(2)[[0, 1, 0, 1, 1]]
    used = same_as_particle_by_particle(
        pair.model, pair.guide, (x, y), list(pair.parameters()), "doubly-reparameterized"
    )
    assert used == ("_draw_under_plate", "_score_under_vmap")


@pytest.mark.parametrize("gradient", ["doubly-reparameterized", "plain"])
def test_plates_inside_the_data_plate_are_summed_into_the_weight(gradient):
    loc = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))

    def model(x):
        with pyro.plate("data", 5, dim=-1), pyro.plate("parts", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.param("loc", loc)
        with pyro.plate("data", 5, dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    x = torch.randn(3, 5, dtype=torch.float64)
    used = same_as_particle_by_particle(model, guide, (x,), [loc], gradient)
    assert used == ("_draw_under_plate", "_score_under_vmap")
    with torch.no_grad():
        loc.copy_(x / 2)
    exact = dist.Normal(torch.zeros_like(x), 2**0.5).log_prob(x).sum()
    assert IWAE(3, gradient).loss(model, guide, x) == pytest.approx(-exact.item(), abs=1e-10)


def test_pair_that_cannot_be_batched_is_called_particle_by_particle():
    pair = Gaussian()

    def model(x):
        pyro.module("gaussian.model", pair.model_part)
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[0]), 1.0))
            pyro.sample("x", dist.Normal(z.sort().values, 1.0), obs=x)

    def guide(x):
        pyro.module("gaussian.guide", pair.guide_part)
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(pair.guide_part["shift"], 1.0))
            if z.dim() > 1 or len(z) > 4:
                raise RuntimeError("written for one particle")

    x = torch.zeros(4, dtype=torch.float64)
    objective = IWAE(3)
    with pytest.warns(UserWarning, match="the guide of this pair"):
        objective.loss(model, guide, x)
    # Found out once: later steps neither look nor warn again, with beta around the pair or not.
    scaled = scale_latents(model, 0.5), scale_latents(guide, 0.5, is_guide=True)
    objective.loss_and_grads(*scaled, x)
    assert pair.guide_part["shift"].grad.isfinite()
    assert [known.ways["draws"] for known in objective._known.values()] == ["_draw_plain"]


def test_dropout_does_not_stop_batching():
    model, guide, _ = make_pair("standard")
    drop = nn.Dropout(0.5)

    def dropping(x):
        return guide(drop(x))

    objective = IWAE(3)
    objective.loss_and_grads(model, dropping, torch.rand(5, 4).bernoulli())
    assert next(objective._known.values()).ways["draws"] == "_draw_under_plate"
    assert drop.training


def test_subsample_drawn_inside_is_shared_by_guide_model_and_particles():
    pair, x = Gaussian(slope=0.0), torch.linspace(-3.0, 3.0, 50, dtype=torch.float64)

    def model(x):
        pyro.module("gaussian.model", pair.model_part)
        with pyro.plate("data", 50, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[0]), 1.0))
            pyro.sample("x", dist.Normal(z, pair.model_part["noise"]), obs=x[index])

    def guide(x):
        pyro.module("gaussian.guide", pair.guide_part)
        with pyro.plate("data", 50, subsample_size=5) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))

    objective = IWAE(3)
    losses = torch.tensor([objective.loss(model, guide, x) for _ in range(200)])
    exact = -pair.log_marginal(x).sum()
    assert abs(losses.mean() - exact) < 5 * standard_error_of(losses) + 1e-6
    assert losses.std() > 0


def test_a_first_step_draws_what_any_other_would():
    model, guide, _ = make_pair("standard")
    x = torch.rand(5, 4).bernoulli()
    objective, losses = IWAE(3), []
    for _ in range(2):
        pyro.set_rng_seed(7)
        losses.append(objective.loss(model, guide, x))
    assert losses[0] == losses[1]


# --- refusals ---


def test_bad_options_are_refused():
    with pytest.raises(pv.InputError, match="num_particles of at least 1, got 0"):
        IWAE(0)
    with pytest.raises(pv.InputError, match="'reinforce'"):
        IWAE(2, "reinforce")


def test_scale_of_the_users_own_is_refused():
    pair, x = Gaussian(), torch.zeros(3, dtype=torch.float64)
    scaled = pyro.poutine.scale(pair.model, 0.5)
    with pytest.raises(pv.InputError, match=r"poutine\.scale"):
        IWAE(2).loss(scaled, pair.guide, x)


def test_latent_outside_the_data_plate_is_refused_by_name():
    def model(x):
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shared, 1.0), obs=x)

    def guide(x):
        pyro.sample("shared", dist.Normal(0.0, 1.0))

    with pytest.raises(pv.InputError, match="'shared'"):
        IWAE(2).loss(model, guide, torch.zeros(3))


def test_subsampling_inside_the_data_plate_is_refused_by_name():
    def pair(observed):
        def function(x):
            with pyro.plate("data", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
                if observed:
                    with pyro.plate("pixels", 10, subsample_size=2, dim=-2) as index:
                        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        return function

    with pytest.raises(pv.InputError, match="'pixels'"):
        IWAE(2).loss(pair(True), pair(False), torch.zeros(10, 3))


def test_point_masses_take_the_plain_gradient():
    """A guide as Pyro's autoguides write it: an auxiliary draw placed by a point mass."""
    loc = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Exponential(torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.param("loc", loc)
        with pyro.plate("data", 3):
            u = pyro.sample("u", dist.Normal(loc, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    def lognormal(x):
        pyro.param("loc", loc)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.LogNormal(loc, 1.0))

    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.raises(pv.InputError, match=r"'z' of the guide is a point mass.*plain"):
        IWAE(2).loss_and_grads(model, guide, x)
    found = []
    for function in (guide, lognormal):
        objective = IWAE(2, "plain")
        objective.loss(model, function, x)
        pyro.set_rng_seed(1)
        loc.grad = None
        found.append((objective.loss_and_grads(model, function, x), loc.grad))
    torch.testing.assert_close(found[0], found[1])
