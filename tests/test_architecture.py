"""The import direction of the package, and what importing it must not do."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent

# A module imports from the groups above its own, or from its own group without a circle.
GROUPS = [
    {"version", "errors", "files", "distributed", "data_scale", "sources", "summary"}
    | {"networks", "datasets", "plots", "distributions"},
    {"priors", "likelihoods", "guides"},
    {"vae", "beta"},
    {"pair"},
    {"weights"},
    {"infer"},
    {"evaluation"},
    {"autoencoder", "tasks", "runs"},
    {"app"},
    {"transformer"},
    {"__main__"},
]
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}


def unit_of(path: Path) -> str:
    """Return the top-level module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_units(path: Path) -> set[str]:
    units = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            units |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.level == 1 and path.parent != PACKAGE:
                continue  # from a file of the same folder
            assert node.level == 0, f"{path}: relative import across folders"
            if node.module == "pyro_vae":
                units |= {f"pyro_vae.{alias.name}" for alias in node.names}
            else:
                units.add(node.module)
    return {name.split(".")[1] for name in units if name.startswith("pyro_vae.")}


def package_files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_place_in_the_layout():
    assert {unit_of(path) for path in package_files()} == set(RANK)


def test_imports_go_one_way():
    for path in package_files():
        own = unit_of(path)
        for other in imported_units(path) - {own}:
            assert other in RANK, f"{path.name} imports {other}, which has no place in the layout"
            assert RANK[other] <= RANK[own], f"{own} imports {other} from a group below it"


def check_no_circle(edges: dict[str, set[str]]) -> None:
    remaining = set(edges)
    while remaining:
        free = {name for name in remaining if not edges[name] & remaining}
        assert free, f"circular imports among {sorted(remaining)}"
        remaining -= free


def test_no_circle_between_units():
    edges: dict[str, set[str]] = {}
    for path in package_files():
        own = unit_of(path)
        edges.setdefault(own, set()).update(imported_units(path) - {own})
    check_no_circle(edges)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the package's modules that a file imports anywhere, in functions and for types too."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = module_of(path.parent) if node.level else ""
            source = ".".join(part for part in (folder, node.module) if part)
            for alias in node.names:
                inside = f"{source}.{alias.name}"
                found.add(inside if inside in modules else source)
    return found & modules - {module_of(path)}


def test_no_circle_between_files():
    # The package's face imports everything: a file that imports it closes a circle.
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    check_no_circle({name: imported_modules(path, set(paths)) for name, path in paths.items()})


def test_a_circle_between_files_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "package")
    folder = tmp_path / "package" / "inside"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("def f():\n    from package.inside import two\n")
    (folder / "two.py").write_text("if TYPE_CHECKING:\n    from package.inside.one import f\n")
    paths = {module_of(path): path for path in folder.glob("*.py")}
    edges = {name: imported_modules(path, set(paths)) for name, path in paths.items()}
    with pytest.raises(AssertionError, match=r"among \['package.inside.one', 'package.inside.two'\]"):
        check_no_circle(edges)


def test_every_file_says_in_its_first_line_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(parse(path))
        assert docstring, f"{path} has no docstring"
        assert docstring.splitlines()[0].endswith("."), f"{path}: {docstring.splitlines()[0]}"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


@functools.cache
def said_on_import():
    """Import the package in a process of its own: first the core, then every name."""
    code = (
        "import torch, pyro, random, sys\n"
        "import numpy as np\n"
        "random.seed(1); np.random.seed(1); torch.manual_seed(1)\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().sum(),\n"
        "            random.getstate(), np.random.get_state()[1].sum(),\n"
        "            len(pyro.get_param_store()), torch.distributions.Distribution._validate_args,\n"
        "            pyro.poutine.util.is_validation_enabled(), torch.is_grad_enabled())\n"
        "before = state()\n"
        "import pyro_vae as pv\n"
        "pv.VAE, pv.fit, pv.log_marginal, pv.priors.StandardNormal\n"
        "print([m for m in ('arviz', 'matplotlib', 'torchvision', 'sklearn') if m in sys.modules])\n"
        "for name in pv.__all__: getattr(pv, name)\n"
        "print(all(bool(a == b) for a, b in zip(before, state())))"
    )
    return run_python(code).splitlines()


def test_importing_the_package_is_light():
    assert said_on_import()[0] == "[]"


def test_bare_import_and_help_load_no_torch():
    assert run_python("import sys, pyro_vae; print('torch' in sys.modules)") == "False"
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pyro_vae.app.cli import app\n"
        "result = CliRunner().invoke(app, ['train', '--help'])\n"
        "print(result.exit_code, 'torch' in sys.modules, 'pyro' in sys.modules)"
    )
    assert run_python(code) == "0 False False"


def test_importing_changes_no_global_state():
    assert said_on_import()[1] == "True"


def test_public_names_are_reachable_and_listed():
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name) is not None
    assert set(pyro_vae.__all__) <= set(dir(pyro_vae))


def test_what_serves_any_pair_knows_no_component():
    """A pair is two functions, whoever wrote them; components and the VAE are one way to do so."""
    rooms = {"beta", "pair", "weights", "infer", "evaluation", "tasks", "autoencoder", "plots"}
    for path in PACKAGE.rglob("*.py"):
        if unit_of(path) in rooms:
            components = {"priors", "likelihoods", "guides", "vae"}
            found = {name.split(".")[1] for name in imported_units(path) if "." in name}
            assert not found & components, f"{path}: imports {found & components}"
