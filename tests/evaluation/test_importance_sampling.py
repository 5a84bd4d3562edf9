"""Importance sampling: exact models, defined answers at the edges, what the diagnostics say."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation.estimate import concatenate

CONTINUOUS = ["probabilistic_pca", "gaussian", "beta_bernoulli", "mixture_prior", "small_decoder"]
SPHERES = ["von_mises_fisher", "sphere"]


def within(estimate, exact, standard_errors=5):
    error = (estimate.log_prob - exact).abs()
    return (error < standard_errors * estimate.standard_error + 1e-6).all()


@pytest.mark.parametrize("name", CONTINUOUS + SPHERES)
def test_exact_models(exact, name):
    problem = exact[name]()
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=4000, seed=0)
    assert within(estimate, problem.log_prob)
    assert estimate.standard_error.max() < 0.1
    assert abs(estimate.mean - problem.log_prob.mean()) < 5 * estimate.mean_standard_error + 1e-6
    assert (estimate.elbo < problem.log_prob + 5 * estimate.standard_error).all()
    assert (estimate.num_samples == 4000).all()
    assert estimate.pareto_k.max() < 0.7


def test_the_exact_posterior_gives_equal_weights(exact):
    problem = exact["probabilistic_pca"](covariance_scale=1.0, shift=0.0)
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=100, seed=0)
    torch.testing.assert_close(estimate.log_prob, problem.log_prob, rtol=0, atol=1e-4)
    assert (estimate.pareto_k == 0).all()
    torch.testing.assert_close(estimate.ess, torch.full_like(estimate.ess, 100.0))


def test_the_elbo_misses_by_the_kl_divergence(exact):
    """A guide that is too wide by a factor c in D dimensions: KL = D (c - 1 - log c) / 2."""
    problem = exact["probabilistic_pca"](num_data=20, covariance_scale=1.5, shift=0.0)
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=4000, seed=0)
    gap = (problem.log_prob - estimate.elbo).mean().item()
    exact_gap = 6 * (1.5 - 1 - math.log(1.5)) / 2
    # The log weight is chi-squared: (c - 1) / 2 times a sum of 6 squares, of variance 12.
    error = 0.25 * math.sqrt(12 / (4000 * 20))
    assert abs(gap - exact_gap) < 5 * error + 1e-6


@pytest.mark.parametrize(
    ("ratio", "low", "high"), [(0.02, 0.8, 1.0), (1.5, 0.0, 0.0), (1.0, 0.0, 0.0)]
)
def test_pareto_k_of_a_narrow_a_wide_and_the_exact_proposal(exact, ratio, low, high):
    """Reference item 2: each datum is a repeat of one problem."""
    problem = exact["gaussian"](num_data=100, proposal_variance=0.5 * ratio)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if ratio >= 1 else "ignore")
        estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=5000, seed=0)
    share = estimate.num_unreliable / 100
    assert low <= share <= high


def test_the_warning_names_how_many(exact):
    problem = exact["gaussian"](num_data=20, proposal_variance=0.005)
    with pytest.warns(UserWarning, match=r"\d+ of 20 data points have Pareto k > 0.7") as caught:
        estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=2000, seed=0)
    assert str(caught[0].message).startswith(f"{estimate.num_unreliable} of 20")
    assert caught[0].filename == __file__


def test_a_narrow_guide_misses_and_says_so(exact):
    problem = exact["probabilistic_pca"](covariance_scale=0.05, shift=0.6)
    with pytest.warns(UserWarning, match="Pareto k"):
        estimate = pv.log_marginal(problem.model, problem.guide, problem.x, seed=0)
    assert problem.log_prob.mean() - estimate.mean > 1
    assert estimate.num_unreliable >= 0.9 * len(problem.x)


@pytest.mark.filterwarnings("ignore:.* data points missed")  # some need more than 20 times the pilot
@pytest.mark.parametrize("options", [{}, {"target_standard_error": 0.03}], ids=["plain", "target"])
@pytest.mark.parametrize("count", [100, pytest.param(200, marks=pytest.mark.slow)])
def test_calibration_over_random_problems(options, count):
    """Each datum is a problem of its own: its weights and guide come in as inputs."""
    D, d, variance = 6, 3, 0.4
    W, b = torch.randn(count, D, d).double(), torch.randn(count, D).double()
    M = W.mT @ W + variance * torch.eye(d)
    z = torch.randn(count, d).double()
    x = (W @ z[..., None])[..., 0] + b + math.sqrt(variance) * torch.randn(count, D).double()
    covariance = W @ W.mT + variance * torch.eye(D)
    exact = dist.MultivariateNormal(b, covariance).log_prob(x)
    mean = torch.linalg.solve(M, (W.mT @ (x - b)[..., None]))[..., 0]
    posterior = variance * torch.linalg.inv(M)
    scale = 0.8 + torch.rand(count, 1, 1).double()
    offset = 0.1 * torch.randn(count, d).double()

    def model(x, W, b, mean, covariance):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d).double(), 1.0).to_event(1))
            loc = (W @ z[..., None])[..., 0] + b
            pyro.sample("x", dist.Normal(loc, math.sqrt(variance)).to_event(1), obs=x)

    def guide(x, W, b, mean, covariance):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    inputs = (x, W, b, mean + offset, scale * posterior)
    estimate = pv.log_marginal(model, guide, inputs, num_samples=1000, seed=count, **options)
    trusted = estimate.pareto_k < 0.5
    assert trusted.sum() > 0.7 * count
    inside = (estimate.log_prob - exact).abs() < 2 * estimate.standard_error
    share = inside[trusted].double().mean()
    # 90 to 99 %, less what so few problems may miss by at a true share of 95 %.
    slack = 0.0 if count >= 200 else 2 * math.sqrt(0.05 * 0.95 / count)
    assert 0.90 - slack <= share <= 0.99 + slack


def test_target_standard_error_is_met_with_fresh_samples(exact):
    problem = exact["probabilistic_pca"](num_data=30, covariance_scale=1.5, shift=0.05)
    estimate = pv.log_marginal(
        problem.model,
        problem.guide,
        problem.x,
        num_samples=500,
        target_standard_error=0.02,
        seed=0,
    )
    assert len(estimate.num_samples.unique()) > 1
    assert not estimate.missed_target.any()
    assert torch.equal(estimate.cost, estimate.num_samples + 500)
    assert ((estimate.standard_error > 0.01) & (estimate.standard_error < 0.03)).all()
    assert within(estimate, problem.log_prob)
    assert estimate.convergence is None


def test_target_is_bounded_by_max_samples(exact):
    problem = exact["gaussian"](num_data=5, proposal_variance=2.0)
    with pytest.warns(UserWarning, match=r"5 of 5 data points missed .* raise max_samples"):
        estimate = pv.log_marginal(
            problem.model,
            problem.guide,
            problem.x,
            num_samples=100,
            target_standard_error=1e-6,
            max_samples=300,
            seed=0,
        )
    assert (estimate.num_samples == 300).all()
    assert estimate.missed_target.all()


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of 300 samples the limit is 0.6
def test_streaming_does_not_change_the_numbers(exact):
    """The samples of a seed don't depend on the memory they are scored in."""
    problem = exact["probabilistic_pca"](num_data=9)
    results = [
        pv.log_marginal(
            problem.model, problem.guide, problem.x, num_samples=300, seed=3, max_memory=memory
        )
        for memory in (1 << 20, 1 << 26)
    ]
    for name in ("log_prob", "standard_error", "ess", "pareto_k", "rate", "distortion"):
        torch.testing.assert_close(getattr(results[0], name), getattr(results[1], name))
    assert torch.equal(results[0].log_prob, results[0].convergence.log_prob[-1])


