"""The importance weight: against a plain reference for every kind of pair, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.infer.log_weights import PairScorer
from pyro_vae.infer.objectives import scale_latents

N = 7


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


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


# Pairs of every kind. Each returns (model, guide, inputs).


def hierarchical():
    inner, outer, encoder = nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", normal(torch.zeros(2)))
            low = pyro.sample("low", normal(inner(top)))
            pyro.sample("x", normal(outer(low), 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", normal(encoder(x), 0.4))
            pyro.sample("top", normal(low[..., :2], 0.7))

    return model, guide, (torch.randn(N, 5),)


def conditional():
    decoder, encoder = nn.Linear(2 + 3, 5), nn.Linear(5 + 3, 2)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(decoder(torch.cat([z, y], -1))), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(encoder(torch.cat([x, y], -1)), 0.5))

    return model, guide, (torch.randn(N, 5), torch.eye(3)[torch.arange(N) % 3])


def conditional_hierarchical_guide():
    """Concatenation inside the guide breaks under a particle plate and must be tiled."""
    decoder, first, second = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5 + 2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(torch.zeros(2)))
            b = pyro.sample("b", normal(a))
            pyro.sample("x", normal(decoder(torch.cat([a, b], -1))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(first(x)))
            pyro.sample("b", normal(second(torch.cat([x, a], -1))))

    return model, guide, (torch.randn(N, 5),)


def convolutional():
    decoder = pv.networks.ConvDecoder(2, (1, 6, 6), channels=(4, 3))
    encoder = pv.networks.ConvEncoder((1, 6, 6), channels=(3,), features=8)
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (1, 6, 6)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )
    return vae.model, vae.guide, (torch.rand(N, 1, 6, 6).round(),)


def raw_convolution():
    """A decoder that takes exactly four dimensions, and an encoder likewise."""
    decoder, encoder = nn.ConvTranspose2d(2, 1, 4), nn.Conv2d(1, 2, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            assert z.dim() == 2
            logits = decoder(z[:, :, None, None])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(encoder(x)[:, :, 0, 0]))

    return model, guide, (torch.rand(N, 1, 4, 4).round(),)


def several_plates():
    """A latent per pixel beside one per datum; the data's plate is not the innermost."""
    weight = torch.randn(4)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 4, dim=-1):
                noise = pyro.sample("noise", dist.Normal(z * weight, 1.0))
                pyro.sample("x", dist.Normal(noise, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 1.0))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("noise", dist.Normal(x, 0.5))

    return model, guide, (torch.randn(N, 4),)


def discrete():
    probabilities, means = torch.tensor([0.2, 0.5, 0.3]), torch.randn(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probabilities))
            pyro.sample("x", normal(means[k]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x @ means.T))

    return model, guide, (torch.randn(N, 2),)


def auxiliary():
    encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(decoder(z)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", normal(torch.zeros(2)), infer={"is_auxiliary": True})
            z = encoder(x) + 0.5 * noise
            density = z.new_full(z.shape[:-1], -2 * math.log(0.5))
            pyro.sample("z", dist.Delta(z, log_density=density, event_dim=1))

    return model, guide, (torch.randn(N, 5),)


def masked():
    decoder = nn.Linear(2, 5)

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).mask(seen).to_event(1), obs=x)
            with poutine.mask(mask=seen[:, 0]):
                pyro.sample("flag", dist.Bernoulli(0.3), obs=seen[:, 1].float())

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(torch.where(seen, x, 0.0)[:, :2]))

    return model, guide, (torch.randn(N, 5), torch.rand(N, 5) < 0.6)


