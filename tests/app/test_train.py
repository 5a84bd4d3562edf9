"""`pyro-vae train`: the run folder it leaves, on every kind of data, and what it prints."""

import functools
import json
import math
import re
import struct
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ESTIMATE_KEYS, RUN_FILES, WARNED, run, train
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import datasets
from pyro_vae.app import names
from pyro_vae.app import settings as app_settings
from pyro_vae.app import train as app_train
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.options import in_options

pytestmark = WARNED


def test_train_leaves_a_whole_run(digits):
    assert sorted(path.name for path in digits.iterdir()) == RUN_FILES
    config = json.loads((digits / "config.json").read_text())
    settings = config["run"]["settings"]
    assert settings["dataset"] == "digits"
    assert settings["binarize"] == "dynamic"
    assert settings["latent_dim"] == 2
    metrics = json.loads((digits / "metrics.json").read_text())
    assert set(metrics["history"]) == set(pv.infer.training.HISTORY)
    assert all(len(curve) == 2 for curve in metrics["history"].values())
    test = metrics["test"]
    assert test["elbo"] == pytest.approx(-test["rate"] - test["distortion"])
    assert test["num_data"] == 359
    estimate = metrics["test_log_marginal"]
    assert set(estimate) == ESTIMATE_KEYS
    assert (estimate["num_data"], estimate["num_samples"]) == (359, 500)
    # Two epochs are enough to be better than independent pixels at one half.
    assert -64 * np.log(2) < estimate["log_marginal"] < -15
    for name in RUN_FILES:
        if name.endswith(".png"):
            assert (digits / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_decided_is_recorded_and_shown(digits):
    record = json.loads((digits / "config.json").read_text())["run"]
    settings = record["settings"]
    assert (settings["warmup_epochs"], settings["num_particles"], settings["data_seed"]) == (1, 1, 0)
    assert record["start"] == "training data"
    assert record["num_data"] == {"train": 1294, "validation": 144, "test": 359}
    assert None not in settings.values()
    assert not {"sigma", "num_components", "free_bits", "patience"} & set(settings)  # not in use
    html = (digits / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link", html)  # its pictures too
    assert "All 359 test data points, 500 draws" in html
    for name, value in (
        ("warmup epochs", 1),
        ("start", "training data"),
        ("data points / test", 359),
    ):
        assert f'<th scope="row">{name}</th><td>{value}</td>' in html
    for cell in ("default", "auto", "-"):
        assert f"<td>{cell}</td></tr>" not in html.split("Settings</caption>")[1]


def test_components_and_particles_are_told_by_their_numbers(here):
    options = ("--prior", "vamp", "--objective", "iwae", "--dataset", "bits.npy")
    train(*options, "--output", "own", epochs=0)
    settings = json.loads(Path("own/config.json").read_text())["run"]["settings"]
    assert (settings["num_components"], settings["num_particles"]) == (7, 5)  # of 72 bits' data
    assert len(pv.load("own").prior.pseudo_inputs) == 7


def test_a_warning_of_the_training_stands_on_the_page(here):
    train("--beta", 1000, "--output", "own", "--compile", "off", epochs=3)
    (warning,) = json.loads(Path("own/metrics.json").read_text())["warnings"]
    assert "posterior collapse" in warning
    assert in_options(warning) in Path("own/report.html").read_text()


def test_a_run_that_recorded_its_settings_as_asked_is_read_and_gone_on_with(here):
    # As version 0.1.0 wrote them: what was left to its default is null.
    path = Path("run/config.json")
    config = json.loads(path.read_text())
    left = {each.name: None for each in fields(TrainSettings) if each.default is None}
    asked = left | config["run"]["settings"]
    asked |= {"download": False, "sigma": "learned"}
    asked |= dict.fromkeys(("warmup_epochs", "num_particles", "data_seed"))
    config["run"]["settings"] = asked
    del config["run"]["start"], config["run"]["num_data"]
    path.write_text(json.dumps(config))
    result = run("evaluate", "run", "--num-samples", 5, "--method", "importance", "--json")
    assert json.loads(result.out)["num_data"] == 359
    weights = Path("run/model.safetensors").read_bytes()
    for name in ("metrics.json", "model.safetensors", "report.html"):
        Path("run", name).unlink()
    result = run("train", "--resume", "run", "--epochs", 2)
    assert result.code == 0, result.err
    assert Path("run/model.safetensors").read_bytes() == weights
    assert "<td>training data</td>" in Path("run/report.html").read_text()


def test_train_says_what_was_measured_and_where(here):
    result = train("--dataset", "bits.npy", "--output", here / "own", epochs=1)
    assert "log p(x)" in result.out
    assert "20 x 500" in result.out
    assert f"run folder: {here / 'own'}" in result.out
    assert "pseudo" not in result.out
    assert max(map(len, result.out.splitlines()[:-1])) <= 80


def test_the_choice_of_compiling_is_printed_and_recorded(here, digits):
    metrics = json.loads((digits / "metrics.json").read_text())
    assert metrics["compiled"] is False
    assert "recording them pays from" in metrics["compile_choice"]
    own = ("--dataset", "bits.npy", "--output", "own")
    result = train("--compile", "off", *own, epochs=0)
    assert "training step: eager as asked" in result.out
    assert "eager as asked" in (here / "own" / "report.html").read_text()


OBJECTIVES = {
    "elbo": (pv.infer.TraceBound, 1),
    "elbo --num-particles 2": (pv.infer.TraceBound, 2),
    "analytic-kl": (pv.infer.AnalyticKL, 1),
    "sticking-the-landing": (pv.infer.StickingTheLanding, 1),
    "free-bits --free-bits 0.1": (pv.infer.FreeBits, 1),
    "iwae": (pv.infer.IWAE, 5),
    "iwae --num-particles 3": (pv.infer.IWAE, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OBJECTIVES)
def test_every_objective_trains(here, monkeypatch, options):
    given = []

    def fit(*arguments, objective, **others):
        given.append(objective)
        return pv.fit(*arguments, objective=objective, **others)

    monkeypatch.setattr(app_train, "fit", fit)
    recipe = ("--schedule", "cosine", "--gradient-clip", 5)
    train("--dataset", "bits.npy", *recipe, "--output", "own", "--objective", *options.split())
    kind, particles = OBJECTIVES[options]
    (objective,) = given
    assert type(objective) is kind
    assert getattr(objective, "num_particles", 1) == particles
    history = json.loads(Path("own/metrics.json").read_text())["history"]
    assert np.isfinite(history["train_elbo"]).all()


def test_a_seed_repeats_a_run(here):
    weights = []  # of grey pixels, binarised by drawing
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        train("--dataset", "grey.npy", "--output", folder, "--seed", seed, epochs=1)
        weights.append(Path(folder, "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("vectors", "learned"),
        pytest.param("plane", "per-pixel", marks=pytest.mark.slow),
        ("scalars", "0.5"),
    ],
)
def test_vectors_of_ones_own_under_a_gaussian(here, name, sigma):
    data = ("--dataset", f"{name}.npy", "--likelihood", "gaussian", "--sigma", sigma)
    train(*data, "--output", "own", epochs=1)
    assert sorted(path.name for path in Path("own").iterdir()) == RUN_FILES
    values = json.loads(
        run("evaluate", "own", "--num-samples", 20, "--method", "importance", "--json").out
    )
    assert values["num_data"] == 20
    assert run("sample", "own").code == 0
    assert run("reconstruct", "own").code == 0


@pytest.mark.parametrize("name", ["bits", "colour", "grey"])
def test_other_data_of_ones_own(here, name):
    train("--dataset", f"{name}.npy", "--output", "own", epochs=1)
    assert sorted(path.name for path in Path("own").iterdir()) == RUN_FILES


def test_grey_pixels_under_a_bernoulli_are_labelled(here):
    result = train("--dataset", "grey.npy", "--binarize", "none", "--output", "grey-run", epochs=1)
    assert "log p(x) (pseudo-likelihood)" in result.out
    assert json.loads(Path("grey-run/metrics.json").read_text())["pseudo_likelihood"] is True
    result = run("evaluate", "grey-run", "--num-samples", 5, "--method", "importance", "--json")
    assert set(json.loads(result.out)) == ESTIMATE_KEYS
    assert "pyro-vae: warning: grey values under a Bernoulli" in result.err
    gaussian = train(
        "--dataset", "grey.npy", "--likelihood", "gaussian", "--output", "gaussian", epochs=0
    )
    assert "pseudo" not in gaussian.out
    assert json.loads(Path("gaussian/metrics.json").read_text())["pseudo_likelihood"] is False
    assert (
        "pseudo" not in run("evaluate", "gaussian", "--num-samples", 5, "--method", "importance").err
    )


def test_named_sets_are_found_from_another_folder(here, monkeypatch):
    raw = here / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 50), ("t10k", 20)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28)).astype(np.uint8)
        header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">4B1I", 0, 0, 8, 1, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(count))
    monkeypatch.setenv("PYRO_VAE_DATA", "data")
    train("--dataset", "mnist", "--output", "mnist-run", epochs=1)
    monkeypatch.delenv("PYRO_VAE_DATA")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    result = run(
        "evaluate", here / "mnist-run", "--num-samples", 5, "--method", "importance", "--json"
    )
    assert json.loads(result.out)["num_data"] == 20


