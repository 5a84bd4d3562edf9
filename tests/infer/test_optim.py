"""FusedOptim takes the steps of Pyro's own optimisers, with one torch optimiser."""

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyro_vae.errors import InputError
from pyro_vae.infer.optim import FusedOptim, step_by_kernel

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
SCHEDULE = {
    "scheduler": torch.optim.lr_scheduler.ExponentialLR,
    "scheduler_args": {"gamma": 0.5},
}


@pytest.fixture(autouse=True)
def _clean_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def make_pair():
    net = nn.Linear(3, 3)

    def model(x):
        pyro.module("net", net)
        noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x) + z, noise).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide


def train(optim, steps=4, pair=None, after_step=None):
    if pair is None:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = make_pair()
    svi = SVI(*pair, optim, Trace_ELBO())
    for _ in range(steps):
        svi.step(X)
        if after_step:
            after_step(optim)
    return parameters(), pair


def parameters():
    return {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def per_name(name):
    return {"lr": 0.05, "betas": (0.8, 0.9)} if "net." in name else {"lr": 0.01}


def clip_by_name(module_name, name):
    return {"clip_norm": 0.1} if name == "weight" else {}


@pytest.mark.parametrize(
    ("constructor", "options"),
    [
        (torch.optim.Adam, {"lr": 0.02}),
        (torch.optim.Adam, per_name),
        (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.02}),
        (torch.optim.RMSprop, {"lr": 0.02}),
    ],
)
@pytest.mark.parametrize("clip_args", [None, {"clip_norm": 0.5}, {"clip_value": 0.1}, clip_by_name])
def test_steps_are_pyros(constructor, options, clip_args):
    expected, _ = train(pyro.optim.PyroOptim(constructor, options, clip_args))
    found, _ = train(FusedOptim(constructor, options, clip_args))
    assert_equal(found, expected)


def _optimizers(constructor, **options):
    """Return an optimiser that took a first step and its twin, of the same numbers."""
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(n, generator=generator).requires_grad_() for n in (3, 40)]
        made.append(constructor(params, lr=0.1, fused=True, **options))
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        made[-1].step()
    return made


def _numbers(optimizer):
    params = optimizer.param_groups[0]["params"]
    states = [optimizer.state[param][n] for param in params for n in sorted(optimizer.state[param])]
    return torch.cat([value.detach().flatten() for value in (*params, *states)])


@pytest.mark.parametrize(
    ("constructor", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.5, 0.8), "maximize": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
    ],
)
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_the_kernel_alone_takes_the_optimisers_step_to_the_bit(constructor, options, found_inf):
    ours, theirs = _optimizers(constructor, **options)
    before, flag = _numbers(ours), None if found_inf is None else torch.tensor(found_inf)
    theirs.found_inf = flag
    for _ in range(3):
        assert step_by_kernel(ours, flag)
        theirs.step()
    assert torch.equal(_numbers(ours), _numbers(theirs))
    assert torch.equal(_numbers(ours), before) == bool(found_inf)


def test_an_optimiser_with_more_to_do_takes_its_own_step():
    fresh = torch.optim.Adam([torch.zeros(2, requires_grad=True)], fused=True)
    fresh.param_groups[0]["params"][0].grad = torch.ones(2)
    plain, hooked = _optimizers(torch.optim.Adam)
    assert step_by_kernel(plain)
    hooked.register_step_post_hook(lambda *_: None)
    scheduled, sparse = _optimizers(torch.optim.Adam)
    torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    sparse.param_groups[0]["params"][0].grad = torch.ones(3).to_sparse()
    largest, on_device = _optimizers(torch.optim.Adam, amsgrad=True)
    on_device.param_groups[0].update(amsgrad=False, lr=torch.tensor(0.1))
    refused = [fresh, hooked, scheduled, sparse, largest, on_device]
    before = [_numbers(optimizer) for optimizer in refused]
    assert not any(map(step_by_kernel, refused))
    assert all(map(torch.equal, before, map(_numbers, refused)))
    everywhere = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert not step_by_kernel(plain)
    finally:
        everywhere.remove()
    assert step_by_kernel(plain)


def test_clipping_by_norm_and_value_together():
    clip_args = {"clip_norm": 0.5, "clip_value": 0.2}
    expected, _ = train(pyro.optim.SGD({"lr": 0.1}, clip_args))
    found, _ = train(FusedOptim(torch.optim.SGD, {"lr": 0.1}, clip_args))
    assert_equal(found, expected)


