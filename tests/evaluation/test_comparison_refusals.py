"""What a comparison refuses, and that it does so before anything is trained."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared_pairs import QUICK, bits, pair_of, small_vae, unchanged, values_of
from pyro import poutine

import pyro_vae as pv
from pyro_vae.errors import InputError


def test_pairs_that_would_train_the_same_parameters_are_refused():
    x, options = bits(), {"fit_options": {"epochs": 1}, **QUICK}
    vae = small_vae()
    other = pv.VAE(pv.priors.StandardNormal(2), vae.likelihood, small_vae().variational_family)
    pairs = {"a": pair_of(vae), "b": pair_of(other)}
    before = values_of(vae)
    with pytest.raises(InputError, match="share no parameters to train, got shared ones of 'a' and"):
        pv.compare(pairs, x, train=x, **options)
    assert unchanged(vae, before)
    # Nothing is shared of what trains where the model is held, nor where nothing trains.
    pv.compare(pairs, x, train=x, hold="model", **options)
    pv.compare(pairs, x, **QUICK)


def test_likelihoods_that_differ_in_kind_are_refused():
    grey = torch.rand(8, 6)
    density = pair_of(small_vae("ContinuousBernoulli"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pseudo = pair_of(small_vae("Bernoulli"))
        with pytest.raises(
            InputError, match=r"a density of 'x' from 'a' and a pseudo-likelihood from"
        ):
            pv.compare({"a": density, "b": pseudo}, grey, **QUICK)
        alone = pv.compare({"a": pseudo, "b": pseudo}, grey, **QUICK)
    assert alone.likelihood == "pseudo-likelihood"
    assert "pseudo-likelihood" in str(alone)
    with pytest.raises(InputError, match=r"a density of 'x' from 'a' and a probability from 'b'"):
        pv.compare({"a": density, "b": pseudo}, bits(), **QUICK)


def gaussian_pair(change=lambda x: x, name="x", twice=False):
    def model(x):
        x = change(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample(name, dist.Normal(z.expand_as(x), 1.0).to_event(1), obs=x)
            if twice:
                pyro.sample("again", dist.Normal(z.expand_as(x), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))

    return model, guide


def test_other_data_are_refused():
    x = 0.1 * torch.randn(30, 4)
    plain = gaussian_pair()
    for other, message in (
        (gaussian_pair(lambda x: 2 * x), "observe the same values, got other values at 'x'"),
        (gaussian_pair(lambda x: x[:, :2]), r"got shapes \(30, 4\) and \(30, 2\)"),
        (gaussian_pair(twice=True), "got 1 observed sites of 'a' and 2 of 'b'"),
    ):
        with pytest.raises(InputError, match=message):
            pv.compare({"a": plain, "b": other}, x, **QUICK)
    renamed = pv.compare({"a": plain, "b": gaussian_pair(name="y")}, x, **QUICK)
    assert renamed.verdict("b") == "tied"


def test_options_out_of_range_are_refused():
    vae, x = small_vae(), bits()
    pair = pair_of(vae)
    for pairs, options, message in (
        ({}, {}, "at least one pair"),
        ({"a": vae}, {}, r"expected \(model, guide\) for 'a', got VAE"),
        ([pair], {}, r"one pair \{name: \(model, guide\)\}, got list"),
        ({"a": pair}, {"methods": "importance"}, "expected methods .* got 'importance'"),
        ({"a": pair}, {"num_samples": 0, "train": x}, "num_samples of at least 1"),
        ({"a": pair}, {"fit_options": {"epoch": 1}}, "unknown fit option 'epoch': .* 'epochs'"),
        ({"a": pair}, {"methods": ("annealed",)}, "expected methods"),
        ({"a": pair}, {"methods": ("nested",)}, "expected methods"),
        ({"a": pair}, {"hold": "guide"}, "hold None or 'model', got 'guide'"),
        ({"a": pair}, {"posterior": "grid"}, "posterior None or 'quadrature', got 'grid'"),
        ({"a": pair}, {"num_elbo_samples": 0}, "num_elbo_samples of at least 1"),
        ({"a": pair}, {"annealing_options": {"steps": 3}}, "annealing_options among .* got 'steps'"),
        ({"a": pair}, {"annealing_options": {"num_steps": 0}}, "num_steps of at least 1"),
        ({"a": pair}, {"num_importance": 0}, "num_importance of at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            pv.compare(pairs, x, **options)
    comparison = pv.compare({"mean-field": pair}, x, **QUICK)
    assert comparison.verdict("mean-field") == "best"
    with pytest.raises(InputError, match="unknown pair 'mean-feild': did you mean 'mean-field'"):
        comparison.difference("mean-feild")
    with pytest.raises(InputError, match="unknown quantity 'annealed'"):
        comparison.per_datum("mean-field", "annealed")


@pytest.fixture
def _untrained(monkeypatch):
    """Fail where anything is trained."""

    def fit(*_, **__):
        raise AssertionError("trained before it was refused")

    monkeypatch.setattr("pyro_vae.evaluation.comparison_training.fit", fit)


def normal_pair(num_latents=2, scaled=False, latents=("z",), num_data=None):
    """Latents seen as they are, by a guide that may miss one of them or fit one number of data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(num_latents), 1.0).to_event(1))
            if len(latents) > 1:
                z = z + pyro.sample("w", dist.Normal(torch.zeros(num_latents), 1.0).to_event(1))
            with poutine.scale(scale=0.5 if scaled else 1.0):
                pyro.sample("x", dist.Normal(z[..., :1], 1.0).to_event(1), obs=x)

    def guide(x):
        loc = torch.zeros(num_data or 1, num_latents)
        loc = pyro.param(f"loc{num_latents}{scaled}{latents}{num_data}", loc)
        with pyro.plate("data", len(x)):
            for name in latents:
                pyro.sample(name, dist.Normal(loc, 1.0).to_event(1))

    return model, guide


