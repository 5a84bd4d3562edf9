"""Values kept for the functions of a pair as long as these live, and found again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """Values by functions, each known by weak references to what it consists of.

    A bound method is made anew at every access, so it is known by its function and its instance; what
    took the place of a dead function in memory is not taken for it. A value is forgotten with the
    first of its functions, so it must not keep them alive.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], tuple[list[Callable[[], Any]], Value]] = {}

    def get(self, *functions: Any) -> Value | None:
        """Return what was kept for these very functions, in this order; None where nothing was."""
        parts = _parts(functions)
        entry = self._entries.get(tuple(map(id, parts)))
        if entry is None:
            return None
        same = all(ref() is part for ref, part in zip(entry[0], parts, strict=True))
        return entry[1] if same else None

    def keep(self, value: Value, *functions: Any) -> None:
        """Keep a value until one of the functions (or the instance of a method) dies."""
        parts, entries = _parts(functions), self._entries
        key = tuple(map(id, parts))

        def forget(_: object) -> None:
            entries.pop(key, None)

        entries[key] = ([_refer(part, forget) for part in parts], value)

    def values(self) -> Iterator[Value]:
        """All that is kept, the oldest first."""
        return (value for _, value in list(self._entries.values()))


def _parts(functions: tuple[Any, ...]) -> list[Any]:
    parts: list[Any] = []
    for function in functions:
        if type(function) is MethodType:
            parts += (function.__func__, function.__self__)
        else:
            parts += (function, None)
    return parts


def _refer(part: Any, forget: Callable[[Any], None]) -> Callable[[], Any]:
    try:
        return weakref.ref(part, forget)
    except TypeError:  # None, and the few objects that take no weak reference
        return lambda: part
