"""Saving and loading: equal results, equal bytes, whatever the components."""

import functools
import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from saved_vaes import LATENT, SHAPE, make_vae, same_outputs
from torch import nn

import pyro_vae as pv
from pyro_vae.app import names
from pyro_vae.runs.files import read_config

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
    assert read_config(folder)["run"] == {"note": "mine"}


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
    with pytest.raises(pv.InputError, match=r"classes by their names.*got list"):
        pv.load(folder, components=[Shifted, Inner])
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


class _Wide(pv.priors.Prior):
    def forward(self):
        return dist.Laplace(torch.zeros(LATENT), 1.0).to_event(1)


def test_a_component_without_a_constructor_can_be_saved(tmp_path):
    vae = make_vae(prior=_Wide())
    pv.save(vae, tmp_path)
    same_outputs(vae, pv.load(tmp_path, components={"_Wide": _Wide}))


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


PLAIN = {
    "a whole number of more than 64 bits": np.random.SeedSequence(1 << 127).entropy,
    "of 39 digits": int("9" * 39),
    "NumPy's": [np.float32(0.5), np.int64(3), np.bool_(True), np.array(2.5)],
    "torch's": {"k": torch.tensor(3), "x": torch.tensor(0.25, dtype=torch.float64)},
    "text of any kind": ["\udcff", "\0", "$[b]\n", "\N{SNOWMAN}"],
    "a tuple": (1, 2),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_settings_that_are_saved_are_read_again(tmp_path, kind):
    folder = pv.save(make_vae(), tmp_path / "run", settings={"told": PLAIN[kind]})
    assert pv.load(folder)
    read = json.loads((folder / "config.json").read_text())["run"]["told"]
    plain = {
        "NumPy's": [0.5, 3, True, 2.5],
        "torch's": {"k": 3, "x": 0.25},
        "a tuple": [1, 2],
    }
    assert read == plain.get(kind, PLAIN[kind])


def endless():
    inside = []
    inside.append(inside)
    return inside


UNREADABLE = {
    "a set": {"told": {"a"}},
    "an array": {"told": np.zeros(3)},
    "a tensor": {"told": torch.zeros(3)},
    "bytes": {"told": b"a"},
    "a complex number": {"told": torch.tensor(1j)},
    "a number without end": {"told": 10**500},
    "a list in itself": {"told": endless()},
    "lists without end": {"told": functools.reduce(lambda inner, _: [inner], range(5000), 1)},
    "one name twice": {1: "a", "1": "b"},
    "64 MiB": {"told": "x" * (1 << 26)},
    "no dict": [1, 2],
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_settings_that_could_not_be_read_again_are_not_saved(tmp_path, kind):
    with pytest.raises(
        pv.InputError, match=r"which can be read again, got: |settings as a dict"
    ) as caught:
        pv.save(make_vae(), tmp_path / "run", settings=UNREADABLE[kind])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_weights_that_could_not_be_read_again_are_not_saved(tmp_path):
    broken, mixed = make_vae(), make_vae()
    next(broken.parameters()).data[0] = torch.nan
    mixed.likelihood.double()
    for vae, message in ((broken, "expected finite weights"), (mixed, "of one floating-point type")):
        with pytest.raises(pv.InputError, match=message):
            pv.save(vae, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
