"""Optimisers, parameter groups, schedulers and moving averages of a training run."""

import functools
import math
import os
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.infer.checkpoint import Interrupted

AdamW = torch.optim.AdamW
TIMES = {"seconds", "data_per_second"}


def line_pair():
    """A linear model and guide without draws: the steps can be repeated by hand."""
    torch.manual_seed(0)
    decode, encode = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)

    def model(x):
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encode(x)).to_event(1))

    return model, guide, torch.nn.ModuleDict({"decode": decode, "encode": encode})


def loss_of(nets, x):
    z = nets["encode"](x)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum()
    return -(log_prior + dist.Normal(nets["decode"](z), 1.0).log_prob(x).sum()) / len(x)


def train_by_hand(nets, x, optimizer, steps=6, after_step=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(nets, x).backward()
        optimizer.step()
        after_step()


@pytest.fixture
def x():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


def assert_same_numbers(nets, others):
    for (name, found), expected in zip(nets.named_parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def decay_matrices(parameters):
    return AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.5},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.05,
    )


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"optimizer": torch.optim.SGD, "learning_rate": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
        (
            {
                "optimizer": functools.partial(AdamW, weight_decay=0.3, betas=(0.5, 0.9)),
                "learning_rate": 0.1,
            },
            lambda p: AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.5, 0.9)),
        ),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)},
            lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
        ),
        (
            {"optimizer": lambda p: torch.optim.RMSprop(p, lr=0.05)},
            lambda p: torch.optim.RMSprop(p, lr=0.05),
        ),
        ({"optimizer": decay_matrices}, lambda p: decay_matrices(list(p))),
        ({"optimizer": torch.optim.Adagrad}, lambda p: torch.optim.Adagrad(p, lr=1e-3)),
        ({"optimizer": torch.optim.Rprop}, lambda p: torch.optim.Rprop(p, lr=1e-3)),
    ],
    ids=[
        "class",
        "options",
        "partial",
        "function",
        "function with groups",
        "fused on the CPU alone",
        "never fused",
    ],
)
def test_steps_are_those_of_the_optimiser_itself(x, options, by_hand):
    model, guide, nets = line_pair()
    pv.fit(model, guide, x, epochs=6, **options)
    _, _, others = line_pair()
    train_by_hand(others, x, by_hand(others.parameters()))
    assert_same_numbers(nets, others)


def test_groups_by_pattern_of_their_names(x):
    model, guide, nets = line_pair()
    groups = {"encode*": {"lr": 0.01}, "*weight": {"weight_decay": 0.2}, "*e.bias": {"lr": 0.3}}
    optimizer = functools.partial(AdamW, weight_decay=0.0)
    options = {"optimizer": optimizer, "learning_rate": 0.1, "schedule": "cosine"}
    pv.fit(model, guide, x, epochs=6, parameter_groups=groups, **options)
    _, _, others = line_pair()
    decode, encode = others["decode"], others["encode"]
    by_hand = AdamW(
        [
            {"params": [encode.weight], "lr": 0.01, "weight_decay": 0.2},
            {"params": [encode.bias, decode.bias], "lr": 0.3},
            {"params": [decode.weight], "weight_decay": 0.2},
        ],
        lr=0.1,
        weight_decay=0.0,
    )
    cosine = torch.optim.lr_scheduler.LambdaLR(
        by_hand, lambda step: 0.5 * (1 + math.cos(math.pi * step / 6))
    )
    train_by_hand(others, x, by_hand, after_step=cosine.step)
    assert_same_numbers(nets, others)


def one_cycle(optimizer, max_lr=0.2, total_steps=6):
    return OneCycleLR(optimizer, max_lr=max_lr, total_steps=total_steps)


@pytest.mark.parametrize("make", [one_cycle, lambda o: MultiStepLR(o, [2, 4], gamma=0.1)])
def test_a_scheduler_moves_after_every_step(x, make):
    model, guide, nets = line_pair()
    pv.fit(model, guide, x, epochs=6, learning_rate=0.1, scheduler=make)
    _, _, others = line_pair()
    by_hand = torch.optim.Adam(others.parameters(), lr=0.1)
    train_by_hand(others, x, by_hand, after_step=make(by_hand).step)
    assert_same_numbers(nets, others)


