"""KL to the true posterior on a grid, against closed forms."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate

import pyro_vae as pv
from pyro_vae.errors import InputError

F64 = torch.float64


@pytest.mark.parametrize(
    ("covariance_scale", "shift", "num_latents"),
    [
        (1.3, 0.1, 1),
        (0.05, 0.4, 1),
        (30.0, 0.0, 1),
        pytest.param(1.3, 0.1, 2, marks=pytest.mark.slow),
        (0.05, 0.4, 2),
        (30.0, 0.0, 2),
    ],
)
def test_normal_against_normal(exact, num_latents, covariance_scale, shift):
    problem = exact["probabilistic_pca"](
        num_data=6, num_latents=num_latents, covariance_scale=covariance_scale, shift=shift
    )
    result = pv.evaluation.posterior_divergence(problem.model, problem.guide, problem.x, seed=0)
    linear_posterior = problem.guide.__closure__[0].cell_contents(problem.x)
    posterior = dist.MultivariateNormal(
        linear_posterior.mean - shift, linear_posterior.covariance_matrix / covariance_scale
    )
    expected = torch.distributions.kl_divergence(linear_posterior, posterior)
    torch.testing.assert_close(result.kl, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.log_prob, problem.log_prob, rtol=1e-8, atol=1e-8)
    assert result.error.max() < 1e-5


def test_network_decoder_and_kl_as_the_gap_of_the_bound(exact):
    problem = exact["small_decoder"]()
    result = pv.evaluation.posterior_divergence(problem.model, problem.guide, problem.x, seed=0)
    torch.testing.assert_close(result.log_prob, problem.log_prob, rtol=1e-6, atol=1e-6)
    weights = pv.log_weights(problem.model, problem.guide, problem.x, num_samples=4000)
    gap = problem.log_prob - weights.mean(0)
    error = weights.std(0) / math.sqrt(4000)
    assert ((gap - result.kl).abs() < 5 * error + 1e-6).all()
    assert (result.kl > 0).all()


def two_modes(weight):
    """x says z up to its sign: modes at +-2 of width 0.05."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.05).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            centres = torch.stack([x, -x], dim=1)
            logits = torch.tensor([weight, 1 - weight], dtype=F64).log().expand(len(x), 2)
            variance = 1 / (1 + 1 / 0.05**2)
            parts = dist.Normal(centres * variance / 0.05**2, variance**0.5).to_event(1)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts))

    return model, guide


def test_two_narrow_modes_are_both_found():
    x = torch.full((3, 1), 2.0, dtype=F64)
    # q with weights (w, 1 - w) on two equal modes: KL = w log 2w + (1 - w) log 2(1 - w).
    for weight in (0.5, 0.8):
        expected = sum(w * math.log(2 * w) for w in (weight, 1 - weight))
        result = pv.evaluation.posterior_divergence(*two_modes(weight), x, seed=0)
        torch.testing.assert_close(result.kl, torch.full_like(result.kl, expected), rtol=0, atol=1e-5)


def test_what_has_no_grid_is_refused(exact):
    large = exact["probabilistic_pca"](num_latents=3)
    with pytest.raises(InputError, match=r"real latent of 1 or 2 dimensions .* 'z' of 3"):
        pv.evaluation.posterior_divergence(large.model, large.guide, large.x)
    sphere = exact["sphere"](dimension=2)
    with pytest.raises(InputError, match="real latent"):
        pv.evaluation.posterior_divergence(sphere.model, sphere.guide, sphere.x)
    small = exact["gaussian"]()
    with pytest.raises(InputError, match="odd num_points of at least 9, got 100"):
        pv.evaluation.posterior_divergence(small.model, small.guide, small.x, num_points=100)
    for options, message in (
        ({"num_points": 101.0}, "num_points as a whole number, got 101.0"),
        ({"max_memory": 0}, "max_memory of at least 1, got 0"),
        ({"progress": False}, "progress as a function, got bool"),
    ):
        with pytest.raises(InputError, match=message):
            pv.evaluation.posterior_divergence(small.model, small.guide, small.x, **options)


def test_a_latent_may_be_a_number():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.3, 0.5**0.5))

    x = torch.linspace(-1, 1, 3, dtype=F64)
    result = pv.evaluation.posterior_divergence(model, guide, x, seed=0)
    # Normals of one variance v: (m - m')^2 / (2 v).
    torch.testing.assert_close(result.kl, torch.full((3,), 0.09, dtype=F64), rtol=1e-6, atol=1e-6)


