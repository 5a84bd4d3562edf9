"""Data completion: exact conditionals, what each method promises, what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation.estimate import rank_normalized_r_hat
from pyro_vae.tasks import complete

F64 = torch.float64

# A short run of each method.
QUICK = {
    "metropolis": {"num_steps": 5},
    "pseudo-gibbs": {"num_steps": 5},
    "importance": {"num_samples": 50},
}


def mean_errors(problem, missing, draws):
    """Errors of the draws' means, in standard errors: draws of a datum are independent."""
    errors = []
    for n, hidden in enumerate(missing):
        mean, covariance = problem.conditional(problem.x[n], hidden)
        values = draws[:, n][:, hidden]
        errors.append((values.mean(0) - mean) / (covariance.diag() / len(values)).sqrt())
    return torch.stack(errors)


def covariance_errors(problem, missing, draws):
    """Errors of the draws' covariances, in standard errors of a normal sample's."""
    errors = []
    for n, hidden in enumerate(missing):
        _, covariance = problem.conditional(problem.x[n], hidden)
        got = draws[:, n][:, hidden].T.cov()
        variances = covariance.diag()
        error = ((variances[:, None] * variances + covariance**2) / len(draws)).sqrt()
        errors.append((got - covariance) / error)
    return torch.stack(errors)


@pytest.mark.parametrize(
    ("shift", "scale"),
    [
        pytest.param(0.0, 1.0, id="exact", marks=pytest.mark.slow),
        pytest.param(0.3, 1.5, id="poor guide"),
    ],
)
def test_metropolis_draws_the_exact_conditional(pca, hide, shift, scale):
    problem = pca(shift=shift, covariance_scale=scale)
    missing = hide(problem.x)
    incomplete = problem.x.masked_fill(missing, math.nan)
    result = complete(
        problem.model, problem.guide, incomplete, missing, num_draws=2000, num_steps=100, seed=0
    )
    assert mean_errors(problem, missing, result.draws).abs().max() < 5
    assert covariance_errors(problem, missing, result.draws).abs().max() < 5
    # Each draw ends a chain of its own: together they may be right before a single chain has mixed.
    assert result.r_hat.isfinite().all()
    if scale == 1:
        # Nine tenths of the proposals are the posterior's own, so that its density is at most 10/9 of
        # theirs, and a proposal is accepted with probability 0.9 at least; 200,000 were made.
        assert (result.acceptance > 0.9 - 5 * math.sqrt(0.09 / 200_000)).all()
    else:
        assert ((result.acceptance > 0.1) & (result.acceptance < 0.9)).all()


def test_mean_and_standard_deviation_are_the_conditional_s(pca, hide):
    problem = pca(shift=0.1, covariance_scale=1.3)
    missing = hide(problem.x)
    options = {"num_draws": 1000, "num_steps": 40, "seed": 0}
    result = complete(problem.model, problem.guide, problem.x, missing, **options)
    for n, hidden in enumerate(missing):
        mean, covariance = problem.conditional(problem.x[n], hidden)
        deviation = covariance.diag().sqrt()
        # The averages rest on more than the last states, whose standard errors bound theirs.
        error = (result.mean[n][hidden] - mean).abs()
        assert (error < 5 * deviation / math.sqrt(1000) + 1e-6).all()
        error = (result.standard_deviation[n][hidden] - deviation).abs()
        assert (error < 5 * deviation / math.sqrt(2000) + 1e-6).all()
    assert torch.equal(result.mean[~missing], problem.x[~missing])
    assert (result.standard_deviation[~missing] == 0).all()


def test_pseudo_gibbs_is_biased_where_the_guide_is_not_the_posterior(pca, hide):
    options = {"method": "pseudo-gibbs", "num_draws": 2000, "num_steps": 25, "seed": 0}
    exact = pca()
    missing = hide(exact.x)
    result = complete(exact.model, exact.guide, exact.x, missing, **options)
    assert mean_errors(exact, missing, result.draws).abs().max() < 5
    poor = pca(shift=0.3, covariance_scale=1.5)
    result = complete(poor.model, poor.guide, poor.x, missing, **options)
    assert mean_errors(poor, missing, result.draws).abs().max() > 5
    assert covariance_errors(poor, missing, result.draws).abs().max() > 5
    assert "biased" in result.guarantee
    assert result.acceptance is None


