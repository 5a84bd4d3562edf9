"""Every block of the README runs as written, one after another in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
# A block that can't be run here (installation, long trainings, several processes) says why above it.
BLOCK = re.compile(
    r"(<!-- not run: .+? -->\n)?^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
BLOCKS = [
    (language, text) for left_out, language, text in BLOCK.findall(README.read_text()) if not left_out
]
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ")
    for language, text in BLOCKS
    if language == "console"
    for line in text.splitlines()
]


def test_there_are_blocks_to_run():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 5
    assert all(line.startswith("pyro-vae ") for line in COMMANDS)


SHORTER = {
    r'(epochs"?[=:] ?)\d+': r"\g<1>1",
    r"num_samples=\d+": "num_samples=30",
    r"data\.test\[:20\]": "data.test[:3], max_steps=20",
    r"CompiledTrace_ELBO\(\)": 'CompiledTrace_ELBO(backend="eager")',
}


def shortened(block):
    """Leave one epoch of every training, few draws, and no building of a compiled step."""
    for pattern, shorter in SHORTER.items():
        block = re.sub(pattern, shorter, block)
    return block


@pytest.mark.filterwarnings("ignore:.* data points have Pareto k")  # what the README speaks of
@pytest.mark.parametrize(
    "read", [shortened, pytest.param(str, marks=pytest.mark.slow, id="as written")]
)
def test_python_blocks_run_in_order(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(read(block), str(README), "exec"), namespace)
    assert namespace["estimate"].log_prob.isfinite().all()


@pytest.mark.slow
def test_commands_run_in_order(tmp_path):
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for command in COMMANDS:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
