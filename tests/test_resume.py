"""A run of the real command killed at random moments ends, resumed, as if nothing had happened."""

import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from command_line import run, sketching

import pyro_vae as pv

TIMES = {"seconds", "data_per_second"}  # the columns of the history that a clock decides
SMALL = (
    *("--hidden", 8, "--latent-dim", 2, "--batch-size", 16, "--validation-size", 20),
    *("--schedule", "cosine", "--patience", 100, "--epochs", 12, "--device", "cpu"),
)


@pytest.fixture(scope="module")
def bits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bits.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2, (120, 6)))
    return path


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(*arguments, launch=()):
    pipe = subprocess.PIPE
    command = [sys.executable, *launch, "-m", "pyro_vae", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONHASHSEED", None)  # the order of sets differs from process to process
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def train(bits, folder, *arguments, launch=()):
    options = ("--dataset", bits, *SMALL, "--output", folder, *arguments)
    return start("train", *options, launch=launch)


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_step(checkpoints, step, process):
    """Wait until a state of this step or a later one is on the disk, or the run is over."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        names = (path.stem for path in checkpoints.glob("step-*.safetensors"))
        if any(int(name.removeprefix("step-")) >= step for name in names):
            return
        time.sleep(0.002)


def ending(folder):
    """All that a run leaves and no clock decides."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("training_seconds")
    history = {name: row for name, row in metrics.pop("history").items() if name not in TIMES}
    return (folder / "model.safetensors").read_bytes(), history, metrics


@pytest.fixture(scope="module")
def whole(bits, tmp_path_factory):
    """The uninterrupted run, written without a checkpoint in between, and its seconds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = train(bits, folder, "--checkpoint-minutes", 1000)
    wait_for(folder / "config.json", process)
    begun = time.monotonic()
    finished(process)
    return folder, time.monotonic() - begun


def assert_resumed(folder, whole, launch=()):
    finished(start("train", "--resume", folder, launch=launch))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    assert ending(folder) == ending(whole)


@pytest.mark.slow
def test_a_seed_repeats_its_run_to_the_bit(bits, whole, tmp_path):
    finished(train(bits, tmp_path / "run", "--checkpoint-every", 5))
    assert ending(tmp_path / "run") == ending(whole[0])


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed(bits, whole, tmp_path, request):
    moments = random.Random(0)
    counts = {"before a checkpoint": 0, "while writing one": 0, "between": 0, "after the training": 0}
    for case in range(request.config.getoption("--cases") or 5):
        folder = tmp_path / f"run-{case}"
        # A state after every step: most of the time goes into writing them.
        process = train(bits, folder, "--checkpoint-minutes", 0)
        wait_for(folder / "config.json", process)
        if case % 4:  # most of them amid the steps, the others at any moment
            wait_for_step(folder / "checkpoints", moments.randrange(1, 40), process)
            time.sleep(moments.uniform(0, 0.02))
        else:
            time.sleep(moments.uniform(0, whole[1]))
        process.kill()
        process.communicate()
        states = list((folder / "checkpoints").glob("*"))
        if (folder / "model.safetensors").exists():
            counts["after the training"] += 1
        elif any(path.name.startswith(".part") for path in states):
            counts["while writing one"] += 1
        else:
            counts["between" if states else "before a checkpoint"] += 1
        assert_resumed(folder, whole[0])
    print(f"killed {counts}")
    assert counts["while writing one"] + counts["between"] > 0, counts


def workers_of(process):
    """Return the processes that torchrun has begun."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def end_workers_apart(bits, folder, draw):
    """End both workers, each at a moment and by a signal of its own; return what was sent."""
    process = train(bits, folder, "--checkpoint-minutes", 0, launch=TORCHRUN)
    wait_for_step(folder / "checkpoints", draw.randrange(1, 60), process)
    workers, sent = workers_of(process), []
    draw.shuffle(workers)
    for pid in workers:
        number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
        time.sleep(draw.uniform(0, 0.3))
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            sent.append(number.name)
    _, err = process.communicate(timeout=300)
    ours = [line for line in err.splitlines() if "pyro-vae: " in line]
    states = [path.stem for path in sorted((folder / "checkpoints").glob("step-*"))]
    return sent, process.returncode, states, ours


# With --cases N, N times more with a signal and a moment for each of them.
@pytest.mark.slow
def test_processes_that_share_a_run_leave_it_and_resume_it_together(bits, tmp_path, request):
    finished(train(bits, tmp_path / "whole", launch=TORCHRUN))
    folder = tmp_path / "left"
    process = train(bits, folder, "--checkpoint-minutes", 0, launch=TORCHRUN)
    wait_for_step(folder / "checkpoints", 10, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to each of them
    _, err = process.communicate(timeout=60)
    assert f"resume with `pyro-vae train --resume {folder}`" in err
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert not (folder / "model.safetensors").exists()
    refused = run("train", "--resume", folder)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"expected as many processes as {folder} was begun with, 2, got 1" in refused.err
    assert_resumed(folder, tmp_path / "whole", launch=TORCHRUN)
    for case in range(request.config.getoption("--cases") or 0):
        folder = tmp_path / f"left-{case}"
        print(f"seed {case}: {end_workers_apart(bits, folder, random.Random(case))}")
        assert_resumed(folder, tmp_path / "whole", launch=TORCHRUN)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_its_state_on_disk(bits, whole, tmp_path, number):
    folder = tmp_path / "run"
    process = train(bits, folder, "--epochs", 100_000, "--compile", "off")
    wait_for(folder / "config.json", process)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"pyro-vae: interrupted: resume with `pyro-vae train --resume {folder}`\n"
    assert len(list((folder / "checkpoints").iterdir())) == 1
    refused = run("train", "--resume", folder, "--epochs", 12)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "expected epochs 100000" in refused.err


def test_a_run_folder_says_how_it_came_about(bits, tmp_path):
    settings = ("--dataset", bits, *SMALL, "--epochs", 1, "--seed", 5)
    told = ("train", *settings, "--output", tmp_path / "run")
    with sketching():
        assert run(*told).code == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert record["command"] == shlex.join(["pyro-vae", *map(str, told)])
    assert record["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "matplotlib": matplotlib.__version__,
        "pyro_vae": pv.__version__,
    }
    assert (record["device"], record["settings"]["seed"], record["processes"]) == ("cpu", 5, 1)
    data = pv.datasets.load(bits, binarize="dynamic", validation_size=20, seed=5)
    assert record["checksums"] == data.checksums


def test_what_is_no_interrupted_run_is_refused(bits, tmp_path):
    result = run("train", "--resume", tmp_path)
    assert result.code == 2
    assert "expected a run folder" in result.err
    result = run("train", "--resume", tmp_path, "--output", "elsewhere")
    assert result.code == 2
    assert "without --output" in result.err
    assert list(tmp_path.iterdir()) == []