def test_a_scheduler_that_goes_by_a_metric_sees_every_epoch(x):
    model, guide, _ = line_pair()
    rates = []

    class Rates(pv.infer.Callback):
        def on_step(self, step, metrics):
            rates.append(metrics["learning_rate"])

    def plateau(optimizer):
        return ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
        )

    pv.fit(model, guide, x, epochs=4, learning_rate=0.1, scheduler=plateau, callbacks=[Rates()])
    assert rates == [0.1, 0.1, 0.05, 0.025]  # no bound is so much better than the one before


def test_moving_average(x):
    model, guide, nets = line_pair()
    seen = []

    def note(epoch, row):
        seen.append((nets["decode"].weight.detach().clone(), row["validation_elbo"]))

    options = {"learning_rate": 0.1, "ema": 0.8, "validation": x, "on_epoch": note}
    pv.fit(model, guide, x, epochs=6, **options)
    _, _, others = line_pair()
    path = []
    by_hand = torch.optim.Adam(others.parameters(), lr=0.1)
    train_by_hand(others, x, by_hand, after_step=lambda: path.append(others["decode"].weight.clone()))
    for epoch, (average, _) in enumerate(seen, start=1):
        weights = torch.tensor([0.8 ** (epoch - 1 - step) for step in range(epoch)])
        expected = torch.einsum("s,sij->ij", weights / weights.sum(), torch.stack(path[:epoch]))
        torch.testing.assert_close(average, expected)
    # The run leaves what was validated last.
    assert torch.equal(nets["decode"].weight, seen[-1][0])
    assert -loss_of(nets, x).item() == pytest.approx(seen[-1][1], rel=1e-5)


def test_early_stopping_keeps_the_averages_of_the_best_epoch(x):
    model, guide, nets = line_pair()
    seen = []

    def note(epoch, row):
        seen.append((row["validation_elbo"], nets["decode"].weight.detach().clone()))

    options = {"learning_rate": 2.0, "ema": 0.5, "patience": 2, "validation": x, "on_epoch": note}
    result = pv.fit(model, guide, x, epochs=30, **options)
    assert result.stopped_early
    best = max(seen, key=lambda entry: entry[0])
    assert torch.equal(nets["decode"].weight, best[1])


MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize("optimizer", [None, MOMENTUM, torch.optim.RMSprop])
def test_a_step_that_is_not_finite_is_left_out_by_every_optimiser(x, optimizer):
    bad = x.clone()
    bad[3] = 1e30  # its square is no float
    model, guide, nets = line_pair()
    options = {"optimizer": optimizer, "batch_size": 1, "seed": 0, "ema": 0.9}
    result = pv.fit(model, guide, bad, epochs=2, on_nonfinite="skip", **options)
    assert result.skipped_steps == 2
    assert all(value.isfinite().all() for value in nets.parameters())


# --- resumed ---


def noisy_pair():
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((4,), (8,))
    likelihood = pv.likelihoods.Gaussian(decoder, (4,))
    return pv.VAE(pv.priors.StandardNormal(2), likelihood, pv.guides.MeanFieldNormal(encoder, 2))


class Interrupt(pv.infer.Callback):
    def __init__(self, stop):
        self.stop = stop

    def on_step(self, step, metrics):
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)


def train(x, folder=None, stops=(), **options):
    for stop in (*stops, None):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        vae = noisy_pair()
        options |= {"checkpoint": folder, "checkpoint_minutes": None, "resume": folder is not None}
        try:
            callbacks = [Interrupt(stop)]
            found = pv.fit(
                vae.model, vae.guide, x, epochs=4, batch_size=3, callbacks=callbacks, **options
            )
        except Interrupted:
            continue
    return found, list(vae.state_dict().values())


GROUPS = {"*variational_family*": {"lr": 0.02}, "*bias": {"weight_decay": 0.0}}


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": AdamW, "parameter_groups": GROUPS, "scheduler": "one cycle", "ema": 0.7},
        pytest.param(
            {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, nesterov=True)},
            marks=pytest.mark.slow,
        ),
        {"optimizer": torch.optim.NAdam, "schedule": "cosine", "gradient_clip": 1.0},
        {"scheduler": lambda o: MultiStepLR(o, [4, 8]), "ema": 0.9, "patience": 1},
        {
            "scheduler": lambda o: ReduceLROnPlateau(
                o, patience=0, threshold=1e9, threshold_mode="abs"
            )
        },
    ],
    ids=["groups and one cycle", "function", "never fused", "milestones", "by a metric"],
)
def test_a_run_killed_and_resumed_is_the_run_never_killed(x, tmp_path, options):
    if options.get("scheduler") == "one cycle":
        options = options | {"scheduler": functools.partial(one_cycle, total_steps=12)}
    if options.get("patience"):
        options = options | {"validation": x}
    expected, values = train(x, **options)
    found, others = train(x, tmp_path, stops=(2, 6, 11), **options)
    assert all(map(torch.equal, others, values))
    for name in found.history.keys() - TIMES:
        np.testing.assert_array_equal(found.history[name], expected.history[name], name)
    assert found.best_epoch == expected.best_epoch