def test_one_fused_optimiser_with_groups_by_options_in_order_of_names():
    optim = FusedOptim(torch.optim.Adam, per_name)
    train(optim)
    groups = optim.optimizer.param_groups
    store = pyro.get_param_store()
    names = [[store.param_name(p) for p in group["params"]] for group in groups]
    assert names == [["loc", "noise"], ["net$$$bias", "net$$$weight"]]
    assert [group["lr"] for group in groups] == [0.01, 0.05]
    assert all(group["fused"] for group in groups)
    assert list(optim.optim_objs.values()) == [optim.optimizer]


def test_chosen_implementation_is_kept():
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1, "foreach": True})
    train(optim, steps=1)
    assert optim.optimizer.param_groups[0]["foreach"]
    assert not optim.optimizer.param_groups[0]["fused"]


def test_schedule_is_pyros():
    stock = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    )
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, **SCHEDULE)
    expected, _ = train(stock, after_step=lambda o: o.step())
    found, _ = train(optim, after_step=lambda o: o.step())
    assert_equal(found, expected)
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 16)


def test_plateau_schedule_takes_the_loss():
    optim = FusedOptim(
        torch.optim.SGD,
        {"lr": 0.1},
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau,
        scheduler_args={"patience": 0, "factor": 0.1},
    )
    optim.step(1.0)  # nothing to schedule yet
    train(optim, steps=3, after_step=lambda o: o.step(1.0))
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_gradients_are_none_and_momentum_may_leave_unused_parameters_alone():
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, keep_none=True)
    train(optim)
    store = dict(pyro.get_param_store().named_parameters())
    assert all(p.grad is None for p in store.values())
    before = parameters()
    store["loc"].grad = torch.ones(3)
    optim(set(store.values()))
    after = parameters()
    assert not torch.equal(after["loc"], before["loc"])
    assert torch.equal(after["noise"], before["noise"])


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_two_losses_share_an_optimiser_as_in_stock(make):
    """The second loss is given all parameters and uses them at every other step alone."""

    def first(x):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1), obs=x)

    def second(x):
        loc = pyro.param("loc", torch.zeros(3))
        if len(losses) % 2:
            pyro.sample("x", dist.Normal(loc, 2.0).to_event(1), obs=-x)

    found = []
    for optim in (pyro.optim.PyroOptim(make, {"lr": 0.1}), FusedOptim(make, {"lr": 0.1})):
        pyro.clear_param_store()
        losses = []
        both = [SVI(model, lambda x: None, optim, Trace_ELBO()) for model in (first, second)]
        for step in range(6):
            for svi in both:
                losses.append(svi.step(torch.ones(3)))
            with torch.no_grad() if step == 3 else torch.enable_grad():
                losses.append(both[0].step(torch.ones(3)))
        found.append((losses, parameters()))
    (losses, stock), (own_losses, own) = found
    assert own_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(own, stock)


def test_only_the_given_parameters_are_stepped():
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    train(optim)
    store = dict(pyro.get_param_store().named_parameters())
    before = parameters()
    for param in store.values():
        param.grad = torch.ones_like(param)
    optim([store["loc"]])
    after = parameters()
    assert [n for n in after if not torch.equal(after[n], before[n])] == ["loc"]
    assert store["loc"].grad is None
    assert torch.equal(store["noise"].grad, torch.ones(()))
    optim([])


def test_parameters_that_appear_later():
    optim = FusedOptim(torch.optim.Adam, per_name)
    first = pyro.param("b", torch.zeros(2))
    second = pyro.param("net.c", torch.zeros(2))
    for params in ([first], [first, second]):
        for param in params:
            param.grad = torch.ones(2)
        optim(params)
    a = pyro.param("a", torch.zeros(2))
    a.grad = torch.ones(2)
    optim([a])
    assert [len(g["params"]) for g in optim.optimizer.param_groups] == [2, 1]
    torch.testing.assert_close(a.detach(), torch.full((2,), -0.01))
    torch.testing.assert_close(first.detach(), torch.full((2,), -0.02))
    torch.testing.assert_close(second.detach(), torch.full((2,), -0.05))


def test_replaced_parameter_starts_afresh():
    runs = []
    for optim in (pyro.optim.Adam({"lr": 0.1}), FusedOptim(torch.optim.Adam, {"lr": 0.1})):
        _, pair = train(optim)
        pyro.get_param_store()["loc"] = torch.ones(3)
        pyro.set_rng_seed(1)
        runs.append(train(optim, steps=2, pair=pair)[0])
    assert_equal(runs[1], runs[0])
    assert len(optim.optimizer.state) == 4
    assert sum(len(g["params"]) for g in optim.optimizer.param_groups) == 4


