"""Closed-form KL divergences: on the sphere, and how a registered one is found."""

import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.distributions import HypersphericalUniform, VonMisesFisher
from pyro_vae.distributions.kl import closed_form_kl
from pyro_vae.errors import InputError
from pyro_vae.infer import AnalyticKL

# KL(vMF || uniform) in nats, computed with arbitrary precision.
TABLE = {
    (2, 1): 0.210475607389,
    (3, 10): 1.99573231684,
    (3, 100): 4.29831736655,
    (11, 1): 0.0449840794607,
    (11, 100): 12.0692643784,
    (41, 100): 22.4787931592,
    (101, 100): 24.098230176,
    (513, 1000): 236.357331744,
}
DIMENSIONS = [2, 3, 4, 5, 8, 11, 21, 41, 101, 257, 513, 1024]
# Exact in float32 too, so that both dtypes see the same k.
CONCENTRATIONS = [2.0**-20, 2.0**-10, 0.125, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0, 1e3, 1e4, 1e5]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-11}
DTYPES = [torch.float32, torch.float64]


def on_axis(m, concentration, dtype=torch.float64):
    concentration = torch.as_tensor(concentration, dtype=dtype)
    loc = torch.zeros(*concentration.shape, m, dtype=dtype)
    loc[..., 0] = 1.0
    return VonMisesFisher(loc, concentration)


@pytest.mark.parametrize(("m", "k"), TABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_table(m, k, dtype, tolerance):
    value = kl_divergence(on_axis(m, k, dtype), HypersphericalUniform(m, dtype=dtype))
    assert value.dtype == dtype
    assert value.item() == pytest.approx(TABLE[m, k], rel=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", DIMENSIONS)
def test_divergences_from_and_to_the_uniform_law_on_the_grid(m, dtype, exact, error):
    p, uniform = on_axis(m, CONCENTRATIONS, dtype), HypersphericalUniform(m, dtype=dtype)
    to_uniform, from_uniform = kl_divergence(p, uniform), kl_divergence(uniform, p)
    for index, k in enumerate(CONCENTRATIONS):
        assert error(to_uniform[index], exact(m, k).kl_to_uniform) < TOLERANCE[dtype]
        assert error(from_uniform[index], exact(m, k).log_partition) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", [2, 5, 41, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_to_the_uniform_law_is_k_times_the_variance(m, dtype, exact, error):
    k = torch.tensor(CONCENTRATIONS, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        kl_divergence(on_axis(m, k, dtype), HypersphericalUniform(m, dtype=dtype)).sum(), k
    )
    for index, concentration in enumerate(CONCENTRATIONS):
        reference = concentration * exact(m, concentration).variance
        assert error(gradient[index], reference) < max(TOLERANCE[dtype], 3e-14 * concentration)


def test_divergence_is_zero_at_zero_concentration():
    p, uniform = on_axis(5, 0.0), HypersphericalUniform(5, dtype=torch.float64)
    for value in (kl_divergence(p, uniform), kl_divergence(uniform, p), kl_divergence(p, p)):
        assert value.item() == 0.0
    assert kl_divergence(uniform, uniform).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k_p", "k_q", "angle"),
    [(2, 1.0, 3.0, 2.0), (3, 100.0, 90.0, 0.01), (11, 11.0, 0.5, 3.0), (513, 1000.0, 900.0, 1.5)],
)
def test_between_two_von_mises_fisher(m, k_p, k_q, angle, dtype, exact):
    loc = torch.zeros(2, m, dtype=dtype)
    loc[0, 1] = 1.0
    loc[1, 1], loc[1, 0] = math.cos(angle), math.sin(angle)
    value = kl_divergence(VonMisesFisher(loc[0], k_p), VonMisesFisher(loc[1], k_q)).item()
    p, q = exact(m, k_p), exact(m, k_q)
    reference = p.mean * (k_p - k_q * mpmath.cos(angle)) - p.log_partition + q.log_partition
    assert value == pytest.approx(float(reference), rel={64: 1e-10, 32: 1e-5}[dtype.itemsize * 8])


def test_between_two_von_mises_fisher_agrees_with_sampling():
    torch.manual_seed(0)
    loc = torch.nn.functional.normalize(torch.randn(2, 6, dtype=torch.float64), dim=-1)
    p, q = VonMisesFisher(loc[0], 8.0), VonMisesFisher(loc[1], 3.0)
    value = p.sample((20_000,))
    ratio = p.log_prob(value) - q.log_prob(value)
    standard_error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - kl_divergence(p, q)) < 5 * standard_error + 1e-6


def test_divergence_of_a_distribution_from_itself_is_zero():
    p = on_axis(11, [0.1, 7.0, 1e4])
    assert (kl_divergence(p, on_axis(11, [0.1, 7.0, 1e4])).abs() < 1e-10).all()