def test_new_folders_below_runs_are_numbered(here):
    for expected in ("bits-standard-normal-mean-field", "bits-standard-normal-mean-field-2"):
        assert f"run folder: runs/{expected}" in train("--dataset", "bits.npy", epochs=0).out
        assert (here / "runs" / expected / "metrics.json").is_file()


def test_an_empty_folder_is_taken(here):
    Path("mine").mkdir()
    train("--dataset", "bits.npy", "--output", "mine", epochs=0)
    assert Path("mine/config.json").is_file()


def matching_pairs():
    for prior, prior_class in names.PRIORS.items():
        for guide, guide_class in names.FAMILIES.items():
            supports = {
                getattr(pv.priors, prior_class).latent_support,
                getattr(pv.guides, guide_class).latent_support,
            }
            if len(supports) == 1 or (prior == "vamp"):
                yield prior, guide


@functools.cache
def digits():
    return datasets.load("digits", binarize="threshold")


@pytest.mark.parametrize(
    ("prior", "guide", "likelihood"),
    [
        *((*pair, "bernoulli") for pair in matching_pairs()),
        *(("standard-normal", "mean-field", name) for name in names.LIKELIHOODS),
    ],
)
def test_every_name_builds_a_pair(prior, guide, likelihood):
    data = digits()
    settings = TrainSettings(prior=prior, guide=guide, likelihood=likelihood, hidden="8")
    vae = app_settings.build_vae(settings, data)
    assert type(vae.prior).__name__ == names.PRIORS[prior]
    assert type(vae.variational_family).__name__ == names.FAMILIES[guide]
    assert type(vae.likelihood).__name__ == names.LIKELIHOODS[likelihood]
    assert torch.tensor(Trace_ELBO().loss(vae.model, vae.guide, data.test[:4])).isfinite()


