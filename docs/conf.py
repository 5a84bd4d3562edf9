"""Settings of Sphinx: the guide's pages, the notebooks, and the reference from the docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import notebook_pages
import reference

import pyro_vae

project = "pyro_vae"
author = "the pyro_vae contributors"
version = release = pyro_vae.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]  # as the notebooks write it
html_math_renderer = "mathml"  # written into the pages, which then need no network
exclude_patterns = ["build", "description.md"]  # the latter is for a package index
html_theme = "furo"
pygments_dark_style = "monokai"  # the theme's own underlines every imported name
html_title = f"pyro_vae {release}"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False

# Types are written at the arguments, where they are read; a signature keeps names and defaults.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
add_module_names = False
toc_object_entries_show_parents = "hide"

napoleon_numpy_docstring = False
napoleon_use_rtype = False
# A field of a dataclass is documented once, in the class.
napoleon_use_ivar = True
napoleon_custom_sections = ["Shapes", "Source", ("Warns", "Warns")]

# A reference to a public name must lead somewhere. Names of other libraries, and types that a
# signature takes from a module that is not public, are plain text.
nitpicky = True
_PUBLIC = "|".join(name.removeprefix("pyro_vae.") for name in reference.public_modules())
nitpick_ignore_regex = [
    ("py:.*", r"(?!pyro_vae).*"),
    ("py:class", rf"pyro_vae\.(?!(?:{_PUBLIC})\.\w+$)\w+\..*"),
]


_LABELLED_BRACE = re.compile(
    r"<msub>(\s*<munder>.*?<mo>\N{BOTTOM CURLY BRACKET}</mo>.*?)</msub>", re.S
)
_LISTED = re.compile(r":param [\\*]*(\w+):")  # as napoleon writes an argument that is listed


def setup(app: Sphinx) -> None:
    """Write the pages of modules and notebooks before Sphinx looks for pages; see to properties."""
    app.connect("builder-inited", lambda app: reference.write_pages(Path(app.srcdir)))
    app.connect("builder-inited", lambda app: notebook_pages.write_pages(Path(app.srcdir)))
    app.connect("autodoc-process-docstring", _spare_colon, priority=400)
    app.connect("autodoc-process-docstring", _list_arguments, priority=600)
    app.add_html_math_renderer("mathml", (_write_inline, None), (_write_block, None))


def _write_inline(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    translator.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _write_block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    translator.body.append(f'<p class="formula">{_mathml(node, as_block=True)}</p>')
    raise nodes.SkipNode


def _mathml(node: nodes.TextElement, *, as_block: bool) -> str:
    text = " ".join(node.astext().split())
    # Browsers put no space between a function's name and its argument.
    written = str(tex2mathml(text.replace(r"\log ", r"\log\, "), as_block=as_block))
    # The label of a brace goes below it; docutils writes it as an index, behind.
    return _LABELLED_BRACE.sub(r"<munder>\1</munder>", written)


def _list_arguments(
    _app: Sphinx, what: str, _name: str, obj: object, _options: object, lines: list[str]
) -> None:
    """List arguments that a docstring describes in prose: Sphinx adds types to listed names alone.

    Napoleon (priority 500) has listed the others by now, and the fields of classes.
    """
    if what not in ("class", "function", "method") or not callable(obj):
        return
    found = [(match[1], n) for n, line in enumerate(lines) if (match := _LISTED.match(line))]
    if not any(line.startswith(":ivar ") for line in lines):
        place = min((n for _, n in found), default=len(lines))
        names = {name for name, _ in found}
        given = inspect.signature(obj).parameters.values()
        typed = [each.name for each in given if each.annotation is not each.empty]
        lines[place:place] = [f":param {name}:" for name in typed if name not in names]
        lines.append("")


def _spare_colon(_app: Sphinx, what: str, *rest: object) -> None:
    """Write a dash for a property's first colon, before which napoleon (priority 500) sees a type."""
    lines = rest[-1]
    if what == "property" and isinstance(lines, list) and lines:
        lines[0] = lines[0].replace(": ", " - ", 1)
