"""log p(x | data) given draws of what the data share, against closed forms and exact loo."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import evaluation

NOISE, D, N = 0.7, 3, 30


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, NOISE), obs=y)


def draw(num_data):
    x = torch.randn(num_data, D, dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    return x, x @ weights + NOISE * torch.randn(num_data, dtype=torch.float64)


def posterior(x, y):
    precision = x.T @ x / NOISE**2 + torch.eye(D, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    return covariance @ x.T @ y / NOISE**2, covariance


def predictive(train, x, y):
    mean, covariance = posterior(*train)
    scale = (NOISE**2 + torch.einsum("ni,ij,nj->n", x, covariance, x)).sqrt()
    return dist.Normal(x @ mean, scale).log_prob(y)


def fitted(train):
    mean, covariance = posterior(*train)

    def guide(x, y):
        pyro.sample("weights", dist.MultivariateNormal(mean, covariance))

    return guide


def amortised(x, y):
    pyro.sample("weights", dist.MultivariateNormal(*posterior(x, y)))


def test_held_out_data_have_their_closed_form():
    train, test = draw(N), draw(7)
    exact = predictive(train, *test)
    for guide, given in ((fitted(train), None), (amortised, train)):
        found = evaluation.predictive_log_prob(
            regression, guide, test, given=given, num_draws=200, seed=0
        )
        assert found.log_likelihood.shape == (200, 7)
        assert found.draws["weights"].shape == (200, D)
        assert ((found.log_prob - exact).abs() < 5 * found.standard_error).all()
        assert found.standard_error.max() < 0.2


@pytest.mark.slow
def test_arvizs_loo_is_exact_leave_one_out():
    import arviz

    x, y = train = draw(N)
    kept = [torch.arange(N) != n for n in range(N)]
    exact = sum(
        predictive((x[rest], y[rest]), x[n : n + 1], y[n : n + 1]).item()
        for n, rest in enumerate(kept)
    )
    found = evaluation.predictive_log_prob(regression, fitted(train), train, num_draws=2000, seed=0)
    loo = arviz.loo(found.to_arviz())
    estimate = loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd
    in_sample = predictive(train, x, y).sum().item()
    assert abs(estimate - exact) < 0.05 * (in_sample - exact)


def test_latents_of_a_data_point_are_weighed_inside():
    """x_n ~ N(mean + z_n, NOISE), z_n ~ N(0, 1): given the mean a normal of wider scale."""
    x = torch.linspace(-1.0, 2.0, 5)
    wide = (1 + NOISE**2) ** 0.5

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(mean + z, NOISE), obs=x)

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.4), 0.2))
        with pyro.plate("data", len(x)):
            loc = (x - mean) / wide**2
            pyro.sample("z", dist.Normal(loc, NOISE / wide))

    found = evaluation.predictive_log_prob(model, guide, x, num_draws=30, num_samples=4, seed=0)
    each = dist.Normal(found.draws["mean"][:, None].double(), wide).log_prob(x.double())
    torch.testing.assert_close(found.log_likelihood, each, rtol=0, atol=1e-5)

    def summed(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            coin = pyro.sample("coin", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mean + coin, NOISE), obs=x)

    def mean_alone(x):
        pyro.sample("mean", dist.Normal(torch.tensor(0.4), 0.2))

    found = evaluation.predictive_log_prob(summed, mean_alone, x, num_draws=5, seed=0)
    centre = found.draws["mean"][:, None].double()
    tails, heads = (dist.Normal(centre + coin, NOISE).log_prob(x.double()).exp() for coin in (0, 1))
    torch.testing.assert_close(
        found.log_likelihood, (0.7 * tails + 0.3 * heads).log(), rtol=0, atol=1e-5
    )


def test_refusals_say_what_is_missing():
    with pytest.raises(pv.InputError, match=r"'weights' of the guide depends on.* by given="):
        evaluation.predictive_log_prob(regression, amortised, draw(5), num_draws=2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, NOISE))

    with pytest.raises(
        pv.InputError, match=r"latents outside the data plate, got none.*log_marginal"
    ):
        evaluation.predictive_log_prob(model, guide, torch.zeros(4), num_draws=2)
