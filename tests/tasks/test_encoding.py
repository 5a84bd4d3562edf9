"""Codes of data and data of codes: exact means, honest draws, every kind of pair."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import tasks
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.settings import assemble_vae


def vae(prior="standard-normal", guide="mean-field", likelihood="bernoulli", latent_dim=3):
    settings = TrainSettings(
        prior=prior, likelihood=likelihood, guide=guide, latent_dim=latent_dim, hidden="16"
    )
    return assemble_vae(settings, (6,), 100)


def data(number=7):
    return torch.bernoulli(torch.full((number, 6), 0.5))


def test_the_mean_is_the_distributions_own():
    pair, x = vae(), data()
    torch.testing.assert_close(tasks.encode(pair.guide, x), pair.variational_family(x).mean)


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        ("standard-normal", "full-rank"),
        ("vamp", "mixture"),
        ("hypersphere-uniform", "von-mises-fisher"),
        ("beta", "beta"),
    ],
)
def test_draws_average_to_the_mean(prior, guide):
    pair, x = vae(prior, guide), data()
    mean = tasks.encode(pair.guide, x)
    draws = tasks.encode(pair.guide, x, mean=False, num_draws=4000, seed=1)
    assert draws.shape == (4000, 7, 3)
    error = draws.std(0) / math.sqrt(4000)
    assert ((draws.mean(0) - mean).abs() < 5 * error + 1e-6).all()


def test_a_mean_without_closed_form_comes_from_draws_and_says_so():
    pair, x = vae(guide="iaf"), data()
    with pytest.warns(UserWarning, match="no closed form: the result is the mean of 3,000 draws"):
        mean = tasks.encode(pair.guide, x, num_draws=3000, seed=0)
    draws = tasks.encode(pair.guide, x, mean=False, num_draws=3000, seed=1)
    error = draws.std(0) * math.sqrt(2 / 3000)
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()


def chain():
    """A pair of two latents, the second about the first, with a plate of its own."""

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_zeros(len(x)), 1.0))
            with pyro.plate("parts", 4):
                part = pyro.sample("part", dist.Normal(top, 1.0).expand([4, len(x)]))
            pyro.sample("x", dist.Normal(part.T, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.mean(1), 0.5))
            with pyro.plate("parts", 4):
                pyro.sample("part", dist.Normal(x.T + top, 0.3))

    return model, guide


def test_a_mean_that_moves_with_another_latent_is_averaged_over_it():
    x = torch.randn(5, 4)
    _, guide = chain()
    assert tasks.encode(guide, x, site="top").equal(x.mean(1))
    with pytest.warns(UserWarning, match="'part' has no closed form"):
        mean = tasks.encode(guide, x, site="part", num_draws=300, seed=0)
    assert mean.shape == (5, 4)
    exact = x + x.mean(1, keepdim=True)
    assert ((mean - exact).abs() < 5 * math.hypot(0.5, 0.3) / math.sqrt(300)).all()
    draws = tasks.encode(guide, x, site="part", mean=False, num_draws=3)
    assert draws.shape == (3, 5, 4)


def test_codes_are_decoded_as_the_model_would():
    pair, x = vae(), data()
    z = tasks.encode(pair.guide, x)
    expected = pair.likelihood(z).mean
    torch.testing.assert_close(tasks.decode(pair.model, z, x), expected)
    torch.testing.assert_close(tasks.decode(pair.model, {"z": z}, torch.zeros_like(x)), expected)
    drawn = tasks.decode(pair.model, z, x, mean=False, seed=0)
    assert ((drawn == 0) | (drawn == 1)).all()


def test_latents_in_plates_of_their_own_are_decoded():
    x = torch.randn(5, 4)
    model, _ = chain()
    part = torch.randn(5, 4)
    top = torch.randn(5)
    assert tasks.decode(model, {"top": top, "part": part}, x).equal(part)


def test_conditions_reach_guide_and_model():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + y, 0.1).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - y, 0.1).to_event(1))

    x, y = torch.randn(6, 2), torch.randn(6, 2)
    z = tasks.encode(guide, (x, y))
    assert z.equal(x - y)
    torch.testing.assert_close(tasks.decode(model, z, (x, y)), x)


def test_mistakes_are_refused():
    _, guide = chain()
    model = chain()[0]
    x = torch.randn(5, 4)
    with pytest.raises(pv.InputError, match="one latent, there are top, part"):
        tasks.encode(guide, x)
    with pytest.raises(pv.InputError, match="a latent 'tip'"):
        tasks.encode(guide, x, site="tip")
    with pytest.raises(pv.InputError, match="num_draws of at least 1"):
        tasks.encode(guide, x, site="top", num_draws=0)
    with pytest.raises(pv.InputError, match="num_draws as a whole number, got '3'"):
        tasks.encode(guide, x, site="top", num_draws="3")
    with pytest.raises(pv.InputError, match="inside the data plate 'rows'"):
        tasks.encode(guide, x, site="top", plate="rows")
    with pytest.raises(pv.InputError, match=r"latents 'top' of shape \(5,\).* got \(3,\)"):
        tasks.decode(model, {"top": torch.zeros(3)}, x)
    with pytest.raises(pv.InputError, match="expected a guide that draws a latent"):
        tasks.encode(lambda x: None, x)


def test_codes_may_come_in_another_type_but_not_in_another_shape():
    pair, x = vae(), data()
    codes = tasks.encode(pair.guide, x)
    expected = tasks.decode(pair.model, codes, x)
    for same in (codes.double(), codes.numpy(), codes.double().numpy()):
        torch.testing.assert_close(tasks.decode(pair.model, same, x.double()), expected)
    for shape in ((7,), (7, 2), (6, 3), (1, 7, 3)):
        with pytest.raises(pv.InputError, match=r"latents 'z' of shape \(7, 3\)"):
            tasks.decode(pair.model, torch.zeros(shape), x)
    with pytest.raises(pv.InputError, match="site 'z' inside the data plate 'rows', got one outside"):
        tasks.decode(pair.model, codes, x, plate="rows")


def test_mode_and_generators_are_left_alone():
    pair = vae(guide="iaf").train()
    x = data()
    state = torch.get_rng_state()
    first, second = (tasks.encode(pair.guide, x, mean=False, seed=5) for _ in range(2))
    assert first.equal(second)
    assert torch.equal(state, torch.get_rng_state())
    assert pair.training
