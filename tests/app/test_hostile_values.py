"""Every option of every command at hostile values: refused in one line, or let to where work begins.

``--cases N`` tries N values of each option, and ten of all in processes of their own.
"""

import random
import subprocess
import sys
from inspect import signature
from typing import get_args

import numpy as np
import pytest
import typer
from command_line import WARNED, run, snapshot, train

import pyro_vae as pv
from pyro_vae import tasks
from pyro_vae.app import evaluate as evaluating
from pyro_vae.app import train as training
from pyro_vae.app.cli import app
from pyro_vae.autoencoder import Autoencoder

pytestmark = WARNED

SMALL = ("--dataset", "bits.npy", "--hidden", "4", "--latent-dim", "2", "--device", "cpu")
NUMBERS = [
    *("-1", "0", "1", "2147483647", "2147483648", "9223372036854775808", "1" + "0" * 30),
    *("-" + "9" * 30, "1000000000", "3000"),
]
REALS = ["nan", "inf", "-inf", "-1", "0", "1e308", "-1e308", "1e-320", "1e-8", "1" + "0" * 400]
TEXTS = [
    *("", " ", "nan", "-1", "0", "1e999", ",", "1,,2", "../..", "/dev/null", "/proc/self/mem"),
    *("$a$", "[/b]", "two\nlines", "\x1b[31m", "\udcff", "\N{SNOWMAN}", "a" * 300, "a/" * 2500),
    *(",".join(["8"] * 3000), "9" * 11, "1" + "0" * 30, ",".join(["1000000"] * 4), "random:nan"),
    *("mean-field,mean-field", "out", "run", "bits.npy", "learned", "gaussian", "mnist", "annealed"),
    *("~no-one", "x.png/y.png"),
]
BEGINS = "the work begins"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a finished run, which no call may touch."""
    folder = tmp_path_factory.mktemp("hostile")
    np.save(folder / "bits.npy", np.random.default_rng(0).integers(0, 2, (40, 1, 6, 6)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(*SMALL, "--output", "run", epochs=1)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """Training, measuring and drawing end where they begin."""

    def begin(*_, **__):
        raise pv.InputError(BEGINS)

    monkeypatch.chdir(place)
    monkeypatch.setattr(training, "fit", begin)
    monkeypatch.setattr(Autoencoder, "fit", begin)
    monkeypatch.setattr(evaluating, "log_marginal", begin)
    for name in ("generate", "reconstruct", "complete", "encode", "traverse", "interpolate"):
        monkeypatch.setattr(tasks, name, begin)
    return place


def options():
    """Return every command's options: (command, flags, kind); the run itself has no flag."""
    found = []
    for registered in app.registered_commands:
        for parameter in signature(registered.callback).parameters.values():
            if parameter.name in ("context", "debug"):
                continue
            hint, declared = get_args(parameter.annotation)
            kinds = [kind for kind in (bool, int, float) if kind in (hint, *get_args(hint))]
            flags = []
            if isinstance(declared, typer.models.OptionInfo):
                usual = f"--{parameter.name.replace('_', '-')}"
                flags = "/".join(declared.param_decls or [usual]).split("/")
            found.append((registered.callback.__name__, flags, kinds[0] if kinds else str))
    return found


def draw_call(command, flags, kind, draw):
    """Return arguments in which one option, or the run, is hostile."""
    values = {int: NUMBERS, float: REALS}.get(kind, TEXTS)
    value = draw.choice(values)
    trains = command in ("train", "compare", "sweep", "autoencoder")
    base = [*SMALL, "--output", "out"] if trains else ["run"]
    if not flags:
        return [command, "--", value]
    flag = draw.choice(flags)
    given = [flag] if kind is bool else [flag, value]
    if flag in base:  # in place of the usual one
        at = base.index(flag)
        base[at : at + 2] = []
    return [command, *base, *given]


def assert_told(result, call):
    """A refusal is one line of printable text, after warnings of one line each."""
    assert result.code in (0, 2), (call, result)
    assert "Traceback" not in result.err, (call, result.err)
    if result.code == 2 and "Usage" not in result.err:
        *warned, last, end = result.err.split("\n")
        assert end == "", (call, result.err)
        assert last.startswith("pyro-vae: "), (call, last)
        assert last.isprintable(), (call, last)
        assert len(last) < 8000, call
        assert all(line.isprintable() for line in warned), (call, warned)


@pytest.mark.slow
def test_a_hostile_value_is_refused_in_one_line_or_let_to_the_work(here, request, capsys):
    before, draw = snapshot(here), random.Random(0)
    counts = {"refused": 0, "at work": 0, "of use": 0}
    for _ in range(request.config.getoption("--cases") or 1):
        for command, flags, kind in options():
            call = draw_call(command, flags, kind, draw)
            result = run(*call)
            assert_told(result, call)
            how = "at work" if BEGINS in result.err else "refused" if result.code else "of use"
            counts[how] += 1
            assert snapshot(here) == before, call
    print(counts)
    assert counts["refused"] > 0.3 * sum(counts.values())
    assert counts["at work"] > 0


# What would end in the system's own end of a process, not in an error.
IN_PROCESSES = [
    "train --hidden 1000000,1000000,1000000",
    "train --latent-dim 2147483647",
    "train --num-particles 2147483647",
    "evaluate run --method annealed --num-chains 2147483647 --num-data 2",
    "evaluate run --method annealed --num-steps 2147483647 --num-data 2",
    "complete run --num-draws 2147483647",
    "complete run --method importance --num-samples 2147483647",
    "compare --seeds 1000000000",
    "train --prior gaussian-mixture --num-components 2147483647",
    "train --prior vamp --num-components 1000000000",
]


@pytest.mark.slow
def test_what_the_memory_cannot_hold_is_one_line(place, request):
    number = len(IN_PROCESSES) if request.config.getoption("--cases") else 2
    for text in IN_PROCESSES[:number]:
        call = text.split()
        if call[0] in ("train", "compare"):
            pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
            usual = [each for pair in pairs if pair[0] not in call for each in pair]
            call += [*usual, "--output", "new"]
        command = [sys.executable, "-m", "pyro_vae", *call]
        told = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=300)
        assert told.returncode == 2, (text, told.stderr)
        assert told.stderr.count("\n") == 1, (text, told.stderr)
        assert "memory" in told.stderr or "at most" in told.stderr, told.stderr
