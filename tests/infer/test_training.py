"""``fit`` on any pair: same steps as Pyro's own SVI, no parameter lost, no state left behind."""

import copy
import functools
import math
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from small_vae import PIXELS, make_vae
from torch import nn
from training_pairs import (
    changed,
    conditional_pair,
    delta_pair,
    make_data,
    make_data_fixed,
    two_level_pair,
)

import pyro_vae as pv
from pyro_vae.infer import bound_terms, scale_latents


@pytest.mark.slow
def test_four_pairs_in_one_process_train_their_own_parameters_only():
    x = make_data()
    y = nn.functional.one_hot(torch.arange(len(x)) % 2, 2).float()
    vaes = [make_vae(0), make_vae(1)]
    two_level, conditional = two_level_pair("two_level"), conditional_pair("conditional")
    runs = [
        (vaes[0].model, vaes[0].guide, x, vaes[0]),
        (*two_level[:2], x, two_level[2]),
        (*conditional[:2], (x, y), conditional[2]),
        (vaes[1].model, vaes[1].guide, x, vaes[1]),
    ]
    for model, guide, data, own in runs:
        states = {id(run[3]): copy.deepcopy(run[3].state_dict()) for run in runs}
        result = pv.fit(
            model, guide, data, epochs=24, batch_size=16, learning_rate=0.05, warmup_epochs=6, seed=0
        )
        assert changed(own, states[id(own)]) == set(own.state_dict())
        for _, _, _, other in runs:
            if other is not own:
                assert not changed(other, states[id(other)])
        # The best model that ignores its latents gives every pixel probability 1/2.
        assert result.history["train_elbo"][-5:].mean() > PIXELS * math.log(0.5) + 0.1
        assert result.num_parameters == sum(p.numel() for p in own.parameters())


