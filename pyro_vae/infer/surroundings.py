"""What a pair's code reads besides tensors it is given and parameters: numbers, flags, objects."""

from __future__ import annotations

import pickle
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.infer.capture import CannotCaptureError, is_number

_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "pyro", "numpy", "pyro_vae"})
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, range, type(None), np.generic)
_PLAIN += (torch.dtype, torch.device, torch.Size)
_INSTALLED = "site-packages"  # where globals are no part of a pair
# Private attributes of a module whose contents run when it is called.
_RUN = frozenset({"_modules", "_forward_hooks", "_forward_pre_hooks", "_pyro_samples"})
_LONGEST = 1_000  # entries of a list or dict that are looked through

_SLOT = types.MemberDescriptorType

# How a generator's state is read and put back.
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda own: own.bit_generator.state,
        lambda own, state: setattr(own.bit_generator, "state", state),
    ),
}

Key = Hashable


class _Place(NamedTuple):
    """Where a value stands: an item of a dict or list, a cell, an attribute, what a function says."""

    holder: Any
    key: Any  # of an item, or a function of the holder, such as its length
    value: Any
    name: str  # empty where nothing can be put in the value's place
    version: Any = 0  # of a tensor, which changes with its values, and a copy of a small one
    copy: Any = None  # or a generator's state, and that as bytes

    def with_version(self) -> _Place:
        """Note a tensor's version, and keep the values of a small one; or a generator's state."""
        tensor = self.value
        if type(tensor) in _GENERATORS:
            state = _GENERATORS[type(tensor)][0](tensor)
            return self._replace(version=pickle.dumps(state), copy=state)
        if not isinstance(tensor, Tensor) or tensor.requires_grad or tensor.is_inference():
            return self
        copy = tensor.clone() if tensor.numel() <= _LONGEST else None
        return self._replace(version=tensor._version, copy=copy)

    def is_number(self) -> bool:
        """Whether its value can be an input of a graph instead of a constant."""
        return is_number(self.value) and not callable(self.key)

    def is_same(self, value: Any) -> bool:
        """Whether a plain value equals this one, and any other one is it."""
        if isinstance(self.value, _PLAIN) and type(value) is type(self.value):
            return self.value is value or bool(self.value == value)
        return self.value is value

    def reader(self) -> Callable[[], Any]:
        """Return what reads the place, without keeping an object alive."""
        holder, key = self.holder, self.key
        if callable(key) and key is not _own_forward:
            return partial(key, holder)
        if isinstance(holder, dict | list):
            return partial(holder.get if isinstance(holder, dict) else holder.__getitem__, key)
        try:
            own = holder if isinstance(holder, type | types.CellType) else weakref.proxy(holder)
        except TypeError:
            own = holder
        return partial(key, own) if callable(key) else partial(getattr, own, key)

    def put(self, value: Any) -> None:
        """Put another value there."""
        if isinstance(self.holder, type | types.CellType) or self._is_slot():
            setattr(self.holder, self.key, value)
        else:
            items: Any = self.holder if isinstance(self.holder, dict | list) else vars(self.holder)
            items[self.key] = value

    def _is_slot(self) -> bool:
        own = not isinstance(self.holder, dict | list) and isinstance(self.key, str)
        return own and isinstance(getattr(type(self.holder), self.key, None), _SLOT)

    @contextmanager
    def hold(self, value: Any) -> Iterator[None]:
        """Put another value there for a while."""
        is_item = isinstance(self.holder, dict | list | types.CellType) or self._is_slot()
        is_own = is_item or self.key in vars(self.holder)
        self.put(value)
        try:
            yield
        finally:
            if is_own:
                self.put(self.value)
            else:  # an attribute of the object's class
                del vars(self.holder)[self.key]


def look_around(roots: Iterable[Any]) -> dict[Key, _Place]:
    """Return all places that the code of some functions and modules reads by names it uses.

    Of objects outside the libraries only what some code names is followed, so that a list of losses
    beside the pair is no part of it. The names grow meanwhile: the walk is repeated until they don't.
    """
    names: set[str] = set()
    while True:
        places: dict[Key, _Place] = {}
        seen: dict[int, Any] = {}  # kept alive: an id is not given twice
        count, pending = len(names), list(roots)
        while pending:
            value = pending.pop()
            if isinstance(value, (*_PLAIN, Tensor, types.ModuleType)) or id(value) in seen:
                continue
            seen[id(value)] = value
            for place in _places_in(value, names):
                pending.append(place.value)
                if place.name and not isinstance(place.value, types.ModuleType):
                    places[id(place.holder), place.key] = place.with_version()
                elif type(place.value) in _GENERATORS:  # bound, in a tuple or a default
                    places[id(place.holder), id(place.value)] = place.with_version()
        if len(names) == count:
            return places