def test_found_after_expand_and_under_to_event():
    p = on_axis(4, [1.0, 2.0, 3.0])
    uniform = HypersphericalUniform(4, dtype=torch.float64)
    single = kl_divergence(p, uniform)
    expanded = kl_divergence(p.expand((5, 3)), uniform.expand((5, 3)))
    torch.testing.assert_close(expanded, single.expand(5, 3))  # other shapes, other kernels
    together = kl_divergence(p.expand((5, 3)).to_event(1), uniform.expand((5, 3)).to_event(1))
    torch.testing.assert_close(together, single.sum().expand(5))
    torch.testing.assert_close(
        kl_divergence(p.to_event(1), on_axis(4, [2.0, 2.0, 2.0]).to_event(1)),
        kl_divergence(p, on_axis(4, [2.0, 2.0, 2.0])).sum(),
    )


def test_found_under_a_mask():
    p, uniform = on_axis(4, [1.0, 2.0]), HypersphericalUniform(4, batch_shape=(2,))
    mask = torch.tensor([True, False])
    value = kl_divergence(p.mask(mask), uniform.mask(mask))
    torch.testing.assert_close(value, kl_divergence(p, uniform) * mask)


def test_batch_shapes_broadcast():
    p = on_axis(4, [1.0, 2.0])
    assert kl_divergence(p, HypersphericalUniform(4, batch_shape=(3, 1))).shape == (3, 2)
    assert kl_divergence(HypersphericalUniform(4, batch_shape=(3, 1)), p).shape == (3, 2)
    assert kl_divergence(p, on_axis(4, [[1.0], [2.0], [3.0]])).shape == (3, 2)


def test_refuses_two_spheres():
    with pytest.raises(InputError, match="dimensions 4 and 5"):
        kl_divergence(on_axis(4, 1.0), HypersphericalUniform(5))


def test_other_pairs_are_not_claimed():
    with pytest.raises(NotImplementedError):
        kl_divergence(on_axis(4, 1.0), dist.Normal(torch.zeros(4), 1.0).to_event(1))


@pytest.mark.gpu
def test_stays_on_the_device():
    p = VonMisesFisher(torch.tensor([0.0, 1.0], device="cuda"), 3.0)
    uniform = HypersphericalUniform(2, device="cuda")
    cpu = VonMisesFisher(torch.tensor([0.0, 1.0]), 3.0)
    for value, reference in [
        (kl_divergence(p, uniform), kl_divergence(cpu, HypersphericalUniform(2))),
        (kl_divergence(uniform, p), kl_divergence(HypersphericalUniform(2), cpu)),
        (kl_divergence(uniform, uniform), torch.tensor(0.0)),
    ]:
        assert value.device.type == "cuda"
        torch.testing.assert_close(value.cpu(), reference)


def test_full_covariance_normal_to_independent_normals():
    """Against torch's own formula for two full covariances."""
    factor = torch.randn(5, 3, 3, dtype=torch.float64).tril() + 3 * torch.eye(3).double()
    loc, other = torch.randn(2, 5, 3, dtype=torch.float64)
    scale = torch.rand(5, 3, dtype=torch.float64) + 0.5
    p = dist.MultivariateNormal(loc, scale_tril=factor)
    q = dist.Normal(other, scale).to_event(1)
    full = dist.MultivariateNormal(other, scale_tril=torch.diag_embed(scale))
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p, full))
    torch.testing.assert_close(
        kl_divergence(p.expand((2, 5)), q), kl_divergence(p, full).expand(2, 5)
    )
    with pytest.raises(NotImplementedError):
        kl_divergence(p, dist.Laplace(other, scale).to_event(1))


class Wrapped(dist.TorchDistribution):
    """A distribution of somebody's own that expands by Pyro's default."""

    arg_constraints = {}  # noqa: RUF012 (Pyro's attribute)
    support = torch.distributions.constraints.real_vector
    has_rsample = True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape=()):
        return self.loc + torch.randn(self._extended_shape(sample_shape))

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).to_event(1).log_prob(value)


@torch.distributions.kl.register_kl(Wrapped, Wrapped)
def _kl_wrapped(q, p):
    return (q.loc - p.loc).square().sum(-1) / 2


def test_a_registered_divergence_is_found_after_expansion():
    q, p = Wrapped(torch.randn(5, 3)), Wrapped(torch.zeros(3)).expand((5,))
    assert closed_form_kl(q, p).shape == (5,)
    torch.testing.assert_close(closed_form_kl(q, p), q.loc.square().sum(-1) / 2)
    assert closed_form_kl(q, dist.Gamma(torch.ones(3), 1.0).to_event(1)) is None

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Wrapped(torch.zeros(3)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Wrapped(x / 2))

    x = torch.randn(4, 3)
    objective = AnalyticKL()
    objective.loss(model, guide, x)
    assert objective.exact_sites == {"z": True}
    measured = pv.compare({"a": (model, guide)}, x, num_samples=60, num_elbo_samples=60).pairs["a"]
    assert measured.exact_kl
    torch.testing.assert_close(measured.rate.value, (x.double() / 2).square().sum(-1) / 2)
