"""Bidirectional Monte Carlo on probabilistic PCA, where the exact value lies between the bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation.ais import AnnealingOptions


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def closed_form_gap(linear, x, betas):
    """Right minus left sum of E_beta[log p(x given z)] with exact transitions from the prior."""
    precision = linear.W.T @ linear.W / linear.variance
    pull = (x - linear.b) @ linear.W / linear.variance
    values = []
    for beta in betas:
        covariance = torch.linalg.inv(torch.eye(len(precision)).double() + beta * precision)
        mean = beta * pull @ covariance
        residual = (x - linear.b - mean @ linear.W.T).square().sum(1)
        spread = (linear.W @ covariance @ linear.W.T).trace()
        values.append(-(residual + spread) / (2 * linear.variance))
    values = torch.stack(values)
    rises = torch.tensor(betas).double().diff()[:, None]
    return (rises * (values[1:] - values[:-1])).sum(0)


def check_bounds(exact, num_data, steps):
    problem = exact["probabilistic_pca"](num_data=num_data, num_pixels=8, num_latents=5)
    linear = problem.model.__closure__[0].cell_contents.__self__
    marginal = linear.marginal(torch.zeros(5).double(), torch.eye(5).double())
    products = []
    for num_steps in steps:
        result = pv.evaluation.bidirectional(
            problem.model,
            problem.guide,
            problem.x,
            num_chains=1,
            num_steps=num_steps,
            num_leapfrog_steps=8,
            num_transitions=3,
            start="prior",
            schedule="linear",
            seed=num_steps,
        )
        (x,) = result.x
        log_prob = marginal.log_prob(x)
        below, below_error = mean_and_error(log_prob - result.lower)
        above, above_error = mean_and_error(result.upper - log_prob)
        assert below > -3 * below_error
        assert above > -3 * above_error
        betas = AnnealingOptions(num_steps=num_steps, schedule="linear").betas()
        expected = closed_form_gap(linear, x, betas).mean().item()
        error = result.mean_gap_standard_error
        assert abs(result.mean_gap - expected) < 0.5 * expected + 3 * error
        products.append((num_steps * result.mean_gap, num_steps * error))
    return products


def test_the_exact_value_lies_between(exact):
    check_bounds(exact, 300, [8])


@pytest.mark.slow
def test_the_gap_falls_as_the_steps(exact):
    products = check_bounds(exact, 500, [200, 400, 800])
    centre = sum(product for product, _ in products) / len(products)
    for product, error in products:
        assert abs(product / centre - 1) < 0.3 + 3 * error / centre


def test_the_data_are_the_models(exact):
    problem = exact["probabilistic_pca"](num_data=2, num_latents=2)
    result = pv.evaluation.bidirectional(
        problem.model, problem.guide, problem.x, num_data=500, num_steps=2, num_chains=2, seed=0,
        num_leapfrog_steps=1, start="guide",
    )  # fmt: skip
    (x,) = result.x
    assert x.shape == (500, 12)
    assert result.lower.shape == result.upper.shape == (500,)
    linear = problem.model.__closure__[0].cell_contents.__self__
    marginal = linear.marginal(torch.zeros(2).double(), torch.eye(2).double())
    error = (marginal.variance / 500).sqrt()
    assert ((x.mean(0) - marginal.mean).abs() < 5 * error).all()
    assert (x.var(0) / marginal.variance - 1).abs().max() < 5 * math.sqrt(2 / 500)
    assert "simulated data only" in str(result)
    assert "simulated data only" in pv.evaluation.bidirectional.__doc__


def test_conditioning_is_kept():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(10 * y + z, 0.1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - 10 * y, 0.3))

    y = torch.tensor([0.0, 1.0, 2.0])
    options = {"num_data": 8, "num_steps": 20, "num_leapfrog_steps": 2, "start": "guide", "seed": 0}
    result = pv.evaluation.bidirectional(model, guide, (torch.zeros(3), y), **options)
    x, labels = result.x
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert ((x - 10 * labels).abs() < 6).all()
    exact = dist.Normal(10 * labels, math.sqrt(1.01)).log_prob(x)
    assert (result.lower - exact).mean() < 0.3
    assert (result.upper - exact).mean() > -0.3


def test_seed_and_refusals(exact):
    problem = exact["gaussian"](num_data=3)
    options = {"num_steps": 5, "num_chains": 2, "num_leapfrog_steps": 1}
    one, two = (
        pv.evaluation.bidirectional(problem.model, problem.guide, problem.x, seed=1, **options)
        for _ in range(2)
    )
    assert torch.equal(one.gap, two.gap)

    def halved(x):
        problem.model(x / 2)

    with pytest.raises(InputError, match="observed site 'x'"):
        pv.evaluation.bidirectional(halved, problem.guide, problem.x, **options)
    with pytest.raises(InputError, match="num_data of at least 1"):
        pv.evaluation.bidirectional(problem.model, problem.guide, problem.x, num_data=0)
