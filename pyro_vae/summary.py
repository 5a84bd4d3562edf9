"""What results show of themselves: a few lines in a terminal, a table in a notebook."""

import html
import math
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch

# A result tells its title and its rows by ``_summary``; without it, all its fields in brief.
Summary = tuple[str, dict[str, str]]

Result = TypeVar("Result", bound=type)


def shown(result: Result) -> Result:
    """Let a class of results be printed in lines, and shown in Jupyter as a table."""
    target: Any = result
    target.__repr__, target._repr_html_ = as_text, as_html
    return result


def as_text(result: Any) -> str:
    """Return a result's lines."""
    title, rows = summarize(result)
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def as_html(result: Any) -> str:
    """Return a result's table in HTML."""
    title, rows = summarize(result)
    return table(title, [[name, text] for name, text in rows.items()])


def table(title: str, rows: list[list[str]], notes: Iterable[str] = ()) -> str:
    """Return an HTML table whose first column names the rows."""
    style = "style='text-align:left'"
    lines = (
        f"<tr><th {style}>{html.escape(name)}</th>"
        + "".join(f"<td {style}>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<p>{html.escape(title)}</p><table>{''.join(lines)}</table>{below}"


def summarize(result: Any) -> Summary:
    """Return a result's title and rows."""
    if hasattr(result, "_summary"):
        return result._summary()
    names = getattr(result, "_fields", None) or vars(result)
    fields = {name: brief(getattr(result, name)) for name in names}
    return type(result).__name__, {name: text for name, text in fields.items() if text}


def brief(value: Any) -> str:
    """Say in a line what a value is: of arrays the shape and the range; nothing of None."""
    if value is None:
        return ""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.size > 1:
        known = value[np.isfinite(value)] if value.dtype.kind == "f" else value
        ends = f", from {known.min():.4g} to {known.max():.4g}" if known.size else ""
        return f"{value.shape}{ends if value.dtype.kind in 'fiu' else ''}"
    if isinstance(value, dict):
        return ", ".join(map(str, value))
    if isinstance(value, float | np.ndarray):
        return f"{float(value):.4g}"
    first, *more = str(value).splitlines() or [""]
    return first[:100] + "..." * (bool(more) or len(first) > 100)


def plus_minus(value: float, *errors: float) -> str:
    """Write a number to the digits that its smallest error leaves, and the errors behind it."""
    digits = _digits(*errors)
    return " ± ".join([f"{value:.{digits}f}", *(error_text(error, digits) for error in errors)])


def error_text(error: float, digits: int | None = None) -> str:
    """Write an error with two significant digits, or with so many digits after the point."""
    if not math.isfinite(error):
        return "unknown"
    return f"{error:.{_digits(error) if digits is None else digits}f}" if error else "0"


def _digits(*errors: float) -> int:
    known = [error for error in errors if 0 < error < math.inf]
    return min(6, max(0, 1 - math.floor(math.log10(min(known))))) if known else 4