@pytest.mark.parametrize(
    ("begun", "other", "message"),
    [
        ({}, {"optimizer": AdamW}, "expected optimizer None as the run in"),
        (
            {"optimizer": functools.partial(AdamW, weight_decay=0.1)},
            {"optimizer": functools.partial(AdamW, weight_decay=0.2)},
            "expected optimizer 'AdamW {\"weight_decay\": 0.1}' as",
        ),
        ({}, {"parameter_groups": {"*": {"eps": 1e-5}}}, "expected parameter groups None as"),
        ({}, {"ema": 0.5}, "expected ema None as"),
        (
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
            "expected the optimiser and the scheduler that the run was begun with",
        ),
        (
            {"optimizer": lambda p: torch.optim.RMSprop(p, lr=0.1)},
            {"optimizer": lambda p: torch.optim.Rprop(p, lr=0.1)},
            "expected the optimiser and the scheduler that the run was begun with",
        ),
        (
            {"scheduler": lambda o: one_cycle(o, max_lr=0.1, total_steps=300)},
            {"scheduler": lambda o: one_cycle(o, max_lr=0.2, total_steps=300)},
            "expected the optimiser and the scheduler that the run was begun with",
        ),
    ],
)
def test_another_optimiser_does_not_take_up_the_run(x, tmp_path, begun, other, message):
    vae = noisy_pair()
    with pytest.raises(Interrupted):
        pv.fit(
            vae.model,
            vae.guide,
            x,
            batch_size=3,
            callbacks=[Interrupt(2)],
            checkpoint=tmp_path,
            **begun,
        )
    pyro.clear_param_store()
    vae = noisy_pair()
    with pytest.raises(pv.InputError) as error:
        pv.fit(vae.model, vae.guide, x, batch_size=3, checkpoint=tmp_path, resume=True, **other)
    assert str(error.value).startswith(message)


# --- refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "expected optimizer as a function, got str"),
        ({"optimizer": pyro.optim.Adam({})}, "got Pyro's PyroOptim: pass torch.optim.Adam itself"),
        ({"optimizer": torch.nn.Linear}, "expected an optimiser of torch, got: "),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS needs a closure"),
        (
            {"optimizer": lambda p: None},
            "expected an optimiser of torch, got: 'NoneType' object has no",
        ),
        (
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "learning_rate": 0.2},
            "expected the learning rate inside the function given as optimizer",
        ),
        (
            {"optimizer": functools.partial(AdamW, decay=1.0)},
            "expected an optimiser of torch, got",
        ),
        ({"parameter_groups": {"*": {"weight_decay": -1.0}}}, "got: Invalid weight_decay value"),
        (
            {"optimizer": lambda p: AdamW(p), "parameter_groups": {"*": {"lr": 1.0}}},
            "expected an optimiser of torch, got: ",
        ),
        ({"parameter_groups": {"*": 0.1}}, "expected the options of '*' as a mapping from names"),
        ({"parameter_groups": {"decoder*": {}}}, "'decoder*' matches none of decode.bias, "),
        ({"parameter_groups": {"*": {"rate": 1.0}}}, "expected an optimiser of torch, got: "),
        ({"scheduler": 0.9}, "expected scheduler as a function, got float"),
        ({"scheduler": one_cycle, "schedule": "cosine"}, "expected a schedule or a scheduler"),
        ({"ema": 1.0}, "expected ema below 1, got 1.0"),
        ({"ema": 0.0}, "expected a finite ema above 0, got 0.0"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused(x, options, message):
    model, guide, nets = line_pair()
    before = [value.clone() for value in nets.parameters()]
    with pytest.raises(pv.InputError) as error:
        pv.fit(model, guide, x, epochs=1, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(map(torch.equal, nets.parameters(), before))
