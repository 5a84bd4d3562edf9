"""The inference gap split in two: against closed forms, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation import gap_decomposition

F64 = torch.float64
NUM_DATA, NUM_PIXELS, NUM_LATENTS, VARIANCE = 16, 6, 4, 0.5
# Of two pairs of latents. The best diagonal q has a tail index near it, so its weights are usable.
CORRELATION = 0.3


class LinearFamily(nn.Module):
    """Normals whose mean is linear in x and whose covariance is shared, starting at a given one."""

    def __init__(self, weights, bias, factor, diagonal):
        super().__init__()
        self.mean = nn.Linear(*weights.shape, dtype=F64)
        self.mean.weight.data, self.mean.bias.data = weights.T.contiguous(), bias.clone()
        self.register_buffer("factor", factor)
        self.diagonal = diagonal

    def encode(self, x):
        loc = self.mean(x)
        raw = self.factor.tril(-1) + self.factor.diagonal().log().diag_embed()
        return {"loc": loc, "raw": raw.expand(len(x), *raw.shape)}

    def distribution(self, parameters):
        raw = parameters["raw"]
        scale = raw.diagonal(dim1=-2, dim2=-1).exp()
        if self.diagonal:
            return dist.Normal(parameters["loc"], scale).to_event(1)
        factor = raw.tril(-1) + scale.diag_embed()
        return dist.MultivariateNormal(parameters["loc"], scale_tril=factor)


class Problem:
    """Probabilistic PCA with a correlated posterior."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        random = torch.randn(NUM_PIXELS, NUM_LATENTS, dtype=F64, generator=generator)
        eye = torch.eye(NUM_LATENTS, dtype=F64)
        self.M = 3 * (eye + CORRELATION * eye[[1, 0, 3, 2]])
        W = torch.linalg.qr(random).Q @ torch.linalg.cholesky(self.M - VARIANCE * eye).T
        self.W = W
        self.covariance = VARIANCE * torch.linalg.inv(self.M)
        self.to_mean = W @ torch.linalg.inv(self.M)
        noise = VARIANCE * torch.eye(NUM_PIXELS, dtype=F64)
        marginal = dist.MultivariateNormal(torch.zeros(NUM_PIXELS, dtype=F64), W @ W.T + noise)
        self.x = marginal.sample((NUM_DATA,))
        self.log_prob = marginal.log_prob(self.x)
        self.best_diagonal_gap = (self.M.diagonal().log().sum() - torch.logdet(self.M)) / 2

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_LATENTS, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T, math.sqrt(VARIANCE)).to_event(1), obs=x)

    def family(self, *, diagonal, shift=0.3, scale=1.2):
        """The best member of the family, its mean shifted and its covariance scaled."""
        factor = torch.linalg.cholesky(self.covariance)
        if diagonal:
            factor = (VARIANCE / self.M.diagonal()).sqrt().diag_embed()
        bias = torch.full((NUM_LATENTS,), shift, dtype=F64)
        return LinearFamily(self.to_mean, bias, math.sqrt(scale) * factor, diagonal)


def guide_of(family):
    def guide(x):
        pyro.module("family", family)
        with pyro.plate("data", len(x)):
            pyro.sample("z", family.distribution(family.encode(x)))

    return guide


def gaps_of(problem, family, **options):
    options = {"seed": 0, **options}
    return pv.evaluation.inference_gaps(
        problem.model, guide_of(family), problem.x, family=family, **options
    )


def within_error(estimate, exact, standard_error):
    return ((estimate - exact).abs() < 5 * standard_error + 1e-6).all()


@pytest.fixture(scope="module")
def problem():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Problem()


