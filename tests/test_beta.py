"""The beta handler scales latent sites and nothing else."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.beta import beta_at
from pyro_vae.infer import scale_latents


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.7))


def closed_form(x, beta):
    """-ELBO with weight beta: expected squared error and the KL of two normals."""
    variance, loc = torch.tensor(0.49), 0.5 * x
    distortion = 0.5 * ((x - loc) ** 2 + variance) + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    rate = 0.5 * (variance + loc**2 - 1 - variance.log())
    return (distortion + beta * rate).sum().item()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scaled_objective_is_distortion_plus_beta_times_rate(beta, as_tensor):
    x = torch.tensor([0.3, -1.2, 2.0])
    weight = torch.tensor(beta) if as_tensor else beta
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    scaled = [scale_latents(function, weight) for function in (model, guide)]
    losses = torch.tensor([elbo.loss(*scaled, x) for _ in range(20)])
    standard_error = losses.std().item() / 20**0.5
    assert abs(losses.mean().item() - closed_form(x, beta)) < 5 * standard_error + 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
def test_closed_form_kl_is_scaled_too(beta):
    x = torch.tensor([0.3, -1.2, 2.0])
    elbo = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True)
    scaled = [scale_latents(function, beta) for function in (model, guide)]
    losses = torch.tensor([elbo.loss(*scaled, x) for _ in range(20)])
    standard_error = losses.std().item() / 20**0.5
    assert abs(losses.mean().item() - closed_form(x, beta)) < 5 * standard_error + 1e-6


def test_weights_take_the_scale_out_again():
    x = torch.randn(5)
    pyro.set_rng_seed(1)
    plain = pv.log_weights(model, guide, x, num_samples=3)
    pyro.set_rng_seed(1)
    scaled = pv.log_weights(
        scale_latents(scale_latents(model, 0.5), 3.0), scale_latents(guide, 0.2), x, num_samples=3
    )
    torch.testing.assert_close(plain, scaled)


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_bad_beta_is_refused(beta):
    with pytest.raises(pv.InputError, match="beta"):
        scale_latents(model, beta)


def test_schedule_rises_linearly_and_stays():
    seen = [beta_at(step, 2.0, warmup_steps=4) for step in range(6)]
    assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert beta_at(0, 2.0, warmup_steps=0) == 2.0
