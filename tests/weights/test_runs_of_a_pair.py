"""How often a public call runs model and guide: to inspect, to draw and score, to check these."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae import evaluation, tasks

NUM_DATA = 8
X = torch.arange(NUM_DATA * 5).reshape(NUM_DATA, 5).remainder(3).clamp(max=1).float()


@pytest.fixture
def counted():
    """A small VAE's pair, and how often each of its functions has run."""
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (4,)), (5,)),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((5,), (4,)), 2),
    )
    runs = {"model": 0, "guide": 0}

    def model(x):
        runs["model"] += 1
        return vae.model(x)

    def guide(x):
        runs["guide"] += 1
        return vae.guide(x)

    return vae, model, guide, runs


# What each call does at its smallest: what it adds for more samples, steps or draws is left out.
CALLS = {
    "log_marginal": (3, 3, lambda _, *pair: pv.log_marginal(*pair, X, num_samples=100, seed=0)),
    "inference_gaps": (
        143,  # one at each of 100 steps
        6,  # the refined guide runs in its place
        lambda vae, *pair: evaluation.inference_gaps(
            *pair,
            X,
            family=vae.variational_family,
            num_samples=100,
            num_importance_samples=100,
            max_steps=50,
            seed=0,
        ),
    ),
    "posterior_divergence": (
        57,  # the prior's draws are taken one by one: 50 of them
        9,
        lambda _, *pair: evaluation.posterior_divergence(*pair, X, num_points=129, seed=0),
    ),
    "representation": (
        4,
        9,
        lambda _, *pair: evaluation.representation(*pair, X, num_samples=2, seed=0),
    ),
    "calibration": (
        5,
        4,
        lambda _, *pair: evaluation.calibration(*pair, X, num_data=100, num_draws=19, seed=0),
    ),
    "complete": (
        31,  # 16 of them for the first fill, three for what the prior proposes
        9,
        lambda _, *pair: tasks.complete(*pair, X, X > 0, num_steps=1, num_draws=1, seed=0),
    ),
    "encode": (0, 2, lambda _, model, guide: tasks.encode(guide, X)),
    "decode": (2, 0, lambda _, model, guide: tasks.decode(model, torch.zeros(NUM_DATA, 2), X)),
    "reconstruct": (2, 2, lambda _, *pair: tasks.reconstruct(*pair, X, seed=0)),
}


@pytest.mark.filterwarnings("ignore:.*Pareto k")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_its_pair_no_more_often(counted, name):
    vae, model, guide, runs = counted
    most_of_model, most_of_guide, call = CALLS[name]
    call(vae, model, guide)
    assert runs["model"] <= most_of_model
    assert runs["guide"] <= most_of_guide
