"""What a captured step depends on: followed, part of its key, or a reason for another capture."""

import gc
import weakref

import pyro
import pytest
import torch
from compiled_pairs import VAE, CountingELBO, compiled, make_constrained, make_vae, scalar_pair
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn


def test_train_and_eval_flags(x):
    class Dropping(VAE):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def model(self, x):
            super().model(self.drop(x) * 0 + x)
            pyro.factor("dropped", self.drop(torch.ones(100)).sum())

    vae = Dropping()
    elbo = compiled()
    for _ in range(2):
        vae.train()
        training = [elbo.loss_and_grads(vae.model, vae.guide, x) for _ in range(3)]
        vae.eval()
        assert elbo.loss_and_grads(vae.model, vae.guide, x) < min(training) + 100 - 1
        pyro.set_rng_seed(3)
        evaluated = elbo.loss_and_grads(vae.model, vae.guide, x)
        pyro.set_rng_seed(3)
        assert evaluated == pytest.approx(Trace_ELBO().loss(vae.model, vae.guide, x), rel=1e-6)
    assert elbo.num_graphs == 2


def test_requires_grad_flips(x):
    model, guide = make_vae()
    vae = model.__self__.eval()
    elbo = compiled()
    for _ in range(2):
        for trained in (True, False):
            vae.decoder.requires_grad_(trained)
            vae.zero_grad(set_to_none=True)
            elbo.loss_and_grads(model, guide, x)
            assert all((p.grad is not None) == trained for p in vae.decoder.parameters())
    assert elbo.num_graphs == 2


def test_autocast_is_keyed_and_faithful(x):
    model, guide = make_vae()
    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    losses = {}
    for estimate in (Trace_ELBO().loss_and_grads, elbo.loss_and_grads, elbo.loss_and_grads):
        pyro.set_rng_seed(4)
        with torch.autocast("cpu", torch.bfloat16):
            losses.setdefault("cast", []).append(estimate(model, guide, x))
        pyro.set_rng_seed(4)
        losses.setdefault("plain", []).append(estimate(model, guide, x))
    assert elbo.num_graphs == 2
    assert losses["cast"] == pytest.approx([losses["cast"][0]] * 3, rel=1e-6)
    assert losses["plain"] == pytest.approx([losses["plain"][0]] * 3, rel=1e-6)
    assert losses["cast"][0] != losses["plain"][0]


def test_default_dtype_is_keyed():
    def transform(loc):
        return loc + torch.ones(()) / 3

    model, guide = scalar_pair(transform)()
    elbo = compiled()
    elbo.loss_and_grads(model, guide, torch.tensor(0.5))
    torch.set_default_dtype(torch.float64)
    try:
        pyro.set_rng_seed(0)
        expected = Trace_ELBO().loss(model, guide, torch.tensor(0.5, dtype=torch.float32))
        for _ in range(2):
            pyro.set_rng_seed(0)
            loss = elbo.loss_and_grads(model, guide, torch.tensor(0.5, dtype=torch.float32))
            assert loss == pytest.approx(expected, rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert elbo.num_graphs == 2


def test_without_grad_mode_there_is_no_gradient(x):
    model, guide = make_vae()
    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    model.__self__.zero_grad(set_to_none=True)
    with torch.no_grad():
        elbo.loss_and_grads(model, guide, x)
    assert all(p.grad is None for p in model.__self__.parameters())


def replace_by_item(store):
    store["scale"] = torch.tensor(0.5)


def replace_by_state(store):
    state = store.get_state()
    params = {n: (p.detach() - 1.0).requires_grad_() for n, p in state["params"].items()}
    store.set_state({**state, "params": params})


@pytest.mark.parametrize("replace", [replace_by_item, replace_by_state])
def test_replaced_parameters_are_followed(replace):
    model, guide = make_constrained()
    elbo = compiled()
    inputs = torch.tensor(1.0)
    elbo.loss_and_grads(model, guide, inputs)
    store = pyro.get_param_store()
    replace(store)
    leaf = dict(store.named_parameters())["scale"]
    leaf.grad = None
    pyro.set_rng_seed(6)
    loss = elbo.loss_and_grads(model, guide, inputs)
    found = leaf.grad
    leaf.grad = None
    pyro.set_rng_seed(6)
    assert Trace_ELBO().loss_and_grads(model, guide, inputs) == pytest.approx(loss)
    torch.testing.assert_close(leaf.grad, found)
    assert elbo.num_graphs == 1


def test_replaced_parameters_of_modules(x):
    """A module keeps its own tensors when the store's are replaced, and so do its gradients."""
    model, guide = make_vae()
    elbo = compiled()
    for _ in range(2):
        elbo.loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    name = "vae$$$loc.bias"
    store[name] = torch.zeros(2)
    vae = model.__self__
    for _ in range(3):
        vae.zero_grad(set_to_none=True)
        elbo.loss_and_grads(model, guide, x)
        assert vae.loc.bias.grad is not None
        assert dict(store.named_parameters())[name].grad is None


def test_cleared_store_is_filled_again(x):
    model, guide = make_vae()
    elbo = compiled()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
    svi.step(x)
    pyro.clear_param_store()
    svi.step(x)
    assert len(pyro.get_param_store()) == 10
    assert elbo.num_graphs == 1


def test_bound_methods_share_a_graph_and_pairs_do_not(x):
    elbo = compiled()
    first, second = VAE(), VAE()
    for vae in (first, second):
        pyro.clear_param_store()
        for _ in range(2):
            elbo.loss_and_grads(vae.model, vae.guide, x)
            pyro.set_rng_seed(1)
            loss = elbo.loss_and_grads(vae.model, vae.guide, x)
            pyro.set_rng_seed(1)
            assert loss == pytest.approx(Trace_ELBO().loss(vae.model, vae.guide, x), rel=1e-6)
    assert elbo.num_graphs == 2


def test_a_pair_is_forgotten_with_its_instance(x):
    elbo = compiled()
    vae = VAE()
    elbo.loss_and_grads(vae.model, vae.guide, x)
    reference = weakref.ref(vae)
    del vae
    pyro.clear_param_store()
    gc.collect()
    assert reference() is None
    assert elbo.num_graphs == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        pytest.param(lambda x: x.t().contiguous().t(), marks=pytest.mark.slow),
        lambda x: x[:3],
    ],
    ids=["dtype", "stride", "shape"],
)
def test_tensor_arguments_are_keyed(x, change):
    vae = VAE()

    def model(x):
        vae.model(x.float())

    def guide(x):
        vae.guide(x.float())

    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    other = change(x)
    for _ in range(3):
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(model, guide, other)
        pyro.set_rng_seed(1)
        assert loss == pytest.approx(Trace_ELBO().loss(model, guide, other), rel=1e-6)
    assert elbo.num_graphs == 2


