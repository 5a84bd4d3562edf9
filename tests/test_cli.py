"""The command line end to end, and every mistake: one clear line, exit code 2, nothing touched."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, refused, run, snapshot
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import commands, datasets, names
from pyro_vae.cli import app
from pyro_vae.names import TrainSettings

pytestmark = [
    pytest.mark.filterwarnings("always:.* data have Pareto k"),
    pytest.mark.filterwarnings("always:grey values under a Bernoulli"),
]

KEYS = {
    "log_marginal",
    "standard_error",
    "data_standard_error",
    "elbo",
    "rate",
    "distortion",
    "num_samples",
    "num_data",
    "num_unreliable",
    "median_ess",
    "acceptance",
    "method",
}
FILES = [
    "config.json",
    "metrics.json",
    "model.safetensors",
    "reconstructions.png",
    "report.html",
    "samples.png",
    "training.png",
]


def train(*arguments, epochs=2):
    result = run("train", *SMALL, "--epochs", epochs, *arguments)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A finished run on the digits; tests only read it."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train("--output", folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data files, good and bad."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    vectors = random.normal(5, 2, (100, 3))
    arrays = {
        "vectors": vectors,
        "plane": vectors[:, :2],
        "scalars": vectors[:, :1],
        "bits": random.integers(0, 2, (100, 6)),
        "grey": random.random((100, 1, 5, 4)),
        "colour": random.random((60, 4, 5, 3)),
        "bytes": random.integers(0, 256, (100, 8, 8)).astype(np.uint8),
        "negative": -random.random((100, 8)),
        "nan": np.where(vectors > 8, np.nan, vectors),
        "inf": np.where(vectors > 8, np.inf, vectors),
        "empty": vectors[:0],
        "flat": vectors[:, 0],
        "single": vectors[:1],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    (folder / "text.npy").write_text("1,2,3\n")
    return folder


@pytest.fixture
def here(tmp_path, files, digits, monkeypatch):
    """An own working folder with the data files and a finished run called ``run``."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    shutil.copytree(digits, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_leaves_a_whole_run(digits):
    assert sorted(path.name for path in digits.iterdir()) == FILES
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
    assert set(estimate) == KEYS
    assert (estimate["num_data"], estimate["num_samples"]) == (359, 500)
    # Two epochs are enough to be better than independent pixels at one half.
    assert -64 * np.log(2) < estimate["log_marginal"] < -15
    for name in FILES:
        if name.endswith(".png"):
            assert (digits / name).read_bytes().startswith(b"\x89PNG")


def test_train_says_what_was_measured_and_where(tmp_path):
    result = train("--output", tmp_path / "run")
    assert "log p(x)" in result.out
    assert "359 x 500" in result.out
    assert f"run folder: {tmp_path / 'run'}" in result.out
    assert "pseudo" not in result.out
    assert max(map(len, result.out.splitlines()[:-1])) <= 80


def test_the_choice_of_compiling_is_printed_and_recorded(digits, tmp_path):
    metrics = json.loads((digits / "metrics.json").read_text())
    assert metrics["compiled"] is False
    assert "compiling pays from" in metrics["compile_choice"]
    result = train("--compile", "off", "--output", tmp_path / "run", epochs=0)
    assert "training step: eager as asked" in result.out
    assert "eager as asked" in (tmp_path / "run" / "report.html").read_text()


