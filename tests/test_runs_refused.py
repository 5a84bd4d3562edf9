"""What is no run, or no longer the one that was written, is refused before anything is assigned."""

import json
import math
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_vaes import make_vae

import pyro_vae as pv
from pyro_vae.runs import description, weights
from pyro_vae.runs.files import read_config


@pytest.fixture
def saved(tmp_path):
    return pv.save(make_vae(), tmp_path / "run")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


DAMAGES = {
    "missing": (lambda w: w.pop(next(iter(w))), "1 are missing and 0 surplus"),
    "surplus": (lambda w: w.update(more=torch.ones(2)), "0 are missing and 1 surplus"),
    "wrong shape": (lambda w: w.update({k: v[..., :1].clone() for k, v in w.items()}), "of shape"),
    "nan": (lambda w: next(iter(w.values())).fill_(math.nan), "finite weights"),
    "inf": (lambda w: next(iter(w.values())).fill_(math.inf), "finite weights"),
    "whole numbers": (lambda w: w.update({k: v.int() for k, v in w.items()}), "as torch.float32"),
    "eight bits": (
        lambda w: w.update({k: v.to(torch.float8_e4m3fn) for k, v in w.items()}),
        "as torch.float32",
    ),
    "other values": (lambda w: next(iter(w.values())).add_(1.0), "another checksum"),
    "mixed": (lambda w: w.update({k: w[k].double() for k in list(w)[:1]}), "one floating-point type"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(saved, damage):
    change, message = DAMAGES[damage]
    change_weights(saved, change)
    with pytest.raises(pv.InputError, match=message) as caught:
        pv.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_weights_are_not_assigned_in_part(saved, damage):
    vae = make_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    change_weights(saved, DAMAGES[damage][0])
    config = read_config(saved)
    with pytest.raises(pv.InputError):
        weights.assign(vae, *weights.read_weights(saved), model=config["model"])
    torch.testing.assert_close(dict(vae.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_refused(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(pv.InputError, match="expected safetensors weights"):
        pv.load(saved)


def test_absent_weights_are_an_unfinished_run(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(pv.InputError, match="the run did not finish"):
        pv.load(saved)


@pytest.mark.parametrize("place", ["absent", "file", "empty"])
def test_a_path_that_is_no_run_is_refused(tmp_path, place):
    path = tmp_path / place
    if place == "file":
        path.write_text("{}")
    elif place == "empty":
        path.mkdir()
    with pytest.raises(pv.InputError, match=r"found no config.json in it: check the path"):
        pv.load(path)


CONFIGS = {
    "no JSON": ("{", "expected JSON"),
    "bytes": ("\udcff", "expected JSON"),
    "a list": ("[]", "expected format 1"),
    "older": ('{"model": {}}', "expected format 1 .* got None"),
    "newer": ('{"format": 2}', "expected format 1 .* got 2: it was written by a newer pyro_vae"),
    "true": ('{"format": true}', "expected format 1 .* got True"),
    "not whole": ('{"format": 1.0}', "expected format 1 .* got 1.0"),
    "a name twice": ('{"format": 1, "model": {}, "model": {}}', "a name twice"),
    "not a number": ('{"format": 1, "model": NaN}', "NaN, which is not JSON"),
    "infinity": ('{"format": 1, "model": -Infinity}', "-Infinity, which is not JSON"),
    "beyond floats": ('{"format": 1, "model": 1e999}', "no float holds"),
    "too many bytes": ('{"format": 1, "a": "' + "x" * (1 << 26) + '"}', "67,108,864 at most"),
    "beyond sizes": ('{"format": 1, "model": ' + "9" * 5000 + "}", "of 5000 digits"),
    "deep lists": ('{"format": 1, "model": ' + "[" * 100_000 + "]" * 100_000 + "}", "expected JSON"),
    "deep objects": (
        '{"format": 1, "model": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
        "expected JSON",
    ),
    "run is a list": ('{"format": 1, "run": []}', "expected an object 'run'"),
    "no object": ("5", "expected format 1 .* got None"),
    "no model": ('{"format": 1}', "expected a description of a VAE"),
    "model is text": ('{"format": 1, "model": "vae"}', "expected a description of a VAE"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_are_none_are_refused(saved, case):
    text, message = CONFIGS[case]
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(pv.InputError, match=message):
        pv.load(saved)


def change_config(folder, change, *, vouch=False):
    """Change a description; a forger who vouches for it writes the checksum anew."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["model"])
    path.write_text(json.dumps(config))
    if vouch:
        state = load_file(folder / "model.safetensors")
        checksum = weights.checksum_of(config["model"], state)
        save_file(state, folder / "model.safetensors", {"checksum": checksum})


FORGERIES = {
    "unknown class": (lambda m: m["prior"].update({"class": "priors.StandardNorma"}), "did you mean"),
    "any import": (lambda m: m["prior"].update({"class": "os.system"}), "unknown component"),
    "function": (lambda m: m["prior"].update({"class": "networks.check_shape"}), "unknown component"),
    "own class": (lambda m: m["prior"].update({"class": "custom.Own"}), "class of component 'Own'"),
    "argument": (lambda m: m["prior"]["settings"].update(more=1), "expected a description"),
    "no settings": (lambda m: m["prior"].pop("settings"), "expected a description"),
    "size": (lambda m: m["prior"]["settings"].update(latent_dim=3), "one latent dimension"),
    "type": (lambda m: m["prior"]["settings"].update(latent_dim="x"), "expected"),
    "part": (lambda m: m.pop("likelihood"), "expected a description"),
    "ahead": (lambda m: m.update(variational_family={"shared": "prior"}), "expected a description"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_settings_are_refused(saved, case):
    change, message = FORGERIES[case]
    change_config(saved, change, vouch=True)
    with pytest.raises(pv.InputError, match=message) as caught:
        pv.load(saved)
    assert "\n" not in str(caught.value)


def test_other_settings_of_the_same_shape_are_refused(saved):
    def change(model):
        model["likelihood"]["settings"]["decoder"]["settings"]["activation"] = "relu"

    change_config(saved, change)
    with pytest.raises(pv.InputError, match="another checksum"):
        pv.load(saved)
    change_config(saved, change, vouch=True)
    assert pv.load(saved).likelihood.decoder.activation == "relu"  # the checksum alone was wrong


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def described(kind, **settings):
    return {"class": kind, "settings": settings}


HUGE = 2**31 - 1
SIZES = {
    "one layer": lambda m: m["prior"]["settings"].update(latent_dim=HUGE),
    "one tensor": lambda m: m.update(
        prior=described("priors.GaussianMixture", latent_dim=40_000, num_components=900_000)
    ),
    "pseudo-inputs": lambda m: m.update(
        prior=described(
            "priors.VampPrior",
            guide={"shared": "variational_family"},
            data_shape=[1000, 1000],
            num_pseudo_inputs=1_000_000,
        )
    ),
    "layers": lambda m: m["variational_family"]["settings"].update(
        encoder=described("networks.MLPEncoder", data_shape=[1], hidden=[1] * 1_000_000)
    ),
    "wide layers": lambda m: m["variational_family"]["settings"].update(
        encoder=described("networks.MLPEncoder", data_shape=[900_000], hidden=[900_000])
    ),
    "flows": lambda m: m.update(
        prior=described("priors.FlowPrior", latent_dim=2, num_layers=1_000_000)
    ),
    "convolutions": lambda m: m["variational_family"]["settings"].update(
        encoder=described(
            "networks.ConvEncoder", data_shape=[1, 900_000, 900_000], channels=[500_000]
        )
    ),
    "a declared tensor": lambda m: m["prior"]["settings"].update(
        scale={"tensor": {"dtype": "float32", "shape": [HUGE, HUGE], "values": [1.0]}}
    ),
    "deep": lambda m: m["prior"]["settings"].update(latent_dim=nested(900)),
}


@pytest.mark.parametrize("case", SIZES)
def test_settings_of_any_size_take_neither_memory_nor_time(saved, case):
    change_config(saved, SIZES[case], vouch=True)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(pv.InputError, match="expected"):
        pv.load(saved)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 300_000  # KiB on Linux
    assert after.ru_utime - before.ru_utime < 5


def test_the_bound_on_sizes_leaves_room_for_every_component(saved, monkeypatch):
    tightest = []
    check = description.Bounded._check

    def noted(self, fits):
        tightest.append(self.left)
        check(self, fits)

    monkeypatch.setattr(description.Bounded, "_check", noted)
    pv.load(saved)
    assert min(tightest) > 0.8 * description._ELEMENTS_AT_LEAST


def test_links_that_leave_the_folder_are_refused(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        outside = tmp_path / f"outside-{name}"
        (saved / name).rename(outside)
        (saved / name).symlink_to(outside)
        with pytest.raises(pv.InputError, match=f"expected {name} inside .* got a link to"):
            pv.load(saved)
        (saved / name).unlink()
        outside.rename(saved / name)
    (tmp_path / "link").symlink_to(saved)  # the folder itself may be one
    assert pv.load(tmp_path / "link")


def test_devices_are_checked_first(saved):
    with pytest.raises(pv.InputError, match="expected a device"):
        pv.load(saved, device="cuda:99")
    with pytest.raises(pv.InputError, match="expected a device"):
        pv.load(saved, device="gpu")
