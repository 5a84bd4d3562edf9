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
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import bound_terms, scale_latents

PIXELS = 6


def make_vae(seed=0):
    torch.manual_seed(seed)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((PIXELS,), (8,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (PIXELS,)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )


def make_data(number=40):
    """Two kinds of data, so that there is something to learn."""
    probability = torch.where(torch.arange(number)[:, None] % 2 == 0, 0.9, 0.1)
    return torch.bernoulli(probability.expand(number, PIXELS))


def two_level_pair(prefix):
    """A pair of plain functions with two latent sites; ``cat`` in the guide and in the model."""
    nets = nn.ModuleDict(
        {
            "lower": nn.Linear(PIXELS, 4),
            "upper": nn.Linear(2 + PIXELS, 4),
            "prior": nn.Linear(2, 2),
            "data": nn.Linear(4, PIXELS),
        }
    )

    def model(x):
        pyro.module(f"{prefix}.prior", nets["prior"])
        pyro.module(f"{prefix}.data", nets["data"])
        with pyro.plate("data", len(x)):
            upper = pyro.sample("upper", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            lower = pyro.sample("lower", dist.Normal(nets["prior"](upper), 1.0).to_event(1))
            logits = nets["data"](torch.cat([upper, lower], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"{prefix}.lower", nets["lower"])
        pyro.module(f"{prefix}.upper", nets["upper"])
        with pyro.plate("data", len(x)):
            loc, raw = nets["lower"](x).chunk(2, -1)
            lower = pyro.sample("lower", dist.Normal(loc, raw.exp()).to_event(1))
            loc, raw = nets["upper"](torch.cat([lower, x], -1)).chunk(2, -1)
            pyro.sample("upper", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, nets


def conditional_pair(prefix):
    """A pair that takes (x, y): a label beside the data."""
    nets = nn.ModuleDict({"encode": nn.Linear(PIXELS + 2, 4), "decode": nn.Linear(2 + 2, PIXELS)})

    def model(x, y):
        pyro.module(f"{prefix}.decode", nets["decode"])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = nets["decode"](torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, y):
        pyro.module(f"{prefix}.encode", nets["encode"])
        with pyro.plate("data", len(x)):
            loc, raw = nets["encode"](torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, nets


def delta_pair(prefix, start, plate_size=None):
    """A pair without randomness; its data plate may stand for ``plate_size`` data."""
    net = nn.Linear(PIXELS, 2)

    def model(x):
        pyro.module(f"{prefix}.net", net)
        with pyro.plate("data", plate_size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = pyro.param(f"{prefix}.scale", torch.tensor(1.5), dist.constraints.positive)
            weight = pyro.param(f"{prefix}.weight", start.clone())
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"{prefix}.net", net)
        with pyro.plate("data", plate_size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Delta(net(x)).to_event(1))

    return model, guide, net


def changed(module, before):
    return {
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }


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
            model, guide, data, epochs=60, batch_size=16, learning_rate=0.02, warmup_epochs=20, seed=0
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


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
    ],
    ids=["particles", "vectorised", "mean-field", "graph"],
)
def test_any_elbo_of_pyro_is_an_objective(objective):
    vae, x = make_vae(), make_data()
    before = copy.deepcopy(vae.state_dict())
    result = pv.fit(
        vae.model,
        vae.guide,
        x,
        epochs=60,
        batch_size=16,
        learning_rate=0.02,
        warmup_epochs=20,
        seed=0,
        objective=objective,
        validation=x,
    )
    assert changed(vae, before) == set(before)
    # The best model that ignores its latents gives every pixel probability 1/2.
    assert result.history["validation_elbo"][-1] > PIXELS * math.log(0.5) + 0.1
    assert "_get_trace" not in vars(objective)  # the recording hook is gone


def test_enumerated_latents_train():
    """Two kinds of data and one binary latent, summed out: the mixture is found."""
    x = make_data()

    def model(x):
        logits = pyro.param("logits", torch.linspace(-0.1, 0.1, 2)[:, None].repeat(1, PIXELS))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.5))).long()
            pyro.sample("x", dist.Bernoulli(logits=logits[kind]).to_event(1), obs=x)

    @pyro.infer.config_enumerate
    def guide(x):
        weight = pyro.param("weight", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(logits=weight * (x - 0.5).sum(-1)))

    objective = TraceEnum_ELBO(max_plate_nesting=1)
    result = pv.fit(
        model,
        guide,
        x,
        epochs=60,
        batch_size=20,
        learning_rate=0.1,
        objective=objective,
        validation=x,
        seed=0,
    )
    assert np.isnan(result.history["train_elbo"]).all()  # no single draw to split
    # The truth: one of two kinds, then six pixels that agree with it with probability 0.9.
    entropy = math.log(2) - PIXELS * (0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert result.history["validation_elbo"][-1] > -entropy - 1.0


def test_training_bound_with_many_particles_is_per_particle():
    vae, x = make_vae(), make_data()
    bounds = [
        pv.fit(
            vae.model,
            vae.guide,
            x,
            epochs=1,
            batch_size=40,
            learning_rate=1e-12,
            seed=0,
            objective=Trace_ELBO(num_particles=particles, vectorize_particles=True),
        ).history["train_elbo"][0]
        for particles in (1, 200)
    ]
    with torch.no_grad():
        weights = pv.log_weights(vae.model, vae.guide, x, num_samples=200).mean(1)
    standard_error = weights.std().item() * math.sqrt(1 / 200 + 1 / 200)
    assert abs(bounds[1] - weights.mean().item()) < 5 * standard_error
    assert abs(bounds[0] - weights.mean().item()) < 5 * weights.std().item()


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
    result = pv.fit(model, guide, x, epochs=2, batch_size=12, learning_rate=1e-9, beta=2.0)
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


def make_data_fixed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make_data()


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


def test_transform_sees_each_batch():
    vae, x = make_vae(), make_data()
    sizes = []

    def flip(batch):
        sizes.append(len(batch))
        return 1 - batch

    pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=16, transform=flip)
    assert sizes == [16, 16, 8, 16, 16, 8]