OBJECTIVES = {
    "elbo": (None, 1),
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

    monkeypatch.setattr(commands.training, "fit", fit)
    recipe = ("--schedule", "cosine", "--gradient-clip", 5)
    train("--dataset", "bits.npy", *recipe, "--output", "own", "--objective", *options.split())
    kind, particles = OBJECTIVES[options]
    (objective,) = given
    assert objective is None if kind is None else type(objective) is kind
    assert getattr(objective, "num_particles", 1) == particles
    history = json.loads(Path("own/metrics.json").read_text())["history"]
    assert np.isfinite(history["train_elbo"]).all()


def test_a_seed_repeats_a_run(digits, tmp_path):
    train("--output", tmp_path / "again")
    train("--output", tmp_path / "other", "--seed", 1)
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (digits, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_evaluate_prints_one_json_object_alone(digits):
    result = run("evaluate", digits, "--num-samples", 50, "--json", "--device", "cpu")
    assert result.code == 0
    values = json.loads(result.out)
    assert set(values) == KEYS
    assert (values["num_data"], values["num_samples"]) == (359, 50)
    assert values["elbo"] == pytest.approx(-values["rate"] - values["distortion"])
    assert values["elbo"] < values["log_marginal"]
    assert result.out.count("\n") == 1
    again = run("evaluate", digits, "--num-samples", 50, "--json", "--device", "cpu")
    assert again.out == result.out
    table = run("evaluate", digits, "--num-samples", 50)
    assert f"{values['log_marginal']:.3f}" in table.out


def test_numbers_that_are_not_finite_are_null(digits):
    result = run("evaluate", digits, "--num-samples", 1, "--json")
    values = json.loads(result.out, parse_constant=pytest.fail)
    assert values["standard_error"] is None  # unknown from one sample
    assert values["log_marginal"] is not None


def test_evaluate_by_both_methods_agrees_within_the_errors_and_draws_a_picture(digits, tmp_path):
    picture = tmp_path / "k.png"
    result = run(
        "evaluate", digits, "--method", "both", "--num-samples", 500, "--num-chains", 8,
        "--num-steps", 50, "--num-data", 10, "--picture", picture, "--json",
    )  # fmt: skip
    values = json.loads(result.out)
    annealed = values["annealed"]
    assert (values["method"], annealed["method"]) == ("importance", "annealed")
    assert values["num_data"] == annealed["num_data"] == 10
    assert 0 < annealed["acceptance"] <= 1
    error = math.hypot(values["standard_error"], annealed["standard_error"])
    assert abs(values["log_marginal"] - annealed["log_marginal"]) < 5 * error
    assert picture.stat().st_size > 1000


def test_evaluate_to_a_target_error_reaches_it(digits):
    options = ("--num-samples", 100, "--target-standard-error", 0.02, "--num-data", 5)
    result = run("evaluate", digits, *options, "--json")
    assert json.loads(result.out)["standard_error"] < 2 * 0.02 / 5**0.5


def test_evaluate_leaves_the_run_alone(here):
    before = snapshot(here)
    run("evaluate", "run", "--num-samples", 5, "--json")
    assert snapshot(here) == before


def test_sample_and_reconstruct_write_pictures(here):
    for command in ("sample", "reconstruct"):
        result = run(command, "run", "--seed", 3)
        assert result.code == 0, result.err
        assert Path(result.out.strip()).read_bytes().startswith(b"\x89PNG")
        assert Path(result.out.strip()).parent == Path("run")
        picture = here / "new" / f"{command}.svg"
        assert run(command, "run", "--num", 3, "--output", picture).code == 0
        assert b"<svg" in picture.read_bytes()
    means, draws = here / "means.png", here / "draws.png"
    assert run("sample", "run", "--mean", "--output", means).code == 0
    assert run("sample", "run", "--draw", "--output", draws).code == 0
    assert means.read_bytes() != draws.read_bytes()
    assert means.read_bytes() == (here / "run" / "samples.png").read_bytes()


def test_images_are_sampled_without_the_data(here):
    train("--dataset", "grey.npy", "--output", "grey-run")
    (here / "grey.npy").unlink()
    assert run("sample", "grey-run").code == 0
    refused(here, "reconstruct", "grey-run", message="found none: check the path")


@pytest.mark.parametrize(
    ("name", "sigma"), [("vectors", "learned"), ("plane", "per-pixel"), ("scalars", "0.5")]
)
def test_vectors_of_ones_own_under_a_gaussian(here, name, sigma):
    data = ("--dataset", f"{name}.npy", "--likelihood", "gaussian", "--sigma", sigma)
    train(*data, "--output", "own", epochs=1)
    assert sorted(path.name for path in Path("own").iterdir()) == FILES
    values = json.loads(run("evaluate", "own", "--num-samples", 20, "--json").out)
    assert values["num_data"] == 20
    assert run("sample", "own").code == 0
    assert run("reconstruct", "own").code == 0


@pytest.mark.parametrize("name", ["bits", "colour", "grey"])
def test_other_data_of_ones_own(here, name):
    train("--dataset", f"{name}.npy", "--output", "own", epochs=1)
    assert sorted(path.name for path in Path("own").iterdir()) == FILES


def test_grey_pixels_under_a_bernoulli_are_labelled(here):
    result = train("--binarize", "none", "--output", "grey-run")
    assert "log p(x) (pseudo-likelihood)" in result.out
    assert json.loads(Path("grey-run/metrics.json").read_text())["pseudo_likelihood"] is True
    result = run("evaluate", "grey-run", "--num-samples", 5, "--json")
    assert set(json.loads(result.out)) == KEYS
    assert "pyro-vae: warning: grey values under a Bernoulli" in result.err
    gaussian = train("--likelihood", "gaussian", "--output", "gaussian")
    assert "pseudo" not in gaussian.out
    assert json.loads(Path("gaussian/metrics.json").read_text())["pseudo_likelihood"] is False
    assert "pseudo" not in run("evaluate", "gaussian", "--num-samples", 5).err


def test_warnings_are_one_line(here):
    result = run("evaluate", "run", "--num-samples", 50, "--json")
    assert result.err == "" or result.err.startswith("pyro-vae: warning: ")
    assert result.err.count("\n") == result.err.count("pyro-vae: warning: ")


def test_files_are_found_from_another_folder_and_moved_ones_by_their_root(here, monkeypatch):
    train("--dataset", "vectors.npy", "--likelihood", "gaussian", "--output", "own")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    evaluate = ("evaluate", here / "own", "--num-samples", 5, "--json")
    expected = run(*evaluate).out
    assert json.loads(expected)
    shutil.move(here / "vectors.npy", here / "elsewhere")
    refused(here, *evaluate, message="found none: check the path")
    assert run(*evaluate, "--data-root", ".").out == expected
    assert run("sample", here / "own", "--data-root", here / "elsewhere").code == 0


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
    train("--dataset", "mnist", "--output", "mnist-run")
    monkeypatch.delenv("PYRO_VAE_DATA")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    result = run("evaluate", here / "mnist-run", "--num-samples", 5, "--json")
    assert json.loads(result.out)["num_data"] == 20


def test_data_that_changed_since_are_refused(here):
    train("--dataset", "vectors.npy", "--likelihood", "gaussian", "--output", "own")
    vectors = np.load("vectors.npy")
    vectors[7, 1] += 1e-3
    np.save("vectors.npy", vectors)
    for command in ("evaluate", "reconstruct", "sample"):
        refused(here, command, "own", message="got others by the checksum")


def test_new_folders_below_runs_are_numbered(here):
    for expected in ("digits-standard-normal-mean-field", "digits-standard-normal-mean-field-2"):
        assert f"run folder: runs/{expected}" in train(epochs=0).out
        assert (here / "runs" / expected / "metrics.json").is_file()


def test_an_empty_folder_is_taken(here):
    Path("mine").mkdir()
    train("--output", "mine", epochs=0)
    assert Path("mine/config.json").is_file()


# Options that are wrong whatever the data: refused before any are read.
BAD_SETTINGS = {
    "--latent-dim 0": "latent",
    "--latent-dim -3": "latent",
    "--latent-dim 1000000000": "fit in memory",
    "--latent-dim 100000000000000": "expected latent_dim as whole numbers",
    "--epochs -1": "expected epochs of at least 0, got -1",
    "--beta -1": "beta",
    "--beta nan": "beta",
    "--beta inf": "beta",
    "--learning-rate nan": "finite learning rate above 0, got nan",
    "--learning-rate inf": "finite learning rate above 0, got inf",
    "--learning-rate -1e-3": "finite learning rate above 0, got -0.001",
    "--learning-rate 0": "finite learning rate above 0, got 0",
    "--batch-size 0": "batch size of at least 1, got 0",
    "--warmup-epochs -1": "warm-up",
    "--patience 0": "patience",
    "--hidden 512,,x": "'512,,x': e.g. 512,256",
    "--hidden ,": "e.g. 512,256",
    "--hidden 0": "e.g. 512,256",
    "--hidden 64,-2": "e.g. 512,256",
    "--hidden 1.5": "e.g. 512,256",
    "--seed -1": "expected a seed from 0",
    "--seed 4294967296": "expected a seed from 0",
    "--device cuda:9": "'cuda:9'",
    "--device gpu": "'gpu'",
    "--likelihood gaussian --sigma 0": "sigma above 0, got 0",
    "--likelihood gaussian --sigma -1": "sigma above 0, got -1",
    "--likelihood gaussian --sigma nan": "sigma above 0, got nan",
    "--sigma learnt": "'learned' or 'per-pixel', got 'learnt'",
    "--prior standard-norml": "unknown prior 'standard-norml': did you mean 'standard-normal'?",
    "--likelihood bernouli": "did you mean 'bernoulli'?",
    "--guide meanfield": "did you mean 'mean-field'?",
    "--activation rely": "did you mean 'relu'?",
    "--binarize statik": "did you mean 'static'?",
    "--data-seed -1": "expected a seed from 0",
    "--objective iwea": "did you mean 'iwae'?",
    "--num-particles 0": "--num-particles of at least 1, got 0",
    "--objective free-bits": "expected --free-bits with --objective free-bits",
    "--free-bits 0.1": "got 0.1 with elbo",
    "--objective free-bits --free-bits -1": "floor of at least 0",
    "--schedule linear": "expected a schedule constant, cosine",
    "--gradient-clip 0": "gradient_clip above 0",
    "--precision float16": "expected a precision float32",
    "--compile yes": "choose from auto, off, on",
    "--prior von-mises-fisher --guide mean-field": "latents on the unit sphere",
}


@pytest.mark.parametrize("options", BAD_SETTINGS)
def test_bad_settings_are_refused_before_data_are_read(here, monkeypatch, options):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    for output in ((), ("--output", "new/folder")):
        refused(here, "train", *options.split(), *output, message=BAD_SETTINGS[options])


BAD_DATA = {
    "--dataset bytes.npy": "divide by the largest possible value (255 for bytes)",
    "--dataset bytes.npy --binarize none": "for Bernoulli, got values from 0 to 255: divide by",
    "--dataset bytes.npy --likelihood continuous-bernoulli": "for ContinuousBernoulli",
    "--dataset negative.npy --binarize none": "expected x in [0, 1] for Bernoulli",
    "--dataset nan.npy --likelihood gaussian": "got NaN or infinity",
    "--dataset inf.npy --likelihood gaussian": "got NaN or infinity",
    "--dataset nan.npy": "got NaN or infinity",
    "--dataset empty.npy": "got (0, 3)",
    "--dataset flat.npy": "reshape to (N, 1)",
    "--dataset single.npy": "at least 2 data",
    "--dataset objects.npy": "Object arrays cannot be loaded",
    "--dataset text.npy": "expected an array file of numbers",
    "--dataset none.npy": "found none: check the path",
    "--dataset digts": "did you mean 'digits'?",
    "--dataset data.csv": "unknown data set (and no .npy or .npz file) 'data.csv'",
    "--dataset mnist --data-root nowhere": "give the right root or allow the download",
    "--validation-size -1": "validation size of at least 0, got -1",
    "--validation-size 100000": "expected at least 100001 training data",
    "--validation-size 0 --patience 3": "expected validation data for patience",
}


@pytest.mark.parametrize("options", BAD_DATA)
def test_bad_data_are_refused(here, options):
    for output in ((), ("--output", "new/folder")):
        refused(here, "train", *SMALL, *options.split(), *output, message=BAD_DATA[options])


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word
def test_a_loss_that_diverges_leaves_nothing(here):
    options = ("--dataset", "vectors.npy", "--likelihood", "gaussian", "--learning-rate", "1e30")
    refused(here, "train", *SMALL, *options, "--output", "new/folder", message="finite loss")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("run", "run holds a run: choose another"),
        ("unfinished", "holds an unfinished run"),
        ("busy", "has files in it: choose another"),
        ("text.npy", "is a file: choose another"),
        ("text.npy/run", "Not a directory"),
        ("a" * 300, "File name too long"),
    ],
)
def test_an_output_that_is_taken_is_left_alone(here, output, message):
    for folder, file in (("unfinished", "config.json"), ("busy", "notes.txt")):
        (here / folder).mkdir()
        (here / folder / file).write_text("{}")
    refused(here, "train", *SMALL, "--output", output, message=message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate nowhere", "found no config.json in it: check the path"),
        ("evaluate nowhere --json", "found no config.json in it: check the path"),
        ("evaluate text.npy", "found no config.json in it: check the path"),
        ("sample .", "found no config.json in it: check the path"),
        ("reconstruct nowhere", "found no config.json in it: check the path"),
        ("evaluate run --num-samples 0", "at least 1, got 0"),
        ("evaluate run --method anealed", "did you mean 'annealed'"),
        ("evaluate run --num-chains 0", "--num-chains of at least 1"),
        ("evaluate run --num-steps 0", "--num-steps of at least 1"),
        ("evaluate run --num-data 0", "--num-data of at least 1"),
        ("evaluate run --target-standard-error 0", "target_standard_error above 0"),
        ("evaluate run --picture k.txt", "picture file"),
        ("evaluate run --num-samples -5", "at least 1, got -5"),
        ("evaluate run --device cuda:9", "'cuda:9'"),
        ("evaluate run --seed -1", "expected a seed from 0"),
        ("sample run --num 0", "expected a number from 1"),
        ("sample run --num 10001", "expected a number from 1"),
        ("sample run --seed -1", "expected a seed from 0"),
        ("sample run --output picture.txt", "expected a picture file .png, .svg or .pdf"),
        ("sample run --output text.npy/picture.png", "expected to read or write text.npy"),
        ("reconstruct run --num -1", "expected a number from 1"),
        ("reconstruct run --output picture", "expected a picture file .png, .svg or .pdf"),
    ],
)
def test_mistakes_with_a_run_are_refused(here, arguments, message):
    refused(here, *arguments.split(), message=message)


