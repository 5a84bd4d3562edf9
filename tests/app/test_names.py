"""Names of files and folders are text everywhere: in pictures, pages, JSON and on the terminal."""

import io
import json
import os
import subprocess
import sys
from html import escape

import numpy as np
import pytest
from command_line import SMALL, WARNED, refused, run, train
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.app.cli import main

pytestmark = WARNED

# What mathematics, markup, a terminal or an encoding makes of them.
NAMES = {
    "dollars": "cost_$raw_$",
    "half mathematics": r"a$\frac{$b",
    "markup": "x[/b]y",
    "colour": "[red]z",
    "a line break": "two\nlines",
    "an escape character": "bell\x1b[31m\x07",
    "no UTF-8": os.fsdecode(b"caf\xe9"),
    "HTML": "<b>&amp;",
    "an option": "--epochs",
}


MEASURE = ("--method", "importance", "--num-samples", 30, "--json")


@pytest.fixture
def bits():
    return np.random.default_rng(0).integers(0, 2, (60, 6))


def test_a_run_of_any_name_on_a_file_of_any_name(tmp_path, monkeypatch, bits):
    train_under_any_name(tmp_path, monkeypatch, bits)


@pytest.mark.slow
def test_the_pictures_of_a_run_of_any_name_are_rendered(tmp_path, monkeypatch, bits, rendered):
    train_under_any_name(tmp_path, monkeypatch, bits)


def train_under_any_name(tmp_path, monkeypatch, bits):
    name = "".join(NAMES.values()).replace("/", "")
    folder = name.replace(NAMES["no UTF-8"], "")
    monkeypatch.chdir(tmp_path)
    with open(f"{name}.npy", "wb") as file:
        np.save(file, bits)
    result = train("--dataset", f"./{name}.npy", "--output", f"./{folder}", epochs=1)
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in folder)
    assert result.out.splitlines()[-1] == f"run folder: {shown}"
    page = (tmp_path / folder / "report.html").read_text(encoding="utf-8")
    assert f"<h1>Run {escape(shown)}</h1>" in page
    record = json.loads((tmp_path / folder / "config.json").read_text())["run"]
    assert record["settings"]["dataset"] == str(tmp_path / f"{name}.npy")
    for command in ("evaluate", "sample"):
        again = run(command, f"./{folder}", *(MEASURE if command == "evaluate" else ()))
        assert again.code == 0, again.err
    told = run("train", "--resume", f"./{folder}")
    assert (told.code, told.out) == (0, f"finished before: {shown}\n")


