"""Execute the notebooks of this folder and keep their outputs; with ``--check`` fast, keeping none.

    python notebooks/execute.py [--check] [NOTEBOOK ...]

Every notebook reads two variables: with ``PYRO_VAE_QUICK`` it runs on little data (``--check``), with
``PYRO_VAE_DATA`` on MNIST instead of the digits. Kept outputs are those of the digits. A notebook
notes the checksum of the code and the version of the package that gave its outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

import pyro_vae

FOLDER = Path(__file__).parent
# What a training without widgets says of how it goes, which is over when it is read.
PROGRESS = re.compile(r"\r?(epoch \d+/\d+|eager|recorded|compiled)\b[^\r\n]*")
# Seconds that one cell may take before it counts as hanging.
TIMEOUT = 600


def code_checksum(notebook: NotebookNode) -> str:
    """Return the SHA-256 of the code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute(notebook: NotebookNode, *, quick: bool) -> None:
    """Run every cell in place, by a kernel of the Python that runs this.

    Raises:
        CellExecutionError: a cell that fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYRO_VAE_DATA"}
    environment.pop("PYRO_VAE_QUICK", None)
    if quick:
        environment["PYRO_VAE_QUICK"] = "1"
    # Progress bars without widgets are a matter of this machine, not of the notebook.
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"
    # Without folders the manager knows the kernel of this Python alone, whatever else is installed.
    specifications = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specifications)
    client = NotebookClient(
        notebook, km=manager, timeout=TIMEOUT, record_timing=False, coalesce_streams=True
    )
    client.execute(env=environment)


def note_what_ran(notebook: NotebookNode) -> None:
    """Write down which code gave the outputs, and nothing of the machine."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        pyro_vae={"code": code_checksum(notebook), "version": pyro_vae.__version__},
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                output.text = PROGRESS.sub("", output.text).strip()
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("text") != ""]


def main() -> None:
    """Execute the notebooks named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="little data, outputs thrown away")
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all of the folder")
    arguments = parser.parse_args()
    for path in arguments.notebooks or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        execute(notebook, quick=arguments.check)
        if not arguments.check:
            note_what_ran(notebook)
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
