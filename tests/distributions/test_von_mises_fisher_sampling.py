"""Samples of the von Mises-Fisher distribution and their pathwise gradients."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from pyro_vae.distributions import VonMisesFisher, unit_sphere, von_mises_fisher

SAMPLED_PAIRS = [
    *[(2, 1e-3), (2, 5.0), (2, 1e5), (3, 1.0), (3, 1e5), (5, 2.0), (11, 11.0), (21, 20.0)],
    *[(41, 11.0), (41, 50.0), (101, 20.0), (513, 10.0), (1024, 1e-3), (1024, 1e3), (1024, 1e5)],
]
DTYPES = [torch.float32, torch.float64]
LARGEST = (1024, torch.float64)


def random_loc(m, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(m, dtype=torch.float64, generator=generator)
    return nn.functional.normalize(loc, dim=-1).to(dtype)


def axis(m, index=0, sign=1.0, dtype=torch.float64):
    loc = torch.zeros(m, dtype=dtype)
    loc[index] = sign
    return loc


def polar_angle(value, loc):
    """Through the chord: exact for small angles too."""
    chord = torch.linalg.vector_norm((value - loc).double(), dim=-1)
    return 2.0 * torch.asin((0.5 * chord).clamp(max=1.0))


def assert_within_standard_errors(samples, exact):
    standard_error = samples.double().std(0) / math.sqrt(len(samples))
    difference = (samples.double().mean(0) - exact).abs()
    assert (difference < 5 * standard_error + 1e-6).all(), (difference, standard_error)


# Samples.


# The largest dimension takes longest in float64: one of its concentrations stands for the others.
@pytest.mark.parametrize(
    ("m", "k", "dtype"),
    [
        pytest.param(m, k, dtype, marks=pytest.mark.slow if (m, dtype) == LARGEST and k < 1e5 else ())
        for m, k in SAMPLED_PAIRS
        for dtype in DTYPES
    ],
)
def test_samples_follow_the_law_of_the_cosine(m, k, dtype, exact, cdf):
    torch.manual_seed(1)
    loc = random_loc(m, dtype=dtype)
    value = VonMisesFisher(loc, k).sample((5_000 if m > 100 else 20_000,))
    assert value.dtype == dtype
    assert unit_sphere.check(value).all()
    angle = polar_angle(value, loc)
    one_minus_cosine = 2.0 * (0.5 * angle).sin().square()
    exact_gap = float(1 - exact(m, k).mean)
    standard_error = one_minus_cosine.std() / math.sqrt(len(angle))
    # Relative slack: float32 coordinates resolve small angles to 1e-4 of themselves.
    assert abs(one_minus_cosine.mean() - exact_gap) < 5 * standard_error + 1e-6 * exact_gap
    assert stats.kstest(angle.numpy(), cdf(m, k)).pvalue > 1e-3


@pytest.mark.parametrize(("m", "k"), [(2, 5.0), (3, 0.0), (11, 11.0), (41, 1e3)])
def test_small_draws_follow_the_same_law(m, k, cdf):
    torch.manual_seed(2)
    q = VonMisesFisher(random_loc(m), k)
    angles = [polar_angle(q.sample((100,)), q.loc) for _ in range(100)]
    assert stats.kstest(torch.cat(angles).numpy(), cdf(m, k)).pvalue > 1e-3


@pytest.mark.parametrize(
    "loc", [random_loc(5), axis(5), axis(5, sign=-1.0), axis(5, 2), random_loc(2), axis(2, 1)]
)
def test_samples_are_isotropic_around_the_mean_direction(loc, exact):
    torch.manual_seed(3)
    m, k = len(loc), 4.0
    value = VonMisesFisher(loc, k).sample((20_000,))
    reference = exact(m, k)
    assert_within_standard_errors(value, float(reference.mean) * loc)
    second = float(reference.variance + reference.mean**2)
    along = torch.outer(loc, loc)
    across = (torch.eye(m, dtype=loc.dtype) - along) / (m - 1)
    products = value.unsqueeze(-1) * value.unsqueeze(-2)
    assert_within_standard_errors(products, second * along + (1 - second) * across)


def test_batches_draw_each_its_own_law(exact):
    torch.manual_seed(4)
    k = torch.tensor([[0.5, 200.0], [0.0, 20.0]], dtype=torch.float64)
    loc = torch.stack([random_loc(6, seed=s) for s in range(4)]).view(2, 2, 6)
    value = VonMisesFisher(loc, k).sample((10_000,))
    cosine = (value * loc).sum(-1)
    means = [[float(exact(6, x).mean) if x else 0.0 for x in row] for row in k.tolist()]
    assert_within_standard_errors(cosine, torch.tensor(means, dtype=torch.float64))


@pytest.mark.parametrize("m", [2, 3, 11, 1024])
def test_rejection_accepts_as_often_as_claimed(m):
    torch.manual_seed(5)
    a = 0.5 * (m - 1)
    limit = math.exp(a * (1 - math.log(4 * a)) + math.lgamma(2 * a) - math.lgamma(a))
    assert (1 - limit) ** 4 < von_mises_fisher._FIRST_ROUND_MISS
    k = torch.full((40_000,), 1e3 * m, dtype=torch.float64)
    accepted = ~von_mises_fisher._first_accepted(k, 1, m).isnan()
    assert_within_standard_errors(accepted.double(), limit)
    for smaller in (1e-3, 0.1 * m, 1.0 * m):
        accepted = ~von_mises_fisher._first_accepted(torch.full_like(k, smaller), 1, m).isnan()
        assert accepted.double().mean() > limit


def test_what_finds_no_place_in_the_buffer_is_nan(monkeypatch):
    torch.manual_seed(6)
    monkeypatch.setattr(von_mises_fisher, "_FIRST_ROUND_MISS", 0.0)  # makes the buffer 30 places long
    angle = von_mises_fisher.sample_angle(torch.full((20_000,), 1e5), 2)
    missing = angle.isnan()
    assert 100 < missing.sum() < 500
    # The first 30 misses were refilled, so all NaN lie behind them.
    assert missing.nonzero()[0] > 1000


def test_no_draw_is_lost():
    torch.manual_seed(7)
    assert torch.isfinite(von_mises_fisher.sample_angle(torch.full((500_000,), 1e5), 2)).all()


def test_sampling_is_reproducible_and_fresh():
    q = VonMisesFisher(random_loc(4), 3.0)
    torch.manual_seed(8)
    first, second = q.sample((5,)), q.sample((5,))
    torch.manual_seed(8)
    assert torch.equal(q.sample((5,)), first)
    assert not torch.equal(first, second)


# Pathwise gradients.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k"), [(2, 1.0), (2, 1e5), (3, 1e-3), (5, 2.0), (11, 11.0), (101, 20.0), (513, 1e3)]
)
def test_gradient_in_the_concentration(m, k, dtype, exact):
    torch.manual_seed(9)
    n = 4_000
    concentration = torch.full((n,), k, dtype=dtype, requires_grad=True)
    loc = random_loc(m, dtype=dtype)
    value = VonMisesFisher(loc, concentration).rsample()
    (gradient,) = torch.autograd.grad((value * loc).sum(), concentration)
    scale = float(exact(m, k).variance)  # dA/dk, down to 1e-11
    assert_within_standard_errors(gradient / scale, 1.0)


def test_gradient_in_the_concentration_has_the_known_value():
    torch.manual_seed(10)
    concentration = torch.full((50_000,), 2.0, dtype=torch.float64, requires_grad=True)
    loc = random_loc(5)
    value = VonMisesFisher(loc, concentration).rsample()
    (gradient,) = torch.autograd.grad((value * loc).sum(), concentration)
    assert_within_standard_errors(gradient, 0.147389)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 3, 40])
def test_gradient_at_and_near_zero_concentration(m, dtype):
    torch.manual_seed(11)
    concentration = torch.zeros(4_000, dtype=dtype)
    concentration[1::2] = torch.finfo(dtype).tiny
    concentration.requires_grad_()
    loc = random_loc(m, dtype=dtype)
    q = VonMisesFisher(loc, concentration)
    value = q.rsample()
    (pathwise,) = torch.autograd.grad((value * loc).sum(), concentration)
    assert_within_standard_errors(pathwise, 1.0 / m)
    loss = q.log_prob(value.detach()).sum() + q.entropy().sum()
    (score,) = torch.autograd.grad(loss, concentration)
    torch.testing.assert_close(score, (value * loc).sum(-1).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "direction",
    [
        random_loc(5),
        axis(5),
        axis(5, sign=-1.0),
        axis(5, 3),
        axis(2),
        axis(2, 1),
        random_loc(2),
        random_loc(40),
    ],
)
def test_gradient_in_the_mean_direction(direction, exact):
    torch.manual_seed(12)
    n, m, k = 20_000, len(direction), 6.0
    target = random_loc(m, seed=99)
    raw = (1.7 * direction).expand(n, m).clone().requires_grad_()
    value = VonMisesFisher(nn.functional.normalize(raw, dim=-1), k).rsample()
    (gradient,) = torch.autograd.grad((value @ target).sum(), raw)
    along = (target @ direction) * direction
    assert_within_standard_errors(gradient, float(exact(m, k).mean) * (target - along) / 1.7)


def test_gradient_of_a_nonlinear_function_in_both_parameters():
    torch.manual_seed(13)
    n, m, k = 50_000, 4, 3.0
    target, direction = random_loc(m, seed=98), random_loc(m)

    def expectation(k, direction):
        """E[(a.x)^2] = s (a.mu)^2 + (1 - s)(1 - (a.mu)^2)/(m-1), s = E[w^2] = 1 - (m-1) A/k."""
        second = 1 - (m - 1) * VonMisesFisher(direction, k).mean.norm() / k
        overlap = (target @ nn.functional.normalize(direction, dim=-1)).square()
        return second * overlap + (1 - second) * (1 - overlap) / (m - 1)

    exact_k = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    exact_direction = direction.clone().requires_grad_()
    exact_gradients = torch.autograd.grad(
        expectation(exact_k, nn.functional.normalize(exact_direction, dim=-1)),
        (exact_k, exact_direction),
    )
    concentration = torch.full((n,), k, dtype=torch.float64, requires_grad=True)
    raw = direction.expand(n, m).clone().requires_grad_()
    value = VonMisesFisher(nn.functional.normalize(raw, dim=-1), concentration).rsample()
    gradients = torch.autograd.grad((value @ target).square().sum(), (concentration, raw))
    for gradient, reference in zip(gradients, exact_gradients, strict=True):
        assert_within_standard_errors(gradient, reference)


def test_sample_carries_no_gradient():
    k = torch.tensor(2.0, requires_grad=True)
    assert not VonMisesFisher(axis(3, dtype=torch.float32), k).sample().requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(2, 1e5), (11, 11.0), (513, 10.0)])
def test_on_the_device(m, k, dtype, exact):
    torch.manual_seed(18)
    loc = random_loc(m, dtype=dtype).cuda()
    concentration = torch.full((4_000,), k, dtype=dtype, device="cuda", requires_grad=True)
    q = VonMisesFisher(loc, concentration, validate_args=True)
    value = q.rsample()
    log_prob = q.log_prob(value)
    for tensor in (value, log_prob, q.mean, q.entropy(), q.log_normalizing_constant):
        assert tensor.device.type == "cuda"
        assert torch.isfinite(tensor).all()
    cpu = VonMisesFisher(loc.cpu(), concentration.detach().cpu())
    torch.testing.assert_close(log_prob.cpu(), cpu.log_prob(value.cpu()), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad((value * loc).sum(), concentration)
    assert_within_standard_errors(gradient.cpu() / float(exact(m, k).variance), 1.0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_sampling_does_not_wait_for_the_device():
    loc = random_loc(8, dtype=torch.float32).cuda()
    concentration = torch.full((1_000,), 5.0, device="cuda")
    von_mises_fisher.sample_angle(concentration, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        von_mises_fisher.sample_angle(concentration, 8)
        von_mises_fisher.tangent(loc, loc[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
