"""Components together: matching ones train, others are refused by name."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from components import (
    DATA_SHAPE,
    FAMILIES,
    LIKELIHOODS,
    SUPPORT,
    decoder_dim,
    digits,
    encoder,
    likelihood_digits,
)
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae import guides, likelihoods, priors
from pyro_vae.errors import InputError
from pyro_vae.networks import MLPDecoder, MLPEncoder
from pyro_vae.vae import VAE

TRAINED_PRIORS = {
    "StandardNormal": priors.StandardNormal,
    "GaussianMixture": functools.partial(priors.GaussianMixture, num_components=5),
    "FlowPrior": functools.partial(priors.FlowPrior, num_layers=2, hidden=(16,)),
    "VonMisesFisher": functools.partial(priors.VonMisesFisher, learn_concentration=True),
    "HypersphericalUniform": priors.HypersphericalUniform,
    "Beta": functools.partial(priors.Beta, learn_concentrations=True),
}
MATCHING = [
    (prior, family)
    for prior, make in TRAINED_PRIORS.items()
    for family in FAMILIES
    if make(2).latent_support == SUPPORT[family]
] + [("VampPrior", family) for family in FAMILIES]
# Each prior and each family once; the others take too long for every day.
QUICK = {
    ("StandardNormal", "NeuralSplineFlow"),
    ("GaussianMixture", "InverseAutoregressiveFlow"),
    ("FlowPrior", "MixtureOfNormals"),
    ("VampPrior", "FullRankNormal"),
    ("VonMisesFisher", "VonMisesFisher"),
    ("Beta", "Beta"),
}


def make_pair(prior_name, family_name, latent_dim=4):
    torch.manual_seed(0)
    family = FAMILIES[family_name](MLPEncoder((64,), (32,)), latent_dim)
    if prior_name == "VampPrior":
        prior = priors.VampPrior(family, (64,), num_pseudo_inputs=10, learn_weights=True)
        prior.start_at_data(digits())
    else:
        prior = TRAINED_PRIORS[prior_name](latent_dim)
    likelihood = likelihoods.Bernoulli(MLPDecoder(latent_dim, (32,)), (64,))
    likelihood.start_at_mean(digits().mean(0))
    return VAE(prior, likelihood, family)


def train(vae, steps=40, data=None):
    """Train by plain Pyro and return the losses per datum."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.2 / steps}), Trace_ELBO())
    batches = (digits() if data is None else data).split(64)
    losses = [svi.step(batches[step % len(batches)]) / 64 for step in range(steps)]
    pyro.clear_param_store()
    return torch.tensor(losses)


def assert_trains(vae, steps=40, data=None):
    before = copy.deepcopy(dict(vae.named_parameters()))
    losses = train(vae, steps, data)
    assert losses.isfinite().all()
    assert losses[-16:].mean() < losses[:16].mean()
    for name, parameter in vae.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("prior", "family"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in MATCHING],
)
def test_matching_pair_trains(prior, family):
    assert_trains(make_pair(prior, family), steps=40 if (prior, family) in QUICK else 60)


# A variant of a likelihood (its gradients are looked at in test_components.py) with the slow part.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if " " in name else ()) for name in LIKELIHOODS],
)
def test_likelihood_trains(name):
    torch.manual_seed(0)
    likelihood = LIKELIHOODS[name](MLPDecoder(decoder_dim(name, 4), (32,)), (64,))
    data = likelihood_digits(likelihood)
    likelihood.check(data)
    likelihood.start_at_mean(data.mean(0))
    family = guides.MeanFieldNormal(MLPEncoder((64,), (32,)), 4)
    steps = 60 if " " in name else 40
    assert_trains(VAE(priors.StandardNormal(4), likelihood, family), steps, data)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectorised_particles_estimate_the_same_elbo(family):
    prior = {"unit sphere": "HypersphericalUniform", "unit interval": "Beta"}.get(
        SUPPORT[family], "StandardNormal"
    )
    vae, x, num_draws = make_pair(prior, family), digits()[:2], 1000
    pyro.set_rng_seed(0)
    with torch.no_grad():
        q, p = vae.variational_family(x), vae.prior()
        z = q.rsample((num_draws,))
        terms = vae.likelihood(z).log_prob(x) + p.log_prob(z) - q.log_prob(z.clone())
        elbo = Trace_ELBO(num_draws, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.loss(vae.model, vae.guide, x)
    per_sample = terms.sum(-1)
    # Two independent estimates of the same spread.
    standard_error = per_sample.std() * math.sqrt(2 / num_draws)
    assert abs(-loss - per_sample.mean()) < 5 * standard_error + 1e-6


def test_mismatching_supports_are_refused_naming_the_families_that_match():
    for prior_name, make in TRAINED_PRIORS.items():
        prior = make(2)
        matching = {name for name, support in SUPPORT.items() if support == prior.latent_support}
        likelihood = likelihoods.Bernoulli(MLPDecoder(2, (4,)), DATA_SHAPE)
        for family_name in set(FAMILIES) - matching:
            family = FAMILIES[family_name](encoder(), 2)
            with pytest.raises(InputError, match=f"for {prior_name}, got {family_name}") as error:
                VAE(prior, likelihood, family)
            named = str(error.value).rsplit("use ", 1)[1].split(" or ")
            assert set(named) == matching


def test_prior_of_three_lines_trains():
    class Laplace(priors.Prior):
        def __init__(self, latent_dim):
            super().__init__()
            self.latent_dim, self.log_scale = latent_dim, nn.Parameter(torch.zeros(latent_dim))

        def forward(self):
            return dist.Laplace(torch.zeros_like(self.log_scale), self.log_scale.exp()).to_event(1)

    vae = make_pair("StandardNormal", "MeanFieldNormal")
    assert_trains(VAE(Laplace(4), vae.likelihood, vae.variational_family))


def test_lambda_prior_trains():
    vae = make_pair("StandardNormal", "MeanFieldNormal")
    prior = lambda: dist.Laplace(torch.zeros(4), 1.0).to_event(1)  # noqa: E731 (what is tested)
    assert_trains(VAE(prior, vae.likelihood, vae.variational_family))
