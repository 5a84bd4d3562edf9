"""Names of files and folders are text everywhere: in pictures, pages, JSON and on the terminal."""

import json
import os
import subprocess
import sys
from html import escape

import numpy as np
import pytest
from command_line import SMALL, WARNED, run, train
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text

import pyro_vae as pv
from pyro_vae import plots

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


@pytest.fixture
def bits():
    return np.random.default_rng(0).integers(0, 2, (60, 6))


def test_a_run_of_any_name_on_a_file_of_any_name(tmp_path, monkeypatch, bits, rendered):
    name = "".join(NAMES.values()).replace("/", "")
    monkeypatch.chdir(tmp_path)
    with open(f"{name}.npy", "wb") as file:
        np.save(file, bits)
    result = train("--dataset", f"./{name}.npy", "--output", f"./{name}", epochs=1)
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)
    assert result.out.splitlines()[-1] == f"run folder: {shown}"
    page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
    assert f"<h1>Run {escape(shown)}</h1>" in page
    record = json.loads((tmp_path / name / "config.json").read_text())["run"]
    assert record["settings"]["dataset"] == str(tmp_path / f"{name}.npy")
    for command in ("evaluate", "sample"):
        again = run(command, f"./{name}", *(("--json",) if command == "evaluate" else ()))
        assert again.code == 0, again.err
    told = run("train", "--resume", f"./{name}")
    assert (told.code, told.out) == (0, f"finished before: {shown}\n")


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
        plots.image_grid([np.zeros((2, 4, 4))], title=name, row_labels=[name]),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        figure.canvas.draw()
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert any("b" in text for text in texts)
        assert not any(is_math_text(text) or "\n" in text for text in texts)


@pytest.mark.parametrize(
    "setting",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb", "COLUMNS": "20"},
        {"COLUMNS": "0", "NO_COLOR": "1"},
        {"TERM": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.slow
def test_a_terminal_of_any_kind(digits, setting):
    for command in (["evaluate", digits, "--num-data", "3", "--num-samples", "30"], ["train", "-h"]):
        told = subprocess.run(
            [sys.executable, "-m", "pyro_vae", *map(str, command)],
            env={**os.environ, **setting}, capture_output=True,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
        assert b"Traceback" not in told.stderr


@pytest.mark.slow
def test_streams_that_are_closed_or_not_read(digits, tmp_path):
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 6)))
    python = f"{sys.executable} -m pyro_vae"
    small = f"train {' '.join(SMALL)} --epochs 1 --dataset {tmp_path}/bits.npy --output {tmp_path}"
    quick = f"evaluate {digits} --num-data 3 --num-samples 30"
    cases = {
        f"{python} {small}/no-error 2>&-": 0,
        f"{python} {small}/nothing >&- 2>&- <&-": 0,
        f"set -o pipefail; {python} {small}/unread | true": 0,
        f"set -o pipefail; {python} {quick} | true": 0,
        f"{python} {quick} --json >/dev/full": 2,
        f"{python} {quick} --json >&-": 0,
    }
    for case, code in cases.items():
        told = subprocess.run(["bash", "-c", case], capture_output=True, text=True, cwd=tmp_path)
        assert told.returncode == code, (case, told.stderr)
        assert "Traceback" not in told.stderr
        assert "Exception ignored" not in told.stderr
        if "/dev/full" in case:
            message = "to the standard output, got: No space left on device; it is {"
            assert message in told.stderr.splitlines()[-1]
    for name in ("no-error", "nothing", "unread"):
        assert (tmp_path / name / "metrics.json").is_file()
        for file in (tmp_path / name).iterdir():  # nothing that was printed stands in one
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
    result = run("evaluate", digits, "--picture", tmp_path / "k.png", *quick)
    assert result.code == 2
    assert "log_marginal" in json.loads(result.out)
