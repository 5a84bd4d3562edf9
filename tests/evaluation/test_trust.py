"""What annealing and `auto` say of their own numbers: right, or named as not trusted."""

import math
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from random_exact_pairs import F64, make

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation.ais import _diagnose
from pyro_vae.evaluation.annealing_path import multiply
from pyro_vae.evaluation.estimate import log_mean_weights
from pyro_vae.evaluation.pilot import whiten


def on_a_square(noise=0.25):
    """The square of a latent is seen; the guide knows its positive root alone."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z.square(), noise), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.6 * noise / x.sqrt()))

    x, z = torch.tensor([3.0, 6.0], dtype=F64), torch.linspace(-5, 5, 100_001, dtype=F64)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), noise).log_prob(x[:, None])
    return model, guide, x, joint.logsumexp(1) + math.log(10 / 100_000)


def far_away():
    """One latent of a known scale; the guide stops at 2, the data go on to 80."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.clamp(max=2.0), 0.4))

    x = torch.tensor([0.5, 30.0, 80.0], dtype=F64)
    return model, guide, x, dist.Normal(0.0, math.sqrt(1.16)).log_prob(x)


def one_direction(num_latents=40):
    """A posterior that is narrow in one common direction; the guide has no correlations."""
    W = torch.randn(60, num_latents, dtype=F64) / 5 + torch.randn(60, 1, dtype=F64)
    precision = torch.eye(num_latents, dtype=F64) + W.T @ W / 0.25
    covariance = torch.linalg.inv(precision)
    whole = dist.MultivariateNormal(
        torch.zeros(60, dtype=F64), W @ W.T + 0.25 * torch.eye(60, dtype=F64)
    )

    def model(x):
        with pyro.plate("data", len(x)):
            zeros = torch.zeros(num_latents, dtype=F64)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = x @ W @ covariance / 0.25
            pyro.sample("z", dist.Normal(mean, precision.diagonal().rsqrt()).to_event(1))

    x = whole.sample((4,))
    return model, guide, x, whole.log_prob(x)


@pytest.mark.parametrize(
    "case",
    [
        on_a_square,
        *(pytest.param(case, marks=pytest.mark.slow) for case in (far_away, one_direction)),
    ],
)
def test_what_the_guide_misses_is_found_by_the_defaults(case):
    model, guide, x, exact = case()
    estimate = pv.log_marginal(model, guide, x, method="annealed", seed=0)
    assert ((estimate.log_prob - exact).abs() < 5 * estimate.standard_error + 1e-6).all()
    assert (estimate.standard_error < 0.5).all()
    assert estimate.trusted.all()
    assert estimate.methods == ["annealed"] * len(x)


def test_auto_sees_the_mode_that_draws_of_the_guide_do_not():
    model, guide, x, exact = on_a_square()
    plain = pv.log_marginal(model, guide, x, seed=0)
    assert plain.trusted.all()  # the weights look fine
    assert ((plain.log_prob - exact + math.log(2)).abs() < 5 * plain.standard_error + 1e-3).all()
    estimate = pv.log_marginal(model, guide, x, method="auto", seed=0)
    assert estimate.methods == ["annealed"] * 2
    assert estimate.trusted.all()
    assert ((estimate.log_prob - exact).abs() < 5 * estimate.standard_error + 1e-6).all()
    assert (estimate.cost > plain.cost).all()
    draws = estimate.to_arviz(num_draws=200)["posterior"]["z"].values
    assert 0.2 < (draws > 0).mean() < 0.8


def test_auto_leaves_alone_what_is_cleared_and_names_what_is_beyond_its_budget():
    model, guide, x, exact = far_away()
    x = torch.cat([x, x[:1], x[1:2]])
    with pytest.warns(
        UserWarning, match=r"1 of 5 data points .*1 by not being annealed.*max_annealed"
    ):
        estimate = pv.log_marginal(model, guide, x, method="auto", max_annealed=2, seed=0)
    assert estimate.methods == ["importance", "annealed", "annealed", "importance", "not annealed"]
    assert estimate.trusted.tolist() == [True, True, True, True, False]
    assert (estimate.cost[:4] > 5000).all()  # a look or annealing besides the samples
    assert estimate.cost[4] == 5000
    assert estimate.diagnostics["halves"].isnan().tolist() == [False] * 4 + [True]
    error = (estimate.log_prob[:3] - exact).abs()
    assert (error < 5 * estimate.standard_error[:3] + 1e-3).all()