def test_dynamic_data_set_is_drawn_afresh_for_every_batch():
    vae = make_vae()
    data = pv.datasets.Dataset(
        "grey",
        torch.full((20, PIXELS), 0.5),
        torch.zeros(0, PIXELS),
        torch.zeros(1, PIXELS),
        binarize="dynamic",
    )
    seen = []

    def model(x):
        seen.append(x.clone())
        vae.model(x)

    pv.fit(model, vae.guide, data, epochs=3, batch_size=20)
    batches = [batch for batch in seen if len(batch) == 20]
    assert all(set(batch.unique().tolist()) == {0.0, 1.0} for batch in batches)
    assert not torch.equal(batches[-1].sort(0).values, batches[-2].sort(0).values)


def test_numpy_arrays_are_served():
    vae = make_vae()
    result = pv.fit(vae.model, vae.guide, make_data().numpy().astype(np.float64), epochs=1)
    assert math.isfinite(result.history["train_elbo"][0])


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


def unregistered_pair():
    """A pair whose decoder no pyro.module names."""
    net = nn.Linear(2, PIXELS)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide, net


def test_trainable_tensors_unknown_to_pyro_are_refused():
    model, guide, net = unregistered_pair()
    with pytest.raises(pv.InputError, match="known to Pyro, 2 are not"):
        pv.fit(model, guide, make_data(), epochs=1)
    net.requires_grad_(False)
    pv.fit(model, guide, make_data(), epochs=1)


def test_a_name_bound_to_another_module_is_refused():
    first, second = conditional_pair("same"), conditional_pair("same")
    x = make_data()
    y = torch.zeros(len(x), 2)
    pv.fit(first[0], first[1], (x, y), epochs=1)
    with pytest.raises(pv.InputError, match="known to Pyro"):
        pv.fit(second[0], second[1], (x, y), epochs=1)


def test_pair_without_parameters_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    with pytest.raises(pv.InputError, match="parameters to train"):
        pv.fit(model, guide, torch.zeros(4, 1), epochs=1)


def test_latent_outside_the_data_plate_is_refused_by_name():
    def model(x):
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shared, 1.0).expand([PIXELS]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("shared", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(pv.InputError, match="'shared'"):
        pv.fit(model, guide, make_data(), epochs=1)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word before our error
def test_loss_that_is_not_finite_is_refused_before_the_step():
    vae, x = make_vae(), make_data()
    with torch.no_grad():
        vae.likelihood.logits.map.bias[0] = math.inf
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(pv.InputError, match="finite loss"):
        pv.fit(vae.model, vae.guide, 1 - x * 0, epochs=1)
    assert not changed(vae, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs"),
        ({"batch_size": 0}, "batch size"),
        ({"learning_rate": -1e-3}, "learning rate"),
        ({"learning_rate": math.nan}, "learning rate"),
        ({"learning_rate": math.inf}, "learning rate"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"warmup_epochs": -1}, "warm-up"),
        ({"patience": 0}, "patience"),
        ({"patience": 3}, "validation data"),
        ({"schedule": "linear"}, "schedule"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"precision": "float16"}, "precision"),
        ({"compile": "yes"}, "compile"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"nonfinite_limit": -1}, "nonfinite_limit"),
        ({"device": "cuda:9"}, "CUDA devices"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    vae = make_vae()
    with pytest.raises(pv.InputError, match=message):
        pv.fit(vae.model, vae.guide, make_data(), **{"epochs": 1, **options})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, PIXELS), "at least one datum"),
        (torch.zeros(4, PIXELS + 1), "shape"),
        (torch.full((4, PIXELS), math.nan), "finite"),
        ((torch.zeros(4, PIXELS), torch.zeros(3)), "first dimension"),
        ((), "nothing"),
    ],
)
def test_data_out_of_range_are_refused(x, message):
    vae = make_vae()
    with pytest.raises(pv.InputError, match=message):
        pv.fit(vae.model, vae.guide, x, epochs=1)


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


def test_tensors_unknown_to_pyro_are_refused_whatever_the_objective():
    model, guide, _ = unregistered_pair()
    for objective in (RenyiELBO(num_particles=2), TraceGraph_ELBO()):
        with pytest.raises(pv.InputError, match="known to Pyro, 2 are not"):
            pv.fit(model, guide, make_data(), epochs=1, objective=objective)


def test_a_transform_sees_the_bits_of_a_dynamic_data_set():
    vae, seen = make_vae(), []
    data = pv.datasets.Dataset(
        "grey",
        torch.full((20, PIXELS), 0.5),
        torch.zeros(0, PIXELS),
        torch.zeros(1, PIXELS),
        binarize="dynamic",
    )

    def note(batch):
        seen.append(batch)
        return batch

    pv.fit(vae.model, vae.guide, data, epochs=1, batch_size=20, transform=note)
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.decode, self.modes = nn.Linear(2, PIXELS), set()

    def forward(self, z):
        self.modes.add(self.training)
        return self.decode(z)


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
