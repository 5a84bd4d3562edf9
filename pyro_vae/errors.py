"""The one exception for what a user can put right: wrong input, option or file."""

import difflib
import math
import operator
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["InputError"]

# Names and reasons that come from a file may be of any length; a message is one line.
_LONGEST = 200
# Of dimensions, layers and components: torch keeps some of them in 32 bits.
_LARGEST_SIZE = 2**31 - 1


class InputError(ValueError):
    """One line that says what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return text as one line that any terminal, page or picture can show; the rest is escaped."""
    # A name may hold line breaks, a terminal's commands, and bytes that are no UTF-8.
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not in ``known``, with the nearest right one."""
    names, given = sorted(known), str(name)[:_LONGEST]
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = given if isinstance(name, str) else name
    return InputError(f"unknown {kind} {shown!r}: {hint}choose from {', '.join(names)}")


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    """Refuse a name that is not in ``known``."""
    if name not in known:
        raise unknown_name(kind, name, known)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option whose value is not among a few."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise InputError(f"expected {name} {', '.join(others)} or {last}, got {value!r}")


def first_line(error: object) -> str:
    """Return the first line of what an error says, or its type's name where it says nothing."""
    lines = str(error).splitlines()
    return lines[0].rstrip(".")[:_LONGEST] if lines else type(error).__name__


@contextmanager
def expecting(what: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Refuse what raises such an error inside: what was expected, what came, and what to do."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise InputError(f"expected {what}, got: {reason}{advice and f'; {advice}'}") from error


def whole_number(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Return an option that is a whole number; refuse any other value."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"expected {name} as a whole number, got {first_line(repr(value))}")
    if number < least:
        raise InputError(f"expected {name} of at least {least}, got {number}")
    if most is not None and number > most:
        raise InputError(f"expected {name} of at most {most}, got {number}")
    return number


def check_counts(*, least: int = 1, **counts: Any) -> None:
    """Refuse numbers, given by name, that are not whole or below ``least``."""
    for name, count in counts.items():
        whole_number(name, count, least=least)


def check_optional_counts(*, least: int = 1, **counts: Any) -> None:
    """Do the same for options where None stands for a default."""
    check_counts(least=least, **{name: count for name, count in counts.items() if count is not None})


def size(name: str, value: Any, *, least: int = 1) -> int:
    """Return a number of dimensions, layers or components, which torch can allocate."""
    return whole_number(name, value, least=least, most=_LARGEST_SIZE)


def sizes(name: str, values: Any) -> tuple[int, ...]:
    """Return a shape or the widths of layers as whole numbers; refuse others, and none at all."""
    is_sequence = isinstance(values, Iterable) and not isinstance(values, str)
    given = tuple(values) if is_sequence else ()
    try:
        found = tuple(size(name, value) for value in given)
    except InputError:
        found = ()
    if not found:
        told = first_line(repr(values)) + ("" if is_sequence else ": for one write it as (32,)")
        raise InputError(f"expected {name} as whole numbers of at least 1, got {told}")
    return found


def real_number(name: str, value: Any) -> float:
    """Return an option that is a number as a float, not finite ones included; refuse other values."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"expected {name} as a number, got {first_line(repr(value))}") from None


def positive_number(name: str, value: Any) -> float:
    """Return an option that is a finite number above 0 as a float; refuse other values."""
    number = real_number(name, value)
    if not 0 < number < math.inf:
        raise InputError(f"expected a finite {name} above 0, got {number}")
    return number


def check_same(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str, advice: str, free: Container[str] = ()
) -> None:
    """Refuse settings that differ from those at the beginning, except the free ones."""
    for name in {**new, **old}:
        if name not in free and new.get(name) != old.get(name):
            wanted = f"{name.replace('_', ' ')} {old.get(name)!r} as {where} was begun with"
            raise InputError(f"expected {wanted}, got {new.get(name)!r}: {advice}")


def check_room(what: str, needed: int, advice: str) -> None:
    """Refuse what needs more bytes than the memory has, before it is full."""
    available = available_memory()
    if needed > available:
        got = f"{needed / 2**30:,.1f} GiB with {available / 2**30:.1f} GiB free"
        raise InputError(f"expected {what} that fit in memory, got {got}: {advice}")


def available_memory() -> int:
    """Return the bytes that can be had without swapping; where the system doesn't say, 2**62."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, LookupError):
        return 1 << 62
