"""The von Mises-Fisher distribution: density, samples, gradients, behaviour in Pyro."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy import integrate, stats
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.distributions import HypersphericalUniform, VonMisesFisher, unit_sphere
from pyro_vae.errors import InputError

# A = E[mu.x], computed with arbitrary precision.
MEAN_COSINES = {
    (2, 1): 0.446389965897,
    (3, 10): 0.900000004122,
    (3, 100): 0.99,
    (11, 1): 0.0902809641147,
    (11, 100): 0.951009632893,
    (41, 100): 0.819008556966,
    (101, 100): 0.616790819736,
    (513, 1000): 0.776154705717,
}
DIMENSIONS = [2, 3, 4, 5, 8, 11, 21, 41, 101, 257, 513, 1024]
CONCENTRATIONS = [2.0**-10, 0.125, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0, 1e3, 1e4, 1e5]
DTYPES = [torch.float32, torch.float64]


def random_loc(m, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(m, dtype=torch.float64, generator=generator)
    return nn.functional.normalize(loc, dim=-1).to(dtype)


def axis(m, index=0, sign=1.0, dtype=torch.float64):
    loc = torch.zeros(m, dtype=dtype)
    loc[index] = sign
    return loc


# Density.


@pytest.mark.parametrize(("m", "k"), MEAN_COSINES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_mean_in_the_table(m, k, dtype, tolerance):
    loc = random_loc(m, dtype=dtype)
    mean = VonMisesFisher(loc, float(k)).mean
    assert mean.dtype == dtype
    torch.testing.assert_close(mean, MEAN_COSINES[m, k] * loc, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("m", DIMENSIONS)
def test_mean_constant_and_entropy_on_the_grid(m, dtype, tolerance, exact, error):
    k = torch.tensor(CONCENTRATIONS, dtype=dtype)
    q = VonMisesFisher(axis(m, dtype=dtype), k)
    constant, entropy, mean = q.log_normalizing_constant, q.entropy(), q.mean[..., 0]
    for index, concentration in enumerate(CONCENTRATIONS):
        reference = exact(m, concentration)
        assert error(mean[index], reference.mean) < tolerance
        assert error(constant[index], reference.log_normalizing_constant) < tolerance
        assert error(entropy[index], reference.entropy) < tolerance


@pytest.mark.parametrize(("m", "k"), [(2, 0.5), (3, 10.0), (5, 2.0), (11, 100.0), (41, 30.0)])
def test_log_prob_matches_scipy(m, k):
    torch.manual_seed(0)
    loc = random_loc(m)
    value = torch.cat(
        [
            HypersphericalUniform(m, dtype=torch.float64).sample((5,)),
            VonMisesFisher(loc, k).sample((5,)),
        ]
    )
    reference = stats.vonmises_fisher(loc.numpy(), k).logpdf(value.numpy())
    np.testing.assert_allclose(VonMisesFisher(loc, k).log_prob(value), reference, rtol=1e-9)


@pytest.mark.parametrize("m", [2, 3, 4, 9])
@pytest.mark.parametrize("k", [0.0, 0.5, 20.0])
def test_density_integrates_to_one(m, k):
    q = VonMisesFisher(axis(m), k)
    # The sphere is sliced at polar angle theta into spheres S^(m-2) of radius sin(theta).
    slice_area = 2 * math.pi ** ((m - 1) / 2) / math.gamma((m - 1) / 2)

    def slice_mass(theta):
        point = axis(m) * math.cos(theta) + axis(m, 1) * math.sin(theta)
        return slice_area * math.sin(theta) ** (m - 2) * q.log_prob(point).exp().item()

    assert integrate.quad(slice_mass, 0.0, math.pi, epsabs=1e-10)[0] == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("m", [2, 11, 513])
def test_concentration_zero_is_the_uniform_law(m):
    uniform = HypersphericalUniform(m, dtype=torch.float64)
    value = uniform.sample((3,))
    q = VonMisesFisher(axis(m), 0.0)
    torch.testing.assert_close(q.log_prob(value), uniform.log_prob(value), rtol=1e-12, atol=0)
    torch.testing.assert_close(q.entropy(), uniform.entropy(), rtol=1e-12, atol=0)


def test_float32_log_prob_keeps_its_digits_at_large_concentration():
    torch.manual_seed(0)
    loc = random_loc(16, dtype=torch.float32)
    value = VonMisesFisher(loc, 1e5).sample((200,))
    single = VonMisesFisher(loc, 1e5).log_prob(value)
    double = VonMisesFisher(loc.double(), 1e5).log_prob(value.double())
    # mu.x alone would be off by k * 2^-24 = 6e-3.
    assert (single - double).abs().max() < 1e-4


def test_log_prob_gradients():
    torch.manual_seed(0)
    k = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    raw = torch.randn(6, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def log_prob(k, raw, other):
        loc, value = nn.functional.normalize(raw, dim=-1), nn.functional.normalize(other, dim=-1)
        return VonMisesFisher(loc, k, validate_args=False).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (k, raw, other))


def test_entropy_gradient_is_that_of_finite_differences():
    k = torch.tensor([0.1, 3.0, 80.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: VonMisesFisher(axis(9), k).entropy(), (k,))


def test_second_derivative_of_log_prob_is_minus_the_variance(exact):
    k = torch.tensor([0.5, 30.0], dtype=torch.float64, requires_grad=True)
    log_prob = VonMisesFisher(random_loc(6), k).log_prob(random_loc(6, seed=1))
    (first,) = torch.autograd.grad(log_prob.sum(), k, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), k)
    assert second.tolist() == pytest.approx([-float(exact(6, x).variance) for x in (0.5, 30.0)])


@pytest.mark.parametrize("quantity", ["entropy", "mean", "rsample"])
def test_a_derivative_that_is_not_provided_is_refused(quantity):
    k = torch.tensor(3.0, requires_grad=True)
    value = getattr(VonMisesFisher(axis(3, dtype=torch.float32), k), quantity)
    loss = (value if quantity == "mean" else value()).sum()
    (gradient,) = torch.autograd.grad(loss, k, create_graph=True)
    with pytest.raises(NotImplementedError, match="concentration of a VonMisesFisher"):
        torch.autograd.grad(gradient, k)


def test_two_losses_of_one_distribution_can_be_differentiated_apart():
    k = torch.tensor(3.0, requires_grad=True)
    q = VonMisesFisher(axis(3, dtype=torch.float32), k)
    with torch.no_grad():
        q.log_prob(q.sample())
    q.entropy().backward()
    first = k.grad.clone()
    q.entropy().backward()
    assert torch.equal(k.grad, 2 * first)


# Shapes, expansion, validation.


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("sample_shape", [(), (4,), (5, 4), (0,)])
def test_shapes(batch_shape, sample_shape):
    loc = random_loc(7).expand(*batch_shape, 7)
    q = VonMisesFisher(loc, torch.full(batch_shape, 2.0, dtype=torch.float64))
    value = q.rsample(sample_shape)
    assert q.batch_shape == batch_shape
    assert q.event_shape == (7,)
    assert value.shape == sample_shape + batch_shape + (7,)
    assert q.log_prob(value).shape == sample_shape + batch_shape
    assert q.mean.shape == q.mode.shape == (*batch_shape, 7)
    assert q.entropy().shape == q.log_normalizing_constant.shape == batch_shape


def test_parameters_broadcast_and_promote():
    q = VonMisesFisher(random_loc(3, dtype=torch.float32), torch.ones(4, 1, dtype=torch.float64))
    assert q.batch_shape == (4, 1)
    assert q.loc.shape == (4, 1, 3)
    assert q.sample().dtype == torch.float64
    number = VonMisesFisher(random_loc(3, dtype=torch.float32), 5)
    assert number.concentration.dtype == torch.float32
    assert number.sample().dtype == torch.float32
    scalar = VonMisesFisher(random_loc(3, dtype=torch.float32), torch.tensor(5.0).double())
    assert scalar.sample().dtype == torch.float32


def test_float32_samples_can_be_scored_in_float64():
    value = VonMisesFisher(random_loc(50, dtype=torch.float32), 20.0).sample((100,))
    double = VonMisesFisher(random_loc(50), 20.0, validate_args=True).log_prob(value.double())
    single = VonMisesFisher(random_loc(50, dtype=torch.float32), 20.0).log_prob(value)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [False, True])
def test_expand_keeps_the_type_the_values_and_the_gradients(used):
    k = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    q = VonMisesFisher(random_loc(4), k)
    if used:
        q.entropy()
    expanded = q.expand((5, 3))
    assert type(expanded) is VonMisesFisher
    assert expanded.batch_shape == (5, 3)
    value = expanded.rsample((2,))
    assert value.shape == (2, 5, 3, 4)
    torch.testing.assert_close(expanded.log_prob(value), q.log_prob(value))
    (gradient,) = torch.autograd.grad(expanded.entropy().sum(), k)
    (single,) = torch.autograd.grad(q.entropy().sum(), k)
    torch.testing.assert_close(gradient, 5 * single)


def test_is_a_pyro_distribution():
    q = VonMisesFisher(random_loc(4).expand(3, 4), 2.0)
    assert isinstance(q, dist.TorchDistribution)
    assert q.has_rsample
    assert q.to_event(1).event_shape == (3, 4)
    assert q.expand_by((2,)).batch_shape == (2, 3)
    assert q.mask(torch.tensor([True, False, True])).log_prob(q())[1] == 0.0
    assert "VonMisesFisher" in repr(q)


@pytest.mark.parametrize(
    ("loc", "concentration", "message"),
    [
        (torch.tensor([1.0, 1.0]), 1.0, "loc of unit length"),
        (torch.tensor([1.0, 1e-2]), 1.0, "loc of unit length"),
        (torch.tensor([1.0, 0.0]), -1.0, "concentration >= 0"),
        (torch.tensor([1.0, 0.0]), math.nan, "concentration >= 0"),
        (torch.tensor([1.0]), 1.0, "m >= 2"),
        (torch.tensor(1.0), 1.0, r"shape \(\*batch, m\)"),
        (torch.eye(3)[:2], torch.ones(3), "one number for each vector"),
        (torch.tensor([1.0, 0.0]).half(), torch.ones(()).half(), "float32 or float64"),
        (torch.tensor([1, 0]), torch.tensor(1), "float32 or float64"),
    ],
)
def test_refuses_wrong_parameters(loc, concentration, message):
    with pytest.raises(InputError, match=message):
        VonMisesFisher(loc, concentration, validate_args=True)


@pytest.mark.parametrize(
    "value", [torch.full((3,), 0.1), torch.ones(4), torch.tensor(1.0), torch.full((3,), math.nan)]
)
def test_refuses_values_off_the_sphere(value):
    with pytest.raises(InputError, match="unit vectors"):
        VonMisesFisher(axis(3, dtype=torch.float32), 1.0, validate_args=True).log_prob(value)


# Capture, vectorisation, inference.


def loss_and_gradients(raw_loc, raw_concentration):
    q = VonMisesFisher(
        nn.functional.normalize(raw_loc, dim=-1),
        nn.functional.softplus(raw_concentration),
        validate_args=False,
    )
    value = q.rsample((3,))
    prior = HypersphericalUniform(raw_loc.shape[-1])
    loss = q.log_prob(value).sum() + value.pow(3).sum()
    loss = loss + torch.distributions.kl_divergence(q, prior.expand(q.batch_shape)).sum()
    return loss, *torch.autograd.grad(loss, (raw_loc, raw_concentration))


@pytest.mark.parametrize("batch", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_joint_capture_equals_eager(batch):
    torch.manual_seed(14)
    raw_loc = torch.randn(batch, 6, requires_grad=True)
    raw_concentration = torch.randn(batch, requires_grad=True)
    captured = make_fx(loss_and_gradients)(raw_loc, raw_concentration)

    other_loc = torch.randn(batch, 6, requires_grad=True)
    other_concentration = torch.randn(batch, requires_grad=True)
    torch.manual_seed(15)
    eager = loss_and_gradients(other_loc, other_concentration)
    with torch.no_grad():
        torch.manual_seed(15)
        replayed = captured(other_loc, other_concentration)
        fresh = captured(other_loc, other_concentration)
    for left, right in zip(eager, replayed, strict=True):
        torch.testing.assert_close(left, right)
    assert not torch.equal(replayed[0], fresh[0])


def test_log_prob_under_vmap():
    q = VonMisesFisher(random_loc(4).expand(3, 4), torch.tensor([1.0, 5.0, 9.0]).double())
    value = q.sample((6,))
    mapped = torch.vmap(q.log_prob)(value)
    torch.testing.assert_close(mapped, q.log_prob(value))

    def gradient(k, value):
        return torch.func.grad(
            lambda k: VonMisesFisher(q.loc[0], k, validate_args=False).log_prob(value)
        )(k)

    k = torch.tensor([0.5, 2.0], dtype=torch.float64)
    mapped = torch.vmap(gradient)(k, value[:2, 0])
    looped = torch.stack([gradient(a, b) for a, b in zip(k, value[:2, 0], strict=True)])
    torch.testing.assert_close(mapped, looped)


class ConjugatePair:
    """Prior vMF, likelihood vMF around z: posterior and log p(x) are known exactly."""

    m, prior_concentration, concentration = 4, 3.0, 8.0

    def __init__(self):
        self.prior_loc, self.x = random_loc(self.m, seed=1), random_loc(self.m, seed=2)
        posterior = self.prior_concentration * self.prior_loc + self.concentration * self.x
        self.posterior_concentration = posterior.norm()
        self.posterior_loc = posterior / self.posterior_concentration

    def model(self):
        z = pyro.sample("z", VonMisesFisher(self.prior_loc, self.prior_concentration))
        pyro.sample("x", VonMisesFisher(z, self.concentration), obs=self.x)

    def log_evidence(self):
        constants = [
            VonMisesFisher(self.x, k).log_normalizing_constant
            for k in (self.prior_concentration, self.concentration, self.posterior_concentration)
        ]
        return constants[0] + constants[1] - constants[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "elbo", [Trace_ELBO, pytest.param(TraceMeanField_ELBO, marks=pytest.mark.slow)]
)
def test_svi_finds_the_exact_posterior(elbo):
    pyro.clear_param_store()
    pyro.set_rng_seed(16)
    pair = ConjugatePair()

    def guide():
        loc = pyro.param("loc", lambda: axis(pair.m), constraint=unit_sphere)
        k = pyro.param(
            "k", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive
        )
        pyro.sample("z", VonMisesFisher(loc, k))

    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    svi = SVI(pair.model, guide, optimizer, loss=elbo())
    for _ in range(250):
        svi.step()
    q = VonMisesFisher(pyro.param("loc").detach(), pyro.param("k").detach())
    posterior = VonMisesFisher(pair.posterior_loc, pair.posterior_concentration)
    assert torch.distributions.kl_divergence(q, posterior) < 0.02
    pyro.clear_param_store()


def test_elbo_at_the_exact_posterior_is_the_log_evidence():
    pair = ConjugatePair()

    def guide():
        pyro.sample("z", VonMisesFisher(pair.posterior_loc, pair.posterior_concentration))

    pyro.set_rng_seed(17)
    for _ in range(5):
        loss = Trace_ELBO().loss(pair.model, guide)
        assert -loss == pytest.approx(pair.log_evidence().item(), abs=1e-10)


@pytest.mark.gpu
def test_stays_on_the_device():
    loc, k = axis(5, dtype=torch.float32).cuda(), torch.tensor(3.0, device="cuda")
    q, cpu = VonMisesFisher(loc, k, validate_args=True), VonMisesFisher(loc.cpu(), 3.0)
    for name in ("mean", "mode", "log_normalizing_constant"):
        assert getattr(q, name).device.type == "cuda"
        torch.testing.assert_close(getattr(q, name).cpu(), getattr(cpu, name))
    torch.testing.assert_close(q.entropy().cpu(), cpu.entropy())
    torch.testing.assert_close(q.log_prob(loc).cpu(), cpu.log_prob(loc.cpu()))
