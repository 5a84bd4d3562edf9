"""The uniform distribution on the sphere."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.distributions import HypersphericalUniform, unit_sphere
from pyro_vae.errors import InputError

AREAS = {2: 2 * math.pi, 3: 4 * math.pi, 4: 2 * math.pi**2, 5: 8 * math.pi**2 / 3}


@pytest.mark.parametrize("m", AREAS)
def test_density_is_one_over_the_area(m):
    uniform = HypersphericalUniform(m, dtype=torch.float64)
    value = uniform.sample((4,))
    assert uniform.log_prob(value) == pytest.approx([-math.log(AREAS[m])] * 4, abs=1e-12)
    assert uniform.entropy().item() == pytest.approx(math.log(AREAS[m]), abs=1e-12)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("sample_shape", [(), (4,), (5, 4), (0,)])
def test_shapes(batch_shape, sample_shape):
    uniform = HypersphericalUniform(7, batch_shape=batch_shape)
    value = uniform.rsample(sample_shape)
    assert uniform.batch_shape == batch_shape
    assert uniform.event_shape == (7,)
    assert value.shape == sample_shape + batch_shape + (7,)
    assert uniform.log_prob(value).shape == sample_shape + batch_shape
    assert uniform.mean.shape == (*batch_shape, 7)
    assert uniform.entropy().shape == batch_shape


@pytest.mark.parametrize("m", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_first_two_moments_of_the_uniform_law(m, dtype):
    torch.manual_seed(0)
    n = 20_000
    value = HypersphericalUniform(m, dtype=dtype).sample((n,))
    assert value.dtype == dtype
    assert unit_sphere.check(value).all()
    mean_error = value.mean(0).abs()
    assert (mean_error < 5 * value.std(0) / math.sqrt(n) + 1e-6).all()
    products = value.unsqueeze(-1) * value.unsqueeze(-2)
    error = (products.mean(0) - torch.eye(m, dtype=dtype) / m).abs()
    assert (error < 5 * products.std(0) / math.sqrt(n) + 1e-6).all()


def test_expand_keeps_the_type_so_that_divergences_are_found():
    expanded = HypersphericalUniform(4, dtype=torch.float64).expand((5, 2))
    assert type(expanded) is HypersphericalUniform
    assert expanded.batch_shape == (5, 2)
    assert expanded.sample().shape == (5, 2, 4)
    assert expanded.sample().dtype == torch.float64
    assert torch.distributions.kl_divergence(expanded, HypersphericalUniform(4)).shape == (5, 2)


def test_is_a_pyro_distribution():
    uniform = HypersphericalUniform(4, batch_shape=(3,))
    assert isinstance(uniform, dist.TorchDistribution)
    assert uniform.has_rsample
    assert uniform.to_event(1).event_shape == (3, 4)
    assert uniform.mask(torch.tensor([True, False, True])).log_prob(uniform())[1] == 0.0


@pytest.mark.parametrize("m", [1, 0, 2.5, "3", True])
def test_refuses_a_dimension_that_is_none(m):
    with pytest.raises(InputError, match="m >= 2"):
        HypersphericalUniform(m)


@pytest.mark.parametrize(
    "value", [torch.full((3,), 0.1), torch.ones(4), torch.tensor(1.0), torch.full((3,), math.nan)]
)
def test_refuses_values_off_the_sphere(value):
    with pytest.raises(InputError, match="unit vectors"):
        HypersphericalUniform(3, validate_args=True).log_prob(value)


def test_zero_noise_still_gives_a_unit_vector(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape, **options: torch.zeros(shape, **options))
    assert unit_sphere.check(HypersphericalUniform(2).sample((3,))).all()


@pytest.mark.gpu
def test_stays_on_the_device():
    uniform = HypersphericalUniform(5, device="cuda", validate_args=True)
    value = uniform.rsample((6,))
    for tensor in (value, uniform.log_prob(value), uniform.mean, uniform.entropy()):
        assert tensor.device.type == "cuda"
