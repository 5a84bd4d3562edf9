"""Every notebook of the folder runs, and the outputs it keeps are those of its code."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import pyro_vae

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
code_checksum = runpy.run_path(str(FOLDER / "execute.py"))["code_checksum"]

# What a path on somebody's machine starts with, where text goes: after a quote, a blank, a bracket.
MACHINE_PATH = re.compile(
    r"(?:^|[\s'\"(=:])"
    r"(?:/(?:home|root|tmp|work|usr|opt|var|mnt|Users)/|[A-Z]:\\\\?)[\w.]",
    re.MULTILINE,
)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def texts_of(output):
    """Return all text of an output, pictures left out."""
    if output.output_type == "stream":
        return [output.text]
    return [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]


@pytest.mark.slow
def test_every_cell_runs(path):
    command = [sys.executable, FOLDER / "execute.py", "--check", path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kept_outputs_are_those_of_this_code(path):
    notebook = nbformat.read(path, as_version=4)
    again = f"run `make notebooks NOTEBOOKS=notebooks/{path.name}`"
    noted = notebook.metadata.get("pyro_vae", {})
    assert noted.get("code") == code_checksum(notebook), f"the code has changed: {again}"
    assert noted.get("version") == pyro_vae.__version__, f"the package has changed: {again}"


def test_every_cell_was_run_in_order_without_an_error(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", output.text


def test_outputs_name_no_machine(path):
    for cell in code_cells(path):
        for text in [cell.source, *(text for output in cell.outputs for text in texts_of(output))]:
            assert not MACHINE_PATH.search(text), text


def test_it_says_what_it_is_good_for_and_where_to_go(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == cells[-1].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "you will be able to" in cells[0].source
    assert "## Where to go next" in cells[-1].source
