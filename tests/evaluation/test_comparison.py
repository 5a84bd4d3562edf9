"""Pairs compared on equal terms: exact answers, differences with their errors, ties."""

import copy
import json
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared_pairs import (
    QUICK,
    bits,
    comparison_of,
    measured,
    pair_of,
    small_vae,
    unchanged,
    values_of,
)

import pyro_vae as pv
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.paired_difference import judge

F64 = torch.float64

# Against exact answers.


def test_bounds_and_log_prob_are_the_exact_ones(exact):
    problem = exact["probabilistic_pca"](num_data=10, num_latents=2)
    q = problem.guide.__closure__[0].cell_contents(problem.x)
    prior = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    rate = torch.distributions.kl_divergence(q, prior)
    comparison = pv.compare(
        {"a": (problem.model, problem.guide)},
        problem.x,
        num_samples=3000,
        num_elbo_samples=2000,
        posterior="quadrature",
        methods=("importance", "annealed"),
        annealing_options={
            "num_steps": 10,
            "num_chains": 100,
            "num_leapfrog_steps": 2,
            "start": "guide",
        },
        seed=0,
    )
    pair = comparison.pairs["a"]
    for name in ("log_prob", "annealed"):
        estimate = comparison.per_datum("a", name)
        assert ((estimate.value - problem.log_prob).abs() < 5 * estimate.standard_error + 1e-6).all()
    # E[log q - log p(z|x)] is known, so the bound is.
    elbo = problem.log_prob - pair.posterior_divergence.value
    assert ((pair.elbo.value - elbo).abs() < 5 * pair.elbo.standard_error + 1e-6).all()
    torch.testing.assert_close(pair.elbo.value, -pair.rate.value - pair.distortion.value)
    assert (pair.iwae.value > pair.elbo.value).all()
    assert (pair.iwae.value < problem.log_prob + 5 * pair.iwae.standard_error).all()
    assert pair.exact_kl
    torch.testing.assert_close(pair.rate.value, rate)
    assert comparison.verdict("a") == "best"
    assert comparison.ranked_by == "annealed"
    assert comparison.likelihood == "density"


def test_exact_kl_of_the_components(exact):
    vae = small_vae()
    x = bits()
    pair = pv.compare({"a": pair_of(vae)}, x, **QUICK).pairs["a"]
    with torch.no_grad():
        q = vae.variational_family(x)
        expected = torch.distributions.kl_divergence(q, vae.prior().expand((len(x),)))
    assert pair.exact_kl
    torch.testing.assert_close(pair.rate.value, expected.double())
    assert pair.rate.mean_standard_error == 0
    assert pair.num_guide_parameters == sum(p.numel() for p in vae.variational_family.parameters())
    assert pair.num_parameters == sum(p.numel() for p in vae.parameters())
    assert pair.seconds_per_1000 > 0
    assert math.isnan(pair.seconds_per_epoch)


def test_a_rate_without_closed_form_is_monte_carlo():
    vae, x = small_vae(family="MixtureOfNormals"), bits()
    comparison = pv.compare({"a": pair_of(vae)}, x, **QUICK)
    pair = comparison.pairs["a"]
    assert not pair.exact_kl
    assert (pair.rate.standard_error > 0).all()
    line = next(line for line in str(comparison).splitlines() if "  KL" in line)
    assert "Monte Carlo" in line
    weights = pv.log_weights(vae.model, vae.guide, x, num_samples=4000).detach()
    error = (pair.elbo.standard_error.square() + weights.var(0) / 4000).sqrt()
    assert ((pair.elbo.value - weights.mean(0)).abs() < 5 * error + 1e-6).all()