def not_amortised():
    decoder = nn.Linear(2, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(decoder(z)), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.arange(14.0).reshape(N, 2) / 10)
        scale = pyro.param("scale", torch.ones(N, 2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(loc, scale))

    return model, guide, (torch.randn(N, 5),)


def with_deterministic():
    decoder = nn.Linear(2, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            mean = pyro.deterministic("mean", decoder(z), event_dim=1)
            pyro.sample("x", normal(mean), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x[:, :2]))

    return model, guide, (torch.randn(N, 5),)


PAIRS = [
    hierarchical,
    conditional,
    conditional_hierarchical_guide,
    convolutional,
    raw_convolution,
    several_plates,
    discrete,
    masked,
    not_amortised,
    with_deterministic,
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_weights_are_those_of_plain_calls(pair):
    model, guide, inputs = pair()
    with torch.no_grad():
        scorer = PairScorer(model, guide, inputs)
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
    assert scorer.under_model.strategy == "under_vmap"


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
        scorer = PairScorer(model, guide, inputs)
        latents, log_proposal = scorer.propose(5)
        expected = normal(encoder(inputs[0]), 0.5).log_prob(latents["z"]).double()
    torch.testing.assert_close(log_proposal, expected, rtol=1e-5, atol=1e-5)


def test_auxiliary_variable_that_is_mixed_over_is_refused():
    model, _, inputs = auxiliary()

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", normal(torch.zeros(2)), infer={"is_auxiliary": True})
            pyro.sample("z", normal(noise))

    with pytest.raises(InputError, match="'noise'"):
        pv.log_weights(model, guide, inputs, num_samples=2)


def test_point_mass_is_refused():
    model, _, inputs = auxiliary()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    with pytest.raises(InputError, match="'z'"):
        pv.log_weights(model, guide, inputs, num_samples=2)


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
    scorer = PairScorer(subsampled_model, subsampled_guide, (x,))
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


@pytest.mark.parametrize("scale", [0.5, torch.linspace(0.5, 1.0, N)], ids=["number", "per datum"])
def test_a_scale_of_the_users_own_is_refused(scale):
    model, guide, inputs = hierarchical()

    def scaled(x):
        with poutine.scale(scale=scale):
            model(x)

    with pytest.raises(InputError, match=r"scale on site '(top|low|x)'.*poutine.scale"):
        pv.log_weights(scaled, guide, inputs, num_samples=2)


def test_sites_the_data_share_are_refused():
    model, guide, inputs = hierarchical()

    def shared_latent(x):
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        model(x)

    def shared_guide(x):
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        guide(x)

    def factor(x):
        model(x)
        pyro.factor("penalty", torch.tensor(1.0))

    def loop(x):
        for index in pyro.plate("data", len(x)):
            pyro.sample(f"z{index}", normal(torch.zeros(2)))

    with pytest.raises(InputError, match="latent 'shared'"):
        pv.log_weights(shared_latent, shared_guide, inputs, num_samples=2)
    with pytest.raises(InputError, match="observed site 'penalty'"):
        pv.log_weights(factor, guide, inputs, num_samples=2)
    with pytest.raises(InputError, match="latent 'z0'"):
        pv.log_weights(loop, loop, inputs, num_samples=2)


def test_latents_of_one_side_only_are_refused():
    model, guide, inputs = hierarchical()

    def surplus(x):
        guide(x)
        with pyro.plate("more", 3, dim=-2), pyro.plate("data_", len(x), dim=-1):
            pyro.sample("extra", dist.Normal(0.0, 1.0))

    def too_few(x):
        with pyro.plate("data", len(x)):
            pyro.sample("low", normal(x[:, :3]))

    with pytest.raises(InputError, match="'top' is missing"):
        pv.log_weights(model, too_few, inputs, num_samples=2)
    with pytest.raises(InputError, match="'extra' is not"):
        pv.log_weights(model, surplus, inputs, num_samples=2)
    with pytest.raises(InputError, match="draws a latent"):
        pv.log_weights(lambda x: None, lambda x: None, inputs, num_samples=2)


def test_a_plate_that_subsamples_the_batch_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", normal(x[index]))

    with pytest.raises(InputError, match=r"'z'.*7 data.*got 3"):
        pv.log_weights(model, guide, torch.randn(N, 2), num_samples=2)


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
    scorer = PairScorer(model, guide, inputs)
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
    scorer = PairScorer(model, guide, inputs)
    latents, _ = scorer.propose(6)
    terms = scorer.score(latents)
    assert scorer.under_model.strategy == "tiled"
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


def test_a_site_that_broadcast_over_the_data_twice_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)  # z is (N, 1): the log-density is (N, N)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, None], 0.7).to_event(1))

    with pyro.validation_enabled(False), pytest.raises(pv.InputError, match="squeeze"):
        pv.log_weights(model, guide, torch.randn(6), num_samples=2)


def test_a_model_that_observes_nothing_is_refused():
    def function(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))

    with pytest.raises(pv.InputError, match="observes data"):
        pv.log_weights(function, function, torch.randn(6), num_samples=2)
