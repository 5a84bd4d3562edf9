"""What each likelihood promises beyond the common contract."""

import math

import mpmath
import pytest
import torch

from pyro_vae import likelihoods
from pyro_vae.distributions.continuous_bernoulli import StableContinuousBernoulli
from pyro_vae.errors import InputError
from pyro_vae.networks import ConvDecoder, MLPDecoder

# Natural parameters around every switch: zero, the quantile's series, the edge of torch's own series
# (sigmoid(0.004) = 0.501), the series of the normaliser, float32's saturated sigmoid, far out.
ETAS = [
    0.0,
    1e-30,
    1e-8,
    1e-4,
    9e-4,
    1.1e-3,
    3.9e-3,
    4.1e-3,
    0.1,
    0.49,
    0.51,
    1.0,
    8.0,
    17.0,
    100.0,
    3e4,
]
ETAS = [sign * eta for eta in ETAS for sign in (1, -1)]


def exact_log_normaliser(eta):
    """Return log of the integral of exp(eta (x - 1/2)) over [0, 1]."""
    eta = mpmath.mpf(eta)
    if eta == 0:
        return mpmath.mpf(0)
    return mpmath.log(mpmath.sinh(eta / 2) / (eta / 2))


def exact_mean(eta):
    eta = mpmath.mpf(eta)
    if eta == 0:
        return mpmath.mpf(1) / 2
    return mpmath.mpf(1) / 2 + mpmath.coth(eta / 2) / 2 - 1 / eta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
