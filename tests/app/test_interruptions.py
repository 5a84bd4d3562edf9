"""Commands that are killed, interrupted, given twice at once, or whose output goes nowhere."""

import os
import signal

import numpy as np
import pytest
from command_line import SMALL, WARNED, refused, run, snapshot
from typer.core import TyperGroup

from pyro_vae.app import evaluate as evaluating
from pyro_vae.app import study, train
from pyro_vae.infer.training import fit

pytestmark = WARNED

TINY = (*SMALL, "--epochs", "1", "--dataset", "bits.npy", "--output", "out")
COMMANDS = {
    "train": ("train", *TINY),
    "sweep": ("sweep", *TINY, "--betas", "1,2"),
    "compare": (
        "compare",
        *TINY,
        "--guides",
        "mean-field",
        "--seeds",
        1,
        "--num-samples",
        30,
        "--method",
        "importance",
    ),
    "autoencoder": ("autoencoder", *TINY),
}
LAST = {
    "train": "metrics.json",
    "sweep": "sweep.json",
    "compare": "comparison.json",
    "autoencoder": "autoencoder.json",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with nothing but a data file."""
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 6)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_killed_before_its_first_file_is_begun_by_the_same_command(here, command):
    (here / "out").mkdir()
    for name in (".lock", ".part-config.json", ".part-study.json"):
        (here / "out" / name).write_text("process 1 on another machine")
    result = run(*COMMANDS[command])
    assert result.code == 0, result.err
    assert (here / "out" / LAST[command]).is_file()


def signalled(number, function):
    """Return a function that a signal comes to before it does what it does."""

    def first_signal(*arguments, **options):
        os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return first_signal


# Outside of any training: before the first file, while the run is measured, at its pictures.
MOMENTS = [
    (train, "build_vae"),
    (evaluating, "estimate_log_marginal"),
    (train, "write_run_page"),
    (train, "_write_pictures"),
]


# Both signals raise alike: each moment meets one of them, and the other in the slow part.
@pytest.mark.parametrize(
    ("room", "name", "number"),
    [
        pytest.param(*moment, number, marks=() if quick else pytest.mark.slow)
        for place, moment in enumerate(MOMENTS)
        for number, quick in ((signal.SIGINT, place % 2), (signal.SIGTERM, not place % 2))
    ],
)
def test_an_interruption_outside_the_training_says_how_to_go_on(
    here, monkeypatch, room, name, number
):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(room, name, signalled(number, getattr(room, name)))
        result = run(*COMMANDS["train"])
    assert (result.code, result.out) == (128 + number, "")
    assert signal.getsignal(signal.SIGTERM) == before
    if name == "build_vae":
        assert result.err == "pyro-vae: interrupted: resume with the same command\n"
        assert not (here / "out").exists()
        assert run(*COMMANDS["train"]).code == 0
    else:
        assert result.err == "pyro-vae: interrupted: resume with `pyro-vae train --resume out`\n"
        assert run("train", "--resume", "out").code == 0
    assert (here / "out" / "metrics.json").is_file()
    assert not (here / "out" / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_before_the_command_begins_is_told_too(here, monkeypatch, number):
    parse = TyperGroup.parse_args
    monkeypatch.setattr(TyperGroup, "parse_args", signalled(number, parse))
    result = run(*COMMANDS["train"])
    told = "pyro-vae: interrupted: resume with the same command\n"
    assert result == (128 + number, "", told)


@pytest.mark.parametrize("command", [pytest.param("sweep", marks=pytest.mark.slow), "compare"])
def test_an_interruption_of_several_runs_goes_on_by_the_same_command(here, monkeypatch, command):
    with monkeypatch.context() as patch:
        patch.setattr(study, "train_run", signalled(signal.SIGTERM, study.train_run))
        result = run(*COMMANDS[command])
    assert (result.code, result.out) == (128 + signal.SIGTERM, "")
    assert result.err == "pyro-vae: interrupted: resume with the same command\n"
    assert not (here / "out").exists()
    assert run(*COMMANDS[command]).code == 0


def interrupt_training(monkeypatch):
    def stop(*arguments, **options):
        end = {"on_epoch": lambda *_: os.kill(os.getpid(), signal.SIGINT)}
        return fit(*arguments, **options, **end)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stop)
        assert run(*COMMANDS["train"]).code == 130


@pytest.mark.parametrize(
    ("room", "name"), [pytest.param(*MOMENTS[1], marks=pytest.mark.slow), *MOMENTS[2:]]
)
def test_a_run_is_locked_to_its_last_file(here, monkeypatch, room, name):
    interrupt_training(monkeypatch)
    function, second = getattr(room, name), []

    def meanwhile(*arguments, **options):
        if not second:
            second.append(None)
            second[0] = run("train", "--resume", "out")
        return function(*arguments, **options)

    monkeypatch.setattr(room, name, meanwhile)
    assert run("train", "--resume", "out").code == 0
    assert second[0].code == 2
    assert f"out is in use by process {os.getpid()}" in second[0].err


def test_a_run_that_another_process_has_ended_meanwhile_is_left_alone(here, monkeypatch):
    interrupt_training(monkeypatch)
    load, left = train.load_data_of_run, []

    def late(*arguments):
        data = load(*arguments)
        if not left:
            left.append(None)
            assert run("train", "--resume", "out").code == 0
            left[0] = snapshot(here)
        return data

    monkeypatch.setattr(train, "load_data_of_run", late)
    result = run("train", "--resume", "out")
    assert (result.code, result.out, result.err) == (0, "finished before: out\n", "")
    assert snapshot(here) == left[0]


def test_a_study_that_another_process_has_begun_meanwhile_is_not_mixed_with(here, monkeypatch):
    load, inner = study.load_data, []

    def late(settings):
        if not inner:
            inner.append(None)
            assert run(*COMMANDS["sweep"], "--epochs", 0).code == 0
            inner[0] = snapshot(here)
        return load(settings)

    monkeypatch.setattr(study, "load_data", late)
    result = run(*COMMANDS["sweep"])
    assert result.code == 2
    assert "expected epochs 0 as out was begun with, got 1" in result.err
    assert snapshot(here) == inner[0]


@pytest.mark.parametrize(
    "name", ["checkpoints", pytest.param("runs", marks=pytest.mark.slow), "runs/beta-1"]
)
def test_folders_inside_a_run_folder_that_are_links_are_not_written_to(here, monkeypatch, name):
    command = ("sweep", *COMMANDS["sweep"][1:])
    if name == "checkpoints":
        interrupt_training(monkeypatch)
        command = ("train", "--resume", "out")
    else:
        assert run(*command).code == 0
        (here / "out" / "runs" / "beta-1" / "metrics.json").unlink()
    (here / "out" / name).rename(here / "mine")
    (here / "out" / name).symlink_to(here / "mine")
    refused(here, *command, message=f"got a link to {here / 'mine'}: put itself there")
