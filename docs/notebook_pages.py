"""The pages of the notebooks: their text, code and kept outputs as Markdown, figures as files."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

import pyro_vae

FOLDER = "notebooks"
REPOSITORY_NOTEBOOKS = Path(pyro_vae.__file__).parents[1] / FOLDER
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def page(notebook: NotebookNode, name: str, folder: Path) -> str:
    """Return a notebook as Markdown; its figures are written beside it."""
    parts: list[str] = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            for count, output in enumerate(cell.outputs):
                parts += _shown(output, folder / f"{name}-{number}-{count}.png")
    return "\n\n".join(parts) + "\n"


def _shown(output: NotebookNode, figure: Path) -> list[str]:
    """Return what a reader sees of an output: its figure, else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        figure.write_bytes(base64.b64decode(data["image/png"]))
        return [f"![figure]({figure.name})"]
    if "text/html" in data:
        # A data frame brings rules of its own for its looks; the pages have theirs.
        table = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        return [f'```{{raw}} html\n<div class="output">{table}</div>\n```']
    text = output.get("text", "") or data.get("text/plain", "")
    return [f"```text\n{_COLOURS.sub('', text).rstrip()}\n```"] if text.strip() else []


def write_pages(source: Path) -> None:
    """Write a page for each notebook of the repository below the documentation's folder."""
    folder = source / FOLDER
    folder.mkdir(exist_ok=True)
    for path in sorted(REPOSITORY_NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        (folder / f"{path.stem}.md").write_text(page(notebook, path.stem, folder))
