"""Batched particles against plain calls: what passes for rounding, and what does not."""

import warnings

import pytest
import torch

import pyro_vae as pv
from pyro_vae.infer import IWAE
from pyro_vae.pair.sites import agree, all_close

NOISE = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))


def steep(latents):
    """Finds the noise of z = 1000 + noise / 10,000 again: rounding of z is multiplied by 10,000."""
    return (-0.5 * ((latents["z"] - 1000.0) * 1e4).square(),)


def tame(latents):
    return (-0.5 * latents["z"].square(),)


def test_what_a_steep_density_makes_of_rounding_is_let_pass():
    exact = (-0.5 * NOISE.square(),)
    latents = {"z": 1000.0 + NOISE / 1e4}
    assert not all_close(exact, steep(latents))
    assert agree(exact, steep, latents)


def test_what_a_tame_density_gives_may_differ_by_its_kernels_rounding_alone():
    latents = {"z": NOISE}
    (exact,) = tame(latents)
    assert agree((exact * (1 + 1e-6),), tame, latents)
    assert not agree((exact + 0.01,), tame, latents)


@pytest.mark.parametrize("density", [tame, steep])
def test_particles_that_changed_places_never_agree(density):
    latents = {"z": NOISE if density is tame else 1000.0 + 10 * NOISE}
    (exact,) = density(latents)
    assert agree((exact,), density, latents)
    assert not agree((exact.flip(0),), density, latents)


def test_results_drawn_anew_are_not_called_steep():
    latents = {"z": NOISE}
    assert not agree((torch.rand(4, 50),), lambda _: (torch.rand(4, 50),), latents)


def test_discrete_latents_are_not_moved():
    """A label a little below 2 would be read as 1, and 'steep' excuse whatever comes."""
    table = torch.tensor([0.0, 5.0, -3.0])
    latents = {"k": torch.tensor([[0.0, 1.0, 2.0]])}

    def plain(given):
        return (table[given["k"].long()],)

    assert agree((table[None],), plain, latents)
    assert not agree((table[None].roll(1),), plain, latents)


@pytest.mark.parametrize("use", ["log_weights", "IWAE"])
def test_full_rank_posterior_of_any_condition_is_batched(use):
    torch.manual_seed(0)
    family = pv.guides.FullRankNormal(pv.networks.MLPEncoder((6,), (8,)), 6)
    likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(6, (8,)), (6,))
    vae = pv.VAE(pv.priors.StandardNormal(6), likelihood, family)
    with torch.no_grad():  # diagonals of softplus(-6) = 0.002 below entries of 1/2
        family.raw_cholesky.map.bias.fill_(0.5)
        family.raw_cholesky.map.bias[torch.arange(1, 7).cumsum(0) - 1] = -6.0
    x = torch.rand(5, 6).round()
    z = (q := family(x)).rsample()
    assert not torch.allclose(q.log_prob(z), q.log_prob(z.clone()), atol=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if use == "IWAE":
            IWAE(5, "plain").loss(vae.model, vae.guide, x)
        else:
            pv.log_weights(vae.model, vae.guide, x, num_samples=10)


def test_an_edge_of_the_support_is_no_steepness():
    def uniform(latents):
        z = latents["z"]
        return (torch.where(z <= 1, -0.5 * z.square(), -torch.inf),)

    latents = {"z": torch.cat([torch.ones(4, 1), NOISE.clamp(max=0.9)], dim=1)}
    (exact,) = uniform(latents)
    assert agree((exact,), uniform, latents)
    assert not agree((exact + 5.0,), uniform, latents)
