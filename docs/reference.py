"""The pages of the API documentation: one per public module, from its ``__all__``."""

from __future__ import annotations

import types
from pathlib import Path

import pyro_vae

FOLDER = "reference"


def public_modules() -> dict[str, types.ModuleType]:
    """Return the package and its public modules by name."""
    values = {name: getattr(pyro_vae, name) for name in pyro_vae.__all__}
    modules = {f"pyro_vae.{name}": value for name, value in values.items() if _is_module(value)}
    return {"pyro_vae": pyro_vae, **dict(sorted(modules.items()))}


def public_names(module: types.ModuleType) -> dict[str, object]:
    """Return what a module's ``__all__`` names, its submodules left out."""
    values = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in values.items() if not _is_module(value)}


def documented_as(module: types.ModuleType, name: str) -> str:
    """Return the one full name under which a public name is documented."""
    value, top = getattr(module, name), public_names(pyro_vae)
    owner = "pyro_vae" if top.get(name) is value else module.__name__
    return f"{owner}.{name}"


def page(module: types.ModuleType) -> str:
    """Return the page of a module as reStructuredText."""
    title = module.__name__
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", "   :members:"]
    names = public_names(module)
    full_names = {name: documented_as(module, name) for name in names}
    elsewhere = [name for name, full in full_names.items() if full != f"{title}.{name}"]
    constants = [name for name, value in names.items() if not callable(value)]
    if elsewhere or constants:
        lines += [f"   :exclude-members: {', '.join([*elsewhere, *constants])}", ""]
    for name in constants:
        lines += [f".. py:data:: {name}", f"   :module: {title}", *_value(names[name]), ""]
    if elsewhere:
        links = ", ".join(f":py:obj:`{full_names[name]}`" for name in elsewhere)
        lines += [f"Documented at the top level: {links}."]
    return "\n".join([*lines, ""])


def write_pages(source: Path) -> None:
    """Write the pages below the documentation's folder; a page that is right is left alone."""
    folder = source / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {f"{name}.rst": page(module) for name, module in public_modules().items()}
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _value(constant: object) -> list[str]:
    """Show a constant made of names or numbers; of a dictionary its keys."""
    if isinstance(constant, dict):
        constant = tuple(constant)
    return [f"   :value: {constant!r}"] if isinstance(constant, str | int | tuple) else []


def _is_module(value: object) -> bool:
    return isinstance(value, types.ModuleType)
