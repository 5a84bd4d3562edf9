"""What an observed site's log-probability is the logarithm of, by its support and its values."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.distributions.values import LevelsOfLogistic, NumberedCategorical
from pyro_vae.pair.sites import likelihood_kind

ZEROS = torch.zeros(3)
CASES = [
    (dist.Normal(ZEROS, 1.0), [0.2, 1.0, -3.0], "density"),
    (dist.Bernoulli(ZEROS + 0.5), [0.0, 1.0, 1.0], "probability"),
    (dist.Bernoulli(ZEROS + 0.5), [0.0, math.nan, 1.0], "probability"),
    (dist.Bernoulli(ZEROS + 0.5), [0.0, 0.3, 1.0], "pseudo-likelihood"),
    (dist.Bernoulli(ZEROS + 0.5), [0.0, 2.0, 1.0], "pseudo-likelihood"),
    (LevelsOfLogistic(ZEROS, ZEROS + 1, 256), [0.0, 128 / 255, 1.0], "probability"),
    (LevelsOfLogistic(ZEROS, ZEROS + 1, 256), [0.0, 0.5, 1.0], "pseudo-likelihood"),
    (NumberedCategorical(logits=torch.zeros(3, 4)), [0.0, 3.0, math.nan], "probability"),
    (NumberedCategorical(logits=torch.zeros(3, 4)), [0.0, 4.0, 1.0], "pseudo-likelihood"),
    (dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), ZEROS + 0.5), [1.0, 2.0, 3.0], "probability"),
    (dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), ZEROS + 0.5), [2.0, 2.0, 3.0], "pseudo-likelihood"),
    (dist.Poisson(ZEROS + 2), [0.0, 7.0, 1.0], "probability"),
    (dist.Poisson(ZEROS + 2), [0.5, 7.0, 1.0], "pseudo-likelihood"),
]


@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: fn.to_event(1)], ids=["plain", "event"])
@pytest.mark.parametrize(("distribution", "values", "kind"), CASES)
def test_values_that_a_distribution_takes_have_a_probability(wrap, distribution, values, kind):
    site = {"fn": wrap(distribution), "value": torch.tensor(values)}
    assert likelihood_kind(site) == kind


def test_one_hot_rows_are_taken_whole():
    rows = torch.eye(3)[[0, 2]]
    distribution = dist.OneHotCategorical(logits=torch.zeros(2, 3))
    assert likelihood_kind({"fn": distribution, "value": rows}) == "probability"
    rows = torch.stack([rows[0], torch.full((3,), math.nan)])
    assert likelihood_kind({"fn": distribution, "value": rows}) == "probability"
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert likelihood_kind({"fn": distribution, "value": rows}) == "pseudo-likelihood"


@pytest.mark.filterwarnings("ignore:.* data points have Pareto k")  # of few samples
def test_levels_between_0_and_1_are_no_pseudo_likelihood_in_any_number():
    torch.manual_seed(0)
    likelihood = pv.likelihoods.DiscretizedLogistic(pv.networks.MLPDecoder(2, (4,)), (5,))
    guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((5,), (4,)), 2)
    vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)
    x = torch.randint(0, 256, (30, 5)) / 255
    estimate = pv.log_marginal(vae.model, vae.guide, x, num_samples=200, seed=0)
    assert not estimate.pseudo_likelihood
    compared = pv.compare({"a": (vae.model, vae.guide)}, x, num_samples=200, num_elbo_samples=20)
    assert compared.likelihood == "probability"
