"""Every family stays finite in float32 where training can drive its encoder, and keeps its digits."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae import guides
from pyro_vae.distributions.normal import CholeskyNormal, DiagonalNormalMixture
from pyro_vae.networks import MLPEncoder

LATENT_DIM = 8
FAMILIES = [name for name in guides.__all__ if name != "VariationalFamily"]
PATTERNS = {
    "all up": lambda shape: torch.ones(shape),
    "all down": lambda shape: -torch.ones(shape),
    "up or down": lambda shape: 2.0 * torch.randint(0, 2, shape) - 1,
    "anything between": lambda shape: 2 * torch.rand(shape) - 1,
}


def make_family(name):
    torch.manual_seed(0)
    return getattr(guides, name)(MLPEncoder((6,), (8,)), LATENT_DIM)


def gradients_of(value, parameters):
    return torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("magnitude", [5.0, 20.0, 50.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_draws_densities_and_gradients_are_finite(name, magnitude, pattern):
    family = make_family(name)
    encoded = family.encode(torch.rand(2, 6))
    parameters = {}
    for key, value in encoded.items():
        # The log of a scale goes half as far as that of a variance: scales from e^-25 to e^25.
        size = magnitude / 2 if key == "log_scale" else magnitude
        parameters[key] = (size * PATTERNS[pattern]((300, *value.shape[1:]))).requires_grad_()
    q = family.distribution(parameters)
    z = q.rsample()
    log_prob = q.log_prob(z)
    assert z.isfinite().all()
    assert log_prob.isfinite().all()
    for value in (log_prob, z):
        for gradient in gradients_of(value, list(parameters.values())):
            assert gradient is None or gradient.isfinite().all()


def steep_factor(diagonal):
    """Off-diagonal entries of 1/2 over a small diagonal: a condition number past every float."""
    return torch.full((LATENT_DIM, LATENT_DIM), 0.5).tril(-1) + diagonal * torch.eye(LATENT_DIM)


@pytest.mark.parametrize("diagonal", [0.5, 0.03, 1e-4])
def test_full_rank_normal_scores_its_draws_to_the_last_digit_at_any_condition(diagonal):
    factor = steep_factor(diagonal).expand(20_000, LATENT_DIM, LATENT_DIM).clone().requires_grad_()
    q = CholeskyNormal(torch.ones(20_000, LATENT_DIM), scale_tril=factor)
    log_prob = q.log_prob(q.rsample()).double()
    standard_error = log_prob.std() / math.sqrt(len(log_prob))
    exact = -LATENT_DIM * (0.5 * math.log(2 * math.pi * math.e) + math.log(diagonal))
    assert abs(log_prob.mean() - exact) < 5 * standard_error + 1e-6
    # The noise does not move with the parameters: what is left is the entropy's gradient.
    (gradient,) = torch.autograd.grad(log_prob.sum(), factor)
    expected = (-torch.eye(LATENT_DIM) / diagonal).expand_as(gradient)
    torch.testing.assert_close(gradient, expected)


def test_full_rank_normal_scores_other_points_too():
    torch.manual_seed(0)
    factor = steep_factor(0.5).double()
    q = CholeskyNormal(torch.ones(5, LATENT_DIM).double(), scale_tril=factor)
    z = q.rsample((3,))
    torch.testing.assert_close(q.log_prob(z.clone()), q.log_prob(z))
    again = q.rsample((3,))
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), rtol=0, atol=0)  # not the latest
    assert not torch.equal(q.log_prob(again), q.log_prob(z))


def test_mixture_weights_keep_their_gradient_where_a_later_coordinate_is_far_from_a_component():
    """Two components apart in the second coordinate by 10,000 of their deviations."""
    number, gradients = 1000, {}
    torch.manual_seed(0)
    loc = torch.tensor([[0.0, 0.0, 0.0], [0.002, 30.0, 0.0]]).expand(number, 2, 3)
    scale = torch.full((2, 3), 0.003).expand(number, 2, 3)
    z = DiagonalNormalMixture(torch.zeros(number, 2), loc, scale).sample()
    for dtype in (torch.float32, torch.float64):
        logits = torch.zeros(number, 2, dtype=dtype, requires_grad=True)
        q = DiagonalNormalMixture(logits, loc.to(dtype), scale.to(dtype))
        (gradients[dtype],) = torch.autograd.grad(q._weight_motion(z.to(dtype)).sum(), logits)
    error = (gradients[torch.float32] - gradients[torch.float64]).abs().max()
    # What float32 leaves of (z - loc) / scale near 10,000 rounding units of z from the end.
    assert error < 1e-4 * gradients[torch.float64].abs().max()


def test_a_density_is_remembered_for_an_untouched_draw_only():
    family = guides.FullRankNormal(MLPEncoder((6,)), 2)
    parameters = {"loc": torch.zeros(2), "raw_cholesky": torch.tensor([0.3, -0.4, 0.2])}
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}

    def plain():
        q = family.distribution(leaves)
        return dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril)

    q = family.distribution(leaves)
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), plain().log_prob(z.clone()))
    with torch.no_grad():
        z += 1.0
    torch.testing.assert_close(q.log_prob(z), plain().log_prob(z.clone()))
    z = q.rsample().detach_()  # at a fixed point the gradient is the score
    score = torch.autograd.grad(q.log_prob(z), [*leaves.values()])
    torch.testing.assert_close(score, torch.autograd.grad(plain().log_prob(z), [*leaves.values()]))
    frozen = family.distribution({name: value.detach() for name, value in leaves.items()})
    z = frozen.rsample().requires_grad_()
    (slope,) = torch.autograd.grad(frozen.log_prob(z), z)
    torch.testing.assert_close(slope, torch.autograd.grad(plain().log_prob(z), z)[0])