def test_importance_converges_to_the_conditional(pca, hide):
    problem = pca(covariance_scale=8.0)
    missing = hide(problem.x)
    worst = []
    for num_samples in (1, 5000):
        result = complete(
            problem.model,
            problem.guide,
            problem.x,
            missing,
            method="importance",
            num_samples=num_samples,
            num_draws=200,
            seed=0,
        )
        worst.append(mean_errors(problem, missing, result.draws).abs().max())
    assert result.ess.min() > 200
    assert worst[0] > 5
    # Resampled from samples of this effective number, draws share them: their error is that of both.
    shared = math.sqrt(1 + 200 / result.ess.min())
    assert worst[1] < 5 * shared
    assert covariance_errors(problem, missing, result.draws).abs().max() < 5 * shared
    assert "consistent" in result.guarantee


@pytest.mark.parametrize("method", ["metropolis", "importance", "pseudo-gibbs"])
def test_shapes_observed_values_and_seed(pca, hide, method):
    problem = pca(num_data=5)
    missing = hide(problem.x)
    missing[0] = False
    missing[1] = True
    incomplete = problem.x.masked_fill(missing, math.nan)
    before = torch.get_rng_state()

    def run(seed):
        return complete(
            problem.model,
            problem.guide,
            incomplete,
            missing,
            method=method,
            num_draws=4,
            **QUICK[method],
            seed=seed,
        )

    result, again, other = run(0), run(0), run(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(result.draws, again.draws)
    assert not torch.equal(result.draws, other.draws)
    assert result.draws.shape == (4, 5, 8)
    assert result.mean.shape == result.standard_deviation.shape == (5, 8)
    assert torch.equal(result.draws[:, ~missing], problem.x[~missing].expand(4, -1))
    assert result.draws.isfinite().all()
    assert result.draws[0][missing].ne(result.draws[1][missing]).all()


def test_any_memory_will_do(pca, hide):
    """A byte at a time: one datum and one chain after another."""
    problem = pca(shift=0.2, covariance_scale=1.5)
    missing = hide(problem.x)
    options = {"num_draws": 4, "num_steps": 10, "max_memory": 1, "seed": 0}
    result = complete(problem.model, problem.guide, problem.x, missing, **options)
    assert result.draws.shape == (4, 3, 8)
    assert result.acceptance.shape == result.r_hat.shape == (3,)
    assert mean_errors(problem, missing, result.draws).abs().max() < 5


def test_a_guide_with_parameters_per_datum_runs_chain_by_chain(pca, hide):
    problem = pca()
    missing = hide(problem.x)
    means = (problem.x - problem.b) @ problem.W / 8

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(means, 0.7).to_event(1))

    options = {"num_draws": 6, "num_steps": 15, "seed": 0}
    result = complete(problem.model, guide, problem.x, missing, **options)
    assert mean_errors(problem, missing, result.draws).abs().max() < 5


def test_several_latents_a_condition_and_an_inner_plate(pca):
    """x = y + z1 + z2 + noise in each of two columns, z1 per datum and z2 per value."""

    def model(y, x):
        with pyro.plate("data", len(x), dim=-2):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("columns", 2, dim=-1):
                z2 = pyro.sample("z2", dist.Normal(torch.zeros((), dtype=F64), 0.5))
                pyro.sample("x", dist.Normal(y + z1 + z2, 0.5), obs=x)

    def guide(y, x):
        with pyro.plate("data", len(x), dim=-2):
            loc = 0.5 * (x - y).mean(1, keepdim=True)
            z1 = pyro.sample("z1", dist.Normal(loc, 0.8))
            with pyro.plate("columns", 2, dim=-1):
                pyro.sample("z2", dist.Normal(0.4 * (x - y - z1), 0.5))

    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=F64)
    y = torch.tensor([[5.0], [-5.0]], dtype=F64)
    missing = torch.tensor([[False, True], [True, False]])
    result = complete(
        model, guide, (y, x + y), missing, position=1, num_draws=3000, num_steps=40, seed=0
    )
    # Var x = 1 + 1/4 + 1/4, Cov = 1: the other column has mean x / 1.5 and variance 1.5 - 1 / 1.5.
    values = (result.draws - y)[:, missing]
    mean, variance = x[~missing] / 1.5, 1.5 - 1 / 1.5
    assert ((values.mean(0) - mean).abs() < 5 * math.sqrt(variance / 3000)).all()
    assert ((values.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / 3000)).all()


def bernoulli_vae(shape=(1, 3, 3)):
    decoder = pv.networks.MLPDecoder(2, (8,))
    encoder = pv.networks.MLPEncoder(shape, (8,))
    likelihood = pv.likelihoods.Bernoulli(decoder, shape)
    return pv.VAE(pv.priors.StandardNormal(2), likelihood, pv.guides.MeanFieldNormal(encoder, 2))


