"""Generating and reconstructing with any pair: a VAE, plain functions, conditions, several sites."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.distributions import VonMisesFisher
from pyro_vae.tasks import generate, reconstruct
from pyro_vae.tasks.generation import _AtTemperature

N = 4000


def linear_model(x):
    """Draw x = 3 + 2 z + noise of standard deviation 1/2, whose marginal is known."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(3 + 2 * z, 0.5).to_event(1), obs=x)


def linear_guide(x):
    """Draw from the exact posterior."""
    variance = 1 / (1 + 4 / 0.25)
    with pyro.plate("data", len(x)):
        loc = variance * 2 * (x - 3) / 0.25
        pyro.sample("z", dist.Normal(loc, math.sqrt(variance)).to_event(1))


def moments_agree(values, mean, variance):
    values = values.double().flatten()
    count = len(values)
    assert abs(values.mean() - mean) < 5 * math.sqrt(variance / count) + 1e-6
    error = variance * math.sqrt(2 / count)  # of a normal's sample variance
    assert abs(values.var() - variance) < 5 * error + 1e-6


def test_generate_draws_the_marginal():
    like = torch.full((N, 1), math.nan)  # the data's values must play no part
    moments_agree(generate(linear_model, like, mean=True, seed=0), 3, 4)
    moments_agree(generate(linear_model, like, mean=False, seed=1), 3, 4.25)


def test_reconstruct_draws_the_posterior_predictive():
    x = torch.full((N, 1), 4.0)
    variance = 1 / 17
    loc = 3 + 2 * variance * 2 * 1 / 0.25
    mean = reconstruct(linear_model, linear_guide, x, mean=True, seed=0)
    moments_agree(mean, loc, 4 * variance)
    draws = reconstruct(linear_model, linear_guide, x, mean=False, seed=1)
    moments_agree(draws, loc, 4 * variance + 0.25)


@pytest.mark.parametrize("mean", [True, False])
def test_a_seed_repeats_the_draw_and_restores_the_generator(mean):
    x = torch.randn(5, 1)
    before = torch.get_rng_state()
    for task in (
        lambda seed: generate(linear_model, x, mean=mean, seed=seed),
        lambda seed: reconstruct(linear_model, linear_guide, x, mean=mean, seed=seed),
    ):
        assert torch.equal(task(0), task(0))
        assert not torch.equal(task(0), task(1))
    assert torch.equal(torch.get_rng_state(), before)


def conditional_model(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(100 * y + z, 0.1).to_event(1), obs=x)


def conditional_guide(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x - 100 * y, 1e-3).to_event(1))


def test_conditions_are_kept():
    y = torch.tensor([[1.0], [2.0], [5.0]])
    x = 100 * y + torch.randn(3, 2)
    drawn = generate(conditional_model, (torch.zeros(3, 2), y), seed=0)
    assert ((drawn - 100 * y).abs() < 10).all()
    rebuilt = reconstruct(conditional_model, conditional_guide, (x, y), seed=0)
    torch.testing.assert_close(rebuilt, x, atol=0.02, rtol=0)