def test_other_arguments_are_followed(x):
    vae = VAE()

    def model(x, weight):
        with poutine.scale(scale=weight):
            vae.model(x)

    def guide(x, weight):
        vae.guide(x)

    elbo = compiled()
    for weight in (1, 2.0, 1.0, 2.0):
        elbo.loss_and_grads(model, guide, x, weight)
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(model, guide, x, weight)
        pyro.set_rng_seed(1)
        assert loss == pytest.approx(Trace_ELBO().loss(model, guide, x, weight), rel=1e-6)
    assert elbo.num_graphs == 2  # of the first value, and of any number


def test_odd_last_batch_runs_eagerly(x):
    model, guide = make_vae()
    elbo = CountingELBO(backend="eager")
    for _ in range(3):
        elbo.loss_and_grads(model, guide, x)
        elbo.loss_and_grads(model, guide, x)
        elbo.loss_and_grads(model, guide, x[:3])
    assert elbo.num_graphs == 1
    assert elbo.replays == 5


def test_an_argument_is_told_from_the_same_tensor_closed_over(x):
    vae = VAE()

    def model(batch):
        vae.model(batch)
        pyro.factor("closed_over", x.sum())

    def guide(batch):
        vae.guide(batch)

    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    other = 1 - x
    pyro.set_rng_seed(1)
    loss = elbo.loss_and_grads(model, guide, other)
    pyro.set_rng_seed(1)
    assert loss == pytest.approx(Trace_ELBO().loss(model, guide, other), rel=1e-6)


def test_closed_over_tensor_changed_in_place_is_seen(x):
    vae = VAE()
    weight = torch.ones(())

    def model(batch):
        vae.model(batch)
        pyro.factor("weighted", weight * 5)

    elbo = compiled()
    elbo.loss_and_grads(model, vae.guide, x)
    losses = []
    for value in (1.0, 3.0):
        weight.fill_(value)
        pyro.set_rng_seed(1)
        losses.append(elbo.loss_and_grads(model, vae.guide, x))
    assert losses[0] - losses[1] == pytest.approx(10.0, rel=1e-4)


def test_an_unregistered_module_gets_gradients_as_in_stock(x):
    vae = VAE()
    extra = nn.Linear(6, 6)

    def model(batch):
        vae.model(batch)
        pyro.factor("extra", extra(batch).sum())

    elbo = compiled()
    elbo.loss_and_grads(model, vae.guide, x)
    extra.zero_grad(set_to_none=True)
    elbo.loss_and_grads(model, vae.guide, x)
    torch.testing.assert_close(extra.bias.grad, torch.full((6,), -7.0))