@pytest.mark.parametrize("method", ["metropolis", "importance", "pseudo-gibbs"])
def test_a_vae_of_bits_is_completed_by_bits(method):
    vae = bernoulli_vae()
    x = torch.bernoulli(torch.full((6, 1, 3, 3), 0.5))
    missing = torch.zeros_like(x, dtype=torch.bool)
    missing[:, :, 2] = True
    vae.train()
    result = complete(vae.model, vae.guide, x, missing, method=method, num_draws=3, **QUICK[method])
    assert vae.training
    assert ((result.draws == 0) | (result.draws == 1)).all()
    assert ((result.mean[missing] > 0) & (result.mean[missing] < 1)).all()
    assert not result.draws.requires_grad


def test_bits_have_the_exact_conditional_probabilities():
    """Two latent classes by a normal's sign would need quadrature; here a grid sums over z."""
    vae = bernoulli_vae((6,)).double()
    with torch.no_grad():
        for weight in vae.likelihood.parameters():
            weight.mul_(4)
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]], dtype=F64)
    missing = torch.tensor([[False, False, False, True, True, True]])
    axis = torch.linspace(-7, 7, 281, dtype=F64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        probability = vae.likelihood(z).mean
        log_weight = dist.Bernoulli(probability[:, :3]).log_prob(x[:, :3]).sum(1)
        weight = (log_weight - 0.5 * z.square().sum(1)).softmax(0)
        exact = weight @ probability[:, 3:]
    num_draws = 1000
    result = complete(vae.model, vae.guide, x, missing, num_draws=num_draws, num_steps=20, seed=0)
    got = result.draws[:, 0, 3:].mean(0)
    assert ((got - exact).abs() < 5 * (exact * (1 - exact) / num_draws).sqrt()).all()
    result = complete(
        vae.model, vae.guide, x, missing, method="importance", num_draws=num_draws, seed=0,
        num_samples=4000,
    )  # fmt: skip
    error = (exact * (1 - exact) * (1 / num_draws + 1 / result.ess.min())).sqrt()
    assert ((result.draws[:, 0, 3:].mean(0) - exact).abs() < 5 * error).all()


def test_the_first_fill_is_the_model_s_mean_or_as_given(pca):
    """Seen by a guide that records what it is given."""
    problem = pca(num_data=2)
    missing = torch.ones_like(problem.x, dtype=torch.bool)
    missing[:, 0] = False
    seen = []

    def guide(x):
        seen.append(x)
        problem.guide(x)

    options = {"method": "importance", "num_draws": 2, "num_samples": 4, "seed": 0}
    complete(problem.model, guide, problem.x, missing, initial=7.0, **options)
    assert (seen[-1][missing] == 7).all()
    seen.clear()
    complete(problem.model, guide, problem.x, missing, **options)
    fill, deviation = seen[-1], (problem.covariance.diag() / 16).sqrt()  # 16 draws of the prior
    assert ((fill - problem.b).abs() < 5 * deviation)[missing].all()
    assert torch.equal(fill[:, 0], problem.x[:, 0])


def test_a_likelihood_that_is_not_elementwise_is_refused(pca, hide):
    problem = pca()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            covariance = torch.eye(8, dtype=F64)
            pyro.sample("pixels", dist.MultivariateNormal(z @ problem.W.T, covariance), obs=x)

    with pytest.raises(pv.InputError, match=r"'pixels' to have independent values .*Multivariate"):
        complete(model, problem.guide, problem.x, hide(problem.x))


def test_a_model_that_uses_the_data_elsewhere_is_refused(pca, hide):
    problem = pca()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            loc = z @ problem.W.T + x.roll(1, dims=1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(pv.InputError, match="at observed sites alone, the density at 'x' changes"):
        complete(model, problem.guide, problem.x, hide(problem.x))


def test_a_transformed_observation_is_refused(pca, hide):
    problem = pca()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ problem.W.T, 1.0).to_event(1), obs=2 * x + 1)

    with pytest.raises(pv.InputError, match="'x' to observe the input or a part of it"):
        complete(model, problem.guide, problem.x, hide(problem.x))