def test_a_seed_repeats_and_restores_the_generators(exact):
    problem = exact["gaussian"](num_data=3)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    estimates = [
        pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=50, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(estimates[0].log_prob, estimates[1].log_prob)
    assert not torch.equal(estimates[0].log_prob, estimates[2].log_prob)


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of 250 samples k is above 0.7 for one datum in 8
def test_convergence_holds_the_estimate_of_the_first_samples(exact):
    problem = exact["probabilistic_pca"](num_data=4)
    options = {"seed": 5, "keep_draws": 250}
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=250, **options)
    assert estimate.convergence.num_samples.tolist() == [1, 2, 5, 10, 20, 50, 100, 200, 250]
    weights = estimate.draws.log_weights
    for count, log_prob in zip(*estimate.convergence, strict=True):
        expected = weights[:count].logsumexp(0) - math.log(count)
        torch.testing.assert_close(log_prob, expected)


def test_many_data_are_taken_in_blocks(exact):
    problem = exact["gaussian"](num_data=2050)
    seen, means = [], []
    estimate = pv.log_marginal(
        problem.model,
        problem.guide,
        problem.x,
        num_samples=2000,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
        running_mean=means.append,
    )
    # 7 for the largest of so many errors: the weights are bounded above, which skews them.
    assert within(estimate, problem.log_prob, 7)
    assert len(estimate.log_prob) == 2050
    assert estimate.convergence.log_prob.shape[1] == 2050
    assert seen == sorted(seen)
    assert seen[-1] == (2050, 2050)
    assert means[-1] == pytest.approx(estimate.mean, abs=1e-3)


