"""``plate=None``: the whole data set is one datum, and p(x) its joint evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_vae as pv
from pyro_vae import evaluation
from pyro_vae.infer import IWAE, StickingTheLanding

NOISE = 0.5


class Regression:
    """y = Xw + noise with w ~ N(0, I): its posterior and its evidence in closed form."""

    def __init__(self, num_weights, num_data=40):
        self.x = torch.randn(num_data, num_weights, dtype=torch.float64)
        weights = torch.randn(num_weights, dtype=torch.float64)
        self.y = self.x @ weights + NOISE * torch.randn(num_data, dtype=torch.float64)
        eye = torch.eye(num_weights, dtype=torch.float64)
        self.precision = self.x.T @ self.x / NOISE**2 + eye
        self.covariance = torch.linalg.inv(self.precision)
        self.mean = self.covariance @ self.x.T @ self.y / NOISE**2
        marginal = self.x @ self.x.T + NOISE**2 * torch.eye(num_data, dtype=torch.float64)
        zeros = torch.zeros(num_data, dtype=torch.float64)
        self.evidence = dist.MultivariateNormal(zeros, marginal).log_prob(self.y)

    @property
    def data(self):
        return self.x, self.y

    def model(self, x, y):
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            # Also of many particles at once.
            pyro.sample("y", dist.Normal((weights * x).sum(-1), NOISE), obs=y)

    def posterior(self, x, y):
        pyro.sample("weights", dist.MultivariateNormal(self.mean, self.covariance))

    def mean_field(self, x, y):
        scale = self.precision.diagonal().rsqrt()
        pyro.sample("weights", dist.Normal(self.mean, scale).to_event(1))


def far(estimate, exact):
    return (estimate.log_prob - exact).abs() > 5 * estimate.standard_error + 1e-6


@pytest.mark.parametrize("num_weights", [5, 50])
def test_every_draw_of_the_posterior_weighs_the_evidence(num_weights):
    pair = Regression(num_weights)
    weights = pv.log_weights(pair.model, pair.posterior, pair.data, num_samples=20, plate=None)
    assert weights.shape == (20, 1)
    torch.testing.assert_close(weights, pair.evidence.expand(20, 1), rtol=0, atol=1e-6)
    estimate = pv.log_marginal(pair.model, pair.posterior, pair.data, num_samples=20, plate=None)
    torch.testing.assert_close(estimate.log_prob, pair.evidence[None], rtol=0, atol=1e-6)
    assert estimate.log_prob.shape == estimate.pareto_k.shape == (1,)
    assert estimate.draws.latents["weights"].shape == (20, 1, num_weights)


@pytest.mark.slow
def test_a_mean_field_guide_is_weighed_and_annealed():
    pair = Regression(5)
    sampled = pv.log_marginal(
        pair.model, pair.mean_field, pair.data, num_samples=4000, plate=None, seed=0
    )
    assert not far(sampled, pair.evidence)
    annealed = pv.log_marginal(
        pair.model,
        pair.mean_field,
        pair.data,
        method="annealed",
        num_steps=50,
        num_leapfrog_steps=2,
        plate=None,
        seed=0,
    )
    assert not far(annealed, pair.evidence)
    bound = torch.tensor([IWAE(10, plate=None).loss(pair.model, pair.mean_field, *pair.data)])
    assert -bound < pair.evidence + 1


@pytest.mark.slow
@pytest.mark.parametrize("num_weights", [5, 50])
def test_a_mean_field_guide_annealed_by_default_is_right_or_not_trusted(num_weights):
    pair = Regression(num_weights)
    options = {"method": "annealed", "plate": None, "seed": 0}
    found = pv.log_marginal(pair.model, pair.mean_field, pair.data, **options)
    error = (found.log_prob - pair.evidence).abs()
    assert (error < 3 * found.standard_error) | ~found.trusted


@pytest.mark.slow
@pytest.mark.parametrize(("num_weights", "epochs", "rate"), [(5, 200, 0.05), (50, 1500, 0.03)])
def test_a_fitted_auto_guide_is_a_proposal(num_weights, epochs, rate):
    pair = Regression(num_weights, num_data=200)
    guide = AutoMultivariateNormal(pair.model)
    objective = StickingTheLanding(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    options = {"epochs": epochs, "schedule": "cosine", "learning_rate": rate, "compile": False}
    pv.fit(pair.model, guide, pair.data, objective=objective, plate=None, seed=0, **options)
    estimate = pv.log_marginal(pair.model, guide, pair.data, num_samples=1000, plate=None, seed=0)
    assert (estimate.log_prob - pair.evidence).abs() < (3 * estimate.standard_error).clamp(min=1e-6)
    assert estimate.standard_error < 0.02
    assert estimate.trusted.all()


def test_neither_plates_nor_rows_in_common_are_needed():
    """A scalar and a table: one evidence, by a loop without any plate."""
    pair = Regression(3, num_data=4)

    def model(x, y, noise):
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        for row in range(4):
            pyro.sample(f"y{row}", dist.Normal(x[row] @ weights, noise), obs=y[row])

    def guide(x, y, noise):
        pair.posterior(x, y)

    data = (*pair.data, torch.tensor(NOISE, dtype=torch.float64))
    estimate = pv.log_marginal(model, guide, data, num_samples=4000, plate=None, seed=0)
    assert not far(estimate, pair.evidence)


def test_local_latents_beside_shared_ones_have_one_joint_weight():
    """x_n ~ N(theta + z_n, 1), z_n and theta standard normal: jointly normal."""
    x = torch.linspace(-1.0, 2.0, 6)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)

    def guide(x):
        theta = pyro.sample("theta", dist.Normal(x.mean(), 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (x - theta), 0.8))

    exact = dist.MultivariateNormal(torch.zeros(6).double(), 2 * torch.eye(6).double() + 1).log_prob(
        x.double()
    )
    for options in (
        {"num_samples": 8000},
        {"method": "annealed", "num_steps": 20, "num_leapfrog_steps": 2},
    ):
        estimate = pv.log_marginal(model, guide, x, plate=None, seed=0, **options)
        assert not far(estimate, exact), options
        assert estimate.log_prob.shape == (1,)


def test_what_subsamples_is_no_datum():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x[rows])

    def guide(x):
        pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(pv.InputError, match="no subsampling inside one datum, plate 'data'"):
        pv.log_weights(model, guide, torch.zeros(6), num_samples=2, plate=None)


def test_a_value_per_number_without_a_plate_is_refused_as_pyro_refuses_it():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(pv.InputError, match=r"'x' of the model .* \.to_event\(k\)"):
        pv.log_weights(model, guide, torch.zeros(6), num_samples=2, plate=None)


def test_what_asks_for_each_data_point_refuses_to_take_all_as_one():
    pair = Regression(2)
    for function in (evaluation.representation, pv.tasks.reconstruct, evaluation.calibration):
        with pytest.raises(
            pv.InputError, match="expected the name of the data plate, got plate=None"
        ):
            function(pair.model, pair.posterior, pair.data, plate=None)
    with pytest.raises(pv.InputError, match="expected the name of the data plate, got plate=None"):
        pv.compare({"a": (pair.model, pair.posterior)}, pair.data, plate=None)


def test_the_advice_leads_to_one_datum():
    pair = Regression(2)
    with pytest.raises(pv.InputError, match=r"'weights' of the guide .* by plate=None"):
        pv.log_marginal(pair.model, pair.posterior, pair.data, num_samples=3)
    assert math.isfinite(
        pv.log_marginal(pair.model, pair.posterior, pair.data, num_samples=3, plate=None).mean
    )


@pytest.mark.slow
def test_an_auto_guide_is_annealed():
    """It places its latents by point masses: its density is known at its draws alone."""
    pair = Regression(3)
    guide = AutoMultivariateNormal(pair.model, init_scale=0.5)
    for method in ("annealed", "auto"):
        found = pv.log_marginal(
            pair.model, guide, pair.data, method=method, num_steps=30, plate=None, seed=0
        )
        assert not far(found, pair.evidence)
        assert found.trusted.all()