def test_a_guide_of_point_masses_is_refused_by_metropolis_alone(pca, hide):
    problem = pca()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = (x - problem.b) @ problem.W / 8
            u = pyro.sample("u", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})
            density = dist.Normal(loc, 1.0).to_event(1).log_prob(u) * 0
            pyro.sample("z", dist.Delta(u, log_density=density, event_dim=1))

    missing = hide(problem.x)
    with pytest.raises(pv.InputError, match="'z' is a point mass: use method"):
        complete(problem.model, guide, problem.x, missing)
    result = complete(problem.model, guide, problem.x, missing, method="importance", num_draws=2)
    assert result.draws.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": torch.zeros(3, 8)}, "boolean tensor, got torch.float32"),
        ({"missing": torch.zeros(3, 7, dtype=torch.bool)}, r"data's shape \(3, 8\), got \(3, 7\)"),
        ({"missing": torch.zeros(3, 8, dtype=torch.bool)}, "no NaN among the observed values"),
        ({"method": "gibbs"}, "unknown method 'gibbs': did you mean 'pseudo-gibbs'"),
        ({"num_draws": 0}, "num_draws of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps of at least 1, got 0"),
        ({"num_samples": 0}, "num_samples of at least 1, got 0"),
        ({"num_samples": 9}, "no num_samples with method 'metropolis', which has num_steps, got 9"),
        ({"method": "importance", "num_steps": 9}, "no num_steps with method 'importance', which"),
        ({"num_draws": 3.0}, "num_draws as a whole number, got 3.0"),
        ({"num_steps": "3"}, "num_steps as a whole number, got '3'"),
        ({"max_memory": 0}, "max_memory of at least 1, got 0"),
        ({"position": 0.0}, "position as a whole number, got 0.0"),
        ({"initial": math.nan}, "finite values to fill with"),
        ({"position": 1}, "position from 0 to 0, got 1"),
        ({"observed": "y"}, "observed site 'y', the model has x"),
    ],
)
def test_bad_options_are_refused(pca, hide, change, message):
    problem = pca()
    x = problem.x.clone()
    missing = hide(x)
    x[missing] = math.nan
    options = {"missing": missing, **change}
    with pytest.raises(pv.InputError, match=message):
        complete(problem.model, problem.guide, x, **options)


@pytest.mark.parametrize("method", ["metropolis", "importance"])
def test_data_of_another_type_serve_a_network(method):
    networks = pv.networks
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Gaussian(networks.MLPDecoder(2, (8,)), (4,)),
        pv.guides.MeanFieldNormal(networks.MLPEncoder((4,), (8,)), 2),
    )
    x = torch.ones(5, 4)
    missing = torch.arange(4).expand(5, 4) > 1
    options = {"method": method, "num_draws": 2, "seed": 0, **QUICK[method]}
    expected = complete(vae.model, vae.guide, x, missing, **options)
    for same in (x.double(), x.long(), x.double().numpy()):
        got = complete(vae.model, vae.guide, same, missing, **options)
        assert torch.equal(got.draws, expected.draws)


@pytest.mark.parametrize("initial", [torch.zeros(3), torch.zeros(2, 3, 8), "mean"])
def test_a_first_fill_that_does_not_fit_is_refused(pca, hide, initial):
    problem = pca()
    with pytest.raises(pv.InputError, match="expected initial"):
        complete(problem.model, problem.guide, problem.x, hide(problem.x), initial=initial)


def components(x):
    """Three clusters far apart: given the cluster values are certain, and given these the cluster."""
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=x.dtype)
    return shares, torch.tensor([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]], dtype=x.dtype)


def test_chains_that_cannot_leave_their_mode_are_flagged():
    def model(x):
        shares, centres = components(x)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(shares))
            pyro.sample("x", dist.Normal(centres[k], 0.3).to_event(1), obs=x)

    def guide(x):
        shares, centres = components(x)
        log_prob = dist.Normal(centres, 0.3).log_prob(x[:, None]).sum(-1) + shares.log()
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=0.7 * log_prob))

    x = torch.zeros(2, 2, dtype=torch.float64)
    missing = torch.ones_like(x, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"2 of 2 data points have R-hat > 1.1 or not known"):
        found = complete(model, guide, x, missing, num_draws=200, num_steps=10, seed=0)
    assert (found.r_hat > 1.5).all()
    # The chains start apart, half from the prior, whose draws are right where nothing is observed.
    shares, centres = components(x)
    nearest = torch.cdist(found.draws, centres.expand(200, -1, -1)).argmin(-1)
    counts = torch.stack([(nearest == k).double().mean(0) for k in range(3)], -1)
    assert ((counts - shares).abs() < 5 * (shares * (1 - shares) / 200).sqrt()).all()


