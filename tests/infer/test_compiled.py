"""CompiledTrace_ELBO takes the same steps as stock Trace_ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_pairs import VAE, assert_same_run, compiled, make_vae, run, scalar_pair
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_vae.infer.optim import FusedOptim

# --- holds under joint capture ---


@pytest.mark.parametrize(
    ("vectorize_particles", "num_particles"),
    [(False, 1), (True, 3), pytest.param(False, 3, marks=pytest.mark.slow)],
)
def test_vae(x, num_particles, vectorize_particles):
    assert_same_run(make_vae, x, num_particles=num_particles, vectorize_particles=vectorize_particles)


def test_constrained_parameters():
    def make():
        def model(x):
            scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
            weights = pyro.param("weights", torch.ones(4) / 4, constraint=constraints.simplex)
            z = pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))
            pyro.sample("x", dist.Normal(z.sum() + weights[0], 1.0), obs=x)

        def guide(x):
            loc = pyro.param("loc", lambda: torch.randn(3))
            scale = pyro.param("q", torch.ones(3), constraint=constraints.interval(0.1, 3.0))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        return model, guide

    assert_same_run(make, torch.tensor(0.7))


class HalvedGradient(torch.autograd.Function):
    """A backward that is not the derivative of the forward, so that losing it shows."""

    @staticmethod
    def forward(ctx, value):
        return value.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.5


def test_custom_autograd_function():
    assert_same_run(scalar_pair(HalvedGradient.apply), torch.tensor(0.7))


def test_no_grad_and_detach_regions():
    def transform(loc):
        with torch.no_grad():
            a = loc.exp()
        return a + loc.sin().detach() + loc**2

    assert_same_run(scalar_pair(transform), torch.tensor(0.7))


def test_beta_and_dirichlet_pathwise_gradients():
    def make():
        def model(x):
            with pyro.plate("data", 5):
                a = pyro.sample("a", dist.Beta(2.0, 2.0))
                b = pyro.sample("b", dist.Dirichlet(torch.ones(3)))
                pyro.sample("x", dist.Normal(a + b[:, 0], 1.0), obs=x)

        def guide(x):
            concentration = pyro.param("c", torch.full((2,), 1.5), constraint=constraints.positive)
            weights = pyro.param("w", torch.full((3,), 2.0), constraint=constraints.positive)
            with pyro.plate("data", 5):
                pyro.sample("a", dist.Beta(concentration[0], concentration[1]))
                pyro.sample("b", dist.Dirichlet(weights))

        return model, guide

    assert_same_run(make, torch.linspace(0, 1, 5))


def test_mixture_of_diagonal_normals():
    def make():
        def model(x):
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def guide(x):
            locs = pyro.param("locs", torch.randn(3, 2))
            scales = pyro.param("scales", torch.ones(3, 2), constraint=constraints.positive)
            logits = pyro.param("logits", torch.zeros(3))
            with pyro.plate("data", 5):
                pyro.sample("z", dist.MixtureOfDiagNormals(locs, scales, logits))

        return model, guide

    assert_same_run(make, torch.linspace(0, 1, 5))


def test_noise_is_fresh_and_follows_the_seed(x):
    model, guide = make_vae()
    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    pyro.set_rng_seed(3)
    first = [elbo.loss_and_grads(model, guide, x) for _ in range(3)]
    pyro.set_rng_seed(3)
    second = [elbo.loss_and_grads(model, guide, x) for _ in range(3)]
    assert first == second
    assert len(set(first)) == 3


def test_dropout(x):
    class Dropping(VAE):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 6))

    def make():
        vae = Dropping()
        return vae.model, vae.guide

    assert_same_run(make, x)


def test_subsample_indices_are_fresh_and_scaled():
    data = torch.arange(20.0)
    seen = []

    def make():
        def model(data):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 20, subsample_size=4) as index:
                seen.append(index)
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

        def guide(data):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))

        return model, guide

    assert_same_run(make, data)


@pytest.mark.parametrize(
    "normed",
    [
        pytest.param(nn.utils.parametrizations.weight_norm, marks=pytest.mark.slow),
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_weight_and_spectral_norm(x, normed):
    def make():
        return make_vae(layer=lambda i, o: normed(nn.Linear(i, o)))

    (model, _), (found, _) = assert_same_run(make, x)
    buffers, found_buffers = dict(model.__self__.named_buffers()), found.__self__.named_buffers()
    for name, buffer in found_buffers:
        torch.testing.assert_close(buffer, buffers[name])


def test_batch_norm_statistics(x):
    class Normed(VAE):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))

    def make():
        vae = Normed()
        return vae.model, vae.guide

    (model, _), (found, _) = assert_same_run(make, x)
    expected, norm = model.__self__.decoder[1], found.__self__.decoder[1]
    assert int(norm.num_batches_tracked) == 4
    torch.testing.assert_close(norm.running_mean, expected.running_mean)


def test_factor_mask_and_auxiliary_sites():
    def make():
        def model(x, mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("penalty", -(z**2))
            with pyro.plate("data", 5), poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x, mask):
            loc = pyro.param("loc", torch.tensor(0.3))
            base = dist.Normal(loc, 1.0)
            u = pyro.sample("u", base, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2 * u, log_density=-torch.tensor(2.0).log()))

        return model, guide

    mask = torch.tensor([True, False, True, True, False])
    assert_same_run(make, torch.linspace(0, 1, 5), mask)


def test_plate_scale_of_minibatches(x):
    def make():
        vae = VAE()

        def scaled(function):
            def wrapped(x):
                with poutine.scale(scale=10.0):
                    function(x)

            return wrapped

        return scaled(vae.model), scaled(vae.guide)

    assert_same_run(make, x)


def test_pyro_module_parameters():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.plain = nn.Linear(1, 1)
            self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.plain(self.linear(x)).squeeze(-1) + z
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(loc, self.noise), obs=x.sum(-1))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    assert_same_run(lambda: (Model(), Guide()), torch.randn(5, 2))


def test_automatic_guide(x):
    def make():
        vae = VAE()

        def model(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(7, 2), 1.0).to_event(2))
            pyro.module("decoder", vae.decoder)
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z)).to_event(2), obs=x)

        return model, pyro.infer.autoguide.AutoNormal(model)

    assert_same_run(make, x)


def test_keyword_arguments_none_and_nested_containers(x):
    def make():
        vae = VAE()

        def model(batch, extra=None, *, flag):
            assert extra is None
            assert flag == "on"
            vae.model(batch["images"][0] * batch["mask"][1])

        def guide(batch, extra=None, *, flag):
            vae.guide(batch["images"][0])

        return model, guide

    batch = {"images": [x, (None, 3)], "mask": (None, torch.ones(6))}
    losses, _, _ = run_with_flag(make, Trace_ELBO(), batch)
    elbo = compiled()
    found, _, _ = run_with_flag(make, elbo, batch)
    assert elbo.num_graphs == 1
    assert losses == pytest.approx(found, rel=1e-6)


def run_with_flag(make, elbo, batch):
    def make_with_flag():
        model, guide = make()
        return lambda b: model(b, flag="on"), lambda b: guide(b, flag="on")

    return run(make_with_flag, elbo, [(batch,)] * 3)


def test_with_the_fused_optimiser_the_run_is_still_pyros(x):
    batches = [(x,)] * 5
    expected, params, _ = run(make_vae, Trace_ELBO(), batches, pyro.optim.Adam({"lr": 0.01}))
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.01})
    found, found_params, _ = run(make_vae, compiled(), batches, optim)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in params.items():
        torch.testing.assert_close(found_params[name], value, rtol=1e-4, atol=1e-5)


def test_parameter_created_in_the_first_step_trains_and_draws_once():
    def make():
        def model(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

        def guide(x):
            loc = pyro.param("loc", lambda: torch.randn(3))
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        return model, guide

    assert_same_run(make, torch.tensor(2.0))
    before = pyro.param("loc").detach().clone()
    SVI(*make(), pyro.optim.SGD({"lr": 0.1}), compiled()).step(torch.tensor(2.0))
    assert not torch.equal(before, pyro.param("loc"))


def test_gradients_can_be_changed_in_place():
    """Two parameters with one gradient, one that is expanded, one that is transposed."""
    shared = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    matrix = nn.Parameter(torch.zeros(2, 3))
    module = nn.ParameterList([*shared, matrix])

    def model(x):
        pyro.module("module", module)
        pyro.factor("sum", (shared[0] + shared[1]).sum() + (matrix.t() * x).sum())
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    x = torch.arange(6.0).reshape(3, 2)
    elbo = compiled()
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        elbo.loss_and_grads(model, guide, x)
    assert elbo.num_graphs == 1
    for parameter in module:
        assert parameter.grad.stride() == parameter.stride()
        parameter.grad.mul_(2.0)
    torch.testing.assert_close(shared[0].grad, torch.full((2,), -2.0))
    torch.testing.assert_close(shared[1].grad, torch.full((2,), -2.0))
    torch.testing.assert_close(matrix.grad, -2 * x.t())
