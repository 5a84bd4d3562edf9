"""Training and measuring on the observed part of incomplete data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.tasks import nan_as_missing, observed_pair

F64 = torch.float64
LIKELIHOODS = ["Bernoulli", "ContinuousBernoulli", "Gaussian"]


def make_vae(likelihood="Gaussian", shape=(1, 4, 4), **options):
    return pv.VAE(
        pv.priors.StandardNormal(2),
        getattr(pv.likelihoods, likelihood)(pv.networks.MLPDecoder(2, (8,)), shape, **options),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(shape, (8,)), 2),
    )


def test_log_p_of_the_observed_part_is_exact(pca, hide):
    problem = pca(num_data=10, covariance_scale=8.0)
    missing = hide(problem.x)
    missing[0], missing[1] = False, True
    incomplete = problem.x.masked_fill(missing, math.nan)
    pair = observed_pair(problem.model, problem.guide)
    inputs = (incomplete, missing)
    estimate = pv.log_marginal(*pair, inputs, num_samples=4000, compile=False, seed=0)
    exact = problem.log_prob_observed(missing)
    assert ((estimate.log_prob - exact).abs() < 5 * estimate.standard_error + 1e-6).all()
    assert exact[1] == 0
    assert estimate.standard_error.max() < 0.2


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_with_nothing_missing_the_weights_are_the_pair_s(likelihood):
    vae, x = make_vae(likelihood), torch.rand(6, 1, 4, 4).round()
    missing = torch.zeros_like(x, dtype=torch.bool)
    pyro.set_rng_seed(1)
    whole = pv.log_weights(vae.model, vae.guide, x, num_samples=5)
    pyro.set_rng_seed(1)
    observed = pv.log_weights(*observed_pair(vae.model, vae.guide), (x, missing), num_samples=5)
    # A pair's own Bernoulli pixels are scored in fewer passes: float32 rounds otherwise.
    torch.testing.assert_close(observed, whole, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_hidden_values_play_no_part(likelihood):
    vae = make_vae(likelihood)
    x = torch.rand(6, 1, 4, 4).round()
    missing = torch.rand_like(x) < 0.5
    pair = observed_pair(vae.model, vae.guide)
    pair[1](x, missing)  # names the guide's parameters
    weights = []
    for hidden in (0.0, math.nan, math.inf, 1e9):
        pyro.set_rng_seed(1)
        inputs = (x.masked_fill(missing, hidden), missing)
        weights.append(pv.log_weights(*pair, inputs, num_samples=3))
        assert torch.equal(weights[0], weights[-1])
    weights[1].sum().backward()  # of the NaN
    gradients = [parameter.grad for parameter in vae.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_masked_density_is_the_sum_over_the_observed_values():
    vae = make_vae("Gaussian")
    x = torch.rand(6, 1, 4, 4)
    missing = torch.rand_like(x) < 0.5
    model, _ = observed_pair(vae.model, vae.guide)
    z = torch.randn(6, 2)
    with poutine.trace() as trace, poutine.condition(data={"z": z}):
        model(x, missing)
    trace.trace.compute_log_prob()
    likelihood = vae.likelihood(z).base_dist
    wanted = likelihood.log_prob(x).masked_fill(missing, 0).flatten(1).sum(1)
    torch.testing.assert_close(trace.trace.nodes["x"]["log_prob"], wanted)


def test_training_equals_that_of_the_pair_where_nothing_is_missing():
    x = torch.rand(40, 1, 4, 4)
    histories = []
    for missing in (None, torch.zeros_like(x, dtype=torch.bool)):
        torch.manual_seed(3)
        vae = make_vae()
        pair, data = (vae.model, vae.guide), x
        if missing is not None:
            pair, data = observed_pair(*pair), (x, missing)
        result = pv.fit(*pair, data, epochs=3, batch_size=16, seed=0, compile=False)
        histories.append(torch.as_tensor(result.history["train_elbo"]))
        assert result.num_parameters == sum(p.numel() for p in vae.parameters())
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-5, atol=1e-5)


class FactorModel(nn.Module):
    """x = W z + b + noise with learned W, b and noise, and a linear encoder: probabilistic PCA."""

    def __init__(self, num_pixels):
        super().__init__()
        self.decoder = nn.Linear(1, num_pixels)
        self.encoder = nn.Linear(num_pixels, 2)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def model(self, x):
        pyro.module("factor_model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            likelihood = dist.Normal(self.decoder(z), self.log_scale.exp())
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("factor_model", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, dim=1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.slow
def test_a_model_learns_from_incomplete_data_what_filling_by_zeros_would_hide():
    """The data's mean is 3: zeros in a third of the places would pull it to 2."""
    W, num_data = torch.tensor([[1.0], [-1.0], [0.5], [1.0]]), 1000
    x = 3 + torch.randn(num_data, 1) @ W.T + 0.3 * torch.randn(num_data, 4)
    incomplete = x.masked_fill(torch.rand_like(x) < 1 / 3, math.nan)
    torch.manual_seed(0)
    learner = FactorModel(4)
    options = {"epochs": 15, "batch_size": 50, "learning_rate": 0.03, "seed": 0}
    pair = observed_pair(learner.model, learner.guide, fill=3.0)
    result = pv.fit(*pair, nan_as_missing(incomplete), compile=False, **options)
    curve = result.history["train_elbo"]
    assert curve[-1] > curve[0]
    # The mean of a column rests on some 650 observed values of deviation below 1.1.
    assert ((learner.decoder.bias - 3).abs() < 5 * 1.1 / math.sqrt(650)).all()
    assert learner.log_scale.exp() < 0.5