def test_a_guide_with_parameters_per_datum_is_not_cut(exact):
    problem = exact["gaussian"](num_data=1500)
    loc = pyro.param("loc", torch.zeros(1500, 1).double())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc"), 0.9).to_event(1))

    assert len(loc) == 1500
    for options in ({}, {"target_standard_error": 0.05}):
        estimate = pv.log_marginal(problem.model, guide, problem.x, num_samples=60, seed=0, **options)
        assert within(estimate, problem.log_prob, 6)


def test_one_sample(exact):
    problem = exact["gaussian"](num_data=3)
    with pytest.warns(UserWarning, match="3 of 3 data points have Pareto k not known"):
        estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=1, seed=0)
    assert estimate.log_prob.isfinite().all()
    assert estimate.standard_error.isnan().all()
    assert estimate.pareto_k.isnan().all()
    torch.testing.assert_close(estimate.elbo, estimate.log_prob)


def test_one_datum(exact):
    problem = exact["gaussian"](num_data=1)
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=500, seed=0)
    assert within(estimate, problem.log_prob)
    assert math.isnan(estimate.data_standard_error)


def impossible_pair():
    """Data 1 can't come from the model: their likelihood is 0 under every latent."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(()), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), 1.0))
            log_prob = torch.where(x < 0.5, z.log(), -math.inf)
            pyro.sample("x", dist.Unit(log_prob), obs=torch.empty(0))

    return model, guide


def test_a_datum_of_zero_likelihood_is_minus_infinity():
    model, guide = impossible_pair()
    x = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match="1 of 2"):
        estimate = pv.log_marginal(model, guide, x, num_samples=400, seed=0)
    assert estimate.log_prob[1] == -math.inf
    assert estimate.standard_error[1] == math.inf
    assert estimate.ess[1] == 0
    assert estimate.pareto_k[1] == math.inf
    assert abs(estimate.log_prob[0] - math.log(0.5)) < 5 * estimate.standard_error[0] + 1e-6
    assert not estimate.log_prob.isnan().any()


@pytest.mark.parametrize("method", ["importance", "annealed"])
def test_nan_from_the_users_network_is_an_error(exact, method):
    problem = exact["probabilistic_pca"](num_data=4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(6).double(), 1.0).to_event(1))
            scale = torch.where(x[:, 0] == x[1, 0], math.nan, 1.0)[:, None]
            noise = dist.Normal(z.sum(-1, keepdim=True), scale, validate_args=False)
            pyro.sample("x", noise.expand(x.shape).to_event(1), obs=x)

    with (
        pyro.validation_enabled(False),
        pytest.raises(InputError, match=r"NaN in log p\(x\|z\) for 1 of 4 data"),
    ):
        pv.log_marginal(model, problem.guide, problem.x, method=method, seed=0)


def test_modes_are_eval_during_and_restored_after():
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (4,)), (5,)),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((5,), (4,)), 2),
    )
    vae.likelihood.decoder.eval()
    vae.variational_family.train()
    seen = []
    vae.variational_family.encoder.register_forward_hook(lambda m, *_: seen.append(m.training))
    pv.log_marginal(vae.model, vae.guide, torch.ones(3, 5), num_samples=10, seed=0)
    assert seen
    assert not any(seen)
    assert vae.variational_family.training
    assert not vae.likelihood.decoder.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples of at least 1"),
        ({"method": "magic"}, "'importance', 'annealed' or 'auto'"),
        ({"target_standard_error": 0.0}, "above 0"),
        ({"target_standard_error": 0.1, "method": "annealed"}, "num_chains"),
        ({"target_standard_error": 0.1, "num_samples": 1}, "pilot"),
        ({"max_memory": 0}, "max_memory"),
        ({"keep_draws": -1}, "keep_draws"),
        ({"max_samples": 0}, "max_samples of at least 1, got 0"),
        ({"max_samples": 10}, "expected target_standard_error with max_samples, got none"),
        ({"compile": True, "method": "annealed"}, "method='importance' with compile=True"),
        ({"compile": "auto"}, "compile as None, True or False, got 'auto'"),
        ({"num_samples": 100.0}, "num_samples as a whole number, got 100.0"),
        ({"num_samples": "3"}, "num_samples as a whole number, got '3'"),
        ({"num_steps": 2.5, "method": "annealed"}, "num_steps as a whole number, got 2.5"),
        ({"target_standard_error": "0.1"}, "target_standard_error as a number, got '0.1'"),
        ({"running_mean": 1}, "running_mean as a function, got int"),
    ],
)
def test_options_out_of_range_are_refused(exact, options, message):
    problem = exact["gaussian"](num_data=2)
    with pytest.raises(InputError, match=message):
        pv.log_marginal(problem.model, problem.guide, problem.x, **options)


def test_what_is_not_known_is_not_trusted(exact):
    problem = exact["gaussian"](num_data=3)
    with pytest.warns(UserWarning, match="3 of 3 data points have Pareto k not known"):
        few = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=10, seed=0)
    many = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=1000, seed=0)
    assert not few.trusted.any()
    assert many.trusted.all()
    assert (few.num_unreliable, many.num_unreliable) == (3, 0)
    assert (few.num_unreliable, many.num_unreliable) == (3, 0)


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of 60 samples the limit is 0.4
def test_the_bias_of_the_log_is_expected(exact):
    """Each datum is a repeat of one problem, so the estimates' mean has the bias and little else."""
    problem = exact["gaussian"](num_data=20000, proposal_variance=4.0)
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=60, seed=0)
    error = estimate.log_prob - problem.log_prob
    bias, noise = estimate.mean_expected_bias, error.std() / math.sqrt(len(error))
    assert bias == pytest.approx(-0.5 * estimate.standard_error.square().mean().item())
    assert abs(error.mean()) > 5 * noise  # what the standard error does not contain
    assert abs(error.mean() - bias) < 5 * noise + 0.1 * abs(bias)