def test_auto_trusts_nothing_that_can_not_be_looked_at_again():
    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(kind, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(torch.full_like(x, 0.5)))

    with (
        pytest.warns(UserWarning, match="3 of 3 data points are not trusted"),
        pytest.warns(UserWarning, match="no data point is trusted without annealing.*'kind'"),
    ):
        estimate = pv.log_marginal(model, guide, torch.randn(3), method="auto", seed=0)
    assert not estimate.trusted.any()


@pytest.mark.slow
def test_a_comparison_anneals_alike():
    model, narrow, x, exact = on_a_square()

    def both(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 2.5))

    pairs = {"one mode": (model, narrow), "both": (model, both)}
    short = {"num_steps": 40, "num_leapfrog_steps": 4}
    found = pv.compare(
        pairs, x, methods=("auto",), num_elbo_samples=10, annealing_options=short, seed=0
    )
    for pair in found.pairs.values():
        assert pair.estimate.was_annealed.all()
        error = (pair.log_prob.value - exact).abs()
        assert (error < 5 * pair.log_prob.standard_error + 1e-6).all()
    options = {"max_annealed": 1}
    with pytest.raises(InputError, match="'max_annealed'"):
        pv.compare(pairs, x, methods=("importance", "annealed"), annealing_options=options)


def diagnose(log_weights, *, from_half=None, acceptance=0.9, prior=-1e3):
    """Diagnose one data point whose 64 log weights are given."""
    half = log_weights if from_half is None else from_half
    zero = torch.zeros(1, dtype=F64)
    pilot = types.SimpleNamespace(log_prob=zero + prior, variance=zero)
    found = _diagnose(
        log_mean_weights(log_weights[:, None]),
        log_weights[:, None],
        half[:, None],
        torch.tensor([[0.9], [acceptance]]),
        types.SimpleNamespace(prior=pilot),
    )
    return {name for name, value in found.items() if not bool(value <= 1)}


def test_each_diagnostic_fails_for_its_own_reason_alone():
    good = 0.3 * torch.randn(64, dtype=F64)
    by_turns = torch.tensor([0.0, 1.5], dtype=F64).repeat(32)
    heavy = torch.cat([torch.full((60,), -3.0, dtype=F64), torch.zeros(4, dtype=F64)])
    assert diagnose(good) == set()
    assert diagnose(good, from_half=good - 1) == {"steps"}
    assert diagnose(good + by_turns) == {"halves"}
    assert diagnose(good, acceptance=0.1) == {"acceptance"}
    assert diagnose(heavy) == {"weights"}
    assert diagnose(good, prior=2.0) == {"prior"}
    assert diagnose(good[:1]) == {"steps", "halves", "prior"}  # nothing is known of one


def test_gradients_tell_the_covariance_of_a_normal_whatever_the_draws():
    """Thirty times as wide in one direction as in another, seen from draws that are elsewhere."""
    basis = torch.linalg.qr(torch.randn(2, 8, 8, dtype=F64)).Q
    scales = torch.logspace(0, -1.5, 8, dtype=F64)
    factor = basis * scales
    covariance = factor @ factor.mT
    position = 5 + 0.2 * multiply(factor, torch.randn(20, 2, 8, dtype=F64))
    gradient = -multiply(torch.linalg.inv(covariance), position - 1)
    found = whiten(position, gradient)
    white = torch.linalg.solve(factor, found)
    assert (white @ white.mT - torch.eye(8, dtype=F64)).abs().max() < 0.05


