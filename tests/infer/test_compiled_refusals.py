"""What CompiledTrace_ELBO can't hold in a graph runs as stock Pyro, with one warning."""

import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from torch import nn

from pyro_vae.errors import InputError
from pyro_vae.infer.compiled import CompiledTrace_ELBO

X = torch.tensor([0.3, -0.2, 1.1])


def pair(change=lambda z: z, *, latent=None, draw=None):
    """A normal model whose mean is ``change(z)``."""

    def model(x, *_):
        z = pyro.sample("z", latent or dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(change(z), 1.0), obs=x)

    def guide(x, *_):
        loc = pyro.param("loc", torch.tensor(0.4))
        pyro.sample("z", draw(loc) if draw else dist.Normal(loc, 1.0))

    return model, guide


def repeat(times, estimate, *inputs):
    return [estimate(*inputs) for _ in range(times)]


def assert_stock_with_one_warning(model, guide, *inputs, match):
    """Losses and parameters are stock Pyro's, and the reason is given exactly once."""
    inputs = inputs or (X,)
    runs = []
    for elbo in (Trace_ELBO(), CompiledTrace_ELBO(backend="eager")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = [svi.step(*inputs) for _ in range(4)]
        params = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
        runs.append((losses, params, [str(w.message) for w in caught]))
    (expected, params, _), (found, found_params, messages) = runs
    assert found == expected
    for name, value in params.items():
        torch.testing.assert_close(found_params[name], value, rtol=0, atol=0)
    reasons = [m for m in messages if "CompiledTrace_ELBO" in m]
    assert len(reasons) == 1
    assert match in reasons[0]
    assert elbo.num_graphs == 0


def data_dependent(z):
    return z if z > 0 else 2 * z


def read_as_list(z):
    return z * (1.0 if z.tolist() > 0 else 2.0)


def read_as_array(z):
    return z * float(np.asarray(z.detach()) > 0)


def read_item(z):
    return z * z.item()


@pytest.mark.parametrize("change", [data_dependent, read_as_list, read_as_array, read_item])
def test_control_flow_on_values(change):
    assert_stock_with_one_warning(*pair(change), match="near site 'z'")


def test_shape_that_depends_on_values():
    def change(z):
        values = z * torch.ones(5)
        return values[torch.rand(5) > 0.5].sum()

    assert_stock_with_one_warning(*pair(change), match="near site 'z'")


def test_site_without_reparameterisation():
    model, guide = pair(latent=dist.Bernoulli(0.5), draw=lambda loc: dist.Bernoulli(logits=loc))
    assert_stock_with_one_warning(model, guide, match="site 'z' is not reparameterised")


def test_enumeration():
    model, guide = pair(latent=dist.Bernoulli(0.5), draw=lambda loc: dist.Bernoulli(logits=loc))
    assert_stock_with_one_warning(model, config_enumerate(guide), match="site 'z' is enumerated")


def test_sparse_gradients():
    embedding = nn.Embedding(4, 1, sparse=True)

    def model(x):
        pyro.module("embedding", embedding)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            loc = embedding(torch.tensor([0, 1, 1])).squeeze(-1)
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)

    guide = pair()[1]
    elbo = CompiledTrace_ELBO(backend="eager")
    with pytest.warns(UserWarning, match="gradient of 'embedding.*weight' is sparse") as caught:
        repeat(2, elbo.loss_and_grads, model, guide, X)
    assert embedding.weight.grad.is_sparse
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module():
    class Shift(nn.Module):
        def forward(self, z):
            return z + 1.0

    match = "'Shift' is a scripted module"
    assert_stock_with_one_warning(*pair(torch.jit.script(Shift())), match=match)


def test_sites_that_change():
    calls = []

    def model(x):
        pair()[0](x)
        calls.append(None)
        if len(calls) % 2:
            pyro.factor("sometimes", torch.ones(()))

    guide = pair()[1]
    pyro.set_rng_seed(0)
    elbo = CompiledTrace_ELBO(backend="eager")
    with pytest.warns(UserWarning, match="the sites change from run to run: sometimes") as caught:
        repeat(3, elbo.loss_and_grads, model, guide, X)
    assert len(caught) == 1
    assert elbo.num_graphs == 0


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters(register):
    seen = []
    weight = nn.Parameter(torch.ones(()))
    module = nn.ParameterDict({"weight": weight})

    def model(x):
        pyro.module("module", module)
        pair(lambda z: z * module["weight"])[0](x)

    def hook(tensor):
        seen.append(tensor.norm().item())

    guide = pair()[1]
    elbo = CompiledTrace_ELBO(backend="eager")
    elbo.loss_and_grads(model, guide, X)
    elbo.loss_and_grads(model, guide, X)
    assert elbo.num_graphs == 1
    getattr(weight, register)(hook)
    with pytest.warns(UserWarning, match="a hook is registered on 'module\\$\\$\\$weight'"):
        elbo.loss_and_grads(model, guide, X)
    count = len(seen)
    elbo.loss_and_grads(model, guide, X)
    assert len(seen) == count + 1


