"""The importance weight: against a plain reference for every kind of pair."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from weight_pairs import (
    PAIRS,
    N,
    auxiliary,
    convolutional,
    discrete,
    hierarchical,
    normal,
    not_amortised,
)

import pyro_vae as pv
from pyro_vae.beta import scale_latents
from pyro_vae.errors import InputError
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.weights.particles import Particles


def reference(function, inputs, latents, plate="data"):
    """Sum the log-probabilities of all sites per datum, one plain Pyro call per particle."""
    rows = []
    for index in range(len(next(iter(latents.values())))):
        given = {name: value[index] for name, value in latents.items()}
        trace = poutine.trace(poutine.condition(function, data=given)).get_trace(*inputs)
        row = torch.zeros(len(inputs[0]), dtype=torch.float64)
        for site in trace.nodes.values():
            if site["type"] != "sample" or site["name"] in (plate, "pixels"):
                continue
            dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == plate)
            log_prob = site["fn"].log_prob(site["value"])
            if site["infer"].get("_deterministic"):
                continue
            if site["mask"] is not None:
                log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, 0.0)
            row += log_prob.double().movedim(dim, 0).reshape(len(inputs[0]), -1).sum(1)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_weights_are_those_of_plain_calls(pair):
    model, guide, inputs = pair()
    with torch.no_grad():
        scorer = Particles(OpenedPair(model, guide, inputs))
        latents, log_proposal = scorer.propose(5)
        log_likelihood, log_prior = scorer.score(latents)
        joint, proposal = reference(model, inputs, latents), reference(guide, inputs, latents)
    assert log_proposal.shape == log_prior.shape == (5, N)
    assert log_proposal.dtype == log_prior.dtype == log_likelihood.dtype == torch.float64
    torch.testing.assert_close(log_likelihood + log_prior, joint, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_proposal, proposal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        scorer.score_proposal(latents).detach(), proposal, rtol=1e-5, atol=1e-5
    )
    assert scorer.pair.knowledge.ways["model"] == "_score_under_vmap"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_particles_differ_and_data_are_their_own(pair):
    """Permuted data give permuted weights' averages; particles are drawn independently."""
    model, guide, inputs = pair()
    weights = pv.log_weights(model, guide, inputs, num_samples=64)
    assert weights.shape == (64, N)
    assert (weights.std(0) > 0).all()
    if pair is not_amortised:
        return
    turned = tuple(value.flip(0) for value in inputs)
    again = pv.log_weights(model, guide, turned, num_samples=64).flip(1)
    error = (weights.var(0) / 64 + again.var(0) / 64).sqrt()
    assert ((weights.mean(0) - again.mean(0)).abs() < 5 * error + 1e-6).all()


def test_auxiliary_draws_become_latents():
    model, guide, inputs = auxiliary()
    encoder = guide.__closure__[0].cell_contents
    with torch.no_grad():
        scorer = Particles(OpenedPair(model, guide, inputs))
        latents, log_proposal = scorer.propose(5)
        expected = normal(encoder(inputs[0]), 0.5).log_prob(latents["z"]).double()
    torch.testing.assert_close(log_proposal, expected, rtol=1e-5, atol=1e-5)


def test_exact_posterior_of_a_discrete_latent_gives_equal_weights():
    probabilities, means = torch.tensor([0.2, 0.8]), torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(probabilities[1])).long()
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)

    def joint(x):
        return probabilities.log() + dist.Normal(means, 1.0).log_prob(x[:, None])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(joint(x).softmax(1)[:, 1]))

    x = torch.randn(N)
    weights = pv.log_weights(model, guide, x, num_samples=20)
    exact = joint(x).logsumexp(1).double().expand(20, N)
    torch.testing.assert_close(weights, exact, rtol=1e-5, atol=1e-5)


