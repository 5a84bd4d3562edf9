"""What each variational family promises beyond the common contract."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from pyro_vae import guides
from pyro_vae.distributions.flows import gated_affine, rational_quadratic_spline
from pyro_vae.distributions.normal import DiagonalNormalMixture
from pyro_vae.errors import InputError
from pyro_vae.networks import MLPEncoder

# --- normals ----------------------------------------------------------------------------------------


def test_full_rank_normal_has_the_covariance_of_its_factor():
    torch.manual_seed(0)
    family = guides.FullRankNormal(MLPEncoder((6,), (8,)), 3)
    parameters = {"loc": torch.randn(5, 3), "raw_cholesky": torch.randn(5, 6)}
    q = family.distribution(parameters)
    factor = q.scale_tril
    z = torch.randn(5, 3)
    for i in range(5):
        covariance = (factor[i] @ factor[i].T).double().numpy()
        exact = scipy.stats.multivariate_normal(parameters["loc"][i].double().numpy(), covariance)
        np.testing.assert_allclose(q.log_prob(z)[i], exact.logpdf(z[i].numpy()), rtol=1e-4)


# --- flows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("family", [guides.InverseAutoregressiveFlow, guides.NeuralSplineFlow])
def test_flow_density_is_the_change_of_variables(family, latent_dim):
    torch.manual_seed(0)
    module = family(MLPEncoder((6,), (8,)), latent_dim).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    q = module(torch.rand(6, dtype=torch.float64))

    def push(e):
        for layer in q.layers:
            e = layer(e, q.context)[0]
        return e

    e = torch.randn(latent_dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(push, e)
    expected = q.base.log_prob(e) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(q.log_prob(push(e)), expected)


def test_autoregressive_layers_take_turns_in_their_order():
    torch.manual_seed(0)
    module = guides.InverseAutoregressiveFlow(MLPEncoder((6,), (8,)), 4, num_layers=2).double()
    q = module(torch.rand(6, dtype=torch.float64))
    e = torch.randn(4, dtype=torch.float64)
    for layer, triangle in zip(q.layers[1:], (torch.tril, torch.triu), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x, q.context)[0], e)
        torch.testing.assert_close(jacobian, triangle(jacobian), rtol=0, atol=0)
        assert (triangle(torch.ones(4, 4)).bool() == (jacobian != 0)).all()


def test_flow_is_conditioned_on_the_datum_beyond_location_and_scale():
    torch.manual_seed(0)
    for family in (guides.InverseAutoregressiveFlow, guides.NeuralSplineFlow):
        module = family(MLPEncoder((6,), (8,)), 2)
        parameters = module.encode(torch.rand(2, 6))
        parameters["loc"] = parameters["log_scale"] = torch.zeros(2, 2)
        z = torch.randn(1, 2).expand(2, 2)
        first, second = module.distribution(parameters).log_prob(z)
        assert first != second


def random_spline(number, dtype, scale=2.0):
    torch.manual_seed(0)
    return scale * torch.randn(number, 3 * 6 - 1, dtype=dtype)


def test_spline_of_zeros_is_the_identity():
    x = torch.linspace(-5, 5, 101)
    y, log_slope = rational_quadratic_spline(x, torch.zeros(101, 17), False, bound=3.0)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_slope, torch.zeros(101), rtol=0, atol=2e-6)


def test_spline_is_monotone_and_joins_the_identity_smoothly():
    raw = random_spline(1, torch.float64)
    largest_jumps = []
    for points in (10_001, 100_001):
        x = torch.linspace(-3.5, 3.5, points, dtype=torch.float64)
        y, log_slope = rational_quadratic_spline(x, raw.expand(points, -1), False, bound=3.0)
        assert (y.diff() > 0).all()
        outside = x.abs() >= 3
        assert torch.equal(y[outside], x[outside])
        assert (log_slope[outside] == 0).all()
        largest_jumps.append(log_slope.diff().abs().max())
    # Steps ten times smaller make the jumps of a continuous slope smaller, and leave a real one.
    assert largest_jumps[1] < largest_jumps[0] / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spline_and_its_inverse_undo_each_other(dtype):
    raw = random_spline(20000, dtype, scale=1.0)
    x = 4 * torch.rand(20000, dtype=dtype) - 2
    x[:4] = torch.tensor([-1.5, 1.5, 0.0, 1.5 - 1e-6])
    x.requires_grad_()
    y, log_slope = rational_quadratic_spline(x, raw, False, bound=1.5)
    (bend,) = torch.autograd.grad(log_slope.sum(), x)
    again, inverse_log_slope = rational_quadratic_spline(y, raw, True, bound=1.5)
    # A rounding of y moves x by itself over the slope, and the log-slope by that times its own slope.
    rounding = 10 * torch.finfo(dtype).eps * (1 + (-log_slope).exp())
    assert ((again - x).abs() <= rounding).all()
    assert ((inverse_log_slope - log_slope).abs() <= rounding * (1 + bend.abs())).all()


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_slopes_and_gradients_are_those_of_autograd(inverse):
    raw = random_spline(200, torch.float64).requires_grad_()
    x = torch.linspace(-4, 4, 200, dtype=torch.float64).requires_grad_()
    y, log_slope = rational_quadratic_spline(x, raw, inverse, bound=3.0)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    sign = -1 if inverse else 1
    torch.testing.assert_close(slope.log(), sign * log_slope)
    gradients = torch.autograd.grad((y + log_slope).sum(), (x, raw))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.autograd.gradcheck(
        lambda x, raw: rational_quadratic_spline(x, raw, inverse, bound=3.0),
        (x[60:70].detach().requires_grad_(), raw[60:70].detach().requires_grad_()),
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_is_finite_at_its_knots_and_far_away(inverse):
    raw = random_spline(9, torch.float32, scale=8.0).requires_grad_()
    x = torch.tensor([-3.0, 3.0, 0.0, -1e30, 1e30, 2.9999998, -2.9999998, 1e-30, 1.0])
    x.requires_grad_()
    y, log_slope = rational_quadratic_spline(x, raw, inverse, bound=3.0)
    (y.clamp(-10, 10) + log_slope).sum().backward()
    for tensor in (y, log_slope, x.grad, raw.grad):
        assert tensor.isfinite().all()


def test_gated_affine_map_and_its_inverse():
    torch.manual_seed(0)
    x, raw = torch.randn(50, dtype=torch.float64), 3 * torch.randn(50, 2, dtype=torch.float64)
    y, log_slope = gated_affine(x, raw, False)
    gate = torch.sigmoid(raw[:, 1] + 2)
    torch.testing.assert_close(y, gate * x + (1 - gate) * raw[:, 0])
    torch.testing.assert_close(log_slope, gate.log())
    torch.testing.assert_close(gated_affine(y, raw, True), (x, log_slope))


# --- mixture ----------------------------------------------------------------------------------------


def mixture_parameters(dim, components=3, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(components, dtype=torch.float64)
    loc = 1.5 * torch.randn(components, dim, dtype=torch.float64)
    scale = 0.3 + torch.rand(components, dim, dtype=torch.float64)
    return logits, loc, scale


@pytest.mark.parametrize("dim", [1, 3])
def test_mixture_density_and_moments(dim):
    logits, loc, scale = mixture_parameters(dim)
    q = DiagonalNormalMixture(logits, loc, scale)
    z = 3 * torch.randn(50, dim, dtype=torch.float64)
    weights = logits.softmax(-1)
    densities = scipy.stats.norm(loc.numpy(), scale.numpy()).pdf(z[:, None].numpy()).prod(-1)
    np.testing.assert_allclose(q.log_prob(z), np.log(densities @ weights.numpy()))
    torch.manual_seed(0)
    draws = q.sample((50000,))
    for values, exact in ((draws, q.mean), ((draws - q.mean) ** 2, q.variance)):
        standard_error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - exact).abs() < 5 * standard_error + 1e-6).all()


def test_mixture_of_one_is_a_normal():
    _, loc, scale = mixture_parameters(3, components=1)
    loc, scale = loc.requires_grad_(), scale.requires_grad_()
    z = DiagonalNormalMixture(torch.zeros(1, dtype=torch.float64), loc, scale).rsample((7,))
    noise = ((z - loc) / scale).detach()
    gradients = torch.autograd.grad(z.sin().sum(), (loc, scale))
    expected = torch.autograd.grad((loc + scale * noise).sin().sum(), (loc, scale))
    for left, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(left, right)


def closed_form(logits, loc, scale):
    """Return E[z_1^2 + prod_d z_d + cos(sum_d z_d)] under the mixture."""
    weights = logits.softmax(-1)
    square = loc[:, 0] ** 2 + scale[:, 0] ** 2
    cosine = (-0.5 * scale.square().sum(-1)).exp() * loc.sum(-1).cos()
    return (weights * (square + loc.prod(-1) + cosine)).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_mixture_gradient_is_that_of_the_closed_form(dim, seed):
    exact = [tensor.requires_grad_() for tensor in mixture_parameters(dim, seed=seed)]
    closed_form(*exact).backward()
    # One leaf per draw, so that each draw has its own gradient.
    number = 20000
    copies = [
        tensor.detach().expand(number, *tensor.shape).clone().requires_grad_() for tensor in exact
    ]
    z = DiagonalNormalMixture(*copies).rsample()
    (z[:, 0] ** 2 + z.prod(-1) + z.sum(-1).cos()).sum().backward()
    for copy, tensor in zip(copies, exact, strict=True):
        standard_error = copy.grad.std(0) / math.sqrt(number)
        missing = (copy.grad.mean(0) - tensor.grad).abs()
        assert (missing < 5 * standard_error + 1e-6).all()


def test_mixture_gradient_is_finite_where_components_coincide_or_lie_far_apart():
    for spread in (0.0, 30.0):
        logits = torch.zeros(200, 3, requires_grad=True)
        loc = (spread * torch.arange(3.0)[:, None].expand(200, 3, 4)).clone().requires_grad_()
        scale = torch.full((200, 3, 4), 0.5).requires_grad_()
        torch.manual_seed(0)
        DiagonalNormalMixture(logits, loc, scale).rsample().square().sum().backward()
        for tensor in (logits, loc, scale):
            assert tensor.grad.isfinite().all()


# --- the sphere and the cube ------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [2, 10, 100])
def test_von_mises_fisher_family_starts_at_the_same_spread_in_every_dimension(latent_dim):
    torch.manual_seed(0)
    family = guides.VonMisesFisher(MLPEncoder((6,), (8,)), latent_dim)
    length = family(torch.rand(50, 6)).mean.norm(dim=-1)
    assert ((length > 0.1) & (length < 0.4)).all()


def test_beta_family_has_no_concentration_below_a_half_and_draws_inside():
    family = guides.Beta(MLPEncoder((6,), (8,)), 2)
    raw = torch.full((20000, 2), -200.0, requires_grad=True)
    q = family.distribution({"raw_concentration1": raw, "raw_concentration0": raw})
    torch.testing.assert_close(q.base_dist.concentration1, torch.full((20000, 2), 0.5))
    torch.testing.assert_close(q.base_dist.concentration0, torch.full((20000, 2), 0.5))
    torch.manual_seed(0)
    z = q.rsample()
    assert ((z > 0) & (z < 1)).all()
    log_prob = q.log_prob(z)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert raw.grad.isfinite().all()


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guides.MixtureOfNormals(MLPEncoder((6,)), 2, num_components=0), "num_components"),
        (lambda: guides.InverseAutoregressiveFlow(MLPEncoder((6,)), 2, num_layers=0), "num_layers"),
        (lambda: guides.InverseAutoregressiveFlow(MLPEncoder((6,)), 2, hidden=()), "hidden width"),
        (lambda: guides.NeuralSplineFlow(MLPEncoder((6,)), 2, num_bins=1), "num_bins"),
        (lambda: guides.NeuralSplineFlow(MLPEncoder((6,)), 2, bound=-1.0), "bound above 0"),
        (lambda: guides.NeuralSplineFlow(MLPEncoder((6,)), 2, context_features=0), "context"),
        (lambda: guides.FullRankNormal(nn.Linear(6, 8), 2), "network with an attribute out_shape"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