def test_damaged_runs_are_refused(here):
    for name, content in (("model.safetensors", b"cut"), ("config.json", b"{")):
        kept = Path("run", name).read_bytes()
        Path("run", name).write_bytes(content)
        for command in ("evaluate", "sample", "reconstruct"):
            refused(here, command, "run", message="expected")
        Path("run", name).write_bytes(kept)


def test_a_folder_by_save_is_for_the_library(here):
    pv.save(pv.load("run"), here / "saved")
    refused(here, "evaluate", "saved", message="got a folder by pv.save: use the library on it")


@pytest.mark.parametrize(
    "arguments",
    [
        "trian",
        "train --epoch 3",
        "train --latent-dim many",
        "train --learning-rate fast",
        "train digits",
        "evaluate",
        "evaluate run --num-samples 2.5",
    ],
)
def test_usage_errors_exit_with_2_and_no_traceback(here, arguments):
    before = snapshot(here)
    result = run(*arguments.split())
    assert result.code == 2
    assert result.out == ""
    assert "Usage" in result.err
    assert "Traceback" not in result.err
    assert snapshot(here) == before


def test_help_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands_there = [command.callback.__name__ for command in app.registered_commands]
    assert {"train", "evaluate", "compare", "sweep", "sample"} <= set(commands_there)
    for arguments in ((), *((name,) for name in commands_there)):
        result = run(*arguments, "--help")
        assert result.code == 0
        assert max(map(len, result.out.splitlines())) <= 80


