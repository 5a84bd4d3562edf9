"""Generators, buffers and bytes of a run, and values kept as long as a pair's functions live."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import Any, Generic, Self, TypeVar

import pyro
import torch
from torch import Tensor, nn, ops
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Value = TypeVar("Value")

# Whose reads of values decide nothing: checks of arguments and of samples.
_LIBRARIES = ("torch", "pyro", __name__)


def with_submodules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """All the modules below ``modules``, each once."""
    return list({m: None for root in modules for m in root.modules()})


class Snapshot:
    """Generators and module buffers as they stand, to be put back by :meth:`restore`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        found = ((m._buffers, name, each) for m in modules for name, each in m._buffers.items())
        self.buffers = [(own, name, b, b.detach().clone()) for own, name, b in found if b is not None]
        self.generators = pyro.util.get_rng_state()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda_generators = torch.cuda.get_rng_state_all() if cuda else []

    def restore(self) -> None:
        """Put generators and buffers back."""
        pyro.util.set_rng_state(self.generators)
        if self.cuda_generators:
            torch.cuda.set_rng_state_all(self.cuda_generators)
        with torch.no_grad():
            for holder, name, buffer, value in self.buffers:
                holder[name] = buffer
                buffer.copy_(value)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Restore at the end, whatever happens inside."""
        try:
            yield
        finally:
            self.restore()

    def buffer_values(self) -> list[Tensor]:
        """Copies of the buffers as they are now."""
        return [buffer.detach().clone() for _, _, buffer, _ in self.buffers]


def accumulating_leaves(*roots: Tensor) -> list[Tensor]:
    """The leaves that a backward pass from the roots would give a gradient, in a fixed order."""
    leaves: dict[int, Tensor] = {}
    pending: list[Any] = [root.grad_fn for root in roots]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves[id(node.variable)] = node.variable
        pending += [following for following, _ in node.next_functions]
    return list(leaves.values())


class RunObserver(TorchDispatchMode):
    """Watches the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0  # of every operation's results: an upper bound of the memory they need
        self.reads_values = False  # did code outside torch and Pyro (``.item()``, ``if``)?
        self._functions = _Functions(self)

    def __enter__(self) -> Self:
        super().__enter__()
        self._functions.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._functions.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the bytes of what an operation returns."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.bytes += value.numel() * value.element_size()
        if func is ops.aten._local_scalar_dense.default and _is_read_by_user():
            self.reads_values = True
        return result


class _Functions(TorchFunctionMode):
    """Sees the reads that bypass the dispatcher."""

    READS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})

    def __init__(self, observer: RunObserver) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS and _is_read_by_user():
            self.observer.reads_values = True
        return func(*args, **(kwargs or {}))


def _is_read_by_user() -> bool:
    """Tell whether the code that asked for a value is neither torch's nor Pyro's."""
    frame: FrameType | None = sys._getframe(2)
    within_modes = ("torch._tensor", "torch.overrides", "torch.utils", "torch._ops", __name__)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(within_modes):
        frame = frame.f_back
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return name.partition(".")[0] not in _LIBRARIES


class Remembered(Generic[Value]):
    """Values by functions, each known by weak references to what it consists of.

    A bound method is made anew at every access, so it is known by its function and its instance. A
    value is forgotten with the first of its functions, so it must not keep them alive.
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
    both = ((f.__func__, f.__self__) if type(f) is MethodType else (f, None) for f in functions)
    return [part for pair in both for part in pair]


def _refer(part: Any, forget: Callable[[Any], None]) -> Callable[[], Any]:
    try:
        return weakref.ref(part, forget)
    except TypeError:  # None, and the few objects that take no weak reference
        return lambda: part
