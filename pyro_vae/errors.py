"""The one exception for what a user can mend: wrong input, wrong option, wrong file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "unknown_name"]


class InputError(ValueError):
    """One line that says what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not in ``known``, with the nearest right one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}choose from {', '.join(names)}")
