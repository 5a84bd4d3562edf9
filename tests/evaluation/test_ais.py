"""Annealed importance sampling: exact models, the narrow guide, transforms, refusals."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation.ais import AnnealingOptions, error_of_few, make_plan
from pyro_vae.evaluation.annealing_path import AnnealingPath, transition
from pyro_vae.evaluation.estimate import measure_weights
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.weights.particles import Particles

CONTINUOUS = ["probabilistic_pca", "gaussian", "beta_bernoulli", "mixture_prior", "small_decoder"]
# One each of a normal latent, one in an interval and a network, from both starts.
QUICK = {
    ("probabilistic_pca", "guide"),
    ("beta_bernoulli", "guide"),
    ("beta_bernoulli", "prior"),
    ("small_decoder", "guide"),
}


def anneal(problem, **options):
    options = {"num_steps": 60, "num_leapfrog_steps": 3, "seed": 0, **options}
    return pv.log_marginal(problem.model, problem.guide, problem.x, method="annealed", **options)


def within(estimate, exact):
    return (estimate.log_prob - exact).abs() < 5 * estimate.standard_error + 1e-6


@pytest.mark.parametrize(
    ("name", "start"),
    [
        pytest.param(name, start, marks=() if (name, start) in QUICK else pytest.mark.slow)
        for name in CONTINUOUS
        for start in ("guide", "prior")
    ],
)
def test_exact_models(exact, name, start):
    problem = exact[name](num_data=8)
    # From the prior the weights of so few chains are skewed unless there are more steps.
    estimate = anneal(problem, start=start, num_steps=60 if start == "guide" else 300)
    # With 16 chains a standard error is itself uncertain by a fifth.
    assert within(estimate, problem.log_prob).all()
    assert (estimate.mean - problem.log_prob.mean()).abs() < 5 * estimate.mean_standard_error
    assert estimate.standard_error.mean() < 0.5
    assert ((estimate.acceptance > 0.6) & (estimate.acceptance < 1)).all()
    assert estimate.method == "annealed"
    assert estimate.rate.isnan().all() == (start == "prior")


@pytest.mark.parametrize(
    ("num_data", "num_latents", "options"),
    [
        (6, 3, {"num_steps": 300, "num_leapfrog_steps": 3, "num_chains": 64}),
        pytest.param(40, 6, {}, marks=pytest.mark.slow, id="defaults"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Pareto k")
def test_a_guide_too_narrow_does_not_matter(exact, num_data, num_latents, options):
    """Weights stay skewed: the errors of single data are no multiples of their own standard errors.

    All data are one problem, so that the standard errors of all say what the errors are.
    """
    problem = exact["probabilistic_pca"](
        num_data, num_latents=num_latents, covariance_scale=0.05, shift=0.6
    )
    estimate = pv.log_marginal(
        problem.model, problem.guide, problem.x, method="annealed", seed=0, **options
    )
    limit = 0.2 if not options else 0.4
    assert abs(estimate.mean - problem.log_prob.mean()) < limit
    error = (estimate.log_prob - problem.log_prob).square().mean().sqrt()
    assert error < 5 * estimate.standard_error.square().mean().sqrt()


def test_weights_of_too_few_steps_are_warned_of(exact):
    problem = exact["probabilistic_pca"](6, covariance_scale=0.05, shift=0.6)
    with pytest.warns(
        UserWarning, match=r"of 6 data points are not trusted .* more steps or chains"
    ) as caught:
        estimate = anneal(problem, num_steps=5, num_chains=64, num_leapfrog_steps=1, start="guide")
    assert not estimate.trusted.all()
    assert caught[0].filename == __file__


@pytest.mark.slow
def test_calibration(exact):
    """Over many data the exact value lies within 2 standard errors as often as it should."""
    problem = exact["probabilistic_pca"](num_data=200, num_latents=3)
    estimate = anneal(problem, num_steps=200)
    inside = (estimate.log_prob - problem.log_prob).abs() < 2 * estimate.standard_error
    assert 0.88 <= inside.double().mean() <= 0.99


def test_the_final_states_are_posterior_draws(exact):
    problem = exact["probabilistic_pca"](num_data=3, num_latents=2)
    exact_wide = exact["probabilistic_pca"](num_data=3, num_latents=2, covariance_scale=1.0, shift=0)
    estimate = anneal(problem, num_chains=400, num_steps=30, start="guide")
    posterior = exact_wide.guide.__closure__[0].cell_contents(problem.x)
    draws, weights = estimate.draws.latents["z"], estimate.draws.log_weights.softmax(0)
    mean = (weights[..., None] * draws).sum(0)
    error = (posterior.variance / 400).sqrt() * 1.5
    assert ((mean - posterior.mean).abs() < 5 * error).all()


def test_transitions_leave_the_density_invariant():
    """Draws of the posterior stay draws of the posterior, in constrained coordinates too."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(3.0).double(), 2.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(3.0 + x, 3.0))

    x = torch.tensor([0.0, 2.0, 7.0]).double()
    with torch.no_grad():
        options = AnnealingOptions(start="prior")
        path = AnnealingPath(Particles(OpenedPair(model, guide, (x,))), "prior")
        plan = make_plan(path, options)
        end = torch.ones(3).double()
        latents, _ = path.particles.propose(4000)
        state = path.evaluate(path.position(latents))
        for _ in range(10):
            state, _ = transition(path, state, end, *plan.tuning.at(end), 3)
        z = path.latents(state.position)[0]["z"]
    mean, variance = (3 + x) / 3, (3 + x) / 9
    assert ((z.mean(0) - mean).abs() < 5 * (variance / 4000).sqrt()).all()
    # The variance of a Gamma's sample variance: (mu4 - var^2) / n with mu4 = var^2 (3 + 6 / shape).
    error = (variance.square() * (2 + 6 / (3 + x)) / 4000).sqrt()
    assert ((z.var(0) - variance).abs() < 5 * error).all()