def test_the_bernoulli_starts_at_the_training_mean():
    data = datasets.load("digits", binarize="none")
    vae = app_settings.build_vae(TrainSettings(hidden="8"), data)
    bias = vae.likelihood.logits.map.bias.reshape(data.data_shape)
    expected = data.train.mean(0).clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(bias.sigmoid(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "shape"),
    [pytest.param("conv", (3, 5, 6), marks=pytest.mark.slow), ("resnet", (2, 9))],
)
def test_convolutional_networks_by_name(tmp_path, monkeypatch, network, shape):
    monkeypatch.chdir(tmp_path)
    np.save("own.npy", np.random.default_rng(0).random((60, *shape)))
    options = ("--dataset", "own.npy", "--likelihood", "gaussian", "--channels", "4,6")
    small = ("--latent-dim", "2", "--device", "cpu", "--epochs", "1")
    assert run("train", *options, "--network", network, *small, "--output", "run").code == 0
    vae = pv.load("run")
    encoder = vae.variational_family.encoder.encoder  # inside of the standardisation
    assert (encoder.channels, encoder.norm) == ((4, 6), "group")
    assert vae.likelihood.decoder.channels == (6, 4)
    assert encoder.residual_blocks == (2 if network == "resnet" else 0)
    assert run("reconstruct", "run").code == run("sample", "run", "--num", "5").code == 0


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ("--likelihood discretized-logistic --levels 2", True),
        ("--likelihood categorical", True),
        ("--likelihood negative-binomial --size-factor learned", False),
        ("--likelihood student-t", False),
    ],
)
def test_values_of_each_kind_are_trained_evaluated_and_drawn(tmp_path, monkeypatch, options, bits):
    monkeypatch.chdir(tmp_path)
    np.save("bits.npy", np.random.default_rng(0).integers(0, 2, (60, 6)))
    result = train("--dataset", "bits.npy", *options.split(), "--output", "run")
    assert ("bits per dimension: " in result.out) == bits
    metrics = json.loads(Path("run/metrics.json").read_text())["test_log_marginal"]
    if bits:
        wanted = -metrics["log_marginal"] / (6 * math.log(2))
        assert metrics["bits_per_dimension"] == pytest.approx(wanted)
    shown = run("evaluate", "run", "--num-samples", "30", "--method", "importance")
    assert ("bits per dimension" in shown.out) == bits
    run("sample", "run", "--num", "5")


@pytest.mark.parametrize(
    ("options", "num_data", "expected"),
    [
        ({"epochs": 200}, 1294, 20),  # a tenth
        ({"epochs": 8}, 1294, 4),  # half of a short run
        ({"epochs": 30}, 1294, 6),  # 21 steps an epoch, 120 wanted
        ({"epochs": 10}, 60_000, 1),
        ({"epochs": 1}, 50, 0),
        ({"epochs": 8, "warmup_epochs": 0}, 1294, 0),  # as told
    ],
)
def test_the_default_warm_up_is_a_tenth_but_long_enough(options, num_data, expected):
    settings = app_settings.tell_defaults(TrainSettings(**options), torch.empty(num_data, 1))
    assert settings.warmup_epochs == expected
