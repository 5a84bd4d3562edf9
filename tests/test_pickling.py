"""What a run leaves can be pickled: by pickle, by torch.save and by what rests on them."""

import io
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from torch import nn
from torch.utils._pytree import tree_map

import pyro_vae as pv
from pyro_vae.infer.checkpoint import Interrupted

PIXELS = 6


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def plain(value):
    """Return tensors, dicts of them and the like as NumPy can compare them."""
    return tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf, value)


@pytest.fixture(scope="module")
def x():
    return torch.bernoulli(torch.rand(20, PIXELS, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def vae():
    decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    decoder.out_shape = (4,)
    family = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((PIXELS,), (4,)), 2)
    prior = pv.priors.VampPrior(family, (PIXELS,), num_pseudo_inputs=3)  # one module in two parts
    return pv.VAE(prior, pv.likelihoods.Bernoulli(decoder, (PIXELS,)), family)


@pytest.mark.parametrize("carry", [through_pickle, through_torch])
def test_a_vae_that_was_used_gives_the_same_numbers_elsewhere(vae, x, carry):
    def estimate(of):
        return pv.log_marginal(of.model, of.guide, x, num_samples=5, seed=0).log_prob

    pv.fit(vae.model, vae.guide, x, epochs=1)
    expected = estimate(vae)
    copy = carry(vae)
    assert torch.equal(estimate(copy), expected)
    # It is another VAE to Pyro: training goes on in each without the other.
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    pv.fit(copy.model, copy.guide, x, epochs=1)
    assert all(map(torch.equal, vae.parameters(), before))
    pv.fit(vae.model, vae.guide, x, epochs=1)  # and Pyro still knows the first one
    assert not all(map(torch.equal, vae.parameters(), before))


def test_results_come_back_as_they_were(vae, x):
    fitted = pv.fit(vae.model, vae.guide, x, epochs=2, validation=x)
    estimate = pv.log_marginal(vae.model, vae.guide, x, num_samples=5, seed=0)
    for result in (fitted, estimate):
        copy = through_pickle(result)
        for field in fields(result):
            found, expected = (plain(getattr(each, field.name)) for each in (copy, result))
            np.testing.assert_equal(found, expected)


def test_an_interruption_crosses_processes():
    error = Interrupted(15, Path("folder"))
    copy = through_pickle(error)
    assert (copy.number, copy.folder, str(copy)) == (15, Path("folder"), str(error))
    assert "SIGTERM" in str(copy)


def test_a_fitted_transformer_gives_the_same_codes_elsewhere():
    X = np.random.default_rng(0).normal(size=(30, 5))
    transformer = pv.VAETransformer(2, hidden=(4,), epochs=1, num_samples=10).fit(X)
    transformer.score(X)
    copy = through_pickle(transformer)
    np.testing.assert_array_equal(copy.transform(X), transformer.transform(X))
    assert copy.score(X) == transformer.score(X)


def test_cross_validation_hands_out_the_fitted_pipelines():
    X = np.random.default_rng(0).normal(size=(30, 5))
    pipeline = make_pipeline(pv.VAETransformer(2, hidden=(4,), epochs=1), LogisticRegression())
    found = cross_validate(
        pipeline, X, X[:, 0] > 0, cv=2, n_jobs=1, return_estimator=True, error_score="raise"
    )
    for estimator in found["estimator"]:
        copy = through_pickle(estimator)
        np.testing.assert_array_equal(copy.predict(X), estimator.predict(X))


def test_pyro_still_finds_the_parameters_of_a_pickled_vae(vae, x):
    pv.fit(vae.model, vae.guide, x, epochs=1)
    pickle.dumps(vae)
    store = pyro.get_param_store()
    for name, parameter in vae.likelihood.named_parameters():
        found = store[f"{vae.name}.likelihood$$${name}"]
        assert found.unconstrained() is parameter
