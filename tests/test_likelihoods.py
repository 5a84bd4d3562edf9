"""What each likelihood promises beyond the common contract."""

import itertools
import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyro_vae import likelihoods
from pyro_vae.distributions.values import (
    LevelsOfLogistic,
    NumberedCategorical,
    PreciseNegativeBinomial,
    PreciseStudentT,
    StableContinuousBernoulli,
)
from pyro_vae.errors import InputError
from pyro_vae.evaluation.methods import log_marginal
from pyro_vae.guides import MeanFieldNormal
from pyro_vae.infer.training import fit
from pyro_vae.networks import ConvDecoder, MLPDecoder, MLPEncoder
from pyro_vae.priors import StandardNormal
from pyro_vae.tasks import generate
from pyro_vae.vae import VAE

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
    density = StableContinuousBernoulli(logits=eta, validate_args=False)
    result = density.log_prob(torch.tensor(x, dtype=dtype))
    result.sum().backward()
    with torch.no_grad():
        alone = density.log_prob(torch.tensor(x, dtype=dtype))
    unit = torch.finfo(dtype).eps
    wanted = torch.tensor([float(value) for value in log_prob], dtype=torch.float64)
    # A few roundings of the numbers that are added: eta (x - 1/2), |eta| / 2, log |eta|.
    size = 1 + eta.detach().double().abs()
    for found in (result.detach(), alone):
        assert ((found.double() - wanted).abs() <= 4 * unit * size).all()
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


@pytest.mark.parametrize("size_factor", [None, "observed"])
@pytest.mark.parametrize("make", [likelihoods.Poisson, likelihoods.NegativeBinomial])
def test_counts_start_at_their_mean_for_each_size(make, size_factor):
    torch.manual_seed(0)
    likelihood = make(MLPDecoder(2, (4,)), (3,), size_factor=size_factor).double()
    sizes = torch.tensor([0.5, 1.0, 4.0, 2.5], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0, 3.0], [2, 0, 6], [9, 0, 25], [4, 0, 14]], dtype=torch.float64)
    given = () if size_factor is None else (sizes,)
    vae = VAE(StandardNormal(2), likelihood, MeanFieldNormal(MLPEncoder((3,), (4,)), 2))
    vae.start_at_data((x, *given) if given else x)
    with torch.no_grad():
        likelihood.log_rate.map.weight.zero_()
    mean = likelihood(torch.zeros(4, 2, dtype=torch.float64), *given).mean
    torch.testing.assert_close(mean.sum(0)[[0, 2]], x.sum(0)[[0, 2]])
    assert (mean[:, 1] < 0.005).all()
    if given:
        torch.testing.assert_close(mean / sizes[:, None], mean[:1].expand(4, 3) / sizes[0])


def test_categories_start_alike_channel_by_channel():
    likelihood = likelihoods.Categorical(ConvDecoder(2, (2, 4, 4), (3,)), (2, 4, 4), num_categories=5)
    likelihood.start_at_mean(torch.ones(2, 4, 4))
    with torch.no_grad():
        likelihood.logits.map.weight.zero_()
    shares = likelihood(torch.zeros(7, 2)).base_dist.probs
    torch.testing.assert_close(shares, torch.full((7, 2, 4, 4, 5), 0.2))
    with torch.no_grad():  # the last category of the first channel, and of no other
        likelihood.logits.map.bias[4] = 50.0
    mean = likelihood(torch.zeros(7, 2)).mean
    torch.testing.assert_close(mean[:, 0], torch.full((7, 4, 4), 4.0))
    torch.testing.assert_close(mean[:, 1], torch.full((7, 4, 4), 2.0))


