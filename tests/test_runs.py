"""Saving and loading: equal results, equal bytes, nothing unpickled, nothing half done."""

import concurrent.futures
import json
import math
import os
import resource
import stat
import subprocess
import sys
import time

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_vae as pv
from pyro_vae import names, runs
from pyro_vae.runs import description, weights

SHAPE, LATENT = (1, 4, 4), 2


def make_vae(prior=None, likelihood="Bernoulli", guide="MeanFieldNormal", **options):
    encoder = pv.networks.MLPEncoder(SHAPE, (8,), activation="tanh")
    decoder = pv.networks.MLPDecoder(LATENT, (8,), activation="tanh")
    return pv.VAE(
        prior or pv.priors.StandardNormal(LATENT),
        getattr(pv.likelihoods, likelihood)(decoder, SHAPE, **options),
        getattr(pv.guides, guide)(encoder, LATENT),
    )


def outputs(vae, x):
    """Return everything the components say of fixed data and latents."""
    vae.eval()
    with torch.no_grad():
        q = vae.variational_family(x)
        z = q.sample()
        return [vae.prior().log_prob(z), vae.likelihood(z).log_prob(x), q.log_prob(z)]


def same_outputs(first, second, x=None):
    x = torch.rand(5, *SHAPE) if x is None else x
    results = []
    for vae in (first, second):
        torch.manual_seed(0)
        results.append(outputs(vae, x))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


LIKELIHOODS = [
    ("Bernoulli", {}),
    ("Gaussian", {"sigma": 0.25}),
    ("Gaussian", {"sigma": "learned"}),
    ("Gaussian", {"sigma": "per-pixel", "floor": 0.01}),
    ("ContinuousBernoulli", {}),
]


@pytest.mark.parametrize(("likelihood", "options"), LIKELIHOODS)
def test_round_trip_gives_equal_densities_and_identical_files(tmp_path, likelihood, options):
    vae = make_vae(likelihood=likelihood, **options)
    x = torch.rand(16, *SHAPE)
    pv.fit(vae.model, vae.guide, x, epochs=1, device="cpu")
    folder = pv.save(vae, tmp_path / "a" / "b", settings={"note": "mine"})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = pv.load(folder)
    same_outputs(vae, loaded, x)
    assert not loaded.training
    again = pv.save(loaded, tmp_path / "again", settings={"note": "mine"})
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert runs.read_config(folder)["run"] == {"note": "mine"}


# (command-line name of the prior) -> a family with latents of the same support.
MATCHING = {
    "von-mises-fisher": "VonMisesFisher",
    "hypersphere-uniform": "VonMisesFisher",
    "beta": "Beta",
}


@pytest.mark.parametrize("name", names.PRIORS)
def test_every_prior_of_the_command_line_can_be_saved(tmp_path, name):
    guide = MATCHING.get(name, "MeanFieldNormal")
    kind = getattr(pv.priors, names.PRIORS[name])
    vae = make_vae(guide=guide, prior=None if guide == "MeanFieldNormal" else kind(LATENT))
    vae.prior = kind(vae.variational_family, SHAPE) if name == "vamp" else kind(LATENT)
    same_outputs(vae, pv.load(pv.save(vae, tmp_path / "run")))


@pytest.mark.parametrize("name", names.FAMILIES)
def test_every_family_of_the_command_line_can_be_saved(tmp_path, name):
    family = names.FAMILIES[name]
    prior = getattr(pv.priors, family)(LATENT) if family in ("VonMisesFisher", "Beta") else None
    vae = make_vae(guide=family, prior=prior)
    same_outputs(vae, pv.load(pv.save(vae, tmp_path / "run")))


def test_convolutions_can_be_saved(tmp_path):
    vae = pv.VAE(
        pv.priors.StandardNormal(LATENT),
        pv.likelihoods.Bernoulli(pv.networks.ConvDecoder(LATENT, SHAPE, (4, 3)), SHAPE),
        pv.guides.MeanFieldNormal(pv.networks.ConvEncoder(SHAPE, (3, 4), features=5), LATENT),
    )
    same_outputs(vae, pv.load(pv.save(vae, tmp_path / "run")))