@pytest.mark.slow
def test_of_random_exact_problems_what_is_trusted_is_right():
    inside, first_right, kept = [], 0, 0
    for seed in range(6):
        problem = make(seed, 8)
        pair = problem.model, problem.guide, problem.x
        with warnings.catch_warnings(action="ignore"):
            first = pv.log_marginal(*pair, seed=seed)
            found = pv.log_marginal(*pair, method="auto", seed=seed)
        error = (found.log_prob + found.standard_error.square() / 2 - problem.log_prob).abs()
        inside.append((error <= 2 * found.standard_error)[found.trusted])
        right = (first.log_prob - problem.log_prob).abs() <= 2 * first.standard_error
        first_right, kept = first_right + int(right.sum()), kept + int((right & found.trusted).sum())
    inside = torch.cat(inside)
    # Of 93 % the share of so few is lower by chance, by three deviations.
    assert inside.double().mean() > 0.93 - 3 * math.sqrt(0.93 * 0.07 / len(inside))
    assert kept > 0.8 * first_right


def test_a_comparison_with_a_pair_that_can_not_be_annealed_trusts_nothing_and_says_so_once():
    """As `log_marginal` does: Pareto k alone clears no data point of either pair."""

    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(kind, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(torch.full_like(x, 0.5)))

    def normal_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def normal_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.71))

    pairs = {"normal": (normal_model, normal_guide), "kinds": (model, guide)}
    with pytest.warns(
        UserWarning, match="no data point is trusted without annealing: kinds:"
    ) as told:
        found = pv.compare(pairs, torch.randn(3), methods=("auto",), num_elbo_samples=10, seed=0)
    assert len([each for each in told if "without annealing" in str(each.message)]) == 1
    assert told[0].filename == __file__
    for pair in found.pairs.values():
        assert not pair.estimate.trusted.any()
    assert found.verdict("normal") == found.verdict("kinds") == "withheld"
    assert "are not trusted" in str(found)


def coin_pair(concentration, dtype):
    """Two tosses of a coin whose probability has a prior with its mass at the ends."""
    number = torch.tensor(concentration, dtype=dtype)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(number, number))
            pyro.sample("x", dist.Binomial(2, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(0.6 + x, 2.6 - x))

    x = torch.tensor([0.0, 1.0, 2.0], dtype=dtype)
    a, b = concentration + x.double(), concentration + 2 - x.double()
    log_beta = a.lgamma() + b.lgamma() - (a + b).lgamma()
    of_prior = 2 * math.lgamma(concentration) - math.lgamma(2 * concentration)
    return model, guide, x, log_beta - of_prior + torch.tensor([1.0, 2.0, 1.0]).double().log()


@pytest.mark.parametrize(
    ("concentration", "dtype"),
    [
        pytest.param(0.5, torch.float32, id="wide", marks=pytest.mark.slow),
        pytest.param(0.1, torch.float64, id="double"),
    ],
)
def test_ends_that_numbers_tell_apart_are_annealed_right(concentration, dtype):
    model, guide, x, exact = coin_pair(concentration, dtype)
    found = pv.log_marginal(model, guide, x, method="annealed", num_leapfrog_steps=2, seed=0)
    error = (found.log_prob - exact).abs()
    # What lies on the last number is 1.3 % of the prior at 0.1 in float64: so much may be missing.
    assert (error < 5 * found.standard_error + 0.013).all()


@pytest.mark.parametrize("concentration", [0.02, 0.1])
def test_ends_where_numbers_run_out_are_not_annealed(concentration):
    """Positions beyond the last number have its density: a tenth and more of p(x) would be lost."""
    model, guide, x, _ = coin_pair(concentration, torch.float32)
    with pytest.raises(pv.InputError, match=r"prior of 'z' .* last number .* compute in float64"):
        pv.log_marginal(model, guide, x, method="annealed", seed=0)
    with (
        pytest.warns(UserWarning, match="3 of 3 data points are not trusted"),
        pytest.warns(UserWarning, match="no data point is trusted without annealing"),
    ):
        found = pv.log_marginal(model, guide, x, method="auto", num_samples=100, seed=0)
    assert not found.trusted.any()