def test_densities_and_gradients_along_the_path(exact):
    """The path's log densities match Pyro's in constrained space plus the Jacobian."""
    problem = exact["beta_bernoulli"](num_data=4)
    particles = Particles(OpenedPair(problem.model, problem.guide, (problem.x,)))
    path = AnnealingPath(particles, "guide")
    position = torch.randn(3, 4, 1, dtype=torch.float64)
    state = path.evaluate(position)
    z = position[..., 0].sigmoid()
    jacobian = (z * (1 - z)).log()
    joint = sum(particles.score({"z": z}))
    torch.testing.assert_close(state.base, particles.score_proposal({"z": z}) + jacobian)
    torch.testing.assert_close(state.increment, joint - particles.score_proposal({"z": z}))
    step = 1e-6
    for place in (0.0, 0.3, 1.0):
        beta = torch.full((4,), place).double()
        ahead = path.evaluate(position + step).log_density(beta)
        behind = path.evaluate(position - step).log_density(beta)
        slope = (ahead - behind) / (2 * step)
        torch.testing.assert_close(state.gradient(beta)[..., 0], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k")
def test_several_latents_of_several_shapes():
    """A simplex (whose unconstrained space is smaller), a vector per pixel and a scalar."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3).double()))
            level = pyro.sample("level", dist.Gamma(torch.tensor(2.0).double(), 1.0))
            with pyro.plate("pixels", 4, dim=-1):
                noise = pyro.sample("noise", dist.Normal(share[..., 0], 1.0))
                pyro.sample("x", dist.Normal(noise + 0.3 * level, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("share", dist.Dirichlet(torch.ones(3).double()))
            pyro.sample("level", dist.Gamma(torch.tensor(2.0).double(), 0.9))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("noise", dist.Normal(0.4 * x, 0.9))

    x = 1 + torch.randn(6, 4).double()
    annealed = pv.log_marginal(
        model, guide, x, method="annealed", num_steps=30, num_chains=32, num_leapfrog_steps=2, seed=0
    )
    sampled = pv.log_marginal(model, guide, x, num_samples=20_000, seed=0)
    error = (annealed.standard_error.square() + sampled.standard_error.square()).sqrt()
    assert sampled.standard_error.max() < 0.2
    assert ((annealed.log_prob - sampled.log_prob).abs() < 5 * error).all()
    assert annealed.draws.latents["share"].shape == (32, 6, 1, 3)
    torch.testing.assert_close(annealed.draws.latents["share"].sum(-1), torch.ones(32, 6, 1).double())


def test_a_seed_repeats_and_progress_reaches_the_end(exact):
    problem = exact["gaussian"](num_data=5)
    seen = []
    options = {"num_steps": 20, "num_leapfrog_steps": 1}
    one = anneal(problem, progress=lambda *at: seen.append(at), **options)
    two = anneal(problem, **options)
    assert torch.equal(one.log_prob, two.log_prob)
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)


def test_one_chain_one_datum(exact):
    problem = exact["gaussian"](num_data=1)
    with pytest.warns(UserWarning, match="1 of 1 data points are not trusted"):
        estimate = anneal(problem, num_chains=1, num_steps=10, start="guide")
    assert estimate.log_prob.isfinite().all()
    assert estimate.standard_error.isnan().all()
    assert estimate.pareto_k.isnan().all()


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of so few steps some weights have heavy tails
def test_blocks_fit_the_memory(exact):
    problem = exact["probabilistic_pca"](num_data=20, num_latents=2)
    seen = []
    estimate = anneal(
        problem,
        num_steps=10,
        num_chains=32,
        num_leapfrog_steps=2,
        start="guide",
        max_memory=1 << 19,
        progress=lambda done, _: seen.append(done),
    )
    assert len({done for done in seen if done < 20}) > 3
    assert within(estimate, problem.log_prob).all()


def test_cost_counts_gradient_evaluations(exact):
    problem = exact["gaussian"](num_data=2)
    scored = []
    original = AnnealingPath.evaluate

    def counting(self, position):
        scored.append(position.shape[0])
        return original(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnnealingPath, "evaluate", counting)
        estimate = anneal(problem, num_steps=50, num_leapfrog_steps=1)
    assert sum(scored) == estimate.cost[0] == estimate.cost[1]
    assert (estimate.num_samples == 32).all()


def test_zero_likelihood_is_minus_infinity():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Unit(torch.where(x < 0.5, -z.square(), -math.inf)), obs=x[:0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    x = torch.tensor([0.0, 1.0])
    options = {"num_steps": 30, "num_leapfrog_steps": 2, "start": "guide"}
    with pytest.warns(UserWarning, match="1 of 2 data points are not trusted"):
        estimate = pv.log_marginal(model, guide, x, method="annealed", seed=0, **options)
    assert estimate.trusted.tolist() == [True, False]
    # E[exp(-z^2)] over a standard normal is 3^(-1/2).
    exact = -0.5 * math.log(3)
    assert abs(estimate.log_prob[0] - exact) < 5 * estimate.standard_error[0]
    assert estimate.log_prob[1] == -math.inf
    assert estimate.standard_error[1] == math.inf


def test_discrete_latents_are_refused_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(torch.full_like(x, 0.5)))

    with pytest.raises(InputError, match="'kind' is discrete"):
        pv.log_marginal(model, guide, torch.randn(3), method="annealed")


def test_sphere_latents_are_refused_by_name(exact):
    with pytest.raises(InputError, match=r"'z' \(VonMisesFisher\)"):
        anneal(exact["sphere"](num_data=3))


def test_changing_structure_is_refused_by_name():
    # A guide and a model run at a time share a size; from run to run it grows.
    sizes = (size for size in itertools.count(1) for _ in range(2))

    def changing(x, observe=False):
        with pyro.plate("data", len(x)):
            size = next(sizes)
            pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def moving(x, observe=False):
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("high", dist.Uniform(low, low + 1.0))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.zeros(4)
    for function, name in ((changing, "z"), (moving, "high")):
        model = functools.partial(function, observe=True)
        with pytest.raises(InputError, match=f"'{name}' changes"):
            pv.log_marginal(model, function, x, method="annealed", seed=0)


@pytest.mark.slow
def test_guides_that_place_point_masses_are_annealed_from_where_pilots_arrive():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample(
                "noise", dist.Normal(torch.zeros(()), 1.0), infer={"is_auxiliary": True}
            )
            pyro.sample("z", dist.Delta(0.5 * x + noise))

    x = torch.randn(5)
    with pytest.raises(InputError, match="'z' is a point mass"):
        pv.log_marginal(model, guide, x, method="annealed", start="guide")
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).double()
    for options in ({"method": "annealed", "start": "prior"}, {"method": "auto"}):
        estimate = pv.log_marginal(model, guide, x, num_steps=30, num_samples=200, seed=0, **options)
        assert within(estimate, exact).all()
        assert estimate.trusted.all()
    assert estimate.was_annealed.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains of at least 1"),
        ({"num_steps": 0}, "num_steps of at least 1"),
        ({"num_leapfrog_steps": 0}, "num_leapfrog_steps of at least 1"),
        ({"start": "elsewhere"}, "'guide' or 'prior'"),
        ({"schedule": "cubic"}, "'sigmoid' or 'linear'"),
    ],
)
def test_options_out_of_range_are_refused(exact, options, message):
    with pytest.raises(InputError, match=message):
        anneal(exact["gaussian"](num_data=2), **options)


@pytest.mark.parametrize("schedule", ["sigmoid", "linear"])
def test_schedules_rise_from_0_to_1(schedule):
    betas = torch.tensor(AnnealingOptions(num_steps=50, schedule=schedule).betas())
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas, 1 - betas.flip(0))


def test_errors_of_few_weights_hold_three_standard_errors():
    """Normal log weights of variance 0.8, as d = 50 has them: their mean is known exactly."""
    generator = torch.Generator().manual_seed(0)
    log_weights = 0.8**0.5 * torch.randn(32, 20_000, generator=generator, dtype=torch.float64)
    found = measure_weights(log_weights, 1e-16)
    told = error_of_few(log_weights, found["standard_error"])
    away = (found["log_prob"] - 0.4).abs()
    shown_alone = (away > 3 * found["standard_error"]).double().mean()
    assert shown_alone > 0.015  # what the weights show is not enough
    assert (away > 3 * told).double().mean() < 0.01
    assert (told >= found["standard_error"]).all()
    spread = (found["log_prob"]).std()
    assert 0.9 * spread < told.square().mean().sqrt() < 1.3 * spread


def test_chains_that_arrived_nowhere_do_not_swell_the_error():
    log_weights = torch.zeros(32, 2, dtype=torch.float64)
    log_weights[::2, 0] = -40.0
    log_weights[:3, 1] = -math.inf
    found = measure_weights(log_weights, 1e-16)["standard_error"]
    told = error_of_few(log_weights, found)
    torch.testing.assert_close(told[0], 1.5 * found[0])
    assert told[1] == found[1]
