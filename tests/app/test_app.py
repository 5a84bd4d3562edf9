"""The application itself: its help, and what a real process prints."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
from command_line import ESTIMATE_KEYS, WARNED, run

import pyro_vae as pv
from pyro_vae.app import names
from pyro_vae.app.cli import app

pytestmark = WARNED


def test_help_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands_there = [command.callback.__name__ for command in app.registered_commands]
    assert {"train", "evaluate", "compare", "sweep", "sample"} <= set(commands_there)
    for arguments in ((), *((name,) for name in commands_there)):
        result = run(*arguments, "--help")
        assert result.code == 0
        assert max(map(len, result.out.splitlines())) <= 80


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "pyro_vae", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, **options)


@pytest.mark.slow
def test_a_real_process_prints_json_alone(here):
    process = start(
        "evaluate", "run", "--num-samples", 10, "--method", "importance", "--json", cwd=here
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert set(json.loads(out)) == ESTIMATE_KEYS
    assert all(line.startswith("pyro-vae: warning: ") for line in err.splitlines())


@pytest.mark.slow
def test_a_real_process_says_what_is_wrong(tmp_path):
    process = start("train", "--latent-dim", 0, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("pyro-vae: expected")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_a_training_has_one_panel_of_the_help():
    listed = " ".join(names.PANELS.values()).split()
    assert len(listed) == len(set(listed))
    assert {each.name for each in fields(names.TrainSettings)} <= set(listed)


def test_the_version_and_an_example_of_each_command_are_shown():
    assert run("--version").out == f"pyro_vae {pv.__version__}\n"
    for command in app.registered_commands:
        example = command.epilog.removeprefix("Example: pyro-vae ").split()
        assert example[0] == command.callback.__name__