def line_pair(penalty):
    """One latent seen through one Gaussian pixel, times a known factor per datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 3.0).to_event(1), obs=x)
            pyro.factor("penalty", penalty(x[:, 0]))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 10, 1.0).to_event(1))

    return model, guide


def test_a_real_difference_is_found_with_its_error():
    def loss_of(x):
        return -0.05 * (1 + x.tanh())

    x = math.sqrt(10) * torch.randn(200, 1, dtype=F64)
    comparison = pv.compare(
        {"good": line_pair(torch.zeros_like), "worse": line_pair(loss_of)},
        x,
        num_samples=1000,
        num_elbo_samples=100,
        seed=0,
    )
    assert comparison.best() == comparison.best("elbo") == "good"
    assert comparison.verdict("good") == "best"
    assert comparison.verdict("worse") == "behind"
    loss = loss_of(x[:, 0])
    for quantity in comparison.quantities:
        difference = comparison.difference("worse", quantity)
        assert abs(difference.mean - loss.mean()) < 5 * difference.standard_error
        # Unpaired, the spread of log p(x) itself would drown it.
        spread = comparison.per_datum("worse", quantity).data_standard_error
        assert difference.standard_error < 0.2 * spread
        opposite = comparison.difference("good", quantity, to="worse")
        assert opposite.mean == -difference.mean
        assert opposite.standard_error == difference.standard_error


def test_the_error_of_a_difference_covers_both_spreads():
    # Repeats of two pairs whose true mean difference over the data's distribution is 0.3.
    scores = []
    for _ in range(400):
        base = 5 * torch.randn(40, dtype=F64)
        true = [base, base + 0.3 + 0.5 * torch.randn(40, dtype=F64)]
        error = torch.full((40,), 0.4, dtype=F64)
        seen = [value + error * torch.randn(40, dtype=F64) for value in true]
        pairs = {name: [measured(value, error)] for name, value in zip("ab", seen, strict=True)}
        difference = comparison_of(**pairs).difference("b", to="a")
        scores.append((difference.mean - 0.3) / difference.standard_error)
    scores = torch.tensor(scores)
    # Student's t with 39 degrees of freedom has standard deviation 1.027.
    assert abs(scores.std() - 1.027) < 5 * 1.027 / math.sqrt(2 * 400)
    assert abs(scores.mean()) < 5 / math.sqrt(400)


def test_a_verdict_is_withheld_where_the_numbers_cannot_carry_it():
    torch.manual_seed(0)
    exact = torch.zeros(100, dtype=F64)
    theirs, noise = [PerDatum(exact, exact)], 0.05 * torch.randn(100, dtype=F64)
    behind, tied = [PerDatum(noise - 0.1, exact)], [PerDatum(noise - noise.mean(), exact)]
    trusted = torch.ones(100, dtype=torch.bool)
    assert judge(behind, theirs, trusted) == "behind"
    assert judge(tied, theirs, trusted) == "tied"
    trusted[:5] = False  # a few, without which the verdict is the same
    assert judge(behind, theirs, trusted) == "behind"
    few = noise - noise.mean() + 0.02
    few[:5] -= 5.0  # a few that decide
    assert judge([PerDatum(few, exact)], theirs, trusted) == "withheld"
    trusted[:11] = False
    assert judge(behind, theirs, trusted) == judge(tied, theirs, trusted) == "withheld"
    # An error of 0.4 nats in each estimate biases it by -0.08, which is most of the difference.
    biased = [PerDatum(noise - 0.1, exact + 0.44)]
    assert judge(biased, theirs, torch.ones(100, dtype=torch.bool)) == "withheld"


def test_shared_draws_do_not_widen_the_error_of_a_difference():
    """Monte Carlo noise that both pairs have in common drops out of their difference."""
    noise, spread = torch.randn(50, dtype=F64), 0.01 * torch.randn(50, dtype=F64)
    error = torch.ones(50, dtype=F64)
    found = comparison_of(
        a=[measured(noise, error)], b=[measured(noise + spread - 0.1, error)]
    ).difference("b", to="a")
    assert found.standard_error == pytest.approx(spread.std().item() / math.sqrt(50))
    assert found.monte_carlo_standard_error == pytest.approx(math.sqrt(2 / 50))
    assert not found.is_tie


@pytest.mark.slow
def test_the_interval_of_a_difference_holds_the_exact_one():
    from benchmarks.coverage import count_covered

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covered = count_covered(40, num_data=60, num_samples=50)
    assert abs(covered - 38) <= 5 * math.sqrt(40 * 0.95 * 0.05)


def test_what_is_unknown_is_a_tie():
    one = comparison_of(a=[measured([-1.0])], b=[measured([-9.0])])
    assert math.isnan(one.difference("b").standard_error)
    assert one.verdict("a") == one.verdict("b") == "tied"
    impossible = comparison_of(
        a=[measured([-1.0, -2.0], 0.0)],
        b=[measured([-1.0, -math.inf], torch.tensor([0.0, math.inf]))],
    )
    assert impossible.best() == "a"
    plain = impossible.to_dict()
    assert plain["pairs"]["b"]["log_prob"] is None
    json.dumps(plain, allow_nan=False)


# One family under two names.


def test_one_family_under_two_names_is_a_tie():
    vae = small_vae()
    x = bits()
    # Once the very pair, and once another VAE with the same weights.
    pairs = {"one": pair_of(vae), "two": pair_of(vae), "three": pair_of(copy.deepcopy(vae))}
    comparison = pv.compare(pairs, x, **QUICK)
    for name in pairs:
        assert comparison.verdict(name) == "tied"
        for quantity in comparison.quantities:
            difference = comparison.difference(name, quantity)
            assert abs(difference.mean) <= 2 * difference.standard_error + 1e-12
    assert "behind" not in str(comparison)
    assert "best " not in str(comparison).split("verdict")[1].splitlines()[0]


def test_a_pair_under_two_names_is_trained_once():
    vae, x = small_vae(), bits()
    comparison = pv.compare(
        {"one": pair_of(vae), "two": pair_of(vae)}, x, train=x, fit_options={"epochs": 2}, **QUICK
    )
    assert comparison.pairs["one"].fit is comparison.pairs["two"].fit
    assert len(comparison.pairs["one"].fit.history["seconds"]) == 2
    assert comparison.pairs["one"].seconds_per_epoch > 0


def test_several_inputs(exact):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 2, 0.8).to_event(1))

    x, y = torch.randn(10, 1, dtype=F64), torch.randn(10, 1, dtype=F64)
    comparison = pv.compare({"a": (model, guide)}, (x, y), **QUICK)
    estimate = comparison.per_datum("a")
    expected = dist.Normal(y, math.sqrt(2)).log_prob(x)[:, 0]
    assert ((estimate.value - expected).abs() < 5 * estimate.standard_error + 1e-6).all()


def test_each_pair_runs_twice_before_it_is_measured(monkeypatch):
    calls = []

    def count(vae):
        def model(x):
            calls.append("model")
            return vae.model(x)

        def guide(x):
            calls.append("guide")
            return vae.guide(x)

        return model, guide

    class ReachedError(Exception):
        pass

    def measure_bounds(*_, **__):
        raise ReachedError

    monkeypatch.setattr("pyro_vae.evaluation.comparison.measure_bounds", measure_bounds)
    with pytest.raises(ReachedError):
        pv.compare({"one": count(small_vae()), "two": count(small_vae())}, bits(), **QUICK)
    # Once to see what it is, once for what it observes and what trains of it.
    assert calls == ["guide", "model"] * 4


def test_seed_and_state_are_kept():
    vae, x = small_vae(), bits(10)
    state = torch.get_rng_state()
    before = values_of(vae)
    first = pv.compare({"a": pair_of(vae)}, x, **QUICK)
    again = pv.compare({"a": pair_of(vae)}, x, **QUICK)
    assert torch.equal(first.per_datum("a").value, again.per_datum("a").value)
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(vae, before)
    assert vae.training