def two_sites_model(x, y):
    """Draw y given z and x given y, both observed."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(10 + z, 0.1).to_event(1), obs=y)
        pyro.sample("x", dist.Normal(2 * y, 0.1).to_event(1), obs=x)


def two_sites_guide(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(y - 10, 1e-3).to_event(1))


def test_with_two_observed_sites_one_is_named():
    inputs = (torch.zeros(N, 1), torch.zeros(N, 1))
    moments_agree(generate(two_sites_model, inputs, observed="y", seed=0), 10, 1)
    # The y that was given is a condition: x follows it.
    drawn = generate(two_sites_model, inputs, observed="x", mean=False, seed=0)
    moments_agree(drawn, 0, 0.01)
    x, y = torch.tensor([[24.0]]), torch.tensor([[12.0]])
    rebuilt = reconstruct(two_sites_model, two_sites_guide, (x, y), observed="y", seed=0)
    torch.testing.assert_close(rebuilt, y, atol=0.02, rtol=0)


@pytest.mark.parametrize("observed", [None, "w", "z"])
def test_the_observed_site_must_be_clear(observed):
    inputs = (torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(pv.InputError, match=r"expected .*the model has y, x: name one"):
        generate(two_sites_model, inputs, observed=observed)
    with pytest.raises(pv.InputError, match=r"expected .*the model has y, x: name one"):
        reconstruct(two_sites_model, two_sites_guide, inputs, observed=observed)


def test_a_model_without_data_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(pv.InputError, match="a model that observes data, got none observed"):
        generate(model, torch.zeros(3, 1))


def test_a_subsampling_plate_is_no_observed_site():
    def model(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert generate(model, torch.zeros(7, 1)).shape == (7, 1)


def make_vae(likelihood):
    shape = (1, 4, 4)
    decoder = pv.networks.ConvDecoder(2, shape, (4,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        getattr(pv.likelihoods, likelihood)(decoder, shape),
        pv.guides.MeanFieldNormal(pv.networks.ConvEncoder(shape, (4,), features=8), 2),
    )


@pytest.mark.parametrize("likelihood", ["Bernoulli", "Gaussian", "ContinuousBernoulli"])
@pytest.mark.parametrize("mean", [True, False])
def test_a_vae_generates_and_reconstructs(likelihood, mean):
    vae, x = make_vae(likelihood), torch.rand(6, 1, 4, 4)
    for drawn in (
        generate(vae.model, x, mean=mean),
        reconstruct(vae.model, vae.guide, x, mean=mean),
    ):
        assert drawn.shape == x.shape
        assert not drawn.requires_grad
        if likelihood == "Bernoulli":
            assert bool(((drawn == 0) | (drawn == 1)).all()) is not mean


def test_the_mode_is_eval_inside_and_restored():
    vae, modes = make_vae("Bernoulli"), []
    decoder = vae.likelihood.decoder
    decoder.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    x = torch.zeros(2, 1, 4, 4)
    for training in (True, False):
        decoder.train(training)
        generate(vae.model, x)
        reconstruct(vae.model, vae.guide, x)
        assert decoder.training is training
    assert modes
    assert not any(modes)


def test_nothing_is_left_in_the_parameter_store_of_a_plain_pair():
    generate(linear_model, torch.zeros(3, 1))
    assert len(pyro.get_param_store()) == 0


def test_an_empty_batch_is_refused():
    with pytest.raises(pv.InputError, match="at least one datum"):
        generate(linear_model, torch.zeros(0, 1))


def test_the_aggregate_posterior_is_drawn_from():
    """Of data at x = 4 and x = 6: each new datum decodes the posterior of one of them."""
    data = torch.tensor([[4.0], [6.0]])
    like = torch.full((N, 1), math.nan)
    drawn = generate(linear_model, like, guide=linear_guide, data=data, mean=False, seed=0)
    variance = 1 / 17  # of z; x = 3 + 2 z + noise
    first, second = (3 + 2 * variance * 2 * (x - 3) / 0.25 for x in (4.0, 6.0))
    spread = 4 * variance + 0.25
    moments = spread + (second - first) ** 2 / 4
    values = drawn.double().flatten()
    mean = (first + second) / 2
    assert abs(values.mean() - mean) < 5 * math.sqrt(moments / N)
    for centre in (first, second):  # 2.8 apart, deviations 0.7: cut in the middle
        side = values[(values - centre).abs() < (values - (2 * mean - centre)).abs()]
        assert abs(len(side) / N - 0.5) < 5 * 0.5 / math.sqrt(N)
        assert abs(side.mean() - centre) < 0.1


def test_the_aggregate_posterior_of_a_guide_with_parameters_per_datum():
    """Each of its three data has a mean of its own; repeated picks are fresh draws."""
    means = torch.tensor([[-100.0], [0.0], [100.0]])

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(means, 1.0).to_event(1))

    data, like = torch.zeros(3, 1), torch.zeros(600, 1)
    drawn = generate(linear_model, like, guide=guide, data=data, seed=0)
    z = (drawn - 3) / 2
    picked = (z / 100).round()
    counts = torch.stack([(picked == k).sum() for k in (-1, 0, 1)])
    assert ((counts / 600 - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / 600)).all()
    noise = (z - 100 * picked).flatten()
    assert len(noise.unique()) == 600
    moments_agree(noise, 0, 1)


def test_the_aggregate_posterior_keeps_the_conditions_of_the_new_data():
    y = torch.tensor([[1.0], [2.0], [5.0]])
    inputs = (100 * y + torch.randn(3, 2), y)
    wanted = torch.tensor([[7.0], [9.0]])
    like = (torch.zeros(2, 2), wanted)
    drawn = generate(conditional_model, like, guide=conditional_guide, data=inputs, seed=0)
    assert ((drawn - 100 * wanted).abs() < 10).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_multiplies_the_spread_of_the_latents(temperature):
    like = torch.zeros(N, 1)
    drawn = generate(linear_model, like, temperature=temperature, seed=0)
    moments_agree(drawn, 3, 4 * temperature**2)
    data = torch.tensor([[4.0]]).expand(N, 1)
    drawn = generate(
        linear_model, like, guide=linear_guide, data=data, temperature=temperature, seed=0
    )
    variance = 1 / 17
    moments_agree(drawn, 3 + 2 * variance * 2 / 0.25, 4 * variance * temperature**2)


def latents_model(prior):
    """Show the latent itself as the mean of the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


