"""Every mistake on the command line: one clear line, exit code 2, nothing touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL, WARNED, refused, run, snapshot

import pyro_vae as pv
from pyro_vae import datasets
from pyro_vae.app.options import in_options

pytestmark = WARNED


# Options that are wrong whatever the data: refused before any are read.
BAD_SETTINGS = {
    "--latent-dim 0": "latent",
    "--latent-dim -3": "latent",
    "--latent-dim 1000000000": "fit in memory",
    "--latent-dim 100000000000000": "expected --latent-dim of at most 2147483647, got",
    "--epochs -1": "expected --epochs of at least 0, got -1",
    "--beta -1": "beta",
    "--beta nan": "beta",
    "--beta inf": "beta",
    "--learning-rate nan": "finite learning rate above 0, got nan",
    "--learning-rate inf": "finite learning rate above 0, got inf",
    "--learning-rate -1e-3": "finite learning rate above 0, got -0.001",
    "--learning-rate 0": "finite learning rate above 0, got 0",
    "--batch-size 0": "expected --batch-size of at least 1, got 0",
    "--warmup-epochs -1": "--warmup-epochs of at least 0",
    "--patience 0": "patience",
    "--hidden 512,,x": "'512,,x': e.g. 512,256",
    "--hidden ,": "e.g. 512,256",
    "--hidden 0": "e.g. 512,256",
    "--hidden 64,-2": "e.g. 512,256",
    "--hidden 1.5": "e.g. 512,256",
    "--seed -1": "expected --seed of at least 0",
    "--seed 4294967296": "expected --seed of at most 4294967295",
    "--device cuda:9": "'cuda:9'",
    "--device gpu": "'gpu'",
    "--likelihood gaussian --sigma 0": "sigma above 0, got 0",
    "--likelihood gaussian --sigma -1": "sigma above 0, got -1",
    "--likelihood gaussian --sigma nan": "sigma above 0, got nan",
    "--likelihood gaussian --sigma learnt": "learned, per-column, per-pixel, got 'learnt'",
    "--prior standard-norml": "unknown prior 'standard-norml': did you mean 'standard-normal'?",
    "--size-factor depth": "expected --size-factor with --likelihood poisson or negative-binomial",
    "--missing zero": "unknown missing 'zero': choose from nan",
    "--likelihood poisson --size-factor learned --latent-dim 1": "--latent-dim of at least 2 with",
    "--likelihood categorical --levels 1": "num_categories of at least 2, got 1",
    "--network dense": "unknown network 'dense'",
    "--network conv --channels 8,x": "expected channels as whole numbers above 0, separated by",
    "--likelihood bernouli": "did you mean 'bernoulli'?",
    "--guide meanfield": "did you mean 'mean-field'?",
    "--activation rely": "did you mean 'relu'?",
    "--binarize statik": "did you mean 'static'?",
    "--data-seed -1": "expected --data-seed of at least 0",
    "--objective iwea": "did you mean 'iwae'?",
    "--num-particles 0": "--num-particles of at least 1, got 0",
    "--objective free-bits": "expected --free-bits with --objective free-bits",
    "--free-bits 0.1": "got 0.1 with analytic-kl",
    "--objective free-bits --free-bits -1": "floor of at least 0",
    "--schedule linear": "expected a schedule constant, cosine",
    "--gradient-clip 0": "finite --gradient-clip above 0",
    "--precision float16": "expected a precision float32",
    "--compile yes": "choose from auto, off, on",
    "--prior von-mises-fisher --guide mean-field": "on the real): use --guide von-mises-fisher",
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
    "--dataset bytes.npy --likelihood discretized-logistic": "divide by the largest possible value",
    "--dataset grey.npy --likelihood discretized-logistic": "expected multiples of 0.00392157 for",
    "--dataset grey.npy --likelihood poisson": "expected whole numbers for Poisson",
    "--dataset negative.npy --likelihood negative-binomial": "x in [0, inf] for NegativeBinomial",
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
    "--dataset data.txt": "unknown data set (and no .npy, .npz, .csv file) 'data.txt'",
    "--dataset data.csv": "expected a data file at",
    "--labels kind": "with a table, whose columns have names",
    "--dataset mnist --data-root nowhere": "You can use --download to download it; give the right "
    "--data-root or allow it by --download",
    "--validation-size -1": "--validation-size of at least 0, got -1",
    "--validation-size 100000": "expected at least 100001 training data",
    "--validation-size 0 --patience 3": "expected validation data for patience",
}


@pytest.mark.parametrize("options", BAD_DATA)
def test_bad_data_are_refused(here, options):
    for output in ((), ("--output", "new/folder")):
        refused(here, "train", *SMALL, *options.split(), *output, message=BAD_DATA[options])


def test_rows_are_refused_by_convolutions(here):
    options = ("--dataset", "bits.npy", "--network", "conv", "--output", "new/folder")
    refused(here, "train", *options, message="use an MLP for other data")


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word
def test_a_loss_that_diverges_leaves_the_state_before_it_alone(here):
    options = ("--dataset", "vectors.npy", "--likelihood", "gaussian", "--learning-rate", "1e30")
    before = snapshot(here)
    result = run("train", *SMALL, *options, "--output", "new/folder")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("pyro-vae: expected a finite loss")
    assert f"the state before it is in {here}/new/folder/checkpoints" in result.err
    assert result.err.count("\n") == 1
    left = {str(path.relative_to(here)) for path in snapshot(here).keys() - before.keys()}
    assert {name for name in left if Path(name).suffix} == {
        "new/folder/config.json",
        "new/folder/checkpoints/step-0000000001.safetensors",
    }


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("run", "run holds a run: choose another"),
        ("unfinished", "holds an unfinished run"),
        ("busy", "has files in it: choose another"),
        ("text.npy", "is a file: choose another"),
        ("text.npy/run", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("/".join(["a" * 200] * 20), "File name too long"),  # for what is written later alone
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
        ("evaluate run --method both --num-chains 0", "--num-chains of at least 1"),
        ("evaluate run --method annealed --num-steps 0", "--num-steps of at least 1"),
        ("evaluate run --num-data 0", "--num-data of at least 1"),
        ("evaluate run --target-standard-error 0", "--target-standard-error above 0"),
        ("evaluate run --picture k.txt", "picture file"),
        ("evaluate run --num-samples -5", "at least 1, got -5"),
        ("evaluate run --device cuda:9", "'cuda:9'"),
        ("evaluate run --seed -1", "expected --seed of at least 0"),
        ("sample run --num 0", "expected --num of at least 1"),
        ("sample run --num 10001", "expected --num of at most 10000"),
        ("sample run --seed -1", "expected --seed of at least 0"),
        ("sample run --output picture.txt", "expected a picture file .png, .svg or .pdf"),
        (
            "sample run --output text.npy/picture.png",
            "expected to write 'text.npy/picture.png', got: Not a directory",
        ),
        ("reconstruct run --num -1", "expected --num of at least 1"),
        ("reconstruct run --output picture", "expected a picture file .png, .svg or .pdf"),
    ],
)
def test_mistakes_with_a_run_are_refused(here, arguments, message):
    refused(here, *arguments.split(), message=message)


def test_a_number_out_of_range_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom pyro_vae.app.cli import main\n"
        "sys.argv[1:] = ['train', '--latent-dim', '0']\n"
        "try: main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "2 False\n"
    assert told.stderr == "pyro-vae: expected --latent-dim of at least 1, got 0\n"


def test_warnings_speak_of_options(here):
    result = run(
        *("evaluate", "run", "--method", "importance", "--num-samples", 30),
        *("--json", "--device", "cpu"),
    )
    assert result.code == 0
    assert "use --method annealed, a wider guide" in result.err
    assert in_options('use method="annealed" or more') == "use --method annealed or more"
    collapsed = "try a longer warm-up (warmup_epochs), a smaller beta"
    assert in_options(collapsed) == "try a longer warm-up (--warmup-epochs), a smaller beta"
    for path in ("/data/latent_dim/x.npy", "'num_steps'", "my_epochs_file"):
        assert in_options(f"expected a file at {path}") == f"expected a file at {path}"
    elsewhere = in_options('use method="annealed"', {"epochs"})
    assert elsewhere == "use `pyro-vae evaluate RUN --method annealed`"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_whose_name_is_too_long_is_refused_before_anything_is_computed(
    here, monkeypatch, suffix
):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    name = "k" * (255 - len(suffix)) + suffix  # itself it could be written
    refused(here, "evaluate", "run", "--picture", name, message="File name too long")


def test_damaged_runs_are_refused(here):
    for name, content in (("model.safetensors", b"cut"), ("config.json", b"{")):
        kept = Path("run", name).read_bytes()
        Path("run", name).write_bytes(content)
        for command in ("evaluate", "sample", "reconstruct"):
            refused(here, command, "run", message="expected")
        Path("run", name).write_bytes(kept)


def test_a_folder_by_save_is_for_the_library(here):
    pv.save(pv.load("run"), here / "saved")
    refused(here, "evaluate", "saved", message="got a folder by pv.save: load it with pv.load")


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


# Options that would change nothing, be it with their default value.
WITHOUT_EFFECT = {
    "train --num-components 5": "--num-components with --prior gaussian-mixture or vamp, got it with "
    "standard-normal",
    "train --prior flow --num-components 5": "got it with flow",
    "train --sigma 0.5": "--sigma with --likelihood gaussian, student-t or discretized-logistic",
    "train --sigma learned": "discretized-logistic, got it with bernoulli",
    "train --likelihood poisson --levels 5": "--levels with --likelihood discretized-log",
    "train --network conv --hidden 16": "--hidden with --network mlp, got it with conv",
    "train --channels 8": "--channels with --network conv or resnet, got it with mlp",
    "train --size-factor learned": "--size-factor with --likelihood poisson or negative-binomial",
    "train --data-root .": "--data-root with --dataset mnist, fashion-mnist, kmnist or omniglot, got",
    "train --dataset vectors.npy --download": "--download with --dataset mnist",
    "autoencoder --output new --sigma 0.5": "--sigma with --likelihood gaussian",
    "sweep --output new --num-components 5": "--num-components with --prior gaussian-mixture",
    "sweep --output new --warm-start --betas 2": "--warm-start with several --betas",
    "compare --output new --priors flow,beta --num-components 5": "with --priors gaussian-mixture",
    "compare --output new --sigma 0.5": "--sigma with --likelihoods gaussian",
    "compare --output new --method importance --num-chains 16": "--num-chains with --method auto, "
    "annealed or both",
    "evaluate run --method importance --num-chains 16": "annealed or both, got it with import",
    "evaluate run --method importance --num-steps 10": "--num-steps with --method auto, annealed or",
    "evaluate run --method both --max-annealed 5": "--max-annealed with --method auto, got it",
    "evaluate run --method annealed --num-samples 5": "--num-samples with --method auto, importance",
    "evaluate run --method annealed --target-standard-error 1": "--target-standard-error with",
    "complete run --method importance --num-steps 5": "--num-steps with --method metropolis or",
    "complete run --num-samples 50": "--num-samples with --method importance, got it with metropolis",
    "latent run --num-steps 5": "--num-steps with --view manifold, got it with scatter",
    "latent run --view manifold --plane pca": "--plane with --view scatter, got it with manifold",
}


@pytest.mark.parametrize("arguments", WITHOUT_EFFECT)
def test_options_without_effect_are_refused_before_data_are_read(here, monkeypatch, arguments):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    refused(here, *arguments.split(), message=WITHOUT_EFFECT[arguments])


@pytest.mark.parametrize(
    "options",
    ["--priors standard-normal, vamp", "--likelihoods gaussian", "--method both", "--dataset mnist"],
)
def test_options_with_an_effect_are_taken(here, options):
    option, value = options.split(maxsplit=1)
    belonging = {
        "--priors": "--num-components 5",
        "--likelihoods": "--sigma 0.5",
        "--method": "--num-chains 3 --num-steps 5",
        "--dataset": "--data-root . --download",
    }[option].split()
    # What is refused is the other mistake.
    message = "expected --epochs of at least 0"
    arguments = ("--output", "new", option, value, *belonging, "--epochs", -1)
    refused(here, "compare", *arguments, message=message)


def test_a_traceback_is_shown_when_asked_for(here):
    before = snapshot(here)
    result = run("evaluate", "nowhere", "--debug")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Traceback (most recent call last):")
    assert "read_config" in result.err
    assert result.err.splitlines()[-1].startswith("pyro-vae: expected a run folder at nowhere")
    assert snapshot(here) == before


@pytest.mark.parametrize("command", ["evaluate run --picture", "sample run --output"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_computed(
    here, monkeypatch, command
):
    (here / "folder.png").mkdir()
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    refused(here, *command.split(), "folder.png", message="folder.png is a folder")
    refused(here, *command.split(), "text.npy/deep/x.png", message="Not a directory")
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)  # as to no superuser
    refused(here, *command.split(), "deep/x.png", message="Permission denied")


def test_an_output_that_cannot_be_written_is_refused_before_training(here, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)
    for command in ("train", "autoencoder", "sweep", "compare"):
        refused(here, command, *SMALL, "--output", "new", message="Permission denied")


def test_folders_of_another_kind_are_told_apart(here):
    (here / "swept").mkdir()
    (here / "swept" / "study.json").write_text("{}")
    (here / "run" / "model.safetensors").unlink()
    for command in ("evaluate", "sample", "latent"):
        refused(
            here,
            command,
            "swept",
            message="swept holds several runs: name one in swept/runs, or repeat",
        )
        refused(here, command, "run", message="resume it with `pyro-vae train --resume run`")