def test_probabilities_and_densities_are_scipys():
    rates, counts = np.array([1e-3, 0.7, 30.0, 4e3]), np.array([0, 3, 25, 4100])
    theta = np.array([1e-2, 0.5, 20.0, 1e7])
    got = PreciseNegativeBinomial(
        torch.tensor(theta), logits=torch.tensor(np.log(rates / theta)), validate_args=False
    )
    wanted = scipy.stats.nbinom(theta, theta / (theta + rates))
    values = got.log_prob(torch.tensor(counts, dtype=torch.float64))
    np.testing.assert_allclose(values, wanted.logpmf(counts), rtol=1e-6)
    np.testing.assert_allclose(got.mean, wanted.mean())
    np.testing.assert_allclose(got.variance, wanted.var())
    x, df = np.array([-40.0, 0.1, 3.0]), np.array([1.1, 5.0, 1e6])
    student = PreciseStudentT(*map(torch.tensor, (df, np.full(3, 0.3), np.full(3, 2.0))))
    wanted = scipy.stats.t.logpdf(x, df, 0.3, 2.0)
    np.testing.assert_allclose(student.log_prob(torch.tensor(x)), wanted, rtol=1e-9)
    codes = NumberedCategorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    custom = scipy.stats.rv_discrete(values=([0, 1, 2], [0.2, 0.5, 0.3]))
    np.testing.assert_allclose(codes.log_prob(torch.arange(3.0)), custom.logpmf([0, 1, 2]))
    np.testing.assert_allclose(codes.mean, custom.mean())


@pytest.mark.parametrize("loc", [-0.4, 0.0, 0.31, 1.0, 30.0])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.7])
def test_levels_of_a_logistic_are_differences_of_its_distribution_function(loc, scale):
    levels, half = 256, 0.5 / 255
    x = np.arange(levels) / 255
    # 1 - F(t) = F of the mirrored logistic, which keeps the digits of the upper tail.
    with mpmath.workdps(700):
        below = [1 / (1 + mpmath.exp(-(mpmath.mpf(v + half) - loc) / scale)) for v in x[:-1]]
        edges = [mpmath.mpf(0), *below, mpmath.mpf(1)]
        wanted = [float(mpmath.log(b - a)) for a, b in itertools.pairwise(edges)]
    p = LevelsOfLogistic(torch.tensor(loc).double(), torch.tensor(scale).double(), levels)
    got = p.log_prob(torch.tensor(x))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.exp().sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(p.mean, (got.exp() * torch.tensor(x)).sum())
    single = LevelsOfLogistic(torch.tensor(loc), torch.tensor(scale), levels)
    slope = single.log_prob(torch.tensor(x, dtype=torch.float32))
    assert slope.isfinite().all()
    np.testing.assert_allclose(slope, wanted, rtol=1e-3, atol=1e-3)
    draws = p.sample((5000,))
    assert p.support.check(draws).all()
    assert not p.support.check(torch.tensor([0.5, -1 / 255, 256 / 255])).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_poisson_and_nearly_normal_keep_their_digits(dtype):
    count, mean = torch.tensor(130.0, dtype=dtype), torch.tensor(120.0, dtype=dtype)
    theta = torch.tensor(1e7, dtype=dtype)
    nearly = PreciseNegativeBinomial(theta, logits=mean.log() - theta.log()).log_prob(count)
    assert nearly.dtype == dtype
    assert abs(nearly - dist.Poisson(mean.double()).log_prob(count.double())) < 1e-4
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    close = PreciseStudentT(theta, zero, one).log_prob(one)
    assert abs(close - dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0))) < 1e-6


def test_learned_size_factor_is_the_last_latent():
    torch.manual_seed(0)
    likelihood = likelihoods.NegativeBinomial(MLPDecoder(2, (4,)), (3,), size_factor="learned")
    assert likelihood.latent_dim == 3
    with torch.no_grad():
        likelihood.log_size_scale.fill_(math.log(0.5))
    z = torch.randn(5, 3)
    larger = z + torch.tensor([0.0, 0.0, 2.0])
    torch.testing.assert_close(likelihood(larger).mean, likelihood(z).mean * math.e)