def _places_in(value: Any, names: set[str]) -> Iterator[_Place]:
    if isinstance(value, types.FunctionType):
        yield from _places_of_function(value, names)
    elif isinstance(value, type):
        yield from _places_of_class(value, value, names)
    elif isinstance(value, dict | list):
        yield _Place(value, len, len(value), "the length")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items if len(value) <= _LONGEST else ():
            yield _Place(value, key, item, key if isinstance(key, str) else f"[{key!r}]")
    elif isinstance(value, np.ndarray):
        if value.size <= _LONGEST:
            yield _Place(value, np.ndarray.tobytes, value.tobytes(), "the contents")
    elif isinstance(value, set | frozenset | deque):
        if len(value) <= _LONGEST / 10 and all(isinstance(item, _PLAIN) for item in value):
            yield _Place(value, repr, repr(value), "the contents")
    elif isinstance(value, tuple):
        yield from (_Place(value, None, item, "") for item in value)
    else:
        if isinstance(value, partial | types.MethodType | types.BuiltinMethodType):
            for part in ("func", "args", "keywords", "__func__", "__self__"):
                yield _Place(value, part, getattr(value, part, None), "")
        kind = type(value)
        if isinstance(value, torch.nn.Module):  # may be given a method of its own
            yield _Place(value, _own_forward, _own_forward(value), f"{kind.__name__}.forward")
        for name, item in list(getattr(value, "__dict__", {}).items()):
            if name in _RUN or (not name.startswith("_") if _is_library(kind) else name in names):
                yield _Place(value, name, item, f"{kind.__name__}.{name}")
        for base in kind.__mro__:
            yield from _places_of_class(base, value, names)


def _own_forward(module: Any) -> Any:
    return module.__dict__.get("forward")


def _places_of_function(function: types.FunctionType, names: set[str]) -> Iterator[_Place]:
    code, known = function.__code__, function.__globals__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield _Place(cell, "cell_contents", cell.cell_contents, repr(name))
        except ValueError:  # not filled yet
            continue
    for part in (function.__defaults__, function.__kwdefaults__):
        yield _Place(function, None, part, "")
    if not _is_library(function):
        own = _names_of(code)
        names |= own
        for name in sorted(own & known.keys()) if _INSTALLED not in code.co_filename else ():
            yield _Place(known, name, known[name], f"the global {name!r}")
            if isinstance(module := known[name], types.ModuleType):
                within = vars(module) if _is_own(module) else {}
                for inner in sorted(names & within.keys()):
                    yield _Place(within, inner, within[inner], f"{name}.{inner}")


def _is_own(module: types.ModuleType) -> bool:
    top = module.__name__.partition(".")[0]
    return top not in _LIBRARIES and _INSTALLED not in (getattr(module, "__file__", None) or "")


def _places_of_class(kind: type, holder: Any, names: set[str]) -> Iterator[_Place]:
    """Yield a class's code, of an object's class the named one, and plain values that code names."""
    for name, item in list(vars(kind).items()) if not _is_library(kind) else ():
        if isinstance(item, types.FunctionType | staticmethod | classmethod | property):
            runs = name in names or name == "forward" or name.startswith(("__", "_pyro_"))
            if holder is kind or (runs and name != "__init__"):  # which has run already
                own = getattr(item, "fget", None) or getattr(item, "__func__", item)
                yield _Place(kind, name, own, "")
        elif name in names and (holder is kind or _is_read(name, holder, kind)):
            slot = isinstance(item, _SLOT) and holder is not kind
            value = getattr(holder, name, None) if slot else item
            yield _Place(holder, name, value, f"{kind.__name__}.{name}")


def _is_read(name: str, holder: Any, kind: type) -> bool:
    """Tell whether an object's attribute is the one of this class, not its own or another class's."""
    first = next(base for base in type(holder).__mro__ if name in vars(base))
    return first is kind and name not in getattr(holder, "__dict__", {})


def _is_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _names_of(code: types.CodeType) -> set[str]:
    """Return every global, attribute and string that some code names."""
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    inner = (_names_of(own) for own in code.co_consts if isinstance(own, types.CodeType))
    return strings.union(code.co_names, *inner)