def test_steps_are_those_of_stock_svi():
    x, start = torch.randn(12, PIXELS), torch.randn(2, PIXELS)
    ours, stock = delta_pair("ours", start), delta_pair("stock", start)
    stock[2].load_state_dict(ours[2].state_dict())
    pv.fit(ours[0], ours[1], x, epochs=20, batch_size=12, learning_rate=0.01)
    svi = SVI(stock[0], stock[1], pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(20):
        svi.step(x)
    torch.testing.assert_close(ours[2].state_dict(), stock[2].state_dict(), rtol=1e-4, atol=1e-5)
    for name in ("scale", "weight"):
        torch.testing.assert_close(
            pyro.param(f"ours.{name}"), pyro.param(f"stock.{name}"), rtol=1e-4, atol=1e-5
        )


def test_reported_bound_is_the_loss_of_pyro_per_datum():
    x, start = torch.randn(12, PIXELS), torch.randn(2, PIXELS)
    model, guide, _ = delta_pair("pair", start)
    loss = Trace_ELBO().loss(model, guide, x)
    result = pv.fit(model, guide, x, epochs=1, batch_size=12, learning_rate=1e-9, validation=x)
    assert result.history["train_elbo"][0] == pytest.approx(-loss / 12, rel=1e-5)
    assert result.history["validation_elbo"][0] == pytest.approx(-loss / 12, rel=1e-5)


def test_subsampling_plate_changes_neither_bound_nor_steps():
    x, start = torch.randn(12, PIXELS), torch.randn(2, PIXELS)
    plain, scaled = delta_pair("plain", start), delta_pair("scaled", start, plate_size=1200)
    scaled[2].load_state_dict(plain[2].state_dict())
    result = [
        pv.fit(model, guide, x, epochs=5, batch_size=12, learning_rate=0.01, validation=x)
        for model, guide, _ in (plain, scaled)
    ]
    for name in ("train_elbo", "validation_elbo"):
        np.testing.assert_allclose(result[0].history[name], result[1].history[name], rtol=1e-5)
    torch.testing.assert_close(plain[2].state_dict(), scaled[2].state_dict(), rtol=1e-4, atol=1e-6)


def test_history_has_one_row_per_epoch_and_the_warm_up():
    vae, x = make_vae(), make_data()
    seen = []
    result = pv.fit(
        vae.model,
        vae.guide,
        x,
        epochs=6,
        batch_size=15,
        beta=2.0,
        warmup_epochs=4,
        seed=0,
        on_epoch=lambda epoch, row: seen.append((epoch, row["train_elbo"])),
    )
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(len(curve) == 6 for curve in result.history.values())
    np.testing.assert_allclose(result.history["beta"], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert np.isnan(result.history["validation_elbo"]).all()


def test_gradient_norm_bound_and_speed_are_logged():
    x, start = torch.randn(12, PIXELS), torch.randn(2, PIXELS)
    model, guide, _ = delta_pair("pair", start)
    pair = [scale_latents(model, 2.0), scale_latents(guide, 2.0, is_guide=True)]
    (Trace_ELBO().differentiable_loss(*pair, x) / 12).backward()
    leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]
    expected = torch.cat([leaf.grad.flatten() for leaf in leaves]).norm().item()
    options = {"learning_rate": 1e-9, "beta": 2.0, "objective": Trace_ELBO()}
    result = pv.fit(model, guide, x, epochs=2, batch_size=12, **options)
    history = result.history
    np.testing.assert_allclose(history["gradient_norm"], expected, rtol=1e-4)
    bound = -(history["train_distortion"] + 2 * history["train_rate"])
    np.testing.assert_allclose(history["train_bound"], bound, rtol=1e-6)
    np.testing.assert_allclose(history["data_per_second"] * history["seconds"], 12)


def test_zero_epochs_leave_everything_as_it_was():
    vae, x = make_vae(), make_data()
    before = copy.deepcopy(vae.state_dict())
    result = pv.fit(vae.model, vae.guide, x, epochs=0)
    assert not changed(vae, before)
    assert all(len(curve) == 0 for curve in result.history.values())


def test_early_stopping_puts_the_best_parameters_back():
    vae, x = make_vae(), make_data()
    states = {}
    result = pv.fit(
        vae.model,
        vae.guide,
        x,
        epochs=500,
        batch_size=10,
        learning_rate=0.05,
        seed=0,
        validation=1 - x[:7],
        patience=3,
        on_epoch=lambda epoch, row: states.update({epoch: copy.deepcopy(vae.state_dict())}),
    )
    validation = result.history["validation_elbo"]
    assert result.stopped_early
    assert result.best_epoch == int(np.argmax(validation)) + 1
    assert len(validation) == result.best_epoch + 3
    torch.testing.assert_close(vae.state_dict(), states[result.best_epoch], rtol=0, atol=0)


def test_same_seed_same_weights_and_validation_does_not_shift_them():
    weights = []
    for validation in (None, None, make_data(8)):
        vae, x = make_vae(), make_data_fixed()
        pv.fit(vae.model, vae.guide, x, epochs=3, batch_size=16, seed=5, validation=validation)
        weights.append(vae.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=0)


def test_seed_and_modes_are_restored():
    vae, x = make_vae(), make_data()
    vae.eval()
    vae.likelihood.decoder.train()
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    pv.fit(vae.model, vae.guide, x, epochs=2, seed=0, validation=x)
    torch.testing.assert_close(torch.rand(3), expected[0], rtol=0, atol=0)
    np.testing.assert_array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    assert not vae.training
    assert not vae.variational_family.training
    assert vae.likelihood.decoder.training


def test_parameters_created_later_are_trained():
    calls = []

    def model(x):
        calls.append(1)
        bias = x.new_zeros(PIXELS)
        if len(calls) > 4:
            bias = pyro.param("late", torch.zeros(PIXELS))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + bias, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    pv.fit(model, guide, torch.ones(8, PIXELS), epochs=30, batch_size=8, learning_rate=0.1)
    assert (pyro.param("late") > 0.1).all()


def test_fits_in_two_threads_do_not_meet():
    expected = []
    for index in range(2):
        vae = make_vae(index)
        pv.fit(vae.model, vae.guide, make_data_fixed(), epochs=5, seed=index)
        expected.append(vae.state_dict())
    vaes = [make_vae(0), make_vae(1)]
    threads = [
        threading.Thread(
            target=pv.fit,
            args=(vae.model, vae.guide, make_data_fixed()),
            kwargs={"epochs": 5, "seed": index},
        )
        for index, vae in enumerate(vaes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for vae, state in zip(vaes, expected, strict=True):
        torch.testing.assert_close(vae.state_dict(), state, rtol=0, atol=0)


def test_bound_terms_add_up_and_agree_with_the_weights():
    vae, x = make_vae(), make_data()
    terms = bound_terms(vae.model, vae.guide, x)
    assert terms["elbo"] == pytest.approx(-terms["rate"] - terms["distortion"])
    with torch.no_grad():
        weights = pv.log_weights(vae.model, vae.guide, x, num_samples=500).mean(1)
    assert abs(terms["elbo"] - weights.mean().item()) < 5 * weights.std().item()


@pytest.mark.gpu
def test_fit_on_cuda():
    vae, x = make_vae(), make_data()
    result = pv.fit(vae.model, vae.guide, x, epochs=3, device="cuda", seed=0, validation=x)
    assert result.device.startswith("cuda")
    assert all(parameter.is_cuda for parameter in vae.parameters())
    assert math.isfinite(result.history["validation_elbo"][-1])


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.decode, self.modes = nn.Linear(2, PIXELS), set()

    def forward(self, z):
        self.modes.add(self.training)
        return self.decode(z)


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of 30 samples the limit is 0.3
@pytest.mark.parametrize("way", ["partial", "default", "mask", "beta", "container"])
def test_every_module_of_the_pair_is_in_eval_mode_while_it_is_measured(way):
    net = Dropping()

    def body(net, x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def with_default(x, net=net):
        body(net, x)

    nets = {"decoder": [net]}
    model = {
        "partial": functools.partial(body, net),
        "default": with_default,
        "mask": pyro.poutine.mask(lambda x: body(net, x), mask=True),
        "beta": pv.infer.scale_latents(lambda x: body(net, x), 2.0),
        "container": lambda x: body(nets["decoder"][0], x),
    }[way]

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    pv.log_marginal(model, guide, make_data(), num_samples=30)
    assert net.modes == {False}
    assert net.training


class Normed(nn.Module):
    """An encoder with a batch norm, which has no variance of one data point."""

    out_shape = (8,)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.sizes = []

    def forward(self, x):
        if self.training:
            self.sizes.append(len(x))
        return self.layers(x)


def normed_pair():
    torch.manual_seed(0)
    decoder = pv.networks.MLPDecoder(2, (8,))
    likelihood = pv.likelihoods.Gaussian(decoder, (6,), sigma=1.0)
    encoder = Normed()
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    return pv.VAE(pv.priors.StandardNormal(2), likelihood, guide), encoder


@pytest.mark.parametrize(
    ("number", "last"), [(33, [17]), (34, [16, 16, 2]), (32, [16, 16]), (17, [17])]
)
def test_a_last_batch_of_one_goes_with_the_one_before_it_where_there_is_a_batch_norm(number, last):
    vae, encoder = normed_pair()
    seen = []
    result = pv.fit(
        vae.model, vae.guide, torch.randn(number, 6), epochs=1, batch_size=16, seed=0, compile=False,
        schedule=lambda done: seen.append(done) or 1.0,
    )  # fmt: skip
    assert encoder.sizes[-len(last) :] == last
    assert seen[-1] < 1
    assert np.isfinite(result.history["train_elbo"]).all()


@pytest.mark.parametrize(("number", "size"), [(1, 16), (5, 1)])
def test_a_batch_norm_given_one_data_point_says_so(number, size):
    vae, _ = normed_pair()
    with pytest.raises(pv.InputError, match="at least 2 data points in each batch for a batch norm"):
        pv.fit(vae.model, vae.guide, torch.randn(number, 6), epochs=1, batch_size=size, compile=False)


@pytest.mark.filterwarnings("ignore:Encountered")
def test_an_epoch_of_which_no_step_is_left_is_an_error():
    vae, _ = normed_pair()
    x = torch.randn(32, 6)
    x[:, 0] = 1e30
    options = {"epochs": 2, "batch_size": 16, "on_nonfinite": "skip", "seed": 0, "compile": False}
    with pytest.raises(pv.InputError, match=r"batch 1 \(no step of the epoch was left, 2 were"):
        pv.fit(vae.model, vae.guide, x, **options)
    x[1:, 0] = 1.0  # one batch of the two is left
    result = pv.fit(vae.model, vae.guide, x, **options)
    assert result.skipped_steps == 2
    assert np.isfinite(result.history["train_elbo"]).all()