def test_nan_as_missing_says_where():
    x = torch.tensor([[1.0, math.nan], [math.nan, 2.0]])
    filled, missing = nan_as_missing(x)
    assert torch.equal(missing, torch.tensor([[False, True], [True, False]]))
    assert torch.equal(filled, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


def test_nan_says_where_values_are_missing():
    vae, x = make_vae(), torch.rand(6, 1, 4, 4)
    missing = torch.rand_like(x) < 0.3
    pair = observed_pair(vae.model, vae.guide, nan=True, fill=0.5)
    explicit = observed_pair(vae.model, vae.guide, fill=0.5)
    holed = x.masked_fill(missing, math.nan)
    found = pv.log_marginal(*pair, holed, num_samples=20, seed=0)
    expected = pv.log_marginal(*explicit, (x, missing), num_samples=20, seed=0)
    assert torch.equal(found.log_prob, expected.log_prob)
    result = pv.fit(*pair, holed, validation=holed, epochs=2, batch_size=3, seed=0)
    assert math.isfinite(result.history["validation_elbo"][-1])


def test_the_guide_sees_the_fill():
    seen = []

    def guide(x):
        seen.append(x)

    x, missing = torch.ones(2, 3), torch.tensor([[True, False, False]]).expand(2, 3)
    for fill in (0.5, torch.tensor([0.5, 7.0, 7.0], dtype=F64)):
        observed_pair(lambda x: None, guide, fill=fill)[1](x, missing)
        assert torch.equal(seen[-1], torch.tensor([[0.5, 1.0, 1.0]]).expand(2, 3))


def test_a_named_site_a_condition_and_a_mask_of_the_user():
    """Two observed sites; the second one is incomplete, has one value per datum and no event."""

    def model(y, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0).mask(torch.tensor(True)), obs=1 * x)

    def guide(y, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y / 2, 1.0))

    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -1.0])
    missing = torch.tensor([True, False, True])
    pair = observed_pair(model, guide, observed="x", position=1)
    estimate = pv.log_marginal(*pair, (y, x, missing), num_samples=4000, seed=0)
    both = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1)
    exact = torch.where(
        missing, dist.Normal(0.0, math.sqrt(2)).log_prob(y), both.log_prob(torch.stack([y, x], 1))
    )
    assert ((estimate.log_prob - exact).abs() < 5 * estimate.standard_error + 1e-6).all()
    unnamed = observed_pair(model, guide, position=1)
    with pytest.raises(pv.InputError, match="one of the input or a part of it, the model has none"):
        unnamed[0](y, x, missing)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda z: dist.Poisson(z.exp()),
        lambda z: dist.Beta(z.exp(), z.exp()),
        lambda z: dist.LogNormal(z, 1.0),
        lambda z: dist.Cauchy(z, 1.0),
        lambda z: dist.Categorical(logits=torch.stack([z, -z, z], -1)),
        lambda z: dist.Geometric(logits=z),
        lambda z: dist.Laplace(z, 1.0),
    ],
    ids=["Poisson", "Beta", "LogNormal", "Cauchy", "Categorical", "Geometric", "Laplace"],
)
def test_any_elementwise_likelihood_can_be_masked(likelihood):
    """What stands in for a hidden value is in the support, whatever that is."""
    z = torch.randn(5, 3, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(z).to_event(1), obs=x)

    x = likelihood(z).sample()
    missing = torch.rand(5, 3) < 0.5
    hidden = x.masked_fill(missing, -7)  # in no support but the real line
    masked, _ = observed_pair(model, model)
    trace = poutine.trace(masked).get_trace(hidden, missing)
    trace.compute_log_prob()
    got = trace.nodes["x"]["log_prob"]
    wanted = likelihood(z).log_prob(x).masked_fill(missing, 0).sum(1)
    torch.testing.assert_close(got, wanted)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    assert gradient.isfinite().all()
    assert (gradient[missing] == 0).all()