LATE = {
    "three dimensions": (
        {"a": normal_pair(), "b": normal_pair(3)},
        {"posterior": "quadrature"},
        r"real latent of 1 or 2 dimensions for quadrature, got 'z' of 3 on Real\(\)",
    ),
    "two latents": (
        {"a": normal_pair(latents=("z", "w"))},
        {"posterior": "quadrature"},
        "expected one latent site for quadrature, got 2: leave posterior out",
    ),
    "three dimensions of a held model's guide": (
        {"a": normal_pair(3)},
        {"posterior": "quadrature", "hold": "model"},
        "real latent of 1 or 2 dimensions",
    ),
    "a scale": (
        {"a": normal_pair(), "b": normal_pair(scaled=True)},
        {},
        "expected no scale on site 'x' of the model",
    ),
    "other latents than the held model's": (
        {"a": normal_pair(), "b": normal_pair(latents=("w",))},
        {"hold": "model"},
        "expected a guide that draws every latent, 'z' is missing",
    ),
    "parameters per datum": (
        {"a": normal_pair(), "b": normal_pair(num_data=20)},
        {},
        "expected a pair that takes any number of data points, .* error for 30: Shape mismatch",
    ),
    "memory": ({"a": normal_pair()}, {"max_memory": 0}, "max_memory of at least 1, got 0"),
    "progress": ({"a": normal_pair()}, {"progress": True}, "progress as a function, got bool"),
    "a fraction": ({"a": normal_pair()}, {"num_samples": 9.5}, "whole number, got 9.5"),
    "a text": ({"a": normal_pair()}, {"num_importance": "5"}, "whole number, got '5'"),
    "a number as a name": ({0: normal_pair()}, {}, "expected names of pairs as text, got 0"),
}


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize("case", LATE)
def test_what_would_be_found_wrong_after_training_is_refused_before(case):
    pairs, options, message = LATE[case]
    x, train = torch.randn(20, 1), torch.randn(30, 1)
    with pytest.raises(InputError, match=message):
        pv.compare(pairs, x, train=train, **options)


@pytest.mark.usefixtures("_untrained")
def test_training_data_outside_a_likelihoods_support_are_refused_before():
    pairs = {"a": pair_of(small_vae()), "b": pair_of(small_vae())}
    with pytest.raises(InputError, match="expected x in"):
        pv.compare(pairs, bits(), train=255 * bits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annealing_options": {"num_steps": 3}}, r"with annealing_options, got \('importance',\)"),
        ({"annealing_options": 3}, "annealing_options as a mapping from names, got int"),
        ({"fit_options": {"epochs": 1}}, "expected train with fit_options, got none"),
        ({"fit_options": ["epochs"]}, "fit_options as a mapping from names, got list"),
        ({"methods": 3}, "expected methods .* got 3"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        pv.compare({"a": normal_pair()}, torch.randn(5, 1), **options)


@pytest.mark.usefixtures("_untrained")
def test_data_that_the_models_are_not_defined_for_are_refused_before_training():
    x = torch.randn(20, 1)
    x[3] = torch.nan
    with pytest.raises(
        InputError, match=r"'x' of the model in its support .* look for NaN"
    ) as caught:
        pv.compare({"a": normal_pair()}, x, train=torch.randn(20, 1))
    assert "\n" not in str(caught.value)
