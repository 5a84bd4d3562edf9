"""A run begun before a component had a setting: it is known again, and its weights are its own."""

import copy
import json

import torch

import pyro_vae as pv
from pyro_vae.runs.description import describe, known_to
from pyro_vae.runs.weights import save_weights


def make_vae(**options):
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (4,)), (3,))
    guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((3,), (4,), **options), 2)
    return pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)


def as_read(model):
    return json.loads(json.dumps(model))


def without_log1p(model):
    earlier = as_read(model)
    del earlier["variational_family"]["settings"]["encoder"]["settings"]["log1p"]
    return earlier


def test_a_setting_that_is_off_is_no_other_model():
    now = as_read(describe(make_vae())["model"])
    earlier = without_log1p(now)
    assert earlier != now
    assert known_to(earlier, now) == earlier
    assert known_to(now, now) == now


def test_a_setting_that_is_on_or_another_value_is_another_model():
    now = as_read(describe(make_vae())["model"])
    earlier = without_log1p(now)
    assert known_to(earlier, as_read(describe(make_vae(log1p=True))["model"])) != earlier
    other = copy.deepcopy(earlier)
    other["variational_family"]["settings"]["encoder"]["settings"]["activation"] = "tanh"
    assert known_to(other, now) != other


def test_weights_are_those_of_the_description_beside_them(tmp_path):
    vae, path = make_vae(), tmp_path / "run" / "config.json"
    pv.save(vae, path.parent)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": without_log1p(config["model"])}))
    save_weights(vae, path.parent)
    for name, value in pv.load(path.parent).state_dict().items():
        torch.testing.assert_close(value, vae.state_dict()[name], rtol=0, atol=0)