def observing(distribution):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("pixels", distribution(x), obs=x)

    return model


@pytest.mark.parametrize(
    "distribution",
    [
        lambda x: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        lambda x: dist.OneHotCategorical(logits=torch.zeros(1, 3)),
        lambda x: dist.OneHotCategorical(logits=torch.zeros(4, 1, 3)).to_event(1),
    ],
    ids=["MultivariateNormal", "OneHotCategorical", "Independent"],
)
def test_what_is_not_elementwise_is_refused_by_name(distribution):
    model, _ = observed_pair(observing(distribution), lambda x: None)
    x = torch.zeros(4, 3)
    with pytest.raises(pv.InputError, match="'pixels' to have independent values given the latents"):
        model(x, torch.zeros(4, 3, dtype=torch.bool))


def test_a_view_is_observed_in_part_and_a_copy_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            seen = x.flatten(1) if reshaped else x.flatten(1) + 0
            pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=seen)

    masked, _ = observed_pair(model, model, observed="x")
    x, missing = torch.randn(3, 2, 2), torch.rand(3, 2, 2) < 0.5
    reshaped = True
    found = poutine.trace(masked).get_trace(x, missing).log_prob_sum()
    torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(x[~missing]).sum())
    reshaped = False
    with pytest.raises(
        pv.InputError, match=r"the input or a part of it, shape \(3, 2, 2\), got .*\(3, 4\)"
    ):
        masked(x, missing)


@pytest.mark.slow
def test_a_site_for_every_time_is_observed_in_part():
    """An autoregressive latent, a site for each value: weights of what is seen, trained compiled."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            for time in range(3):
                pyro.sample(f"x_{time}", dist.Normal(z, 1.0), obs=x[:, time])

    def guide(x):
        weight = pyro.param("weight", torch.tensor(0.25))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x.sum(1), 0.7))

    x = torch.randn(40, 3)
    x[:, 1:][torch.rand(40, 2) < 0.4] = torch.nan
    inputs = nan_as_missing(x)
    pair = observed_pair(model, guide)
    result = pv.fit(*pair, inputs, epochs=20, batch_size=20, compile=True, seed=0)
    assert result.compiled
    found = pv.log_marginal(*pair, inputs, num_samples=4000, seed=0)
    exact = []
    for row in x:
        seen = row[~row.isnan()]
        covariance = torch.eye(len(seen)) + 1
        exact.append(dist.MultivariateNormal(seen.new_zeros(len(seen)), covariance).log_prob(seen))
    exact = torch.stack([value.double() for value in exact])
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error + 1e-5).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(3, 2),), r"inputs and then missing, got 1 tensors.*pass \(x, missing\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), "boolean tensor, got torch.float32"),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)), r"shape \(3, 2\), got \(3,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    for function in observed_pair(lambda x: None, lambda x: None):
        with pytest.raises(pv.InputError, match=message):
            function(*inputs)


def test_the_owner_of_a_wrapped_pair_is_moved_and_trained_like_the_pair():
    from pyro_vae.pair.functions import modules_of, owned_modules

    vae = make_vae()
    pair = observed_pair(vae.model, vae.guide)
    (owner,) = owned_modules(*pair)
    assert set(owner.parameters()) == set(vae.parameters())
    assert vae in [part for module in modules_of(*pair) for part in module.modules()]
    plain = observed_pair(lambda x: vae.model(x), lambda x: vae.guide(x))
    assert owned_modules(*plain) == []
    assert vae in modules_of(*plain)
