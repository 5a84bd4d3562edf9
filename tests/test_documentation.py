"""What is public is documented: in the pages built from the docstrings, and in the guide's tables."""

import re
import runpy
import shutil
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest
from docutils import nodes
from nbformat.v4 import new_code_cell, new_notebook, new_output

import pyro_vae

ROOT = Path(__file__).parent.parent
MODULES = [
    value
    for value in (getattr(pyro_vae, name) for name in pyro_vae.__all__)
    if isinstance(value, types.ModuleType)
]


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """Build the pages, every warning an error, and return the names they define."""
    source = tmp_path_factory.mktemp("docs")
    for path in (ROOT / "docs").glob("*.*"):
        if path.is_file():
            shutil.copy(path, source)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", source, source / "build"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    # Sphinx's inventory: four lines of heading, then one compressed line per name.
    inventory = (source / "build" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("module", [pyro_vae, *MODULES], ids=lambda module: module.__name__)
def test_every_public_name_has_its_place_in_the_pages(documented, module):
    for name in module.__all__:
        value = getattr(module, name)
        owners = [module.__name__]
        if name in pyro_vae.__all__ and getattr(pyro_vae, name) is value:
            owners.append("pyro_vae")
        assert any(f"{owner}.{name}" in documented for owner in owners), f"{module.__name__}.{name}"


@pytest.mark.parametrize("module", [pyro_vae, *MODULES], ids=lambda module: module.__name__)
def test_public_names_are_there_and_listed_once(module):
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("module", [pyro_vae.priors, pyro_vae.likelihoods, pyro_vae.guides])
def test_every_component_is_in_the_table(module):
    text = (ROOT / "docs" / "components.md").read_text()
    missing = [name for name in module.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_names_in_the_texts_exist():
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "notebooks").glob("*.ipynb")]
    texts += (ROOT / "docs").glob("*.md")
    pattern = re.compile(r"\bpv((?:\.[A-Za-z_]\w*)+)")
    found = {name for path in texts for name in pattern.findall(path.read_text())}
    assert len(found) > 10
    for name in found:
        value = pyro_vae
        for part in name.strip(".").split("."):
            assert hasattr(value, part), f"pv{name}"
            value = getattr(value, part)
            if not isinstance(value, types.ModuleType | type):
                break  # what follows is an attribute of what it returns


def test_every_module_has_its_place_in_the_layout_described():
    package = Path(pyro_vae.__file__).parent
    described = (ROOT / "CONTRIBUTING.md").read_text().split("## Layout")[1].split("\n## ")[0]
    for path in package.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert path.stem == "__init__" or re.search(rf"\b{path.stem}\b", described), path.stem


def test_the_citation_names_the_version():
    assert f"\nversion: {pyro_vae.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_page_lists_exactly_the_public_names():
    section = (ROOT / "docs" / "public_names.md").read_text()
    rows = re.findall(r"^\| `pv([.\w]*)` \| (.+) \|$", section, re.MULTILINE)
    listed = [
        f"pyro_vae{module}.{name}" for module, row in rows for name in row.strip("`").split("`, `")
    ]
    public = {}
    for module in [pyro_vae, *MODULES]:  # the top level first: what it has too is listed there alone
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType) and getattr(pyro_vae, name, None) is value:
                public[f"pyro_vae.{name}"] = value
            elif not isinstance(value, types.ModuleType):
                public[f"{module.__name__}.{name}"] = value
    assert sorted(listed) == sorted(public)


@pytest.fixture
def settings(monkeypatch):
    """Return what the settings of the documentation define."""
    monkeypatch.syspath_prepend(ROOT / "docs")  # and take away what they put there
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def test_the_label_of_a_brace_goes_below_it(settings):
    formula = r"\underbrace{\log p(x)}_{\text{evidence}} + a_b"
    written = settings["_mathml"](nodes.math_block(formula, formula), as_block=True)
    assert written.count("<munder>") == written.count("</munder>") == 2
    assert written.count("<msub>") == written.count("</msub>") == 1
    assert written.index("evidence") < written.rindex("</munder>")


def test_arguments_described_in_prose_are_listed_to_get_their_types(settings):
    list_arguments = settings["_list_arguments"]

    def function(first: int, *rest: str, option: bool = True, untyped=None):
        pass

    prose, listed, fields = ["Text."], [r":param \*rest: some.", ":raises E: x"], [":ivar a: b"]
    for lines in (prose, listed, fields):
        list_arguments(None, "function", "name", function, None, lines)
    assert prose == ["Text.", ":param first:", ":param rest:", ":param option:", ""]
    assert listed == [":param first:", ":param option:", r":param \*rest: some.", ":raises E: x", ""]
    assert fields == [":ivar a: b"]


def test_a_notebooks_tables_are_tables_of_its_page(tmp_path):
    page = runpy.run_path(str(ROOT / "docs" / "notebook_pages.py"))["page"]
    shown = {"text/html": "<style>th {}</style><table><th>k</th></table>", "text/plain": "k 0.7"}
    cell = new_code_cell("table", outputs=[new_output("execute_result", shown)])
    text = page(new_notebook(cells=[cell]), "name", tmp_path)
    assert "<table><th>k</th></table>" in text
    assert "<style>" not in text
    assert "0.7" not in text


def test_kept_notebooks_hold_what_was_said_but_no_progress():
    note_what_ran = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))["note_what_ran"]
    progress = [
        "\repoch 0/2 ? \repoch 1/2 00:01 ELBO -3.2",
        "eager as asked\n",
        "recorded: 9 steps\n",
    ]
    said = [*progress, "a warning\n"]
    outputs = [new_output("stream", name="stderr", text=text) for text in said]
    notebook = new_notebook(cells=[new_code_cell("fit()", outputs=outputs)])
    note_what_ran(notebook)
    assert [output.text for output in notebook.cells[0].outputs] == ["a warning"]
