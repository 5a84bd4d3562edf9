"""Any pair saved and loaded: to the bit, checked as a whole, and trained on from there."""

import json
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from saved_pairs import PAIRS, auto_guide, functions, make_x, own_vae, weigh
from torch import nn

import pyro_vae as pv


def train(make, **options):
    torch.manual_seed(1)
    pair = make()
    pv.fit(*pair, make_x(), epochs=2, learning_rate=0.05, seed=0, **options)
    return pair


def values():
    store = pyro.get_param_store()
    return {name: value.detach().clone() for name, value in store.items()}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_a_pair_built_anew_is_the_saved_one_and_trains_on(tmp_path, make):
    expected = weigh(*(trained := train(make)))
    assert pv.save_pair(*trained, tmp_path / "pair") == tmp_path / "pair"
    pyro.clear_param_store()
    torch.manual_seed(2)
    pair = make()
    before = torch.get_rng_state()
    pv.load_pair(tmp_path / "pair", *pair)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weigh(*pair), expected)

    def train_on(model, guide):
        return pv.fit(model, guide, make_x(), epochs=3, seed=0).history["train_elbo"]

    found = train_on(*pair)
    pyro.clear_param_store()
    other = make()
    pv.load_pair(tmp_path / "pair", *other)
    assert (train_on(*other) == found).all()
    assert (found == train_on(*trained)).all() if make is own_vae else len(found) == 3


def test_an_autoguide_that_was_not_called_yet_takes_its_parameters_from_the_store(tmp_path):
    trained = train(auto_guide, batch_size=6)
    expected = values()
    pv.save_pair(*trained, tmp_path / "pair")
    pyro.clear_param_store()
    pair = auto_guide()
    pv.load_pair(tmp_path / "pair", *pair)
    SVI(*pair, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO()).step(make_x())
    found = values()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any("locs" in name for name in found)


def test_parameters_of_another_pairs_module_are_left_out(tmp_path):
    pyro.module("elsewhere", nn.Linear(2, 2))
    pv.save_pair(*train(functions), tmp_path / "pair")
    described = json.loads((tmp_path / "pair" / "config.json").read_text())["pair"]
    names = {entry["name"] for entry in described.values()}
    assert {"scale", "spread", "tilt", "decode$$$weight"} <= names
    assert not any(name.startswith("elsewhere") for name in names)


def wider():
    model, _ = functions()
    net = nn.Linear(4, 3)

    def guide(x):
        pyro.module("encode", net)

    return model, guide


def other_shape():
    net = nn.Linear(4, 4)

    def model(x):
        pyro.module("decode", net)

    return model, lambda x: None


def without_modules():
    return (lambda x: None), (lambda x: None)


@pytest.mark.parametrize("make", [wider, other_shape, own_vae, without_modules])
def test_another_pair_is_refused_and_left_as_it_was(tmp_path, make):
    pv.save_pair(*train(functions), tmp_path / "pair")
    pyro.clear_param_store()
    model, guide = make()
    with pytest.raises(pv.InputError, match=r"^expected (the weights that|weight )"):
        pv.load_pair(tmp_path / "pair", model, guide)
    assert not pyro.get_param_store()


def test_taken_names_are_refused(tmp_path):
    trained = train(functions)
    pv.save_pair(*trained, tmp_path / "pair")
    for pair in (trained, functions()):
        before = values()
        with pytest.raises(pv.InputError, match=r"is taken: pyro\.clear_param_store"):
            pv.load_pair(tmp_path / "pair", *pair)
        found = values()
        assert all(torch.equal(found[name], before[name]) for name in before)


def test_a_vae_is_no_pair_and_a_pair_is_no_vae(tmp_path):
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Gaussian(pv.networks.MLPDecoder(2, (4,)), (4,)),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((4,), (4,)), 2),
    )
    pv.save(vae, tmp_path / "vae")
    with pytest.raises(pv.InputError, match=r"use pv\.load$"):
        pv.load_pair(tmp_path / "vae", vae.model, vae.guide)
    pv.save_pair(vae.model, vae.guide, tmp_path / "pair")
    with pytest.raises(pv.InputError, match=r"use pv\.load_pair$"):
        pv.load(tmp_path / "pair")
    with pytest.raises(pv.InputError, match=r"got tuple: pv\.save_pair"):
        pv.save((vae.model, vae.guide), tmp_path / "tuple")


def test_what_was_changed_on_the_disk_is_refused(tmp_path):
    folder = pv.save_pair(*train(functions), tmp_path / "pair")
    pyro.clear_param_store()
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"positive"', '"real"'))
    with pytest.raises(pv.InputError, match="got another checksum"):
        pv.load_pair(folder, *functions())
    assert not pyro.get_param_store()


def test_what_can_not_be_saved_is_refused_and_leaves_nothing(tmp_path):
    def empty(x):
        pass

    with pytest.raises(pv.InputError, match="expected a pair with parameters, got none"):
        pv.save_pair(empty, empty, tmp_path / "pair")
    box = dist.constraints.interval(torch.zeros(2), torch.tensor([1.0, 2.0]))
    pyro.param("box", torch.ones(2) / 2, constraint=box)
    with pytest.raises(pv.InputError, match="expected parameters under a constraint of Pyro"):
        pv.save_pair(empty, empty, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()


@pytest.mark.slow
def test_another_process_weighs_the_same_to_the_bit(tmp_path):
    expected = {}
    for name, make in PAIRS.items():
        pyro.clear_param_store()
        pair = train(make)
        expected[name] = weigh(*pair)
        pv.save_pair(*pair, tmp_path / name)
    script = Path(__file__).with_name("saved_pairs.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300)
    for name, value in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "weighed.pt"), value)