def test_double_precision_survives(tmp_path):
    vae = make_vae().double()
    loaded = pv.load(pv.save(vae, tmp_path / "run"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float64}
    same_outputs(vae, loaded, torch.rand(5, *SHAPE, dtype=torch.float64))


class Shifted(nn.Module):
    """A prior of one's own, with settings of every kind that can be kept."""

    def __init__(self, latent_dim, start, *, bound=math.inf, widths=(3, 4), inner=None):
        super().__init__()
        self.latent_dim, self.bound, self.widths = latent_dim, bound, widths
        self.register_buffer("start", start)
        self.inner = inner
        self.shift = nn.Parameter(torch.randn(latent_dim))

    def forward(self):
        return dist.Normal(self.start + self.shift, 1.0).to_event(1)


TENSORS = {
    "double": torch.tensor([0.1, -1.5], dtype=torch.float64),
    "half": torch.tensor([0.1, -1.5], dtype=torch.float16),
    "brain": torch.tensor([0.1, -1.5], dtype=torch.bfloat16),
    "not finite": torch.tensor([math.inf, -math.inf, math.nan]),
    "whole": torch.tensor([[2**62, -(2**53) - 1]]),
    "bits": torch.tensor([True, False]),
    "scalar": torch.tensor(0.1),
    "empty": torch.zeros(0, 3),
    "smallest": torch.tensor([5e-324, 1.7976931348623157e308], dtype=torch.float64),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_among_the_settings_keep_type_shape_and_every_bit(tmp_path, case):
    prior = Shifted(LATENT, torch.zeros(LATENT), bound=TENSORS[case])
    folder = pv.save(make_vae(prior), tmp_path / "run")
    bound = pv.load(folder, components={"Shifted": Shifted}).prior.bound
    torch.testing.assert_close(bound, TENSORS[case], rtol=0, atol=0, equal_nan=True)
    assert (bound.dtype, bound.shape) == (TENSORS[case].dtype, TENSORS[case].shape)


class Inner(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.randn(size))


def test_components_of_ones_own_are_passed_in(tmp_path):
    prior = Shifted(LATENT, torch.tensor([0.5, -1.5]), inner=Inner(3))
    vae = make_vae(prior)
    folder = pv.save(vae, tmp_path / "run")
    with pytest.raises(pv.InputError, match=r"components=\{'Inner': Inner\}"):
        pv.load(folder, components={"Shifted": Shifted})
    loaded = pv.load(folder, components={"Shifted": Shifted, "Inner": Inner})
    same_outputs(vae, loaded)
    assert isinstance(loaded.prior, Shifted)
    assert loaded.prior.bound == math.inf
    assert loaded.prior.widths == (3, 4)
    assert torch.equal(loaded.prior.inner.weight, prior.inner.weight)
    json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)  # strict JSON


class Echo(nn.Module):
    """A prior that holds the family as a module of its own."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self):
        return self.guide(torch.zeros(SHAPE))


def test_a_shared_component_is_saved_once_and_shared_again(tmp_path):
    vae = make_vae()
    vae.prior = Echo(vae.variational_family)
    folder = pv.save(vae, tmp_path / "run")
    size = (folder / "model.safetensors").stat().st_size
    alone = pv.save(make_vae(), tmp_path / "alone") / "model.safetensors"
    assert size < 1.2 * alone.stat().st_size
    loaded = pv.load(folder, components={"Echo": Echo})
    assert loaded.prior.guide is loaded.variational_family
    same_outputs(vae, loaded)


def refuse_to_save(vae, folder, message):
    with pytest.raises(pv.InputError, match=message):
        pv.save(vae, folder)
    assert not folder.exists()


def test_what_cannot_be_described_is_not_saved(tmp_path):
    refuse_to_save(make_vae(lambda: None), tmp_path / "run", "got function: write it as a module")

    class Forgetful(nn.Module):
        def __init__(self, latent_dim):
            super().__init__()

    refuse_to_save(make_vae(Forgetful(2)), tmp_path / "run", "keep its argument 'latent_dim'")


def test_a_run_is_never_overwritten(tmp_path):
    folder = pv.save(make_vae(), tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(pv.InputError, match="holds a run: choose another"):
        pv.save(make_vae(), folder)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(pv.InputError, match="holds an unfinished run"):
        pv.save(make_vae(), folder)
    (tmp_path / "weights").rename(folder / "model.safetensors")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(pv.InputError, match="is a file: choose another"):
        pv.save(make_vae(), tmp_path / "file")


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(pv.InputError, match="got: No space left on device; make room or choose"):
        pv.save(make_vae(), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(pv.InputError, match="No space left"):
        pv.save(make_vae(), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]  # it was there before


def test_files_can_be_read_by_whom_the_mask_allows(tmp_path):
    folder = pv.save(make_vae(), tmp_path / "run")
    mask = os.umask(0)
    os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o666 & ~mask}


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
    config = runs.read_config(saved)
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
    "not a number": ('{"format": 1, "model": NaN}', "NaN, which JSON has not"),
    "infinity": ('{"format": 1, "model": -Infinity}', "-Infinity, which JSON has not"),
    "beyond floats": ('{"format": 1, "model": 1e999}', "no float holds"),
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
    check = description._Bounded._check

    def noted(self, fits):
        tightest.append(self.left)
        check(self, fits)

    monkeypatch.setattr(description._Bounded, "_check", noted)
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


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "../" * 3000])
def test_names_that_are_no_path_are_refused(name):
    for act in (pv.load, lambda folder: pv.save(make_vae(), folder)):
        with pytest.raises(pv.InputError, match="expected"):
            act(name)


def test_folders_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "run", "/proc/run", "/dev/null/run"):
        with pytest.raises(pv.InputError, match="expected to write"):
            pv.save(make_vae(), place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HOLD = """
import sys, time
from pathlib import Path
from pyro_vae import runs
with runs.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_one_folder_is_refused_until_the_first_one_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        for act in (lambda: runs.locked(tmp_path), lambda: runs.new_run(tmp_path, {})):
            with (
                pytest.raises(pv.InputError, match=f"in use by process {first.pid} on .*: wait"),
                act(),
            ):
                pytest.fail("entered")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        first.kill()
        first.wait()
    assert (tmp_path / ".lock").exists()  # of a process that is no more
    pv.save(make_vae(), tmp_path)
    assert pv.load(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_threads_exclude_each_other_too(tmp_path):
    with (
        runs.locked(tmp_path),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        pytest.raises(pv.InputError, match=f"in use by process {os.getpid()} "),
    ):
        pool.submit(pv.save, make_vae(), tmp_path).result()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_one_wins(tmp_path):
    def attempt(_):
        try:
            with runs.new_run(tmp_path / "run", {"format": 1}):
                time.sleep(0.05)
                return True
        except pv.InputError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(attempt, range(16)))
    refusals = [result for result in results if result is not True]
    assert len(refusals) == 15
    assert all("in use" in text or "holds an unfinished run" in text for text in refusals)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_devices_are_checked_first(saved):
    with pytest.raises(pv.InputError, match="expected a device"):
        pv.load(saved, device="cuda:99")
    with pytest.raises(pv.InputError, match="expected a device"):
        pv.load(saved, device="gpu")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    runs.write_json(path, {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf}})
    assert json.loads(path.read_text()) == {"a": [None, 1.5, [None, 2]], "b": {"c": None}}
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"][1] == 1.5
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")

    def write(temporary):
        assert temporary.suffix == ".png"
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_whole(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