def matching_pairs():
    for prior, prior_class in names.PRIORS.items():
        for guide, guide_class in names.FAMILIES.items():
            supports = {
                getattr(pv.priors, prior_class).latent_support,
                getattr(pv.guides, guide_class).latent_support,
            }
            if len(supports) == 1 or (prior == "vamp"):
                yield prior, guide


@pytest.mark.parametrize(("prior", "guide"), matching_pairs())
@pytest.mark.parametrize("likelihood", names.LIKELIHOODS)
def test_every_name_builds_a_pair(prior, guide, likelihood):
    data = datasets.load("digits", binarize="threshold")
    settings = TrainSettings(prior=prior, guide=guide, likelihood=likelihood, hidden="8")
    vae = commands.build_vae(settings, data)
    assert type(vae.prior).__name__ == names.PRIORS[prior]
    assert type(vae.variational_family).__name__ == names.FAMILIES[guide]
    assert type(vae.likelihood).__name__ == names.LIKELIHOODS[likelihood]
    assert torch.tensor(Trace_ELBO().loss(vae.model, vae.guide, data.test[:4])).isfinite()


def test_the_bernoulli_starts_at_the_training_mean():
    data = datasets.load("digits", binarize="none")
    vae = commands.build_vae(TrainSettings(hidden="8"), data)
    bias = vae.likelihood.logits.map.bias.reshape(data.data_shape)
    expected = data.train.mean(0).clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(bias.sigmoid(), expected, rtol=1e-4, atol=1e-6)


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "pyro_vae", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, **options)


def test_a_real_process_prints_json_alone(here):
    process = start("evaluate", "run", "--num-samples", 10, "--json", cwd=here)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert set(json.loads(out)) == KEYS
    assert all(line.startswith("pyro-vae: warning: ") for line in err.splitlines())


def test_a_real_process_says_what_is_wrong(tmp_path):
    process = start("train", "--latent-dim", 0, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("pyro-vae: expected")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