def test_continuous_bernoulli_has_full_precision_everywhere(dtype, x):
    eta = torch.tensor(ETAS, dtype=dtype, requires_grad=True)
    with mpmath.workdps(50):
        values = eta.tolist()
        point = mpmath.mpf(torch.tensor(x, dtype=dtype).item())
        log_prob = [value * (point - 0.5) - exact_log_normaliser(value) for value in values]
        slope = [point - exact_mean(value) for value in values]
    result = StableContinuousBernoulli(logits=eta, validate_args=False).log_prob(
        torch.tensor(x, dtype=dtype)
    )
    result.sum().backward()
    unit = torch.finfo(dtype).eps
    wanted = torch.tensor([float(value) for value in log_prob], dtype=torch.float64)
    # A few roundings of the numbers that are added: eta (x - 1/2), |eta| / 2, log |eta|.
    size = 1 + eta.detach().double().abs()
    assert ((result.detach().double() - wanted).abs() <= 4 * unit * size).all()
    wanted = torch.tensor([float(value) for value in slope], dtype=torch.float64)
    assert ((eta.grad.double() - wanted).abs() <= 8 * unit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_mean(dtype):
    eta = torch.tensor(ETAS, dtype=dtype)
    with mpmath.workdps(50):
        wanted = [float(exact_mean(value)) for value in eta.tolist()]
    mean = StableContinuousBernoulli(logits=eta, validate_args=False).mean
    error = (mean.double() - torch.tensor(wanted, dtype=torch.float64)).abs()
    assert (error <= 4 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("eta", ETAS)
def test_continuous_bernoulli_quantile(eta):
    u = torch.tensor([0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0], dtype=torch.float64)
    logits = torch.tensor(eta, dtype=torch.float64)
    x = StableContinuousBernoulli(logits=logits, validate_args=False).icdf(u)
    with mpmath.workdps(50):
        wanted = [
            float(mpmath.log((1 - mpmath.mpf(v)) + v * mpmath.exp(eta)) / eta) if eta else v
            for v in u.tolist()
        ]
    torch.testing.assert_close(x, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def exact_variance_and_entropy(eta):
    eta = mpmath.mpf(eta)
    if eta == 0:
        return mpmath.mpf(1) / 12, mpmath.mpf(0)
    variance = 1 / eta**2 - 1 / (4 * mpmath.sinh(eta / 2) ** 2)
    return variance, exact_log_normaliser(eta) - eta * (exact_mean(eta) - mpmath.mpf(1) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_spread(dtype):
    eta = torch.tensor([*ETAS, 0.0041, -0.49, 0.51, 16.0, -40.0, 200.0], dtype=dtype)
    p = StableContinuousBernoulli(logits=eta, validate_args=False)
    with mpmath.workdps(200):  # eta^-2 of the smallest eta has 60 digits before the point
        exact = [exact_variance_and_entropy(value) for value in eta.tolist()]
    rows = [[float(value) for value in row] for row in exact]
    variance, entropy = torch.tensor(rows, dtype=torch.float64).T
    unit = torch.finfo(dtype).eps
    # 1/eta^2 and what is taken from it are up to 48 times their difference, at eta = 1/2.
    torch.testing.assert_close(p.variance.double(), variance, rtol=200 * unit, atol=0)
    torch.testing.assert_close(p.stddev.double(), variance.sqrt(), rtol=200 * unit, atol=0)
    torch.testing.assert_close(p.entropy().double(), entropy, rtol=8 * unit, atol=8 * unit)


@pytest.mark.parametrize("eta", ETAS)
def test_continuous_bernoulli_distribution_function(eta):
    x = torch.tensor([-1.0, 0.0, 1e-6, 0.3, 0.5, 1.0, 2.0])
    share = StableContinuousBernoulli(logits=torch.tensor(eta), validate_args=False).cdf(x)
    with mpmath.workdps(50):
        rate = mpmath.mpf(torch.tensor(eta).item())
        wanted = [
            float(mpmath.expm1(rate * v) / mpmath.expm1(rate)) if rate else v
            for v in x.clamp(0, 1).tolist()
        ]
    torch.testing.assert_close(share, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_continuous_bernoulli_draws_have_its_mean_in_float32():
    eta = torch.tensor([-40.0, -20.0, -1.0, 0.0, 1e-4, 20.0, 40.0])
    p = StableContinuousBernoulli(logits=eta, validate_args=False)
    torch.manual_seed(0)
    x = p.sample((50000,)).double()
    assert ((x >= 0) & (x <= 1)).all()
    standard_error = x.std(0) / math.sqrt(len(x))
    assert ((x.mean(0) - p.mean.double()).abs() < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize(
    "make",
    [
        likelihoods.Bernoulli,
        likelihoods.ContinuousBernoulli,
        lambda *arguments: likelihoods.Gaussian(*arguments, sigma="learned"),
    ],
)
def test_starting_bias_is_the_best_constant(make):
    torch.manual_seed(0)
    likelihood = make(MLPDecoder(2, (4,)), (5,)).double()
    x = torch.rand(200, 5, dtype=torch.float64) ** torch.tensor([0.3, 0.6, 1.0, 2.0, 4.0])
    likelihood.start_at_mean(x.mean(0))
    head = likelihood.mean if isinstance(likelihood, likelihoods.Gaussian) else likelihood.logits
    with torch.no_grad():
        head.map.weight.zero_()
    likelihood(torch.zeros(200, 2, dtype=torch.float64)).log_prob(x).mean().backward()
    torch.testing.assert_close(
        head.map.bias.grad, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_pixels_that_never_change_leave_a_finite_start():
    for kind in (likelihoods.Bernoulli, likelihoods.ContinuousBernoulli):
        likelihood = kind(MLPDecoder(2, (4,)), (3,))
        likelihood.start_at_mean(torch.tensor([0.0, 0.5, 1.0]))
        x = torch.tensor([1.0, 0.5, 0.0])
        assert likelihood(torch.zeros(2)).log_prob(x) > -60


def test_learned_sigma_stays_above_its_floor():
    likelihood = likelihoods.Gaussian(MLPDecoder(2, (4,)), (3,), sigma="learned", floor=0.05)
    with torch.no_grad():
        likelihood.raw_sigma.fill_(-200.0)
    p = likelihood(torch.zeros(4, 2))
    torch.testing.assert_close(p.base_dist.scale, torch.full((4, 3), 0.05))
    assert p.log_prob(p.mean).isfinite().all()


def test_per_pixel_sigma_depends_on_the_latents():
    torch.manual_seed(0)
    decoder = ConvDecoder(2, (1, 5, 7), channels=(4, 3))
    likelihood = likelihoods.Gaussian(decoder, (1, 5, 7), sigma="per-pixel")
    scale = likelihood(torch.randn(2, 3, 2)).base_dist.scale
    assert scale.shape == (2, 3, 1, 5, 7)
    assert len(scale.unique()) > 2 * 3 * 5


@pytest.mark.parametrize(
    ("sigma", "floor"), [(0.0, 0.1), (-1.0, 0.1), (math.nan, 0.1), ("free", 0.1), ("learned", 0.0)]
)
def test_gaussian_refuses_wrong_scales(sigma, floor):
    with pytest.raises(InputError, match="expected"):
        likelihoods.Gaussian(MLPDecoder(2, (4,)), (3,), sigma=sigma, floor=floor)


@pytest.mark.parametrize(
    ("kind", "x", "message"),
    [
        ("Bernoulli", torch.full((2, 3), 255.0), r"x in \[0, 1\] for Bernoulli, got values from 255"),
        ("ContinuousBernoulli", torch.full((2, 3), -0.1), "divide by the largest possible value"),
        ("Gaussian", torch.full((2, 3), math.nan), "finite data"),
        ("Gaussian", torch.zeros(2, 4), r"shape \(N, 3\), got \(2, 4\)"),
    ],
)
def test_data_without_a_density_are_refused(kind, x, message):
    likelihood = getattr(likelihoods, kind)(MLPDecoder(2, (4,)), (3,))
    with pytest.raises(InputError, match=message):
        likelihood.check(x)
    likelihood.check(torch.tensor([[0.0, 0.5, 1.0]]))
