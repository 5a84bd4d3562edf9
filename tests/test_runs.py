"""Saving and loading: equal results, equal bytes, nothing unpickled, nothing half done."""

import json
import math
import os
import stat

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_vae as pv
from pyro_vae import names, runs

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
    def fail(state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "serialised", fail)
    with pytest.raises(OSError, match="No space left"):
        pv.save(make_vae(), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="No space left"):
        pv.save(make_vae(), tmp_path / "mine")
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
    with pytest.raises(pv.InputError):
        runs._assign(vae, load_file(saved / "model.safetensors"))
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
    "newer": ('{"format": 2}', "expected format 1 .* got 2: it comes from another version"),
    "no model": ('{"format": 1}', "expected a description of a VAE"),
    "model is text": ('{"format": 1, "model": "vae"}', "expected a description of a VAE"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_are_none_are_refused(saved, case):
    text, message = CONFIGS[case]
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(pv.InputError, match=message):
        pv.load(saved)


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["model"])
    path.write_text(json.dumps(config))


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
    change_config(saved, change)
    with pytest.raises(pv.InputError, match=message):
        pv.load(saved)


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