PRIORS = {
    "normal": (lambda: dist.Normal(torch.ones(2), 2.0).to_event(1), 1.0, 4.0),
    "laplace": (lambda: dist.Laplace(torch.ones(2), 1.0).to_event(1), 1.0, 2.0),
    "multivariate": (
        lambda: dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]])),
        1.0,
        2.0,
    ),
    "mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([1.0])), dist.Normal(torch.ones(1, 2), 3.0).to_event(1)
        ),
        1.0,
        9.0,
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_temperature_of_every_family_with_a_scale(name):
    prior, mean, variance = PRIORS[name]
    like = torch.zeros(N, 2)
    hot = generate(latents_model(prior), like, temperature=2.0, seed=0).double()
    error = math.sqrt(4 * variance / N)
    assert ((hot.mean(0) - mean).abs() < 5 * error).all()
    # A Laplace's kurtosis of 6 makes the variance's error sqrt(5 / N) of itself, a normal's less.
    assert ((hot.var(0) / (4 * variance) - 1).abs() < 5 * math.sqrt(5 / N)).all()


def test_temperature_of_a_flow_is_its_base_s():
    flow = pv.priors.FlowPrior(2)
    like = torch.zeros(N, 2)
    cold = generate(latents_model(flow), like, temperature=1e-4, seed=0)
    centre = generate(latents_model(flow), like, temperature=1e-6, seed=0)
    assert (cold - centre[0]).abs().max() < 0.1
    assert cold.std() > 0


def test_a_latent_without_a_scale_is_refused_by_name():
    prior = lambda: VonMisesFisher(torch.tensor([1.0, 0.0]), torch.tensor(3.0))  # noqa: E731
    like = torch.zeros(3, 2)
    assert generate(latents_model(prior), like).shape == (3, 2)
    with pytest.raises(pv.InputError, match="'z' is VonMisesFisher: leave temperature at 1"):
        generate(latents_model(prior), like, temperature=0.5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(pv.InputError, match="temperature above 0"):
        generate(linear_model, torch.zeros(3, 1), temperature=temperature)


def test_data_without_a_guide_are_refused():
    with pytest.raises(pv.InputError, match="expected a guide with data"):
        generate(linear_model, torch.zeros(3, 1), data=torch.zeros(3, 1))


def test_temperature_of_the_mixture_family():
    guide = pv.guides.MixtureOfNormals(pv.networks.MLPEncoder((3,), (8,)), 1, num_components=2)
    decoder = pv.networks.MLPDecoder(1, (8,))
    likelihood = pv.likelihoods.Gaussian(decoder, (3,))
    vae = pv.VAE(pv.priors.StandardNormal(1), likelihood, guide)
    x = torch.randn(1, 3)
    q = guide(x)
    with _AtTemperature(2.0):
        drawn = poutine.trace(vae.guide).get_trace(x.expand(N, 3)).nodes["z"]["value"]
    mean = q.mean.item()
    # Var z = E s^2 + Var m; the temperature is a factor of s alone.
    inside = (q.log_weights.exp() * q.scale.squeeze(-1) ** 2).sum().item()
    variance = q.variance.item() + 3 * inside
    drawn = drawn.double()
    fourth = (drawn - drawn.mean()).pow(4).mean()
    assert abs(drawn.mean() - mean) < 5 * math.sqrt(variance / N) + 1e-6
    assert abs(drawn.var() - variance) < 5 * ((fourth - variance**2) / N).sqrt() + 1e-6
