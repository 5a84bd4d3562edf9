"""Every block of the README and of the guide's pages runs as written, in an empty folder."""

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# Pages that continue the README's twelve lines; watching_a_run has a test of its own.
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "watching_a_run")
# A block that can't be run here (installation, long trainings, several processes) says why above it.
BLOCK = re.compile(
    r"(<!-- not run: .+? -->\n)?^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks(path, wanted):
    return [
        text
        for left_out, language, text in BLOCK.findall(path.read_text())
        if language == wanted and not left_out
    ]


def commands(path):
    return [
        line.removeprefix("$ ")
        for text in blocks(path, "console")
        for line in text.splitlines()
        if line.startswith("$ ")
    ]


# Blocks that are the README's own, or nearly: with the slow part alone.
ONLY_AS_WRITTEN = ("compare", "using")
PYTHON_PAGES = [path for path in PAGES if blocks(path, "python")]
COMMAND_PAGES = [path for path in (README, *PAGES) if commands(path)]


def test_there_are_blocks_to_run():
    assert len(blocks(README, "python")) >= 3
    assert len(PYTHON_PAGES) >= 10
    assert len([command for path in COMMAND_PAGES for command in commands(path)]) >= 10
    for path in COMMAND_PAGES:
        assert all(command.startswith("pyro-vae ") for command in commands(path)), path.name


SHORTER = {
    r'(epochs"?[=:] ?)\d+': r"\g<1>1",
    r"num_samples=\d+": "num_samples=30",
    r"num_steps=\d+": "num_steps=5",
    r"num_draws=4, seed": "num_draws=4, num_steps=5, seed",
    r"data\.test\[:20\]": "data.test[:3], max_steps=20",
    r"CompiledTrace_ELBO\(\)": 'CompiledTrace_ELBO(backend="eager")',
}


def shortened(block):
    """Leave one epoch of every training, few draws, and no building of a compiled step."""
    for pattern, shorter in SHORTER.items():
        block = re.sub(pattern, shorter, block)
    return block


def run(path, namespace, read):
    for block in blocks(path, "python"):
        exec(compile(read(block), str(path), "exec"), namespace)


@pytest.fixture(
    scope="module",
    params=[shortened, pytest.param(str, marks=pytest.mark.slow)],
    ids=["short", "as written"],
)
def twelve_lines(request):
    """Return what the README's first block leaves, and how blocks are to be read."""
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(request.param(blocks(README, "python")[0]), str(README), "exec"), namespace)
    return namespace, request.param


@pytest.mark.filterwarnings("ignore:.* data points")  # what the pages speak of
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in ONLY_AS_WRITTEN), id=path.stem)
        for path in (README, *PYTHON_PAGES)
    ],
)
def test_python_blocks_run_in_order(tmp_path, monkeypatch, twelve_lines, path):
    monkeypatch.chdir(tmp_path)
    begun, read = twelve_lines
    kept = {} if path == README else {name: begun[name] for name in ("data", "vae", "shape")}
    run(path, copy.deepcopy(kept), read)


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMAND_PAGES, ids=lambda path: path.stem)
def test_commands_run_in_order(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for block in blocks(path, "python"):
        if ".to_csv(" in block:  # the files that the commands read
            exec(compile(block, str(path), "exec"), {})
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(path):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
