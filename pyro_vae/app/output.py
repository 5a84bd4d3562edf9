"""What is shown: self-contained HTML pages of text, tables and figures; tables on the terminal."""

import base64
import io
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape as escape_markup
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyro_vae.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Rows = Sequence[Sequence[object]]
# A figure of more bytes than this as SVG, such as a scatter of many points, is embedded as PNG: a
# browser draws it faster and the page stays small enough to be mailed.
_LARGEST_SVG = 150_000
# CSS pixels per inch, by the CSS standard; figures appear at the size they were drawn for.
_PIXELS_PER_INCH = 96
_NUMERIC = re.compile(r"[-+]?(\d|\.\d|inf)|-$|yes$|no$")

# The policy forbids every resource but embedded pictures: the page needs no network and runs no code.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = Path(__file__).with_name("output.css")


class Page:
    """A page that is built from top to bottom and read without a network.

    What is passed in is text, never markup: everything is escaped. The same content gives the same
    bytes. The page holds no code, names no other resource, follows the reader's light or dark scheme,
    and prints without breaking a figure or a row.

    Example:
        >>> page = Page("Run 1")
        >>> page.section("Result")
        >>> page.table(["quantity", "nats"], [["log p(x)", -19.314]], caption="Test data")
        >>> ">-19.31</td>" in page.html()
        True
    """

    def __init__(self, title: str, *, subtitle: str = "", language: str = "en") -> None:
        self.title, self.subtitle, self.language = title, subtitle, language
        self._sections: list[str] = []
        self._parts: list[str] = []

    def section(self, heading: str) -> None:
        """Begin a section; what follows belongs to it."""
        self._sections.append(heading)
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{escape(heading)}</h2>')

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def warning(self, text: str) -> None:
        """Add a paragraph that a reader must not miss."""
        label = "<strong>Warning:</strong>"
        self._parts.append(f'<p class="warning" role="note">{label} {escape(text)}</p>')

    def code(self, text: str) -> None:
        """Add text as it is to be typed, such as a command line."""
        lines = "\n".join(escape(line) for line in text.split("\n"))
        self._parts.append(f"<pre><code>{lines}</code></pre>")

    def table(self, header: Sequence[str], rows: _Rows, *, caption: str, decimals: int = 2) -> None:
        """Add a table whose first column names the rows; numbers are aligned right.

        Cells are text, numbers, floats with so many decimals, or None for what is not known.
        """
        cells = [[_cell(value, decimals) for value in row] for row in rows]
        numeric = [all(_NUMERIC.match(row[i]) for row in cells) for i in range(len(header))]
        kinds = ["", *(' class="number"' if each else "" for each in numeric[1:])]
        columns = zip(kinds, map(escape, header), strict=True)
        head = "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in columns)
        body = "".join(f"<tr>{_row(row, kinds)}</tr>\n" for row in cells)
        label = escape(caption, quote=True)
        self._parts.append(
            f'<div class="wide" role="region" aria-label="{label}" tabindex="0">'
            f"<table><caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}</tbody></table></div>"
        )

    def facts(self, values: Mapping[str, object], *, caption: str) -> None:
        """Add names and their values, such as settings; a mapping inside becomes names of its own."""
        cells = [(escape(name), escape(_cell(value, None))) for name, value in _flat(values)]
        row = '<tr><th scope="row">{}</th><td>{}</td></tr>\n'.format
        rows = "".join(row(*each) for each in cells)
        table = f'<table class="facts"><caption>{escape(caption)}</caption>\n<tbody>\n{rows}</tbody>'
        self._parts.append(f'<div class="wide">{table}</table></div>')

    def figure(self, figure: "Figure", *, caption: str, description: str | None = None) -> None:
        """Add a figure: as SVG, or as PNG where that is much smaller.

        The description is for a reader who can't see it; by default it is the caption.
        """
        kind, content = _picture(figure)
        width, height = (round(_PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
        source = base64.b64encode(content).decode("ascii")
        broad = ' class="broad"' if width > 2 * height else ""
        self._parts.append(
            f'<figure><img{broad} src="data:image/{kind};base64,{source}" width="{width}" '
            f'height="{height}" alt="{escape(description or caption, quote=True)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """Return the whole page."""
        title, language = escape(self.title), escape(self.language, quote=True)
        link = '<li><a href="#section-{}">{}</a></li>'.format
        links = "".join(link(n, escape(heading)) for n, heading in enumerate(self._sections, 1))
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>\n' if self.subtitle else ""
        contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if links else ""
        body = "\n".join(self._parts)
        return (
            f'<!DOCTYPE html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{_STYLE.read_text()}</style>\n</head>\n<body>\n"
            f"<header>\n<h1>{title}</h1>\n{subtitle}{contents}</header>\n"
            f"<main>\n{body}\n</main>\n</body>\n</html>\n"
        )


def escape(text: str, quote: bool = True) -> str:
    """Return text as HTML shows it; what can't be shown is spelt out."""
    return escape_markup(printable(text), quote)


def print_table(
    title: str, header: Sequence[str], rows: _Rows, *, decimals: int = 2, min_width: int | None = None
) -> None:
    """Print a table with the cells of :meth:`Page.table`, numbers to the right."""
    table = Table(title=title, title_justify="left", min_width=min_width)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(printable(_cell(value, decimals))) for value in row))
    terminal = _Terminal()
    terminal.width = max(terminal.width, 20)  # some say that they have no columns at all
    terminal.print(table)


def print_line(text: str) -> None:
    """Print a line as it is, such as a path: neither broken nor coloured, and no markup in it."""
    _Terminal().print(printable(text), soft_wrap=True, highlight=False, markup=False)


class _Terminal(Console):
    """Standard output: once its reader has gone, as behind ``| head -1``, the work goes on unseen."""

    def on_broken_pipe(self) -> None:
        give_up_output()


def give_up_output() -> None:
    """Discard standard output, and what still waits to be written to it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def plus_minus(value: float | None, error: float | None, decimals: int = 2) -> str:
    """Return a value with its error as one cell; without the error where it is 0 or not known."""
    if value is None or not error or not math.isfinite(value + error):
        return _cell(value, decimals)
    return f"{_cell(value, decimals)} \N{PLUS-MINUS SIGN} {_cell(error, decimals)}"


def _cell(value: object, decimals: int | None) -> str:
    """Return a cell's text; a float has so many decimals, or with None as many as it needs."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and decimals is not None:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if decimals is None else f"{value:.{decimals}f}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(inner, decimals) for inner in value)
    return str(value)


def _row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    first, *others = map(escape, cells)
    rest = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
    return f'<th scope="row">{first}</th>{rest}'


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}".replace("_", " "), value


def _picture(figure: "Figure") -> tuple[str, bytes]:
    """Return a figure's MIME subtype and bytes, which depend only on what it shows."""
    import matplotlib

    def save(**options: Any) -> bytes:
        content = io.BytesIO()
        # The salt takes the place of a random one in the names inside an SVG.
        with matplotlib.rc_context({"svg.hashsalt": "pyro_vae"}):
            figure.savefig(content, **options)
        return content.getvalue()

    vector = save(format="svg", metadata={"Date": None})
    if len(vector) <= _LARGEST_SVG:
        return "svg+xml", vector
    pixels = save(format="png", metadata={"Software": None})
    return ("png", pixels) if len(pixels) < len(vector) else ("svg+xml", vector)
