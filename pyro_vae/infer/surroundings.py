"""What a pair's code reads besides arguments and parameters: numbers, flags, objects, tensors."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.infer.capture import CannotCaptureError

_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "pyro", "numpy", "pyro_vae"})
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, range, type(None), np.generic)
_PLAIN += (torch.dtype, torch.device, torch.Size)
# Private attributes of a module whose contents run when it is called.
_RUN = frozenset({"_forward_hooks", "_forward_pre_hooks", "_pyro_samples"})
_LONGEST = 1_000  # entries of a list or dict that are looked through

Key = Hashable
Numbers = Mapping[str, float]


class _Place(NamedTuple):
    """Where a value stands: an item of a dict or list, a closure's cell, an attribute."""

    holder: Any
    key: Any
    name: str
    value: Any

    @property
    def number(self) -> float | None:
        """Its value, if that can be an input of a graph instead of a constant."""
        return self.value if type(self.value) in (int, float) and self.key is not len else None

    def is_same(self, value: Any) -> bool:
        """Whether a plain value equals this one, and any other one is it."""
        if isinstance(self.value, _PLAIN) and type(value) is type(self.value):
            return self.value is value or bool(self.value == value)
        return self.value is value

    def reader(self) -> Callable[[], Any]:
        """Return what reads the place, without keeping an object alive."""
        holder, key = self.holder, self.key
        if key is len:
            return partial(len, holder)
        if isinstance(holder, dict):
            return partial(holder.get, key)
        if isinstance(holder, list):
            return partial(holder.__getitem__, key)
        try:
            own = holder if isinstance(holder, type | types.CellType) else weakref.proxy(holder)
        except TypeError:
            own = holder
        return partial(getattr, own, key)

    @contextmanager
    def hold(self, value: Any) -> Iterator[None]:
        """Put another value there for a while."""
        holder, key = self.holder, self.key
        if isinstance(holder, type | types.CellType):
            setattr(holder, key, value)
            restore = partial(setattr, holder, key, self.value)
        else:
            items = holder if isinstance(holder, dict | list) else vars(holder)
            is_own = isinstance(items, list) or key in items  # else an attribute of its class
            restore = (
                partial(items.__setitem__, key, self.value) if is_own else partial(items.pop, key)
            )
            items[key] = value
        try:
            yield
        finally:
            restore()


class _Walk:
    """Goes through all that some functions and modules reach by names that their code uses.

    Of objects outside the libraries only what some code names is followed, so that a list of losses
    beside the pair is no part of it.  ``names`` grows meanwhile: walk again until it doesn't.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.places: dict[Key, _Place] = {}
        self._seen: dict[int, Any] = {}  # kept alive: an id is not given twice

    def visit(self, value: Any) -> None:
        """Go through what a value holds."""
        if isinstance(value, (*_PLAIN, Tensor, types.ModuleType)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, type):
            for name, item in vars(value).items() if not _is_library(value) else ():
                self._visit_member(value, name, item)
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            self._add(value, len, len(value), "the length")
            for key, item in items if len(value) <= _LONGEST else ():
                self._add(value, key, item, f"[{key!r}]")
        elif isinstance(value, tuple):
            for item in value:
                self.visit(item)
        else:
            parts = ("func", "args", "keywords", "fget", "__func__", "__self__")
            for part in parts if not hasattr(value, "__dict__") or isinstance(value, partial) else ():
                self.visit(getattr(value, part, None))
            self._visit_object(value)

    def _add(self, holder: Any, key: Any, value: Any, name: str) -> None:
        if not isinstance(value, types.ModuleType):
            self.places[id(holder), key] = _Place(holder, key, name, value)
        self.visit(value)

    def _visit_function(self, function: types.FunctionType) -> None:
        code, known = function.__code__, function.__globals__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._add(cell, "cell_contents", cell.cell_contents, repr(name))
            except ValueError:  # not filled yet
                continue
        if not _is_library(function):
            names = _names_of(code)
            self.names |= names
            for name in sorted(names & known.keys()):
                self._visit_global(known, name)
        self.visit(function.__defaults__)
        self.visit(function.__kwdefaults__)

    def _visit_global(self, known: dict[str, Any], name: str) -> None:
        value = known[name]
        if isinstance(value, types.ModuleType):
            if value.__name__.partition(".")[0] not in _LIBRARIES:
                for inner in sorted(self.names & vars(value).keys()):
                    self._visit_global(vars(value), inner)
        else:
            self._add(known, name, value, f"the global {name!r}")

    def _visit_object(self, value: Any) -> None:
        kind = type(value)
        for name, item in list(getattr(value, "__dict__", {}).items()):
            is_named = not name.startswith("_") if _is_library(kind) else name in self.names
            if (is_named or name in _RUN) and name != "training":  # which is looked at elsewhere
                self._add(value, name, item, f"{kind.__name__}.{name}")
        for base in kind.__mro__:
            for name, item in vars(base).items() if not _is_library(base) else ():
                if name in self.names or name == "forward" or name.startswith(("__", "_pyro_")):
                    self._visit_member(value, name, item)

    def _visit_member(self, holder: Any, name: str, item: Any) -> None:
        """Visit an entry of a class: a method's code, or a value that some code names."""
        if isinstance(item, types.FunctionType | staticmethod | classmethod | property):
            own = getattr(item, "fget", None) or getattr(item, "__func__", item)
            self.visit(own if isinstance(own, types.FunctionType) else None)
        elif name in self.names and not name.startswith("__"):
            kind = holder if isinstance(holder, type) else type(holder)
            if holder is kind or name not in getattr(holder, "__dict__", {}):
                self._add(holder, name, item, f"{kind.__name__}.{name}")