def test_bits_per_dimension_of_a_uniform_code():
    likelihood = likelihoods.Categorical(MLPDecoder(2, (4,)), (3, 5), num_categories=8)
    assert likelihood.bits_per_dimension(15 * math.log(1 / 8)) == pytest.approx(3.0)


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


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (likelihoods.Poisson, [0.0, 1.5, 2.0], "expected whole numbers for Poisson, got 1.5"),
        (likelihoods.NegativeBinomial, [0.0, -1.0, 2.0], r"x in \[0, inf\] for NegativeBinomial"),
        (
            lambda *given: likelihoods.Categorical(*given, num_categories=3),
            [0.0, 1.0, 3.0],
            r"x in \[0, 2\] for Categorical, got values from 0 to 3",
        ),
        (
            lambda *given: likelihoods.DiscretizedLogistic(*given, levels=5),
            [0.0, 0.3, 1.0],
            "expected multiples of 0.25 for DiscretizedLogistic, got 0.3",
        ),
    ],
)
def test_values_between_those_of_a_discrete_likelihood_are_refused(make, x, message):
    likelihood = make(MLPDecoder(2, (4,)), (3,))
    with pytest.raises(InputError, match=message):
        likelihood.check(torch.tensor([x]))
    likelihood.check(torch.tensor([[0.0, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: likelihoods.Poisson(d, (3,), size_factor="known"), "got 'known'"),
        (lambda d: likelihoods.StudentT(d, (3,), df=0), "df above 0, got 0"),
        (lambda d: likelihoods.StudentT(d, (3,), df="free"), "df as a number, got 'free'"),
        (lambda d: likelihoods.DiscretizedLogistic(d, (3,), levels=1), "levels of at least 2"),
        (
            lambda d: likelihoods.Categorical(d, (3,), num_categories=1),
            "num_categories of at least 2",
        ),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(MLPDecoder(2, (4,)))


def test_size_factors_are_asked_for_and_checked():
    likelihood = likelihoods.Poisson(MLPDecoder(2, (4,)), (3,), size_factor="observed")
    vae = VAE(StandardNormal(2), likelihood, MeanFieldNormal(MLPEncoder((3,), (4,)), 2))
    x = torch.ones(6, 3)
    for given, message in (
        (x, "as many tensors as model"),
        ((x, torch.ones(6), torch.ones(6)), "as many tensors as model"),
        ((x, torch.zeros(6)), "size factors as numbers above 0"),
        ((x, torch.ones(6, 1)), r"one for each datum, got shape \(6, 1\)"),
    ):
        with pytest.raises(InputError, match=message):
            fit(vae.model, vae.guide, given, epochs=1)
    with pytest.raises(InputError, match="expected size factors, got x alone"):
        likelihood(torch.zeros(6, 2))


def test_known_size_factors_in_training_estimates_and_draws():
    torch.manual_seed(0)
    likelihood = likelihoods.NegativeBinomial(MLPDecoder(2, (8,)), (3,), size_factor="observed")
    vae = VAE(StandardNormal(2), likelihood, MeanFieldNormal(MLPEncoder((3,), (8,)), 2))
    sizes = torch.linspace(0.5, 3.0, 40)
    x = torch.poisson(5 * sizes[:, None].expand(40, 3))
    vae.start_at_data((x, sizes))
    result = fit(vae.model, vae.guide, (x, sizes), epochs=2, batch_size=16, seed=0)
    assert np.isfinite(result.history["train_elbo"]).all()
    # Latents that say nothing, drawn from the prior: every weight is p(x).
    family = vae.variational_family
    with torch.no_grad():
        for head in (family.loc, family.log_variance, likelihood.log_rate):
            head.map.weight.zero_()
        family.loc.map.bias.zero_()
        family.log_variance.map.bias.zero_()
    estimate = log_marginal(vae.model, vae.guide, (x, sizes), num_samples=30, seed=0)
    mean = likelihood.log_rate.map.bias.exp().detach() * sizes[:, None]
    theta = likelihood.log_theta.exp().detach()
    wanted = scipy.stats.nbinom(theta, theta / (theta + mean)).logpmf(x).sum(1)
    np.testing.assert_allclose(estimate.log_prob, wanted, rtol=1e-5)
    like = torch.zeros(2, 3).double(), torch.tensor([1.0, 1000.0]).double()
    drawn = generate(vae.double().model, like, seed=0)
    torch.testing.assert_close(drawn[1], 1000 * drawn[0])