def test_a_mode_that_the_guide_does_not_know_shows_in_r_hat():
    """x says z up to its sign, and the guide only knows one: every chain from it would agree."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z.abs(), z], -1), 0.1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1], 0.1).to_event(1))

    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    missing = torch.tensor([[False, True]])
    with pytest.warns(UserWarning, match="1 of 1 data points have R-hat"):
        found = complete(model, guide, x, missing, num_draws=32, num_steps=100, seed=0)
    assert found.draws[:, 0, 1].min() < -0.5 < 0.5 < found.draws[:, 0, 1].max()


def test_chains_that_mix_are_not_flagged(pca):
    problem = pca(shift=0.0, covariance_scale=1.0)
    missing = torch.zeros_like(problem.x, dtype=torch.bool)
    missing[:, 0] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = complete(problem.model, problem.guide, problem.x, missing, num_draws=16, seed=0)
    assert (found.r_hat <= 1.1).all()


def test_a_single_chain_has_no_r_hat(pca, hide):
    problem = pca()
    with pytest.warns(UserWarning, match="R-hat > 1.1 or not known"):
        found = complete(
            problem.model, problem.guide, problem.x, hide(problem.x), num_draws=1, num_steps=8, seed=0
        )
    assert found.r_hat.isnan().all()


def test_r_hat_is_the_largest_of_arviz_and_a_constant_says_nothing():
    import arviz

    values = torch.randn(4, 30, 2, 3).double()
    values[0, :, 1, 2] += 3.0
    wanted = [max(float(arviz.rhat(values[..., n, q].numpy())) for q in range(3)) for n in range(2)]
    assert rank_normalized_r_hat(values).tolist() == pytest.approx(wanted)
    assert rank_normalized_r_hat(values)[1] > 1.1
    values[..., 1, :] = 2.0  # nothing moves
    values[..., 0, 1] = 2.0  # one number of several does not
    found = rank_normalized_r_hat(values)
    assert found[0] < 1.2
    assert found[1].isnan()
    values[..., 1, 0] = torch.arange(4.0).double()[:, None]  # each chain keeps to its own
    assert rank_normalized_r_hat(values)[1] == math.inf
    assert rank_normalized_r_hat(values[:, :3]).isnan().all()


@pytest.mark.parametrize("method", [pytest.param("metropolis", marks=pytest.mark.slow), "importance"])
def test_sequences_with_a_site_for_each_time_are_completed(method):
    """A linear Gaussian chain of many lengths; what is missing has the exact normal's moments."""
    lengths = torch.tensor([4, 3, 4])
    on = torch.arange(4) < lengths[:, None]

    def model(x, on):
        z = x.new_zeros(len(x))
        with pyro.plate("data", len(x)):
            for time in pyro.markov(range(4)):
                with pyro.poutine.mask(mask=on[:, time]):
                    z = pyro.sample(f"z_{time}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{time}", dist.Normal(z, 0.5), obs=x[:, time])

    def guide(x, on):
        z = x.new_zeros(len(x))
        with pyro.plate("data", len(x)):
            for time in pyro.markov(range(4)):
                with pyro.poutine.mask(mask=on[:, time]):
                    z = pyro.sample(f"z_{time}", dist.Normal((z + 2 * x[:, time]) / 3, 0.8))

    x = torch.tensor([[0.5, 1.0, 2.0, 1.5], [1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 1.0, 3.0]], dtype=F64)
    missing = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    options = {"num_steps": 200} if method == "metropolis" else {"num_samples": 20_000}
    found = complete(model, guide, (x, on), missing, method=method, num_draws=200, seed=0, **options)
    times = torch.arange(1.0, 5, dtype=F64)
    covariance = torch.minimum(times, times[:, None]) + 0.25 * torch.eye(4, dtype=F64)
    for row in range(3):
        seen = on[row] & ~missing[row]
        (hidden,) = missing[row].nonzero()[:, 0].tolist()
        gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen, hidden])
        variance = covariance[hidden, hidden] - gain @ covariance[seen, hidden]
        drawn, count = found.draws[:, row, hidden], 200.0
        if method == "importance":
            assert found.ess[row] > 50
            count = 1 / (1 / count + 1 / found.ess[row])
        assert (drawn.mean() - gain @ x[row, seen]).abs() < 4 * (variance / count).sqrt()
        assert (drawn.var() / variance - 1).abs() < 4 * (2 / count) ** 0.5
        assert (found.draws[:, row][:, ~missing[row]] == x[row, ~missing[row]]).all()


def test_values_that_no_site_observes_are_not_filled_in(pca):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("first", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("again", dist.Normal(z, 1.0), obs=x[:, twice])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x.sum(1), 0.7))

    x, missing, twice = torch.randn(5, 3), torch.zeros(5, 3, dtype=torch.bool), 1
    missing[:2, 2] = True
    with pytest.raises(pv.InputError, match="2 lie outside first, again"):
        complete(model, guide, x, missing)
    missing[:, 2], missing[:, 0], twice = False, True, 0
    with pytest.raises(pv.InputError, match="observed at one site, 'again' observes some again"):
        complete(model, guide, x, missing)