def _is_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _names_of(code: types.CodeType) -> set[str]:
    """Return every global, attribute and string that some code names."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_of(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names


def look_around(roots: Iterable[Any]) -> dict[Key, _Place]:
    """Return all places that the code of some functions and modules reads."""
    names: set[str] = set()
    roots = list(roots)
    while True:
        walk = _Walk(set(names))
        for root in roots:
            walk.visit(root)
        if walk.names == names:
            return walk.places
        names = walk.names


class Surroundings:
    """The values that a pair's code reads as they stood when a graph was made of it.

    A number can become an input of the graph; any other value that changes makes the graph stale.

    Args:
        before: what :func:`look_around` found before a run of the pair.
        after: what it found after. What the run replaced or let grow is a result of it, not read.
        arguments: the numbers among the arguments, by their path.

    Raises:
        CannotCaptureError: for a pair that changes a number or flag itself at each run.
    """

    def __init__(
        self, before: dict[Key, _Place], after: dict[Key, _Place], arguments: Numbers
    ) -> None:
        self._places: dict[Key, _Place] = {}
        for key, place in after.items():
            same = key in before and place.is_same(before[key].value)
            if same:
                self._places[key] = place
            elif key in before and isinstance(place.value, _PLAIN) and place.key is not len:
                raise CannotCaptureError(f"the pair changes {place.name} itself at each run")
        self.numbers: dict[Key, float] = {}
        self.numbers.update(arguments.items())
        for key, place in self._places.items():
            if (number := place.number) is not None:
                self.numbers[key] = number
        self.names = {key: place.name for key, place in self._places.items()}
        self.inputs: Sequence[Key] = ()
        self._arguments = dict(arguments)

    def readers_of(self, tensor: Tensor) -> list[Callable[[], Any]]:
        """Return what reads the places where a tensor stands."""
        return [place.reader() for place in self._places.values() if place.value is tensor]

    @contextmanager
    def hold(self, inputs: Sequence[Key], tensors: Sequence[Tensor]) -> Iterator[dict[Key, Tensor]]:
        """Let some numbers be tensors for a while; give those that are arguments."""
        given = dict(zip(inputs, tensors, strict=True))
        with ExitStack() as held:
            for key, tensor in given.items():
                if key in self._places:
                    held.enter_context(self._places[key].hold(tensor))
            yield given

    def settle(self, inputs: Sequence[Key], constants: Sequence[Tensor]) -> None:
        """Note what a graph holds: some numbers are its inputs, some tensors' values are baked in."""
        self.inputs, places, self._places = inputs, self._places, {}
        self._arguments = {k: v for k, v in self._arguments.items() if k not in inputs}
        self._given: list[Any] = [places[key].reader() if key in places else key for key in inputs]
        fixed = [place for key, place in places.items() if key not in inputs]
        plain = [place for place in fixed if isinstance(place.value, _PLAIN)]
        self._plain = [place.reader() for place in plain]
        self._types = [type(place.value) for place in plain]
        self._values = [place.value for place in plain]
        read = {id(tensor) for tensor in constants}
        others = [
            place
            for place in fixed
            if not isinstance(place.value, (*_PLAIN, Tensor)) or id(place.value) in read
        ]
        self._others, self._ids = [p.reader() for p in others], [id(p.value) for p in others]
        self._versions = [(tensor, tensor._version) for tensor in constants]
        self._dead: list[Any] = []
        self._kept = [_refer(place.value, self._dead.append) for place in others]

    def current(self, arguments: Numbers) -> list[float] | None:
        """Return the numbers that are inputs as they stand now, None if any other value changed."""
        try:
            values = [read() for read in self._plain]
            if list(map(type, values)) != self._types or values != self._values:
                return None
            if self._dead or [id(read()) for read in self._others] != self._ids:
                return None
            if any(tensor._version != version for tensor, version in self._versions):
                return None
            if any(arguments.get(path) != value for path, value in self._arguments.items()):
                return None
            given = [arguments[read] if isinstance(read, str) else read() for read in self._given]
        except (AttributeError, LookupError, ReferenceError, ValueError):
            return None
        return given if all(type(number) in (int, float) for number in given) else None


def _refer(value: Any, forget: Callable[[Any], None]) -> Any:
    """Return a reference that tells when a value dies, or the value if that takes none."""
    try:
        return weakref.ref(value, forget)
    except TypeError:
        return value