def test_scales_of_plates_and_beta_are_taken_out():
    model, guide, inputs = hierarchical()

    def subsampled_model(x):
        with pyro.plate("data", 60_000, subsample=torch.arange(len(x))):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z), obs=x)

    def subsampled_guide(x):
        with pyro.plate("data", 60_000, subsample=torch.arange(len(x))):
            pyro.sample("z", normal(x))

    x = torch.randn(N, 2)
    scorer = Particles(OpenedPair(subsampled_model, subsampled_guide, (x,)))
    latents, log_proposal = scorer.propose(4)
    z = latents["z"]
    torch.testing.assert_close(log_proposal, normal(x).log_prob(z).double())
    torch.testing.assert_close(scorer.score(latents)[0], normal(z).log_prob(x).double())

    pyro.set_rng_seed(1)
    plain = pv.log_weights(model, guide, inputs, num_samples=3)
    for beta in (0.0, 0.5, torch.tensor(0.25)):
        pyro.set_rng_seed(1)
        scaled = pv.log_weights(
            scale_latents(model, beta), scale_latents(guide, beta), inputs, num_samples=3
        )
        torch.testing.assert_close(scaled, plain)


def test_other_plate_names_are_found():
    def model(x):
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", normal(x))

    x = torch.randn(N, 2)
    assert pv.log_weights(model, guide, x, num_samples=2, plate="batch").shape == (2, N)
    with pytest.raises(InputError, match="inside the data plate 'data'"):
        pv.log_weights(model, guide, x, num_samples=2)


def test_a_model_that_mixes_its_data_is_called_particle_by_particle():
    """Control flow on values can't be batched; the result stays exact, and says it is slow."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            scale = 1.0 if z.mean().item() > 0 else 2.0
            pyro.sample("x", normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x))

    inputs = (torch.randn(N, 2),)
    scorer = Particles(OpenedPair(model, guide, inputs))
    latents, _ = scorer.propose(20)
    with pytest.warns(UserWarning, match="model of this pair"):
        terms = scorer.score(latents)
    torch.testing.assert_close(sum(terms), reference(model, inputs, latents), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_batching_rule_is_tiled():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            # .tolist() has no batching rule; the number of data does not matter to it.
            pyro.sample("x", normal(torch.tensor(z.tolist())), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x))

    inputs = (torch.randn(N, 2),)
    scorer = Particles(OpenedPair(model, guide, inputs))
    latents, _ = scorer.propose(6)
    terms = scorer.score(latents)
    assert scorer.pair.knowledge.ways["model"] == "_score_tiled"
    torch.testing.assert_close(sum(terms), reference(model, inputs, latents), rtol=1e-5, atol=1e-5)


def test_gradients_flow_to_the_parameters():
    model, guide, inputs = hierarchical()
    encoder = guide.__closure__[0].cell_contents
    weights = pv.log_weights(model, guide, inputs, num_samples=8)
    (gradient,) = torch.autograd.grad(weights.logsumexp(0).sum(), encoder.weight)
    assert gradient.abs().sum() > 0


def test_one_sample_and_no_sample():
    model, guide, inputs = hierarchical()
    assert pv.log_weights(model, guide, inputs, num_samples=1).shape == (1, N)
    with pytest.raises(InputError, match="at least 1"):
        pv.log_weights(model, guide, inputs, num_samples=0)


def test_a_seed_gives_the_same_weights():
    model, guide, inputs = hierarchical()
    rows = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        rows.append(pv.log_weights(model, guide, inputs, num_samples=4))
    assert torch.equal(rows[0], rows[1])


def test_modes_and_global_state_are_kept():
    model, guide, inputs = convolutional()
    vae = model.__self__
    vae.train()
    validation = pyro.settings.get("validate_poutine"), torch.is_grad_enabled()
    pv.log_weights(model, guide, inputs, num_samples=3)
    assert vae.training
    assert (pyro.settings.get("validate_poutine"), torch.is_grad_enabled()) == validation


def test_a_latent_marked_for_enumeration_is_drawn_and_weighed():
    """Pyro sums over it under its own objective alone; weights take the guide's draws."""
    model, guide, inputs = discrete()

    marked = poutine.infer_config(guide, lambda site: {"enumerate": "parallel"})
    found = []
    for function in (guide, marked):
        pyro.set_rng_seed(3)
        found.append(pv.log_weights(model, function, inputs, num_samples=20))
    assert torch.equal(*found)