@pytest.mark.parametrize("scheduled", [False, True])
def test_state_resumes_a_run(scheduled, tmp_path):
    options = SCHEDULE if scheduled else {}
    schedule = (lambda o: o.step()) if scheduled else None
    pyro.set_rng_seed(0)
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, **options)
    _, pair = train(optim, steps=3, after_step=schedule)
    optim.save(tmp_path / "optim.pt")
    saved, generator = parameters(), pyro.util.get_rng_state()
    expected, _ = train(optim, steps=3, pair=pair, after_step=schedule)
    with torch.no_grad():
        for name, param in pyro.get_param_store().named_parameters():
            param.copy_(saved[name])
    pyro.util.set_rng_state(generator)
    resumed = FusedOptim(torch.optim.Adam, {"lr": 0.1}, **options)
    resumed.load(tmp_path / "optim.pt")
    assert resumed.get_state().keys() == saved.keys()
    found, _ = train(resumed, steps=3, pair=pair, after_step=schedule)
    assert_equal(found, expected)


@pytest.mark.parametrize("direction", ["from Pyro", "to Pyro"])
def test_state_is_exchanged_with_pyro(direction):
    def fused():
        return FusedOptim(torch.optim.Adam, {"lr": 0.1})

    def stock():
        return pyro.optim.Adam({"lr": 0.1})

    runs = []
    source, target = (stock, fused) if direction == "from Pyro" else (fused, stock)
    for make in (source, target):
        optim = source()
        _, pair = train(optim, steps=3)
        fresh = make()
        fresh.set_state(optim.get_state())
        runs.append(train(fresh, steps=3, pair=pair)[0])
    assert_equal(runs[1], runs[0])


def test_loading_takes_effect_on_a_running_optimiser():
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    _, pair = train(optim, steps=2)
    state = optim.state_dict()
    for own in state.values():
        own["param_groups"][0]["lr"] = 0.0
    optim.load_state_dict(state)
    before = parameters()
    train(optim, steps=2, pair=pair)
    assert_equal(parameters(), before)
    steps = {float(s["step"]) for s in optim.optimizer.state.values()}
    assert steps == {4.0}


def test_gradients_that_are_missing_do_not_warn():
    param = pyro.param("a", torch.zeros(2))
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, {"clip_norm": 1.0, "clip_value": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim([param])
    assert torch.equal(param.detach(), torch.zeros(2))


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda: FusedOptim(torch.optim.LBFGS, {}), "LBFGS needs a closure"),
        (
            lambda: FusedOptim(torch.optim.SGD, {"lr": 0.1}, {"norm": 1.0})(
                [pyro.param("a", torch.zeros(1))]
            ),
            "expected clip_norm and clip_value",
        ),
    ],
)
def test_wrong_use_is_named(use, match):
    with pytest.raises(InputError, match=match):
        use()


def test_tensors_outside_the_store_are_stepped_as_pyro_does():
    ends = []
    for make in (pyro.optim.Adam, functools.partial(FusedOptim, torch.optim.Adam)):
        optim, tensors = make({"lr": 0.1}), [torch.zeros(2, requires_grad=True) for _ in range(2)]
        named = pyro.param("named", torch.zeros(2))
        for given in ([*tensors, named], tensors[:1], tensors):
            for count, tensor in enumerate(given, start=1):
                tensor.grad = torch.full((2,), float(count))
            optim(given)
            assert tensors[0].grad.tolist() == [1.0, 1.0]
            pyro.infer.util.zero_grads(given)
        ends.append([tensor.detach().clone() for tensor in tensors])
        pyro.clear_param_store()
    torch.testing.assert_close(*ends)
    assert list(optim.get_state()) == ["named"]


def test_new_options_after_a_schedule_began_are_refused():
    optim = FusedOptim(torch.optim.Adam, per_name, **SCHEDULE)
    optim([pyro.param("a", torch.zeros(1))])
    optim([pyro.param("b", torch.zeros(1))])
    with pytest.raises(InputError, match=r"'net\.c' has options of its own"):
        optim([pyro.param("net.c", torch.zeros(1))])


@pytest.mark.gpu
def test_cuda_parameters_are_fused():
    param = pyro.param("a", torch.zeros(2, device="cuda"))
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    param.grad = torch.ones_like(param)
    optim([param])
    assert optim.optimizer.param_groups[0]["fused"]
    torch.testing.assert_close(param.detach().cpu(), torch.full((2,), -0.1))
