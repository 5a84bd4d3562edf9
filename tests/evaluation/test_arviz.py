"""The bridge to ArviZ, on whichever line of it is installed."""

import warnings

import matplotlib as mpl
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import InputError


@pytest.fixture(autouse=True)
def _quiet():
    """ArviZ announces its own changes as warnings, and plots are drawn off screen."""
    mpl.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def estimates(exact):
    problem = exact["probabilistic_pca"](num_data=5, num_latents=2)
    options = {"num_steps": 30, "num_chains": 200, "num_leapfrog_steps": 2, "start": "guide"}
    sampled = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=2000, seed=0)
    annealed = pv.log_marginal(
        problem.model, problem.guide, problem.x, method="annealed", seed=0, **options
    )
    return problem, sampled, annealed


def test_groups_and_coordinates(estimates):
    _, sampled, annealed = estimates
    for estimate, num_kept in ((sampled, 2000), (annealed, 200)):
        data = estimate.to_arviz(num_draws=300, labels=list("abcde"))
        assert type(data).__name__ in ("InferenceData", "DataTree")  # of the 0.x and the 1.x line
        assert data["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
        assert data["posterior"]["z"].shape == (1, 300, 5, 2)
        assert data["log_likelihood"]["x"].dims == ("chain", "draw", "data")
        assert data["importance"]["log_weight"].shape == (num_kept, 5)
        assert list(data["posterior"]["data"].values) == list("abcde")
        assert data["importance"]["log_prob"].values.tolist() == estimate.log_prob.tolist()
        assert data["importance"]["trusted"].values.tolist() == estimate.trusted.tolist()
        assert set(data["importance"]["method"].values) == {estimate.method}


def test_draws_are_the_posteriors(estimates):
    problem, sampled, annealed = estimates
    ideal = problem.guide.__closure__[0].cell_contents(problem.x)
    variance = ideal.covariance_matrix.diagonal(dim1=-2, dim2=-1) / 1.3
    mean = ideal.mean - 0.1
    for estimate in (sampled, annealed):
        draws = estimate.to_arviz(num_draws=4000)["posterior"]["z"].values[0]
        error = (variance / estimate.ess.min() + variance / 4000).sqrt()
        assert ((torch.as_tensor(draws).mean(0) - mean).abs() < 5 * error).all()


def test_likelihood_belongs_to_its_draw(estimates):
    problem, sampled, _ = estimates
    data = sampled.to_arviz(num_draws=50)
    z = torch.as_tensor(data["posterior"]["z"].values[0])
    likelihood = problem.model.__closure__[0].cell_contents
    torch.testing.assert_close(
        torch.as_tensor(data["log_likelihood"]["x"].values[0]), likelihood(z).log_prob(problem.x)
    )


def test_arviz_works_on_it_as_it_is(estimates):
    import arviz

    _, sampled, annealed = estimates
    data = {"importance": sampled.to_arviz(), "annealed": annealed.to_arviz()}
    loo = arviz.loo(data["importance"], pointwise=True)
    # The harmonic mean, which errs upwards.
    total = getattr(loo, "elpd_loo", None)
    total = loo.elpd if total is None else total
    assert sampled.log_prob.sum() < total < 0
    comparison = arviz.compare(data)
    assert set(comparison.index) == {"importance", "annealed"}
    assert len(arviz.summary(data["importance"], kind="stats")) == 10
    if hasattr(arviz, "plot_posterior"):
        arviz.plot_posterior(data["importance"], coords={"data": [0]})
        arviz.plot_khat(loo)
    else:
        arviz.plot_dist(data["importance"], coords={"data": [0]}, backend="matplotlib")
        arviz.plot_khat(loo, backend="matplotlib")


def test_refusals(exact):
    problem = exact["gaussian"](num_data=3)
    without = pv.log_marginal(
        problem.model, problem.guide, problem.x, num_samples=50, keep_draws=0, seed=0
    )
    with pytest.raises(InputError, match="keep_draws"):
        without.to_arviz()
    estimate = pv.log_marginal(problem.model, problem.guide, problem.x, num_samples=50, seed=0)
    with pytest.raises(InputError, match="3 labels"):
        estimate.to_arviz(labels=["a"])
    with pytest.raises(InputError, match="num_draws"):
        estimate.to_arviz(num_draws=0)


def test_kept_draws_are_bounded(exact):
    problem = exact["probabilistic_pca"](num_data=500)
    estimate = pv.log_marginal(
        problem.model, problem.guide, problem.x, num_samples=600, seed=0, keep_draws=None
    )
    kept = estimate.draws.latents["z"]
    size = kept.numel() * 8 + 16 * estimate.draws.log_weights.numel()
    assert 0 < len(kept) < 600
    assert size <= 1 << 23


def test_neither_line_of_arviz_warns_of_what_is_called(estimates):
    import arviz  # noqa: F401  (0.x announces 1.x when it is imported)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for estimate in estimates[1:]:
            estimate.to_arviz(num_draws=10)


def test_annealing_keeps_as_many_draws_as_asked(exact):
    problem = exact["gaussian"](num_data=3)
    options = {"method": "annealed", "num_steps": 3, "num_chains": 8, "seed": 0}
    options |= {"num_leapfrog_steps": 1, "start": "guide"}
    for keep_draws, kept in ((None, 8), (5, 5)):
        estimate = pv.log_marginal(
            problem.model, problem.guide, problem.x, keep_draws=keep_draws, **options
        )
        assert estimate.draws.log_weights.shape == (kept, 3)
        assert len(estimate.draws.latents["z"]) == kept
    none = pv.log_marginal(problem.model, problem.guide, problem.x, keep_draws=0, **options)
    assert none.draws is None
    assert torch.equal(none.log_prob, estimate.log_prob)
