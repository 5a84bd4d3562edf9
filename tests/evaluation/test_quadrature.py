"""KL to the true posterior on a grid, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import InputError

F64 = torch.float64


@pytest.mark.parametrize("num_latents", [1, 2])
@pytest.mark.parametrize(("covariance_scale", "shift"), [(1.3, 0.1), (0.05, 0.4), (30.0, 0.0)])
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
