"""Guides compared against one model that is held fixed."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared_pairs import QUICK, bits, pair_of, small_vae, values_of
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import InputError


def vamp(guide):
    return pv.priors.VampPrior(guide, (6,), num_pseudo_inputs=4)


def test_a_held_model_keeps_every_bit_while_guides_train():
    first = small_vae(prior=vamp)
    second = small_vae(family="FullRankNormal")
    first.likelihood.decoder.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in first.named_parameters()}
    before = [values_of(vae) for vae in (first, second)]
    x = bits(40)
    comparison = pv.compare(
        {"vamp": pair_of(first), "full-rank": pair_of(second)},
        x,
        train=x,
        hold="model",
        fit_options={"epochs": 3, "batch_size": 10, "learning_rate": 1e-2},
        **QUICK,
    )
    for vae, kept in zip((first, second), before, strict=True):
        for name, value in vae.state_dict().items():
            assert torch.equal(kept[name], value) != name.startswith("variational_family."), name
    assert flags == {name: p.requires_grad for name, p in first.named_parameters()}
    assert first.training
    # One posterior: both estimates of log p(x) are of the same number.
    assert comparison.hold == "model"
    difference = comparison.difference("vamp", to="full-rank")
    assert abs(difference.mean) < 5 * difference.monte_carlo_standard_error + 1e-6
    pair = comparison.pairs["vamp"]
    assert pair.num_parameters == pair.num_guide_parameters
    assert "one frozen model" in str(comparison)


def plain_pair(size, shared=False):
    decoder, encoder = nn.Linear(2, 6), nn.Linear(6, 2 * size)
    scale = torch.tensor(1.0)

    def model(x):
        pyro.module(f"decoder{size}", decoder)
        noise = pyro.param(f"noise{size}", scale, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            mean = encoder(x)[:, :2] if shared else torch.zeros(2)
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"encoder{size}", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[:, :2], 1.0).to_event(1))

    return model, guide, decoder, encoder


def test_a_plain_function_is_frozen_in_place_and_given_back():
    model, guide, decoder, encoder = plain_pair(1)
    other = plain_pair(2)
    x = 0.1 * torch.randn(30, 6)
    pv.fit(model, guide, x, epochs=1, progress=False)
    kept = [copy.deepcopy(decoder.state_dict()), copy.deepcopy(encoder.state_dict())]
    noise = pyro.param("noise1").clone()
    pairs = {"a": (model, guide), "b": other[:2]}
    pv.compare(pairs, x, train=x, hold="model", fit_options={"epochs": 2, "device": "cpu"}, **QUICK)
    assert torch.equal(decoder.weight, kept[0]["weight"])
    assert torch.equal(pyro.param("noise1"), noise)
    assert not torch.equal(encoder.weight, kept[1]["weight"])
    assert decoder.weight.requires_grad
    assert pyro.param("noise1").unconstrained().requires_grad
    # Free again, it trains again.
    pv.fit(model, guide, x, epochs=1, progress=False)
    assert not torch.equal(decoder.weight, kept[0]["weight"])


def test_a_model_that_leans_on_the_guide_is_not_frozen():
    model, guide, decoder, _ = plain_pair(1, shared=True)
    x = 0.1 * torch.randn(30, 6)
    with pytest.raises(InputError, match="shares no parameters with the guide of 'a'"):
        pv.compare({"a": (model, guide)}, x, train=x, hold="model", **QUICK)
    assert decoder.weight.requires_grad


def test_a_model_that_pyro_knows_in_part_is_not_frozen():
    guide = plain_pair(1)[1]
    unnamed = nn.Linear(6, 6)

    def beyond(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = unnamed(torch.cat([z, z, z], 1))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    with pytest.raises(InputError, match="trainable tensors Pyro knows, got unknown ones"):
        pv.compare({"a": (beyond, guide)}, 0.1 * torch.randn(9, 6), hold="model", **QUICK)
