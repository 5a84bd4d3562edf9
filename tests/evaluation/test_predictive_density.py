"""log p(x | data) given draws of what is shared, against closed forms and exact leave-one-out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

import pyro_vae as pv
from pyro_vae import evaluation

NOISE, D, N = 0.7, 3, 30


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, NOISE), obs=y)


def draw(num_data):
    x = torch.randn(num_data, D, dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    return x, x @ weights + NOISE * torch.randn(num_data, dtype=torch.float64)


def posterior(x, y):
    precision = x.T @ x / NOISE**2 + torch.eye(D, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    return covariance @ x.T @ y / NOISE**2, covariance


def predictive(train, x, y):
    mean, covariance = posterior(*train)
    scale = (NOISE**2 + torch.einsum("ni,ij,nj->n", x, covariance, x)).sqrt()
    return dist.Normal(x @ mean, scale).log_prob(y)


def fitted(train):
    mean, covariance = posterior(*train)

    def guide(x, y):
        pyro.sample("weights", dist.MultivariateNormal(mean, covariance))

    return guide


def amortised(x, y):
    pyro.sample("weights", dist.MultivariateNormal(*posterior(x, y)))


def test_held_out_data_have_their_closed_form():
    train, test = draw(N), draw(7)
    exact = predictive(train, *test)
    for guide, given in ((fitted(train), None), (amortised, train)):
        found = evaluation.predictive_log_prob(
            regression, guide, test, given=given, num_draws=200, seed=0
        )
        assert found.log_likelihood.shape == (200, 7)
        assert found.draws["weights"].shape == (200, D)
        assert ((found.log_prob - exact).abs() < 5 * found.standard_error).all()
        assert found.standard_error.max() < 0.2
        assert found.trusted.all()


def test_each_row_is_the_density_given_its_draw():
    data = draw(5)
    found = evaluation.predictive_log_prob(regression, fitted(data), data, num_draws=100, seed=0)
    each = dist.Normal(found.draws["weights"] @ data[0].T, NOISE).log_prob(data[1])
    torch.testing.assert_close(found.log_likelihood, each)
    # With the exact posterior each draw weighs the evidence.
    evidence = dist.MultivariateNormal(
        torch.zeros(5).double(), data[0] @ data[0].T + NOISE**2 * torch.eye(5).double()
    ).log_prob(data[1])
    torch.testing.assert_close(found.joint.log_prob, evidence[None])
    assert "joint" in repr(found)
    assert "each data point weighed inside" in repr(found.joint)


@pytest.mark.slow
def test_arvizs_loo_is_exact_leave_one_out():
    import arviz

    x, y = train = draw(N)
    kept = [torch.arange(N) != n for n in range(N)]
    exact = sum(
        predictive((x[rest], y[rest]), x[n : n + 1], y[n : n + 1]).item()
        for n, rest in enumerate(kept)
    )
    found = evaluation.predictive_log_prob(regression, fitted(train), train, num_draws=2000, seed=0)
    loo = arviz.loo(found.to_arviz())
    estimate, num_parameters = (
        getattr(
            loo, name, getattr(loo, name.removesuffix("_loo"), None)
        )  # of the 0.x and the 1.x line
        for name in ("elpd_loo", "p_loo")
    )
    assert abs(estimate - exact) < 0.05 * num_parameters
    assert abs(num_parameters - (predictive(train, x, y).sum().item() - exact)) < 0.3


WIDE = (1 + NOISE**2) ** 0.5


def random_effects(x):
    """x_n ~ N(mean + z_n, NOISE), z_n ~ N(0, 1): given the mean a normal of scale WIDE."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(mean + z, NOISE), obs=x)


def effects_guide(error):
    """The mean's draws, and the posterior of each effect given it, wider by a factor."""

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.45), 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - mean) / WIDE**2, error * NOISE / WIDE))

    return guide


def test_latents_of_a_data_point_are_weighed_inside():
    x = torch.linspace(-1.0, 2.0, 5)
    found = evaluation.predictive_log_prob(
        random_effects, effects_guide(1.0), x, num_draws=30, num_samples=25, seed=0
    )
    each = dist.Normal(found.draws["mean"][:, None].double(), WIDE).log_prob(x.double())
    torch.testing.assert_close(found.log_likelihood, each, rtol=0, atol=1e-5)


def test_what_the_model_enumerates_is_summed_inside():
    x = torch.linspace(-1.0, 2.0, 5)

    def summed(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            coin = pyro.sample("coin", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mean + coin, NOISE), obs=x)

    def mean_alone(x):
        pyro.sample("mean", dist.Normal(torch.tensor(0.4), 0.2))

    found = evaluation.predictive_log_prob(summed, mean_alone, x, num_draws=100, seed=0)
    centre = found.draws["mean"][:, None].double()
    tails, heads = (dist.Normal(centre + coin, NOISE).log_prob(x.double()).exp() for coin in (0, 1))
    expected = (0.7 * tails + 0.3 * heads).log()
    torch.testing.assert_close(found.log_likelihood, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_many_data_points_weighed_inside_have_the_joint_evidence():
    """One weight for all the effects of 100 data points is hopeless where each is drawn too wide."""
    torch.manual_seed(1)
    x = 0.45 + WIDE * torch.randn(100)
    exact = dist.MultivariateNormal(
        torch.zeros(100).double(), WIDE**2 * torch.eye(100).double() + 1
    ).log_prob(x.double())
    guide = effects_guide(1.3)
    with pytest.warns(UserWarning, match="1 of 1 data points have Pareto k"):
        pv.log_marginal(random_effects, guide, x, num_samples=2000, plate=None, seed=0)
    options = {"num_draws": 200, "num_samples": 150, "seed": 0}
    joint = evaluation.predictive_log_prob(random_effects, guide, x, **options).joint
    assert joint.trusted.all()
    assert abs(joint.log_prob - exact) < 5 * joint.standard_error
    assert joint.standard_error < 0.3


def test_auto_guides_give_draws_and_point_masses_no_evidence():
    data = draw(6)
    for kind in (AutoMultivariateNormal, AutoDelta):
        pyro.clear_param_store()
        guide = kind(regression)
        guide(*data)
        found = evaluation.predictive_log_prob(regression, guide, draw(4), num_draws=100, seed=0)
        assert set(found.draws) == {"weights"}
        assert (found.joint is None) is (kind is AutoDelta)


def test_refusals_say_what_is_missing():
    with pytest.raises(pv.InputError, match=r"'weights' of the guide depends on.* as given="):
        evaluation.predictive_log_prob(regression, amortised, draw(5), num_draws=2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, NOISE))

    with pytest.raises(
        pv.InputError, match=r"latent outside the data plate, got none: use log_marginal"
    ):
        evaluation.predictive_log_prob(model, guide, torch.zeros(4), num_draws=2)


def test_what_few_draws_of_a_wrong_guide_find_is_not_trusted():
    def far(x, y):
        pyro.sample("weights", dist.Normal(x.new_zeros(D) - 3.0, 0.5).to_event(1))

    with pytest.warns(UserWarning, match=r"of 8 data points have a Pareto k that is too high"):
        found = evaluation.predictive_log_prob(regression, far, draw(8), num_draws=100, seed=0)
    assert not found.trusted.all()
    assert not found.joint.trusted.any()
