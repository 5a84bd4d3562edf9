"""Sticking the landing: the ELBO's gradient in the mean, none at the posterior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_pairs import (
    PAIRS,
    Gaussian,
    assert_same_mean,
    gradient,
    gradients,
    make_pair,
    standard_vae,
)
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import IWAE, StickingTheLanding, TraceBound, scale_latents

KINDS = (StickingTheLanding, TraceBound)


@pytest.mark.parametrize(("name", "beta"), [*((name, 1.0) for name in PAIRS), ("hierarchical", 0.5)])
def test_gradient_is_the_elbos_in_the_mean(name, beta):
    model, guide, modules = make_pair(name)
    model, guide = scale_latents(model, beta), scale_latents(guide, beta, is_guide=True)
    x = torch.rand(3, 4).bernoulli().repeat(60, 1)
    assert_same_mean(
        gradients(StickingTheLanding(), model, guide, modules, x, repeats=30),
        gradients(TraceBound(), model, guide, modules, x, repeats=30),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_particles": 3},
        {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
    ],
)
def test_loss_and_model_gradient_are_the_elbos_draw_by_draw(options):
    model, guide, modules = make_pair("hierarchical")
    modules.double()
    x, found = torch.rand(5, 4).bernoulli().double(), []
    for kind in (TraceBound, StickingTheLanding):
        pyro.set_rng_seed(2)
        terms = kind(**options).terms(model, guide, (x,), {})
        pyro.set_rng_seed(2)
        found.append((*terms, gradient(kind(**options), model, guide, modules, x, part="model")))
    for left, right in zip(found[0], found[1], strict=True):
        if left is not found[0][1]:  # the surrogate's value means nothing
            torch.testing.assert_close(left.double(), right.double())


def test_gradient_of_the_guide_is_zero_in_every_draw_at_the_posterior():
    pair = Gaussian(noise=1.0, slope=0.5, scale=0.5**0.5)
    x = torch.linspace(-2.0, 3.0, 5, dtype=torch.float64)
    for _ in range(3):
        elbo = gradient(TraceBound(), pair.model, pair.guide, pair, x, part="guide_part")
        path = gradient(StickingTheLanding(), pair.model, pair.guide, pair, x, part="guide_part")
        assert elbo.abs().max() > 1e-2
        torch.testing.assert_close(path, torch.zeros_like(path), rtol=0, atol=1e-12)


def test_hierarchical_posterior_has_no_gradient_either():
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1): q(z2 given x) q(z1 given z2) is exact.

    x has variance 3, so z2 given x is N(2x/3, 2/3), and z1 given z2 is N(z2/2, 1/2). The derivative
    of log q by z2 must hold z1 still, or the two terms of z2 would not cancel.
    """
    double = {"dtype": torch.float64}
    values = torch.tensor([2 / 3, (2 / 3) ** 0.5, 1 / 2, 0.5**0.5], **double)
    parameters = nn.ParameterList([nn.Parameter(value.clone()) for value in values])

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        pyro.module("parameters", parameters)
        slope2, scale2, slope1, scale1 = parameters
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(slope2 * x, scale2))
            pyro.sample("z1", dist.Normal(slope1 * z2, scale1))

    x = torch.linspace(-2.0, 3.0, 5, **double)
    found = gradient(StickingTheLanding(), model, guide, parameters, x)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    assert gradient(TraceBound(), model, guide, parameters, x).abs().max() > 1e-2
    exact = dist.Normal(torch.zeros_like(x), 3**0.5).log_prob(x).sum().item()
    assert StickingTheLanding().loss(model, guide, x) == pytest.approx(-exact, abs=1e-12)


def test_jacobian_of_a_learned_point_mass_keeps_its_gradient():
    """z = c + s u, written as an auxiliary u and a point mass: the ELBO of z ~ N(c, s^2)."""
    double = {"dtype": torch.float64}
    parameters = nn.ParameterDict(
        {"shift": torch.tensor(0.2, **double), "scale": torch.tensor(0.5, **double)}
    )

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def placed(x):
        pyro.module("parameters", parameters)
        with pyro.plate("data", len(x)):
            standard = dist.Normal(torch.zeros_like(x), 1.0)
            u = pyro.sample("u", standard, infer={"is_auxiliary": True})
            density = -parameters["scale"].log().expand(len(x))
            value = parameters["shift"] + parameters["scale"] * u
            pyro.sample("z", dist.Delta(value, log_density=density))

    x = torch.full((400,), 0.7, **double)
    rows = gradients(StickingTheLanding(), model, placed, parameters, x, repeats=50)
    names = list(parameters)
    shift, scale = (parameters[name].item() for name in ("shift", "scale"))
    exact = {"shift": 2 * shift - 0.7, "scale": 2 * scale - 1 / scale}
    for column, name in enumerate(names):
        found = rows[:, column]
        standard_error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - exact[name]) < 5 * standard_error + 1e-6, name


def test_pyros_autoguide_and_a_latent_outside_any_plate():
    def model(x):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AutoNormal(model), torch.randn(20)
    guide(x)
    rows = [gradients(kind(), model, guide, guide, x, repeats=150) for kind in KINDS]
    assert_same_mean(*rows)


@pytest.mark.parametrize("family", [pv.guides.InverseAutoregressiveFlow, pv.guides.MixtureOfNormals])
def test_families_that_remember_their_draws(family):
    """A cached score would hide how log q changes with z."""
    vae = standard_vae(family)
    x = torch.rand(3, 4).bernoulli().repeat(40, 1)
    rows = [gradients(kind(), vae.model, vae.guide, vae, x, repeats=25) for kind in KINDS]
    assert_same_mean(*rows)


@pytest.mark.parametrize("make", [StickingTheLanding, lambda: IWAE(2, "plain")])
def test_guide_that_is_a_handler_of_the_model_is_refused(make):
    pair, x = Gaussian(), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(pv.InputError, match="handler of the model"):
        make().loss(pair.model, AutoNormalMessenger(pair.model), x)