@pytest.fixture(scope="module")
def mean_field(problem):
    """Its start is so near that looks every 20 steps suffice; the slow tests keep those of 50."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap_decomposition, "_WINDOW", 20)
        return gaps_of(problem, problem.family(diagonal=True), tolerance=3.0)


def mean_of(gaps, name):
    gap = pv.evaluation.elbo.PerDatum(getattr(gaps, name), getattr(gaps, f"{name}_standard_error"))
    return gap.mean, gap.mean_standard_error


def test_mean_field_misses_by_the_closed_form(problem, mean_field):
    exact = problem.best_diagonal_gap
    assert math.isclose(exact, -math.log(1 - CORRELATION**2), rel_tol=1e-6)
    error = mean_field.approximation_standard_error
    assert within_error(mean_field.approximation, exact, error)
    mean, error = mean_of(mean_field, "approximation")
    assert error < 0.1 * exact
    assert abs(mean - exact) < 5 * error + 1e-6
    assert mean_field.converged


@pytest.mark.slow
def test_full_rank_misses_nothing_and_the_encoder_all(problem):
    family = problem.family(diagonal=False)
    gaps = gaps_of(problem, family)
    mean, error = mean_of(gaps, "approximation")
    assert abs(mean) < 5 * error + 1e-6
    assert error < 1e-3
    q = family.distribution(family.encode(problem.x))
    posterior = dist.MultivariateNormal(problem.x @ problem.to_mean, problem.covariance)
    exact = torch.distributions.kl_divergence(q, posterior)
    assert within_error(gaps.amortization, exact, gaps.amortization_standard_error + 1e-3)
    assert within_error(gaps.total, exact, gaps.total_standard_error)


def test_the_split_adds_up(problem, mean_field):
    parts = mean_field.approximation + mean_field.amortization
    torch.testing.assert_close(parts, mean_field.total)
    assert within_error(mean_field.log_prob, problem.log_prob, mean_field.log_prob_standard_error)
    q_at = guide_of(problem.family(diagonal=True))
    elbo = pv.log_weights(problem.model, q_at, problem.x, num_samples=4000).mean(0)
    error = 2 * mean_field.total_standard_error
    assert within_error(mean_field.total, problem.log_prob - elbo.detach(), error)


@pytest.mark.slow
def test_a_spoiled_encoder_costs_amortization_only(problem, mean_field):
    family = problem.family(diagonal=True)
    weights = family.mean.weight.data.view(-1)
    half = torch.randperm(len(weights))[: len(weights) // 2]
    weights[half] = weights[half[torch.randperm(len(half))]]
    spoiled = gaps_of(problem, family)
    before, error_before = mean_of(mean_field, "amortization")
    after, error_after = mean_of(spoiled, "amortization")
    assert after - before > 10 * math.hypot(error_before, error_after)
    before, error_before = mean_of(mean_field, "approximation")
    after, error_after = mean_of(spoiled, "approximation")
    assert abs(after - before) < 5 * math.hypot(error_before, error_after)


def test_the_refined_q_is_a_proposal_for_these_data_only(problem, mean_field):
    estimate = pv.log_marginal(
        problem.model, mean_field.refined_guide, problem.x, num_samples=3000, seed=3
    )
    assert within_error(estimate.log_prob, problem.log_prob, estimate.standard_error)
    assert estimate.ess.median() > 0.2 * 3000
    with pytest.raises(InputError, match=r"expected the 16 data .* got 5"):
        pv.log_marginal(problem.model, mean_field.refined_guide, problem.x[:5], num_samples=10)


def test_the_refined_q_can_be_compared_with_the_encoder_s(problem, mean_field):
    guide = guide_of(problem.family(diagonal=True))
    pairs = {
        "encoder": (problem.model, guide),
        "refined": (problem.model, mean_field.refined_guide),
    }
    comparison = pv.compare(pairs, problem.x, num_samples=3000, seed=0)
    gain = comparison.difference("refined", "elbo", to="encoder")
    expected = mean_field.amortization.mean().item()
    error = mean_field.amortization_standard_error.square().sum().sqrt().item() / NUM_DATA
    assert abs(gain.mean - expected) < 5 * math.hypot(gain.monte_carlo_standard_error, error)
    assert gain.mean > 5 * gain.monte_carlo_standard_error
    assert not torch.equal(*(comparison.per_datum(name).value for name in pairs))
    assert comparison.pairs["refined"].num_parameters == 0


def test_blocks_and_an_estimate_of_ones_own(problem, monkeypatch):
    monkeypatch.setattr(gap_decomposition, "_WINDOW", 20)
    estimate = pv.log_marginal(
        problem.model, guide_of(problem.family(diagonal=False)), problem.x, num_samples=3000, seed=1
    )
    calls = []
    gaps = gaps_of(
        problem,
        problem.family(diagonal=True),
        estimate=estimate,
        max_memory=200_000,
        max_steps=20,
        progress=lambda *done: calls.append(done),
    )
    assert len(calls) > 1
    assert calls[-1] == (NUM_DATA, NUM_DATA)
    assert gaps.log_marginal is estimate
    assert not gaps.converged
    assert "not converged" in str(gaps)
    # Far from done already better than the encoder, for no datum worse.
    assert (gaps.amortization > -5 * gaps.amortization_standard_error).all()
    assert gaps.amortization.mean() > 0
    with pytest.raises(InputError, match="got one of 16"):
        pv.evaluation.inference_gaps(
            problem.model,
            guide_of(problem.family(diagonal=True)),
            problem.x[:3],
            family=problem.family(diagonal=True),
            estimate=estimate,
        )


def small_vae(guide):
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (6,)),
        guide,
    )


def test_a_vae_brings_its_family_and_keeps_its_mode_and_parameters(monkeypatch):
    monkeypatch.setattr(gap_decomposition, "_WINDOW", 10)
    vae = small_vae(pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((6,), (8,)), 2))
    x = (torch.rand(5, 6) < 0.5).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    options = {"max_steps": 10, "num_importance_samples": 500, "num_samples": 300, "seed": 1}
    first = pv.evaluation.inference_gaps(vae.model, vae.guide, x, **options)
    again = pv.evaluation.inference_gaps(vae.model, vae.guide, x, **options)
    assert torch.equal(first.total, again.total)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert first.total.shape == first.amortization_standard_error.shape == (5,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["InverseAutoregressiveFlow", "NeuralSplineFlow", "MixtureOfNormals"]
)
def test_every_family_is_refined(name):
    vae = small_vae(getattr(pv.guides, name)(pv.networks.MLPEncoder((6,), (8,)), 2))
    x = (torch.rand(8, 6) < 0.5).float()

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.prior())

    # The prior's weights are bounded by the likelihood's, so that they have no tail.
    estimate = pv.log_marginal(vae.model, prior, x, num_samples=20_000, seed=1)
    gaps = pv.evaluation.inference_gaps(vae.model, vae.guide, x, estimate=estimate, seed=0)
    assert (gaps.approximation > -5 * gaps.approximation_standard_error - 1e-6).all()
    assert (gaps.amortization > -5 * gaps.amortization_standard_error - 1e-6).all()
    assert gaps.amortization.mean() > 0.01  # the encoder was never trained


def test_what_has_no_best_member_is_refused(problem):
    x = (torch.rand(4, 6) < 0.5).float()
    plain = small_vae(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
    with pytest.raises(InputError, match="without encode and distribution"):
        pv.evaluation.inference_gaps(plain.model, plain.guide, x)
    family = problem.family(diagonal=True)
    with pytest.raises(InputError, match="got a plain guide: pass family="):
        pv.evaluation.inference_gaps(problem.model, guide_of(family), problem.x)
    with pytest.raises(InputError, match="pass the guide's own family"):
        pv.evaluation.inference_gaps(
            problem.model,
            guide_of(family),
            problem.x,
            family=problem.family(diagonal=True, shift=1.0),
        )

    def two_latents(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    def two_latents_model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((a + b)[:, None], 1.0).to_event(1), obs=x)

    with pytest.raises(InputError, match="one latent site"):
        pv.evaluation.inference_gaps(two_latents_model, two_latents, x, family=family)
    for options, message in (
        ({"num_samples": 0}, "num_samples of at least 1"),
        ({"max_steps": 0}, "max_steps of at least 1"),
        ({"tolerance": 0.0}, "tolerance above 0"),
        ({"num_importance_samples": 0}, "num_importance_samples of at least 1, got 0"),
        ({"num_importance_samples": 10.0}, "num_importance_samples as a whole number, got 10.0"),
        ({"max_memory": 0}, "max_memory of at least 1, got 0"),
        ({"progress": True}, "progress as a function, got bool"),
        ({"estimate": -85.0}, "estimate as pyro_vae.log_marginal returns it, got float"),
    ):
        with pytest.raises(InputError, match=message):
            gaps_of(problem, family, **options)


def test_a_discrete_family_is_refused():
    class Switch(nn.Module):
        def encode(self, x):
            return {"logits": x[:, 0]}

        def distribution(self, parameters):
            return dist.Bernoulli(logits=parameters["logits"])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

    with pytest.raises(InputError, match="reparameterised draws, got Bernoulli"):
        pv.evaluation.inference_gaps(model, guide_of(Switch()), torch.randn(4, 1), family=Switch())


@pytest.mark.parametrize("encoded", [lambda x: x, lambda x: {"loc": x[:1]}, lambda x: {"loc": 0.0}])
def test_a_family_without_a_row_for_each_datum_is_refused(encoded):
    class Bare(nn.Module):
        def encode(self, x):
            return encoded(x)

        def distribution(self, parameters):
            return dist.Normal(parameters["loc"], 1.0).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(InputError, match=r"encode\(x\) of Bare as a dict of tensors, each with"):
        pv.evaluation.inference_gaps(model, guide, torch.randn(4, 1), family=Bare())