class Surroundings:
    """The values that a pair's code reads as they stood when a graph was made of it.

    A number can become an input of the graph; any other value that changes makes the graph stale.

    Args:
        before: what :func:`look_around` found before a run of the pair.
        after: what it found after. What the run replaced or let grow is a result of it, not read.

    Raises:
        CannotCaptureError: for a pair that changes a number or flag itself at each run.
    """

    def __init__(self, before: dict[Key, _Place], after: dict[Key, _Place]) -> None:
        self.places: dict[Key, _Place] = {}
        self._replaced: list[_Place] = []
        changed: list[Any] = []  # values before the run, of a kind that is read and not a result
        for key, place in after.items():
            if key in before and place.is_same(before[key].value):
                if place.name:
                    self.places[key] = place
                if place.version != before[key].version:
                    changed.append(place.value)
                    self._replaced.append(before[key])
            elif key in before and not callable(place.key):
                self._replaced.append(before[key])
                changed += [before[key].value] if isinstance(place.value, _PLAIN) else []
        self.put_back()  # the run was one more than stock Pyro's
        self.refuse_changed(changed)
        self.numbers = {k: (p.name, p.value) for k, p in self.places.items() if p.is_number()}

    def put_back(self) -> None:
        """Put back what a run replaced or wrote to."""
        for place in self._replaced:
            if place.name:
                place.put(place.value)
            if type(place.value) in _GENERATORS:
                _GENERATORS[type(place.value)][1](place.value, place.copy)
            elif place.copy is not None and place.value._version != place.version:
                place.value.copy_(place.copy)

    def refuse_changed(self, read: Sequence[Any]) -> None:
        """Refuse a pair that reads what it replaces: its runs differ, however often it is run."""
        for place in self._replaced:
            if any(place.value is value for value in read):
                raise CannotCaptureError(
                    f"the pair changes {place.name or 'a generator'} itself at each run"
                )

    @contextmanager
    def hold(self, inputs: Sequence[Key], tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let some numbers be tensors for a while."""
        with ExitStack() as held:
            held.callback(self.put_back)
            for key, tensor in zip(inputs, tensors, strict=True):
                held.enter_context(self.places[key].hold(tensor))
            yield

    def readers_of(self, tensor: Tensor) -> list[Callable[[], Any]]:
        """Return what reads the places where a tensor stands."""
        return [place.reader() for place in self.places.values() if place.value is tensor]

    def settle(self, inputs: Sequence[Key], constants: Sequence[Tensor]) -> None:
        """Note what a graph holds: some numbers are its inputs, some tensors' values are baked in."""
        places, self.places = self.places, {}
        self._replaced.clear()  # it would keep the pair alive
        self._given = [places.pop(key).reader() for key in inputs]
        plain = [place for place in places.values() if isinstance(place.value, _PLAIN)]
        self._plain, self._values = [p.reader() for p in plain], [p.value for p in plain]
        self._types = list(map(type, self._values))
        read = {id(tensor) for tensor in constants}
        told = (*_PLAIN, Tensor)
        others = [p for p in places.values() if not isinstance(p.value, told) or id(p.value) in read]
        self._others, self._ids = [p.reader() for p in others], [id(p.value) for p in others]
        self._constants = [(tensor, [tensor._version], tensor.clone()) for tensor in constants]
        self._dead: list[Any] = []  # what a place held may be gone, and its id another's
        self._kept = [_refer(place.value, self._dead.append) for place in others]

    def current(self) -> list[float] | None:
        """Return the numbers that are inputs as they stand now, None if any other value changed."""
        try:
            values = [read() for read in self._plain]
            if list(map(type, values)) != self._types or values != self._values:
                return None
            if self._dead or [id(read()) for read in self._others] != self._ids:
                return None
            for tensor, version, value in self._constants:
                if tensor._version != version[0] and not torch.equal(tensor, value):
                    return None
                version[0] = tensor._version
            given = [read() for read in self._given]
        except (AttributeError, LookupError, ReferenceError, ValueError):  # its place is gone
            return None
        return given if all(map(is_number, given)) else None


def _refer(value: Any, forget: Callable[[Any], None]) -> Any:
    """Return a reference that tells when a value dies, or the value if that takes none."""
    try:
        return weakref.ref(value, forget)
    except TypeError:
        return value
