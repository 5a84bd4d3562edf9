"""The one exception for what a user can mend: wrong input, wrong option, wrong file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "first_line", "unknown_name"]

# Names and reasons that come from a file may be of any length; a message is one line.
_LONGEST = 200


class InputError(ValueError):
    """One line that says what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not in ``known``, with the nearest right one."""
    names = sorted(known)
    given = str(name)[:_LONGEST]
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = given if isinstance(name, str) else name
    return InputError(f"unknown {kind} {shown!r}: {hint}choose from {', '.join(names)}")


def first_line(error: object) -> str:
    """Return the first line of what an error says, or its type's name where it says nothing."""
    lines = str(error).splitlines()
    return lines[0].rstrip(".")[:_LONGEST] if lines else type(error).__name__
