"""Commands where the system gives little: few descriptors, little memory, no home, no asserts."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from command_line import WARNED, run, snapshot

pytestmark = WARNED

TINY = (
    *("--dataset", "bits.npy", "--hidden", "4", "--latent-dim", "2", "--device", "cpu"),
    *("--epochs", "2", "--validation-size", "10"),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 6)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def descriptors_left(number):
    """Let so many files more be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest that is free; a limit counts numbers, not files
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_descriptors_are_enough_or_one_line(here):
    before, codes, weights, out = snapshot(here), [], set(), here / "out"
    for number in (*range(5), 32):
        with descriptors_left(number):
            result = run("train", *TINY, "--output", "out")
        codes.append(result.code)
        if result.code:
            assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
            assert "Too many open files" in result.err
        if out.exists():  # a run that has trained is gone on with
            assert result.code == 0 or run("train", "--resume", "out").code == 0
            weights.add((out / "model.safetensors").read_bytes())
            shutil.rmtree(out)
        assert snapshot(here) == before
    assert codes[0] == 2
    assert codes[-1] == 0
    assert len(weights) == 1


def test_no_home_is_needed(here, monkeypatch):
    for home in (None, "/proc/none"):
        monkeypatch.delenv("HOME", raising=False)
        if home is not None:
            monkeypatch.setenv("HOME", home)
        result = run("train", *TINY, "--output", f"out-{home is None}")
        assert result.code == 0, result.err
    first, second = (here / f"out-{name}" / "model.safetensors" for name in (True, False))
    assert first.read_bytes() == second.read_bytes()


IN_LITTLE_MEMORY = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
runpy.run_module("pyro_vae", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_without_asserts_in_four_gigabytes_of_addresses_is_the_same(here):
    assert run("train", *TINY, "--output", "usual").code == 0
    told = ("train", *TINY, "--output", "out")
    process = subprocess.run(
        [sys.executable, "-O", "-c", IN_LITTLE_MEMORY, *told], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    usual, small = ((here / name / "model.safetensors").read_bytes() for name in ("usual", "out"))
    assert small == usual


def test_python_without_docstrings_is_refused_in_one_line(here):
    process = subprocess.run(
        [sys.executable, "-OO", "-m", "pyro_vae", "train", *TINY, "--output", "out"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(
        "pyro-vae: expected Python with docstrings, which Pyro reads, got -OO: use -O"
    )
    assert process.stderr.count("\n") == 1
    assert not (here / "out").exists()
