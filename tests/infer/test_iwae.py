"""The importance-weighted bound: its values, its bias, and its two gradients."""

import copy
import itertools

import pyro
import pytest
import torch
from objective_pairs import PAIRS, Gaussian, assert_same_mean, gradients, make_pair, standard_error_of
from pyro.infer import SVI

from pyro_vae.infer import IWAE, FusedOptim, scale_latents
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.weights.particles import Particles


def bounds_per_datum(pair, x, num_particles, *, copies, repeats):
    """Estimates ``(repeats,)`` of the bound of one datum, each a mean over copies of it."""
    data, objective = x.expand(copies), IWAE(num_particles)
    with torch.no_grad():
        losses = [objective.loss(pair.model, pair.guide, data) for _ in range(repeats)]
    return -torch.tensor(losses, dtype=torch.float64) / copies


# --- values ---


def test_one_particle_is_the_elbo_and_more_come_nearer_to_log_p():
    pair, x = Gaussian(), torch.tensor([0.7], dtype=torch.float64)
    elbo, exact = -(pair.rate(x) + pair.distortion(x)), pair.log_marginal(x)
    found = {k: bounds_per_datum(pair, x, k, copies=4000, repeats=20) for k in (1, 2, 5, 20)}
    assert abs(found[1].mean() - elbo) < 5 * standard_error_of(found[1]) + 1e-6
    values = list(found.values())
    for less, more in itertools.pairwise(values):
        noise = (standard_error_of(less) ** 2 + standard_error_of(more) ** 2).sqrt()
        assert more.mean() - less.mean() > 5 * noise
    assert values[-1].mean() < exact + 5 * standard_error_of(values[-1])


@pytest.mark.slow
def test_bias_follows_the_law_of_the_weights_variance():
    """k (log p - E L_k) = m2 / 2 - (m3 / 3 - 3 m2^2 / 4) / k + ..., m the weights' central moments.

    With posterior N(0, v) and proposal N(0, t), E[w^n] under the proposal is an integral of normal
    densities; m2 is the chi-square divergence.
    """
    k, v, t = 64, 0.5, 1.0

    def moment(n):
        precision = n / v + (1 - n) / t
        return v ** (-n / 2) * t ** ((n - 1) / 2) / precision**0.5

    second, third = moment(2) - 1, moment(3) - 3 * moment(2) + 2
    assert second + 1 == pytest.approx(t / (v**0.5 * (2 * t - v) ** 0.5))
    expected = second / 2 - (third / 3 - 3 * second**2 / 4) / k
    pair, x = Gaussian(noise=1.0, slope=0.5, scale=t**0.5), torch.zeros(1, dtype=torch.float64)
    estimates = bounds_per_datum(pair, x, k, copies=5_000, repeats=40)
    found = k * (pair.log_marginal(x) - estimates)
    assert abs(found.mean() - expected) < 5 * standard_error_of(found) + 1e-6
    assert standard_error_of(found) < 0.1 * expected  # the test can tell


def test_loss_is_the_mean_of_the_weights_that_log_weights_gives():
    model, guide, _ = make_pair("hierarchical")
    x = torch.rand(6, 4).bernoulli()
    objective = IWAE(5)
    objective.loss(model, guide, x)
    pyro.set_rng_seed(2)
    found = objective.loss(model, guide, x)
    scorer = Particles(OpenedPair(model, guide, (x,)))
    scorer.draw(5)  # finds out how to batch, which draws
    pyro.set_rng_seed(2)
    weights = scorer.draw(5).log_weights
    assert found == pytest.approx(-(weights.logsumexp(0) - torch.tensor(5.0).log()).sum().item())


@pytest.mark.parametrize("gradient", ["doubly-reparameterized", "plain"])
def test_at_the_posterior_every_draw_gives_log_p(gradient):
    pair = Gaussian(noise=1.0, slope=0.5, scale=0.5**0.5)
    x = torch.linspace(-2.0, 3.0, 5, dtype=torch.float64)
    objective = IWAE(3, gradient)
    for _ in range(3):
        pair.zero_grad()
        loss = objective.loss_and_grads(pair.model, pair.guide, x)
        assert loss == pytest.approx(-pair.log_marginal(x).sum().item(), abs=1e-12)
        found = torch.stack([p.grad for p in pair.guide_part.values()])
        if gradient == "plain":
            assert found.abs().max() > 1e-2  # its score term is noise
        else:
            torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


# --- gradients ---

# A pair of one latent is the least of them.
every_pair = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "standard" else ()) for name in PAIRS],
)


@every_pair
def test_doubly_reparameterized_gradient_has_the_plain_ones_mean(name):
    model, guide, modules = make_pair(name)
    x = torch.rand(3, 4).bernoulli().repeat(80, 1)
    doubly, plain = (
        gradients(IWAE(6, kind), model, guide, modules, x, repeats=20)
        for kind in ("doubly-reparameterized", "plain")
    )
    assert_same_mean(doubly, plain)


@every_pair
def test_doubly_reparameterized_gradient_has_less_variance_for_the_guide(name):
    model, guide, modules = make_pair(name)
    x = torch.rand(3, 4).bernoulli().repeat(20, 1)
    svi = SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1.5e-2}), IWAE(6))
    for _ in range(50):  # some way towards the posterior, as in training
        svi.step(x)
    if name == "VampPrior":
        model = frozen_vamp_model(model.__self__)
    doubly, plain = (
        gradients(IWAE(6, kind), model, guide, modules, x, repeats=16, part="guide")
        for kind in ("doubly-reparameterized", "plain")
    )
    assert doubly.var(0).sum() < 0.5 * plain.var(0).sum()


def frozen_vamp_model(vae):
    """The model with an encoder of its own in the prior, so that the guide's has one role."""
    prior = copy.deepcopy(vae.prior)
    object.__setattr__(prior, "guide", copy.deepcopy(vae.variational_family))
    prior.guide.requires_grad_(False)
    prior.requires_grad_(False)

    def model(x):
        pyro.module("likelihood of the frozen pair", vae.likelihood)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", vae.likelihood(z), obs=x)

    return model


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 2.0])
def test_gradients_agree_in_the_mean_under_beta(beta):
    model, guide, modules = make_pair("hierarchical")
    model, guide = scale_latents(model, beta), scale_latents(guide, beta, is_guide=True)
    x = torch.rand(3, 4).bernoulli().repeat(60, 1)
    assert_same_mean(
        *(
            gradients(IWAE(4, kind), model, guide, modules, x, repeats=20)
            for kind in ("doubly-reparameterized", "plain")
        )
    )


def test_gradient_of_one_dimension_is_the_bounds_derivative():
    """Against a finite difference of the bound with common random numbers."""
    pair, x = Gaussian(), torch.full((2000,), 0.7, dtype=torch.float64)
    rows = gradients(IWAE(4), pair.model, pair.guide, pair, x, repeats=12)
    names = [name for name, _ in pair.named_parameters()]
    step = 1e-4
    for column, name in enumerate(names):
        parameter, values = pair.get_parameter(name), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step
            pyro.set_rng_seed(8)
            objective = IWAE(4)
            values.append(
                torch.tensor([objective.loss(pair.model, pair.guide, x) for _ in range(12)])
            )
            with torch.no_grad():
                parameter -= sign * step
        slopes = (values[0] - values[1]) / (2 * step * len(x))
        noise = (standard_error_of(slopes) ** 2 + standard_error_of(rows[:, column]) ** 2).sqrt()
        assert abs(slopes.mean() - rows[:, column].mean()) < 5 * noise + 1e-6, name