def test_a_folder_that_safetensors_cannot_open_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(pv.datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    monkeypatch.chdir(tmp_path)
    for command in ("train", "sweep", "autoencoder"):
        refused(tmp_path, command, *SMALL, "--output", NAMES["no UTF-8"], message="path of a folder")


@pytest.mark.parametrize("kind", NAMES)
def test_an_error_about_any_name_is_one_line(tmp_path, kind):
    result = run("evaluate", tmp_path / NAMES[kind])
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err[:-1].isprintable()


@pytest.mark.parametrize("kind", NAMES)
def test_pictures_show_any_name(kind):
    name = NAMES[kind]
    names, errors = [name, "b"], [0.1, 0.1]
    figures = [
        plots.paired_differences(names, [0.0, -1.0], errors, best=name, title=name),
        plots.families_and_runs(
            names, [[[0.0], [1.0]]], [[0.0, 1.0]], [errors], labels=["ELBO"], title=name
        ),
        plots.datum_against_datum(np.arange(3.0), np.arange(3.0), labels=(name, "b"), title=name),
        plots.image_grid([np.zeros((2, 4, 4))], title=name),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        figure.canvas.draw()
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert not any(is_math_text(text) or "\n" in text for text in texts)


def called(monkeypatch, out, err, *arguments):
    """Run a command in this process with these streams; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["pyro-vae", *map(str, arguments)])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0


@pytest.mark.parametrize(
    "setting",
    [
        {"TERM": "dumb", "COLUMNS": "20"},
        pytest.param({"COLUMNS": "0", "NO_COLOR": "1"}, marks=pytest.mark.slow),
        pytest.param({"TERM": "", "LINES": "x"}, marks=pytest.mark.slow),
    ],
)
def test_a_terminal_of_any_kind(digits, monkeypatch, setting):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    for command in (["evaluate", digits, *MEASURE[:-1]], ["train", "-h"]):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
        assert called(monkeypatch, out, err, *command) == 0
        assert out.buffer.getvalue()


@pytest.mark.slow
def test_where_nobody_reads_the_work_goes_on(digits, tmp_path, monkeypatch, bits):
    np.save(tmp_path / "bits.npy", bits)
    small = (*SMALL, "--epochs", 1, "--dataset", tmp_path / "bits.npy")
    commands = {
        "run/metrics.json": ("train", *small, "--output", tmp_path / "run"),
        "swept/sweep.json": ("sweep", *small, "--betas", "1,2", "--output", tmp_path / "swept"),
        "picture.png": ("sample", digits, "--output", tmp_path / "picture.png"),
    }
    for name, command in commands.items():
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            assert called(monkeypatch, out, io.StringIO(), *command) == 0
        assert (tmp_path / name).is_file()
    assert called(monkeypatch, None, None, "evaluate", digits, "--num-data", 3, "--json") == 0


def test_a_result_that_cannot_be_printed_is_told_with_the_error(digits, monkeypatch):
    err = io.StringIO()
    with open("/dev/full", "w") as out:
        quick = ("--num-data", 3, *MEASURE)
        assert called(monkeypatch, out, err, "evaluate", digits, *quick) == 2
    message, _, result = err.getvalue().splitlines()[-1].partition("; it is ")
    assert message.endswith("to the standard output, got: No space left on device")
    assert json.loads(result)["num_data"] == 3


@pytest.mark.slow
def test_files_do_not_take_the_place_of_closed_streams(tmp_path, bits):
    np.save(tmp_path / "bits.npy", bits)
    small = (
        f"train {' '.join(SMALL)} --epochs 1 --dataset {tmp_path}/bits.npy --output {tmp_path}/run"
    )
    case = f"exec 0<&- 1>&- 2>&-; exec {sys.executable} -m pyro_vae {small}"
    assert subprocess.run(["bash", "-c", case]).returncode == 0
    assert (tmp_path / "run" / "metrics.json").is_file()
    for file in (tmp_path / "run").iterdir():
        assert b"run folder" not in file.read_bytes()


def test_a_fit_without_standard_error_trains(monkeypatch, digits):
    vae, x = pv.load(digits), pv.datasets.load("digits").train[:20].bernoulli()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert pv.fit(vae.model, vae.guide, x, epochs=1).best_epoch == 1
        assert pv.fit(vae.model, vae.guide, x, epochs=1, progress=True).best_epoch == 1


def test_what_was_computed_is_printed_whatever_comes_after(digits, monkeypatch, tmp_path):
    from pyro_vae.app import evaluate as evaluating

    estimate = evaluating.estimate_log_marginal

    def fail(vae, x, how):
        if how.method == "annealed":
            raise pv.InputError("annealing is refused")
        return estimate(vae, x, how)

    monkeypatch.setattr(evaluating, "estimate_log_marginal", fail)
    quick = ("--num-data", 3, "--num-samples", 30, "--json")
    result = run("evaluate", digits, "--method", "both", *quick)
    assert (result.code, result.err[-30:]) == (2, "pyro-vae: annealing is refused\n"[-30:])
    assert "log_marginal" in json.loads(result.out)

    def full(figure, path):
        raise pv.InputError("the disk is full")

    monkeypatch.setattr(evaluating, "save_picture", full)
    result = run("evaluate", digits, "--picture", tmp_path / "k.png", "--num-data", 3, *MEASURE)
    assert result.code == 2
    assert "log_marginal" in json.loads(result.out)
