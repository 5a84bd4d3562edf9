"""Objectives of ``fit``: any ELBO of Pyro trains, and its bound is that of one draw."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from small_vae import PIXELS, make_vae
from training_pairs import changed, make_data

import pyro_vae as pv
from pyro_vae.infer import AnalyticKL, TraceBound


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(num_particles=2),
        pytest.param(Trace_ELBO(num_particles=2, vectorize_particles=True), marks=pytest.mark.slow),
        pytest.param(TraceMeanField_ELBO(), marks=pytest.mark.slow),
        TraceGraph_ELBO(),
    ],
    ids=["particles", "vectorised", "mean-field", "graph"],
)
def test_any_elbo_of_pyro_is_an_objective(objective):
    vae, x = make_vae(), make_data()
    before = copy.deepcopy(vae.state_dict())
    result = pv.fit(
        vae.model,
        vae.guide,
        x,
        epochs=24,
        batch_size=16,
        learning_rate=0.05,
        warmup_epochs=6,
        seed=0,
        objective=objective,
        validation=x,
    )
    assert changed(vae, before) == set(before)
    # The best model that ignores its latents gives every pixel probability 1/2.
    assert result.history["validation_elbo"][-1] > PIXELS * math.log(0.5) + 0.1
    assert "_get_trace" not in vars(objective)  # the recording hook is gone


def test_enumerated_latents_train():
    """Two kinds of data and one binary latent, summed out: the mixture is found."""
    x = make_data()

    def model(x):
        logits = pyro.param("logits", torch.linspace(-0.1, 0.1, 2)[:, None].repeat(1, PIXELS))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.5))).long()
            pyro.sample("x", dist.Bernoulli(logits=logits[kind]).to_event(1), obs=x)

    @pyro.infer.config_enumerate
    def guide(x):
        weight = pyro.param("weight", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(logits=weight * (x - 0.5).sum(-1)))

    objective = TraceEnum_ELBO(max_plate_nesting=1)
    result = pv.fit(
        model,
        guide,
        x,
        epochs=30,
        batch_size=20,
        learning_rate=0.2,
        objective=objective,
        validation=x,
        seed=0,
    )
    assert np.isnan(result.history["train_elbo"]).all()  # no single draw to split
    # The truth: one of two kinds, then six pixels that agree with it with probability 0.9.
    entropy = math.log(2) - PIXELS * (0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert result.history["validation_elbo"][-1] > -entropy - 1.0


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True), "use IWAE"),
        (JitTrace_ELBO(), "use Trace_ELBO$"),
    ],
)
def test_an_elbo_that_training_cannot_take_is_refused_by_name(objective, message):
    vae = make_vae()
    with pytest.raises(pv.InputError, match=message):
        pv.fit(vae.model, vae.guide, make_data(), objective=objective, epochs=1)


def test_training_bound_with_many_particles_is_per_particle():
    vae, x = make_vae(), make_data()
    bounds = [
        pv.fit(
            vae.model,
            vae.guide,
            x,
            epochs=1,
            batch_size=40,
            learning_rate=1e-12,
            seed=0,
            objective=Trace_ELBO(num_particles=particles, vectorize_particles=True),
        ).history["train_elbo"][0]
        for particles in (1, 200)
    ]
    with torch.no_grad():
        weights = pv.log_weights(vae.model, vae.guide, x, num_samples=200).mean(1)
    standard_error = weights.std().item() * math.sqrt(1 / 200 + 1 / 200)
    assert abs(bounds[1] - weights.mean().item()) < 5 * standard_error
    assert abs(bounds[0] - weights.mean().item()) < 5 * weights.std().item()


def test_by_default_rates_are_closed_forms_where_they_can_be():
    x = torch.bernoulli(torch.full((40, PIXELS), 0.5))
    found = {}
    for name, objective in {
        "default": None, "closed": AnalyticKL(), "drawn": Trace_ELBO(), "bound": TraceBound()
    }.items():  # fmt: skip
        vae = make_vae(0)
        result = pv.fit(
            vae.model, vae.guide, x, epochs=2, objective=objective, beta=2.0, seed=0, compile=False
        )
        found[name] = result.history["train_rate"], vae.state_dict()
    for left, right in (("default", "closed"), ("drawn", "bound")):
        np.testing.assert_array_equal(found[left][0], found[right][0])
        torch.testing.assert_close(found[left][1], found[right][1], rtol=0, atol=0)
    assert (found["default"][0] != found["drawn"][0]).all()


def own_pair(latent, *, scale=None):
    """A pair whose guide draws from ``latent``, with a scale of the user's own in the model alone."""
    pyro.clear_param_store()

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale or 1.0):
                z = pyro.sample(
                    "z", dist.Normal(0.0, 1.0) if latent != "bits" else dist.Bernoulli(0.5)
                )
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.Normal(loc, 1.0) if latent != "bits" else dist.Bernoulli(loc.sigmoid())
            )

    return model, guide


@pytest.mark.parametrize(("latent", "scale"), [("bits", None), ("real", 0.25)])
def test_what_has_no_closed_form_is_trained_by_draws_as_before(latent, scale):
    x = torch.linspace(-1, 2, 30)
    found = []
    for objective in (None, Trace_ELBO()):
        result = pv.fit(
            *own_pair(latent, scale=scale), x, epochs=3, batch_size=10, seed=0, objective=objective
        )
        found.append((result.history["train_bound"], pyro.param("loc").detach()))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
