"""Input of every kind: what can be served gives the plain tensor's results, the rest is one line."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pair.inputs import as_inputs, place_inputs

SHAPE, LATENT = (1, 4, 4), 2
FILL = ["constant zeros", "constant ones", "constant grey", "one datum"]


def make_vae(likelihood="Bernoulli", **options):
    torch.manual_seed(1)
    decoder = pv.networks.MLPDecoder(LATENT, (8,), activation="tanh")
    return pv.VAE(
        pv.priors.StandardNormal(LATENT),
        getattr(pv.likelihoods, likelihood)(decoder, SHAPE, **options),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(SHAPE, (8,), activation="tanh"), LATENT),
    )


def bits(number=6):
    return torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(0)).round()


def fitted(vae, x):
    pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=4, device="cpu", seed=0)
    return torch.cat([value.flatten() for value in vae.state_dict().values()])


ACTIONS = {
    "fit": fitted,
    "log_weights": lambda vae, x: pv.log_weights(vae.model, vae.guide, x, num_samples=3),
    "log_marginal": lambda vae, x: pv.log_marginal(vae.model, vae.guide, x, num_samples=3).log_prob,
    "generate": lambda vae, x: pv.tasks.generate(vae.model, x),
    "reconstruct": lambda vae, x: pv.tasks.reconstruct(vae.model, vae.guide, x),
}


def result_of(action, x, vae=None):
    vae = vae or make_vae()
    torch.manual_seed(0)
    return ACTIONS[action](vae, x).detach()


def mapped(tmp_path, dtype):
    path = tmp_path / "data.npy"
    np.save(path, bits().numpy().astype(dtype))
    return np.load(path, mmap_mode="r")


def read_only(x):
    array = x.numpy().copy()
    array.setflags(write=False)
    return array


def wide(x):
    """Return the same values in every other place of a wider tensor."""
    return torch.stack([x, 1 - x], dim=-1)[..., 0]


# Each holds the values of bits(), in another form.
SERVED = {
    "float64": lambda x, _: x.double(),
    "float16": lambda x, _: x.half(),
    "bfloat16": lambda x, _: x.bfloat16(),
    "uint8": lambda x, _: x.byte(),
    "int64": lambda x, _: x.long(),
    "bool": lambda x, _: x.bool(),
    "not contiguous": lambda x, _: wide(x),
    "permuted": lambda x, _: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "requires grad": lambda x, _: x.clone().requires_grad_(),
    "parameter": lambda x, _: nn.Parameter(x.clone()),
    "of a graph": lambda x, _: x.clone().requires_grad_() * 1,
    "in a list": lambda x, _: [x],
    "array": lambda x, _: x.numpy(),
    "float64 array": lambda x, _: x.double().numpy(),
    "float16 array": lambda x, _: x.half().numpy(),
    "long double array": lambda x, _: x.numpy().astype(np.longdouble),
    "uint8 array": lambda x, _: x.byte().numpy(),
    "uint16 array": lambda x, _: x.numpy().astype(np.uint16),
    "bool array": lambda x, _: x.bool().numpy(),
    "big-endian array": lambda x, _: x.numpy().astype(">f4"),
    "backward array": lambda x, _: x.numpy()[::-1].copy()[::-1],
    "Fortran array": lambda x, _: np.asfortranarray(x.numpy()),
    "read-only array": lambda x, _: read_only(x),
    "mapped float32": lambda _, path: mapped(path, "f4"),
    "mapped float64": lambda _, path: mapped(path, "f8"),
    "mapped uint8": lambda _, path: mapped(path, "u1"),
}


@functools.cache
def result_of_plain_bits(action):
    return result_of(action, bits())


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("case", SERVED)
def test_data_in_another_form_give_the_same_results(tmp_path, action, case):
    x = SERVED[case](bits(), tmp_path)
    torch.testing.assert_close(result_of(action, x), result_of_plain_bits(action), rtol=0, atol=0)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_double_pair_takes_single_data(action):
    expected = result_of(action, bits().double(), make_vae().double())
    got = result_of(action, bits(), make_vae().double())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("likelihood", ["Bernoulli", "ContinuousBernoulli", "Gaussian"])
@pytest.mark.parametrize("case", FILL)
def test_data_without_spread_are_served(action, likelihood, case):
    x = {
        "constant zeros": torch.zeros(6, *SHAPE),
        "constant ones": torch.ones(6, *SHAPE),
        "constant grey": torch.full((6, *SHAPE), 0.5),
        "one datum": bits(1),
    }[case]
    options = {"sigma": "learned"} if likelihood == "Gaussian" else {}
    assert result_of(action, x, make_vae(likelihood, **options)).isfinite().all()


def digits():
    return torch.arange(6 * 16).reshape(6, *SHAPE) * 255 // 95


def labels():
    return torch.arange(6) % 3


REFUSED = {
    "whole numbers to 255": (digits, "got values from 0 to 255: divide by the largest"),
    "bytes to 255": (lambda: digits().byte(), "got values from 0 to 255: divide by the largest"),
    "grey above 1": (lambda: 3 * torch.rand(6, *SHAPE), r"expected x in \[0, 1\]"),
    "below 0": (lambda: bits() - 0.5, r"expected x in \[0, 1\]"),
    "NaN": (lambda: bits() * math.nan, "NaN or infinity"),
    "one NaN": (lambda: bits().index_put((torch.tensor(3),), torch.tensor(math.nan)), "NaN"),
    "infinity": (lambda: bits() + math.inf, "NaN or infinity"),
    "labels": (labels, r"expected data of shape .*, got \(6,\)"),
    "no channel": (lambda: bits()[:, 0], "expected data of shape"),
    "flat": (lambda: bits().flatten(1), "expected data of shape"),
    "without a batch": (lambda: bits()[0], "expected data of shape"),
    "another size": (lambda: torch.zeros(6, 1, 5, 5), "expected data of shape"),
}
REFUSED_BY_ALL = {
    "data and labels": (lambda: (bits(), labels()), "got 2 of shapes .* labels only where"),
    "no data": (lambda: bits()[:0], "at least one datum"),
    "one number": (lambda: torch.tensor(1.0), "at least one datum"),
    "nothing": (lambda: (), "got nothing"),
    "none": (lambda: None, "got NoneType"),
    "a dict": (lambda: {"x": bits()}, "got dict"),
    "numbers": (lambda: [0.0, 1.0], "got float"),
    "a name": (lambda: "digits", "got str"),
    "meta": (lambda: bits().to("meta"), "on the meta device"),
    "sparse": (lambda: bits().to_sparse(), "make it dense"),
    "nested": (
        lambda: torch.nested.nested_tensor(list(bits()), layout=torch.jagged),
        "make it dense",
    ),
    "complex": (lambda: bits() * 1j, "expected real numbers, got torch.complex64"),
    "complex array": (lambda: (bits() * 1j).numpy(), "expected real numbers, got an array"),
    "objects": (lambda: np.array([[object()]] * 6), "got an array of object"),
    "text": (lambda: np.array([["a"]] * 6), "got an array of <U1"),
    "dates": (lambda: np.zeros((6, 1), "M8[D]"), "got an array of datetime64"),
    "masked": (lambda: np.ma.masked_less(bits().numpy(), 0.5), "without a mask"),
}


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"generate"}))
@pytest.mark.parametrize("case", REFUSED)
def test_data_the_pair_is_not_made_for_are_refused(action, case):
    refuse(action, *REFUSED[case])


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("case", REFUSED_BY_ALL)
def test_what_is_no_data_is_refused(action, case):
    refuse(action, *REFUSED_BY_ALL[case])


@pytest.mark.parametrize("action", ACTIONS)
def test_a_default_device_without_numbers_is_refused(action):
    vae, x = make_vae(), bits()
    torch.set_default_device("meta")
    try:
        with pytest.raises(pv.InputError, match="a default device that holds numbers, got 'meta'"):
            result_of(action, x, vae)
    finally:
        torch.set_default_device(None)


def refuse(action, make, message):
    vae = make_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(pv.InputError, match=message) as caught:
        result_of(action, make(), vae)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(dict(vae.state_dict()), before, rtol=0, atol=0)


def test_a_data_set_is_passed_by_part():
    data = pv.datasets.load("digits")
    with pytest.raises(pv.InputError, match=r"got Dataset: for a Dataset pass one part, e.g. data.t"):
        result_of("log_marginal", data)


OPTIONS = {
    "num_samples": ("log_marginal", {"num_samples": 0}),
    "method": ("log_marginal", {"method": "importanse"}),
    "start": ("log_marginal", {"method": "annealed", "start": "gide"}),
    "schedule": ("log_marginal", {"method": "annealed", "schedule": "sigmoyd"}),
    "seed": ("log_marginal", {"seed": -1}),
    "seed that is not whole": ("log_marginal", {"seed": 1.5}),
    "seed that is text": ("log_marginal", {"seed": "0"}),
    "epochs": ("fit", {"epochs": -1}),
    "batch_size": ("fit", {"batch_size": 0}),
    "learning_rate": ("fit", {"learning_rate": math.nan}),
    "beta": ("fit", {"beta": math.inf}),
    "patience": ("fit", {"patience": 0}),
    "device": ("fit", {"device": "gpu"}),
    "no validation": ("fit", {"patience": 3}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_out_of_range_are_refused(case):
    function, options = OPTIONS[case]
    vae = make_vae()
    with pytest.raises(pv.InputError, match=r"expected|unknown") as caught:
        getattr(pv, function)(vae.model, vae.guide, bits(), **options)
    assert "\n" not in str(caught.value)


def test_misspelled_names_of_options_are_pythons_own_error():
    vae = make_vae()
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        pv.fit(vae.model, vae.guide, bits(), epoch=3)


def labelled_pair():
    encoder, decoder = nn.Linear(16 + 3, 2 * LATENT), nn.Linear(LATENT + 3, 16)

    def onehot(y):
        return nn.functional.one_hot(y, 3).to(encoder.weight.dtype)

    def model(x, y):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = decoder(torch.cat([z, onehot(y)], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(torch.cat([x, onehot(y)], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    return model, guide


def test_labels_of_a_pair_that_takes_them_stay_whole_numbers():
    model, guide = labelled_pair()
    x = bits().flatten(1)
    weights = []
    for data in (x, x.double(), x.numpy().astype("f8")):
        torch.manual_seed(0)
        weights.append(pv.log_weights(model, guide, (data, labels()), num_samples=2))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    with pytest.raises(pv.InputError, match=r"model\(x, y\) takes, got 1"):
        pv.log_weights(model, guide, x, num_samples=2)
    with pytest.raises(pv.InputError, match="share their first dimension"):
        pv.log_weights(model, guide, (x, labels()[:4]), num_samples=2)


def test_a_mapped_file_is_not_read_into_memory(tmp_path):
    array = mapped(tmp_path, "f4")
    vae = make_vae()
    for functions in ((), (vae.model, vae.guide)):
        (x,) = as_inputs(array, *functions)
        assert x.data_ptr() == array.ctypes.data


def test_data_too_large_for_a_device_stay_and_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    x = (torch.zeros(100),)
    with pytest.warns(UserWarning, match="too large for cuda:0 .* are moved in blocks"):
        assert place_inputs(x, torch.device("cuda:0")) is x


@pytest.mark.gpu
def test_data_on_another_device_are_moved():
    vae = make_vae()
    expected = {action: result_of(action, bits().cuda(), vae.cuda()) for action in ACTIONS}
    for action, value in expected.items():
        if action != "fit":
            torch.testing.assert_close(result_of(action, bits(), vae), value)


@pytest.mark.gpu
def test_data_too_large_for_the_gpu_are_weighed_in_blocks(monkeypatch):
    vae = make_vae().cuda()
    x = bits(3000)
    expected = pv.log_marginal(vae.model, vae.guide, x.cuda(), num_samples=5, seed=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (x.nbytes, x.nbytes))
    with pytest.warns(UserWarning, match="are moved in blocks"):
        blockwise = pv.log_marginal(
            vae.model, vae.guide, x, num_samples=5, seed=0, max_memory=1 << 27
        )
    torch.testing.assert_close(blockwise.log_prob, expected.log_prob)


def test_an_error_raised_inside_a_trace_is_one_line():
    vae = make_vae()
    with pytest.raises(pv.InputError) as caught:
        pv.log_marginal(vae.model, vae.guide, torch.ones(3, 5), num_samples=2)
    assert "\n" not in str(caught.value)
