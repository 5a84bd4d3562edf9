"""Commands ended by signals at random moments give, gone on with, what they give undisturbed.

``python -m pytest -m slow -s tests/test_signals.py --cases 40`` tries 40 moments and prints each.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from command_line import WARNED, run, sketching
from safetensors.torch import load_file

from pyro_vae.app.cli import main

pytestmark = [pytest.mark.slow, *WARNED]

# What a clock decides, or the folder that it ran in.
TIMES = {
    *("seconds", "data_per_second", "training_seconds", "seconds_per_epoch", "seconds_per_1000"),
    *("command", "dataset"),
}
SMALL = (
    *("--dataset", "bits.npy", "--output", "out", "--hidden", "8", "--latent-dim", "2"),
    *("--batch-size", "16", "--validation-size", "20", "--device", "cpu", "--epochs"),
)
COMMANDS = {
    "train": ("train", *SMALL, "12", "--checkpoint-minutes", "0", "--patience", "100"),
    "sweep": ("sweep", *SMALL, "3", "--betas", "0.5,2"),
    "compare": (
        "compare", *SMALL, "2", "--guides", "mean-field,full-rank", "--seeds", "1",
        "--num-samples", "30",
    ),
    "autoencoder": ("autoencoder", *SMALL, "6"),
}  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# The file whose appearance begins a phase, and the seconds of which the signal comes at a random one.
PHASES = {
    "start": (None, 6.0),
    "before the settings": (".lock", 0.01),
    "training": ("config.json", 0.4),
    "a checkpoint": (".part-step-*", 0.002),
    "evaluation": ("model.safetensors", 0.6),
    "pictures": ("*.png", 0.3),
    "the page": ("*report.html", 0.05),
}


@pytest.fixture(scope="module")
def bits():
    return np.random.default_rng(0).integers(0, 2, (120, 6))


def untimed(value):
    """Return a JSON value without what a clock decides."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def ending(folder):
    """All that a command leaves and no clock decides: weights, numbers, histories, tables."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "model.safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".safetensors" and "step" not in path.name:
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix == ".json" and path.name not in ("config.json", "study.json"):
            found[name] = untimed(json.loads(path.read_text()))
        elif path.is_file() and path.name.startswith((".part", ".lock")):
            found[name] = "left behind"
    return found


@pytest.fixture(scope="module")
def whole(bits, tmp_path_factory):
    """What each command leaves undisturbed."""
    endings = {}
    for command, arguments in COMMANDS.items():
        with pytest.MonkeyPatch.context() as patch, sketching():
            folder = tmp_path_factory.mktemp(command)
            np.save(folder / "bits.npy", bits)
            patch.chdir(folder)
            result = run(*arguments)
            assert result.code == 0, result.err
            endings[command] = ending(folder / "out")
    return endings


def check_equal(found, expected, place=""):
    """Check two endings: weights and histories to the bit, what is measured by them to its digits.

    A model that was read again lies elsewhere in memory, and a sum may be taken in another order.
    """
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            check_equal(found[name], value, f"{place}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for each, other in zip(found, expected, strict=True):
            check_equal(each, other, place)
    elif isinstance(expected, float) and "/history" not in place:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True), place
    else:
        assert found == expected, place


class Forked:
    """A command in a child of this process, which has imported all that a command imports."""

    def __init__(self, arguments):
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            self._run(arguments)

    def _run(self, arguments):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv, code = ["pyro-vae", *arguments], 70
        with open(os.devnull, "w") as sys.stdout, open("err", "w", buffering=1) as sys.stderr:
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except KeyboardInterrupt:  # outside of main Python ends so
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)


def started(arguments):
    """Begin a command in a process of its own, imports and all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pyro_vae", *arguments]
    with open("err", "w") as err:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)


def wait_until(process, happened, seconds):
    """Wait until something has happened, the process has ended, or so many seconds have passed."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not happened():
        time.sleep(0.001)


def disturb(arguments, phase, number, draw):
    """Start a command and end it by a signal; return its code and what it said."""
    pattern, seconds = PHASES[phase]
    process = started(arguments) if pattern is None else Forked(arguments)
    if pattern is not None:
        wait_until(process, lambda: any(Path("out").rglob(pattern)), 600)
    time.sleep(draw.uniform(0, seconds))
    while process.poll() is None:  # one that falls into a destructor is lost to Python
        process.send_signal(number)
        wait_until(process, lambda: False, 20)
    return process.returncode, Path("err").read_text()


def check_moment(case, here, bits, whole):
    """End a command at a moment drawn by a seed and go on with it; return what was tried."""
    draw = random.Random(case)
    command = list(COMMANDS)[case % len(COMMANDS)]
    phase, number = draw.choice(list(PHASES)), draw.choice(SIGNALS)
    if phase == "a checkpoint" and command in ("sweep", "compare"):
        phase = "training"  # these begin a run anew
    np.save(here / "bits.npy", bits)
    code, err = disturb(COMMANDS[command], phase, number, draw)
    left = sorted(path.name for path in (here / "out").rglob("*") if path.is_file())
    print(f"seed {case}: {command}, {number.name} at {phase}: code {code}, {len(left)} files")
    if code == 128 + number:
        assert err.count("\n") == 1, err
        assert err.startswith("pyro-vae: interrupted: resume with "), err
    again = COMMANDS[command]
    if "--resume" in err:
        again = shlex.split(err.split("`")[1])[1:]
    elif command == "train" and (here / "out" / "config.json").exists():
        again = ("train", "--resume", "out")
    with sketching():
        result = run(*again)
    assert result.code == 0, (result.err, left)
    check_equal(ending(here / "out"), whole[command])
    return phase, "ended by it" if code else "over before"


def test_a_signal_at_a_random_moment_loses_nothing(bits, whole, tmp_path, monkeypatch, request):
    tried = Counter()
    for case in range(request.config.getoption("--cases") or 4):
        here = tmp_path / f"case-{case}"
        here.mkdir()
        monkeypatch.chdir(here)
        tried[check_moment(case, here, bits, whole)] += 1
    print(dict(tried))