def grey_pair(likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("method", ["importance", "annealed"])
def test_values_that_a_discrete_distribution_cannot_take_are_marked(method):
    """One grey pixel in the last of three blocks is enough; NaN is missing, and no grey."""
    bernoulli = grey_pair(lambda z: dist.Bernoulli(logits=z, validate_args=False).to_event(1))
    normal = grey_pair(lambda z: dist.Normal(z, 1.0).to_event(1))
    options = {"num_samples": 25} if method == "importance" else {"num_chains": 2, "num_steps": 2}
    options |= {} if method == "importance" else {"num_leapfrog_steps": 1, "start": "guide"}
    count = 2500 if method == "importance" else 4
    bits = torch.zeros(count, 2).index_put((torch.tensor(0),), torch.tensor(1.0))
    grey = bits.clone()
    grey[-1, 0] = 0.5
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*trusted")
        for pair, x, marked in (
            (bernoulli, bits, False),
            (bernoulli, grey, True),
            (normal, grey, False),
        ):
            found = pv.log_marginal(*pair, x, method=method, seed=0, keep_draws=2, **options)
            assert found.pseudo_likelihood == marked
            assert ("pseudo-likelihood" in repr(found)) == marked
            attributes = found.to_arviz(num_draws=1)["importance"].attrs
            assert (attributes.get("likelihood") == "pseudo-likelihood") == marked
            assert concatenate([found, found]).pseudo_likelihood == marked


def test_estimates_one_after_the_other_say_what_gave_each_number():
    zero, no = torch.zeros(2).double(), torch.tensor([False, False])
    plain = pv.LogMarginal(*[zero] * 8, "auto", torch.tensor([True, False]), no, {"halves": zero})
    annealed = pv.LogMarginal(*[zero + 1] * 8, "auto", no, ~no, {"halves": zero, "steps": zero})
    both = concatenate([plain, annealed])
    assert both.log_prob.tolist() == [0, 0, 1, 1]
    assert both.methods == ["importance", "not annealed", "annealed", "annealed"]
    assert list(both.diagnostics) == ["halves"]
    assert len(both.diagnostics["halves"]) == 4
    assert both.num_unreliable == 3
    unchecked = pv.LogMarginal(*[zero] * 8)
    assert concatenate([both, unchecked]).trusted is None