def test_foreign_handlers():
    model, guide = pair()
    elbo = CompiledTrace_ELBO(backend="eager")
    elbo.loss_and_grads(model, guide, X)

    @poutine.scale(scale=3.0)
    def scaled(estimate):
        pyro.set_rng_seed(1)
        return estimate(model, guide, X)

    match = "the handler ScaleMessenger stands around the step"
    with pytest.warns(UserWarning, match=match) as caught:
        found = repeat(2, scaled, elbo.loss_and_grads)
    assert len(caught) == 1
    assert found == [scaled(Trace_ELBO().loss_and_grads)] * 2
    # Without the handler the graph serves again.
    pyro.set_rng_seed(1)
    assert elbo.loss_and_grads(model, guide, X) == pytest.approx(found[0] / 3)
    assert elbo.num_graphs == 1


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])  # noqa: NPY002
def test_python_and_numpy_randomness(draw):
    assert_stock_with_one_warning(
        *pair(lambda z: z + draw()), match="Python's or NumPy's global random numbers"
    )


def test_buffer_that_is_replaced():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, z):
            self.mean = 0.9 * self.mean + 0.1
            return z + self.mean

    elbo = CompiledTrace_ELBO(backend="eager")
    moving = Moving()
    model, guide = pair(moving)
    with pytest.warns(UserWarning, match="buffer 'mean' is replaced"):
        repeat(3, elbo.loss_and_grads, model, guide, X)
    assert float(moving.mean) == pytest.approx(1 - 0.9**3)


def test_verification_leaves_a_faithful_run_alone():
    runs = []
    for verify_every in (None, 1):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = CompiledTrace_ELBO(backend="eager", verify_every=verify_every)
        svi = SVI(*pair(), pyro.optim.SGD({"lr": 1e-2}), elbo)
        runs.append([svi.step(X) for _ in range(4)])
        assert elbo.num_graphs == 1
    assert runs[0] == runs[1]


class WrongUnderCapture(torch.autograd.Function):
    """A gradient that is right in the first backward passes and wrong in the captured one."""

    factors = iter(())

    @staticmethod
    def forward(ctx, value):
        return value * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * next(WrongUnderCapture.factors)


def test_wrong_gradient_is_found_out_and_named():
    WrongUnderCapture.factors = iter((1.0, 1.0, 2.0, 1.0))
    model, guide = pair(draw=lambda loc: dist.Normal(WrongUnderCapture.apply(loc), 1.0))
    elbo = CompiledTrace_ELBO(backend="eager")
    with pytest.warns(UserWarning, match="its gradient of 'loc' differs from the eager"):
        elbo.loss_and_grads(model, guide, X)
    assert not list(WrongUnderCapture.factors)
    assert elbo.num_graphs == 0


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        (np.ones(3), "unhashable ndarray"),
        (torch.ones(3, requires_grad=True), "requires a gradient"),
        (torch.eye(3).to_sparse(), "no plain dense tensor"),
        ({"nested": [X, {1, 2}]}, r"argument[0][1]['nested'][1] is an unhashable set"),
    ],
)
def test_arguments_without_a_key(argument, match):
    assert_stock_with_one_warning(*pair(), X, argument, match=match)


def test_a_word_that_changes_every_step_ends_the_captures(monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.program.MAXIMUM_PROGRAMS", 3)
    model, guide = pair()
    elbo = CompiledTrace_ELBO(backend="eager")
    elbo.loss_and_grads(model, guide, X, "0")
    with pytest.warns(UserWarning, match="pass numbers that change as tensors") as caught:
        [elbo.loss_and_grads(model, guide, X, str(step)) for step in range(1, 6)]
    assert len(caught) == 1
    assert elbo.num_graphs == 3


def test_beta_needs_a_guide_of_its_own():
    model, _ = pair()
    guide = pyro.infer.autoguide.AutoNormalMessenger(model)
    with pytest.raises(InputError, match="beta needs a guide"):
        CompiledTrace_ELBO(beta=0.5, backend="eager").loss_and_grads(model, guide, X)


def test_options_are_checked():
    with pytest.raises(InputError, match="verify_every must be at least 1"):
        CompiledTrace_ELBO(verify_every=0)


def test_import_changes_no_settings():
    assert pyro.settings.get("module_local_params") is False
    assert torch.get_default_dtype() is torch.float32