def saturating(prior, slopes):
    """Bits whose odds stop to grow with z: far out the posterior is as heavy as the prior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            logits = 3 * z.tanh() * slopes
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * (x @ slopes)[:, None], 0.6).to_event(1))

    return model, guide


def student(z, degrees):
    """Log-density of Student's t."""
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    return (
        constant - 0.5 * math.log(degrees * math.pi) - (degrees + 1) / 2 * math.log1p(z**2 / degrees)
    )


@pytest.mark.parametrize(
    ("prior", "log_prior"),
    [
        (lambda *place: dist.StudentT(4.0, *place), lambda z: student(z, 4)),
        (dist.Cauchy, lambda z: student(z, 1)),
        (dist.Laplace, lambda z: -abs(z) - math.log(2)),
    ],
    ids=["t4", "cauchy", "laplace"],
)
def test_heavy_tails_are_within_the_error_that_is_said(prior, log_prior):
    slopes = torch.tensor([1.5, -1.0, 2.0], dtype=F64)
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=F64)
    result = pv.evaluation.posterior_divergence(*saturating(prior, slopes), x, seed=0)
    for row, bits in enumerate(x):
        signs, centre = ((2 * bits - 1) * slopes).tolist(), 0.3 * (bits @ slopes).item()

        def log_joint(z, signs=signs):
            odds = 3 * math.tanh(z)
            return log_prior(z) - sum(math.log1p(math.exp(-odds * sign)) for sign in signs)

        def loss(z, log_joint=log_joint, centre=centre):
            log_q = -0.5 * ((z - centre) / 0.6) ** 2 - math.log(0.6 * math.sqrt(2 * math.pi))
            return math.exp(log_q) * (log_q - log_joint(z))

        edges = [-math.inf, -30, -3, 0, 3, 30, math.inf]
        how = {"epsabs": 1e-13, "limit": 200}
        evidence = sum(
            integrate.quad(lambda z, log_joint=log_joint: math.exp(log_joint(z)), *ends, **how)[0]
            for ends in itertools.pairwise(edges)
        )
        mean = integrate.quad(loss, -7, 0, **how)[0] + integrate.quad(loss, 0, 8, **how)[0]
        error = result.error[row]
        assert error < 1e-3
        assert abs(result.log_prob[row] - math.log(evidence)) <= error + 1e-9
        assert abs(result.kl[row] - mean - math.log(evidence)) <= error + 1e-9


def normal_data(guide):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def q(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide(x).to_event(1))

    return model, q


def test_a_posterior_far_from_the_guide_and_much_narrower_is_resolved():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 10.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.003).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0).to_event(1))

    x = torch.tensor([[0.7], [-2.9], [1.0]], dtype=F64)
    result = pv.evaluation.posterior_divergence(model, guide, x, seed=0)
    precision = 1 / 0.003**2 + 0.01
    posterior = dist.Normal(x / 0.003**2 / precision, precision**-0.5)
    wanted = torch.distributions.kl_divergence(dist.Normal(0 * x, 1.0), posterior)[:, 0]
    torch.testing.assert_close(result.kl, wanted, rtol=1e-5, atol=0)
    assert ((result.kl - wanted).abs() <= result.error + 1e-8 * wanted).all()


def test_a_divergence_that_is_infinite_is_refused():
    """The guide's tails are those of a Cauchy, the posterior's of a normal: no KL."""
    model, guide = normal_data(lambda x: dist.Cauchy(x, torch.ones_like(x)))
    x = torch.tensor([[0.3], [1.0], [-2.0]], dtype=F64)
    with pytest.raises(InputError, match=r"a grid resolves, got none for 3 of 3 data points: raise"):
        pv.evaluation.posterior_divergence(model, guide, x, seed=0)
    found = pv.compare(
        {"a": (model, guide)}, x, posterior="quadrature", num_samples=50, num_elbo_samples=10, seed=0
    )
    assert found.pairs["a"].posterior_divergence.value.isnan().all()
    assert "not resolved" in str(found)
    assert found.to_dict()["pairs"]["a"]["posterior_divergence"] is None


def test_pseudo_likelihoods_are_marked():
    pair = saturating(dist.Laplace, torch.ones(2, dtype=F64))
    for value, marked in ((1.0, False), (0.5, True)):
        x = torch.full((2, 2), value, dtype=F64)
        found = pv.evaluation.posterior_divergence(*pair, x, seed=0)
        assert found.pseudo_likelihood == marked
