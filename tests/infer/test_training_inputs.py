"""What ``fit`` is given: data and transforms that are served; pairs, options and data refused."""

import copy
import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, TraceGraph_ELBO
from small_vae import PIXELS, make_vae
from training_pairs import changed, conditional_pair, make_data, unregistered_pair

import pyro_vae as pv
from pyro_vae.pair.functions import modules_of


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


def test_tensors_unknown_to_pyro_are_refused_whatever_the_objective():
    model, guide, _ = unregistered_pair()
    for objective in (RenyiELBO(num_particles=2), TraceGraph_ELBO()):
        with pytest.raises(pv.InputError, match="known to Pyro, 2 are not"):
            pv.fit(model, guide, make_data(), epochs=1, objective=objective)


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


OTHER_KINDS = [
    ("epochs", 2.5),
    ("epochs", "3"),
    ("epochs", True),
    ("epochs", None),
    ("batch_size", 16.0),
    ("batch_size", np.array([4, 4])),
    ("learning_rate", "0.1"),
    ("learning_rate", [0.1, 0.2]),
    ("beta", "1"),
    ("beta", None),
    ("warmup_epochs", 1.5),
    ("patience", 2.5),
    ("gradient_clip", "1"),
    ("gradient_clip", True),
    ("nonfinite_limit", 2.0),
    ("schedule", 3),
    ("schedule", ["cosine"]),
    ("checkpoint", 5),
    ("checkpoint_every", 1.5),
    ("checkpoint_minutes", "1"),
    ("transform", 3),
    ("on_epoch", "print"),
    ("objective", 5),
    ("objective", pv.infer.IWAE),
    ("device", 2.5),
    ("device", None),
    ("seed", 1.5),
]


@pytest.mark.parametrize(("name", "value"), OTHER_KINDS)
def test_options_of_another_kind_are_one_line(name, value):
    vae = make_vae()
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(pv.InputError, match=r"^expected .*, got ") as caught:
        pv.fit(vae.model, vae.guide, make_data(), **{"epochs": 1, name: value})
    assert "\n" not in str(caught.value)
    assert not changed(vae, before)


def test_numbers_of_numpy_and_torch_are_numbers():
    x, states = make_data(), []
    for whole, real in ((int, float), (np.int64, np.float32), (torch.tensor, torch.tensor)):
        vae = make_vae()
        options = {"epochs": whole(2), "batch_size": whole(16), "warmup_epochs": whole(1)}
        options |= {"learning_rate": real(0.125), "beta": real(0.5), "gradient_clip": real(0.25)}
        pv.fit(vae.model, vae.guide, x, seed=whole(3), patience=whole(2), validation=x, **options)
        states.append(vae.state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


# --- what the transform returns ---


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float64])
def test_bytes_are_served_by_a_transform_that_scales_them(kind):
    x, states = 255 * make_data(), []
    for data, transform in ((x.to(kind), lambda batch: batch / 255), (x / 255, None)):
        vae = make_vae()
        pv.fit(vae.model, vae.guide, data, epochs=2, batch_size=16, seed=0, transform=transform)
        states.append(vae.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: 2 * x, r"expected x in \[0, 1\] for Bernoulli, got values from 0 to 2"),
        (lambda x: x / 0, "expected finite data, got NaN or infinity"),
        (lambda x: x[:, :4], "expected data of shape"),
        (lambda x: x.tolist(), "expected x as a tensor or a tuple of tensors, got list"),
        (lambda x: (x, x), "as many tensors as model"),
        (lambda x: None, "got NoneType"),
    ],
)
def test_what_a_transform_returns_is_checked_before_the_first_step(transform, message):
    vae = make_vae()
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(pv.InputError, match=message) as caught:
        pv.fit(vae.model, vae.guide, make_data(), epochs=1, transform=transform)
    assert "\n" not in str(caught.value)
    assert not changed(vae, before)


def test_a_transform_may_give_the_pair_more_than_it_gets():
    model, guide, nets = conditional_pair("split")
    before = copy.deepcopy(nets.state_dict())

    def split(both):
        return both[:, :PIXELS], both[:, PIXELS:]

    both = torch.cat([make_data(), torch.eye(2).repeat(20, 1)], 1)
    pv.fit(model, guide, both, epochs=2, transform=split)
    assert changed(nets, before) == set(before)


@pytest.mark.filterwarnings("ignore:Encountered")  # of Pyro, NaN or infinity in a site
@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
def test_a_step_that_is_not_finite_leaves_no_trace_in_a_batch_norm(on_nonfinite):
    encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(PIXELS), torch.nn.Linear(PIXELS, 4))
    decoder = torch.nn.Linear(2, PIXELS)

    def normal(loc, scale):
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x.new_zeros(2), 1.0))
            pyro.sample("x", normal(decoder(z), 1.0), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", normal(loc, raw.exp()))

    calls = []

    def spoiled(batch):
        calls.append(batch)
        return batch * math.inf if len(calls) == 2 else batch

    def train():
        pv.fit(
            *(model, guide, make_data()),
            **{"epochs": 1, "batch_size": 10, "seed": 0, "on_nonfinite": on_nonfinite},
            transform=spoiled,
        )

    if on_nonfinite == "stop":
        with pytest.raises(pv.InputError, match="finite"):
            train()
    else:
        train()
    assert all(value.isfinite().all() for value in encoder.state_dict().values())


def test_every_module_that_plain_functions_close_over_is_found():
    encoder, decoder = torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 2))

    def model(x):
        return decoder(x)

    def guide(x):
        return encoder(x)

    for _ in range(20):  # what is told apart by its id must outlive the search
        assert modules_of(model, guide) == [decoder, encoder]
        assert modules_of(functools.partial(guide, x=decoder), model) == [decoder, encoder]
