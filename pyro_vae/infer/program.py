"""Captured functions of a pair: where their tensors live, how they are replayed, when they hold."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Generic, TypeVar

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.infer import capture
from pyro_vae.infer.capture import AUTOCAST_DEVICES, CannotCaptureError, autocast_dtypes
from pyro_vae.infer.graph_rewrites import for_replays
from pyro_vae.infer.surroundings import Key, Surroundings
from pyro_vae.pair.precision import precision_now
from pyro_vae.pair.state import Snapshot

# Programs kept per pair, and those of one signature: more mean that a value which is no input of the
# graph changes from step to step; each would cost a compilation.
MAXIMUM_PROGRAMS = 16
MAXIMUM_VALUES = 4

Result = TypeVar("Result")
Signature = tuple[Hashable, Hashable]


def sign(
    key: Hashable, arguments: Any, tensors: list[Tensor], numbers: dict[str, float]
) -> Signature:
    """Return what a graph depends on besides the pair's state; note the arguments' values."""
    numbers.clear()
    structure = capture.describe(arguments, tensors, numbers)
    context = (key, torch.get_default_dtype(), autocast_dtypes(), precision_now(), structure)
    return context, tuple((tensor.shape, tensor.stride()) for tensor in tensors)


def _condition(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph assumes of a parameter or buffer besides its values."""
    return (tensor.requires_grad, tensor.dtype, tensor.shape, tensor.device, hooked(tensor))


def hooked(tensor: Tensor) -> bool:
    """Whether Python runs when this leaf's gradient arrives."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _stored(name: str) -> Tensor | None:
    return pyro.get_param_store()._params.get(name)


class State:
    """Where a pair's parameters and buffers live, so that replaced ones are followed."""

    def __init__(
        self, modules: Sequence[nn.Module], names: Iterable[str], leaves: Sequence[Tensor] = ()
    ) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self._readers: list[Callable[[], Any]] = []
        self._copies: list[tuple[Callable[[], Any], int]] = []  # other places of a tensor
        self._index: dict[int, int] = {}
        self._modules = [weakref.ref(module) for module in modules]
        for name in names:
            if (tensor := _stored(name)) is None:
                raise CannotCaptureError(f"parameter {name!r} is not in Pyro's store")
            self._add(tensor, partial(_stored, name), name)
        for module in modules:
            for holder in (module._parameters, module._buffers):
                for name, value in holder.items():
                    if value is not None:
                        self._add(value, partial(holder.get, name), name)
        self.add_fixed([leaf for leaf in leaves if id(leaf) not in self._index], lambda _: [])

    def _add(self, tensor: Tensor, reader: Callable[[], Any], name: str) -> None:
        if id(tensor) in self._index:
            self._copies.append((reader, self._index[id(tensor)]))
        else:
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.names.append(name)
            self._readers.append(reader)

    def add_fixed(self, tensors: Sequence[Tensor], readers_of: Callable[[Tensor], list[Any]]) -> None:
        """Add tensors that the pair closes over, followed where it is known what holds them."""
        for tensor in tensors:
            for reader in readers_of(tensor) or [lambda tensor=tensor: tensor]:
                self._add(tensor, reader, "a tensor the pair closes over")
        self.conditions = [_condition(tensor) for tensor in self.tensors]

    def name(self, tensor: Tensor) -> str:
        """Name one of the tensors for a message."""
        return self.names[self._index[id(tensor)]]

    def alive(self) -> list[nn.Module]:
        """The modules that still exist."""
        return [module for reference in self._modules if (module := reference()) is not None]

    def current(self) -> list[Tensor] | None:
        """The tensors as they stand now, or None if the graph no longer describes the pair."""
        try:
            tensors = [read() for read in self._readers]
            moved = any(read() is not tensors[index] for read, index in self._copies)
        except (AttributeError, LookupError, ReferenceError, ValueError):  # a holder is gone
            return None
        same = zip(tensors, self.conditions, strict=True)
        if moved or any(not isinstance(t, Tensor) or _condition(t) != known for t, known in same):
            return None
        return tensors


class Program:
    """A function's graph from (given tensors, tensors of the state) to its results."""

    def __init__(
        self, signature: Signature, state: State, surroundings: Surroundings | None = None
    ) -> None:
        self.signature, self.state, self.surroundings = signature, state, surroundings
        self.overwrites = False  # its earlier results, as CUDA graphs do
        self.thread = threading.current_thread()  # to which CUDA graphs belong
        self.cast = [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]

    def record(self, function: Callable[[], tuple[Tensor, ...]], given: Sequence[Tensor]) -> None:
        """Record the function's graph over what it is given and the state."""
        recorded = capture.trace_graph(function, [*given, *self.state.tensors])
        self.graph, closed_over, self.constants = recorded
        around = self.surroundings
        self.state.add_fixed(closed_over, around.readers_of if around else lambda _: [])
        self.run: Callable[..., Sequence[Tensor]] = for_replays(self.graph)

    def outputs(
        self, given: Sequence[Tensor], tensors: Sequence[Tensor], *, keep: bool = True
    ) -> list[Tensor]:
        """Run the graph on what is given and the state's tensors; ``keep`` what it returns."""
        with torch.no_grad(), ExitStack() as contexts:
            for device in self.cast:  # the graph holds its casts already
                contexts.enter_context(torch.autocast(device, enabled=False))
            if self.overwrites:
                if threading.current_thread() is not self.thread:
                    return list(self.graph(*given, *tensors))
                torch.compiler.cudagraph_mark_step_begin()
            found = list(self.run(*given, *tensors))
            # Multiplying by one copies all of them in one launch.
            return list(torch._foreach_mul(found, 1)) if self.overwrites and keep else found

    def compile(
        self, backend: str | Callable[..., Any], mode: str, check: Callable[[], Result],
        report: Callable[[str], None],
    ) -> Result:  # fmt: skip
        """Compile and check the graph; where the backend fails it runs operator by operator."""
        if backend == "eager":
            return check()
        options: dict[str, Any] | None = None
        if backend == "inductor":
            from torch._inductor import list_mode_options

            # Eager torch's random stream: then the compiled graph too can be held against Pyro.
            options = {**list_mode_options(mode), "fallback_random": True}
        self.run = torch.compile(
            self.graph, backend=backend, fullgraph=True, dynamic=False, options=options
        )
        self.overwrites = backend == "cudagraphs" or bool((options or {}).get("triton.cudagraphs"))
        if self.overwrites:
            for tensor in self.state.tensors:
                # Read in place by the graph; a moved one is noticed and recorded anew.
                torch._dynamo.mark_static_address(tensor, guard=False)
        try:
            # A CUDA graph is run as it is, then recorded, then replayed: each may go wrong.
            for _ in range(2 if self.overwrites else 0):
                check()
            return check()
        except CannotCaptureError:
            raise
        except Exception as error:
            self.run, self.overwrites = self.graph, False
            text = " ".join(str(error).split()[:20]) or type(error).__name__
            name = getattr(backend, "__name__", backend)
            report(f"the backend {name!r} failed ({text}); the captured graph runs uncompiled")
        return check()


def verify(
    program: Program, given: Sequence[Tensor], reference: Callable[[], Result],
    compare: Callable[[Result, list[Tensor], list[Tensor]], None],
) -> list[Tensor]:  # fmt: skip
    """Hold a program against the eager reference, on one generator state; return its results."""
    before = Snapshot(program.state.alive())
    with before.put_back():
        with capture.conditions():
            expected = reference()
        capture.refuse_untraceable(before)
        buffers = before.buffer_values()
        before.restore()
        tensors = program.state.current()
        if tensors is None:
            raise CannotCaptureError("the pair changes its parameters' places at every step")
        found = program.outputs(given, tensors)
        compare(expected, found, tensors)
        for theirs, ours in zip(buffers, before.buffer_values(), strict=True):
            eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
            if not are_close(ours, theirs, eps**0.5, floor=0.0, whole=True):
                raise CannotCaptureError("it leaves other values in a buffer than stock Pyro")
        return found


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """Return the relative rounding allowed for: the square root of the coarsest precision."""
    cast = [dtype for dtype in autocast_dtypes() if dtype is not None]
    floating = [dtype for dtype in (*dtypes, *cast) if dtype.is_floating_point]
    return float(max(torch.finfo(dtype).eps for dtype in floating) ** 0.5)


def are_close(
    value: Tensor, expected: Tensor, tolerance: float, *, floor: float = 1.0, whole: bool = False
) -> bool:
    """Tell whether each entry (or the tensor as a whole, by its norm) is the expected one."""
    if value.shape != expected.shape:
        return False
    value, expected = value.detach().double(), expected.detach().double()
    if whole:
        error = torch.linalg.vector_norm(value - expected)
        if error.isfinite():  # so is each number of both
            return bool(error <= tolerance * (torch.linalg.vector_norm(expected) + floor))
    finite = expected.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return False
    if not whole and not torch.allclose(value[~finite], expected[~finite], equal_nan=True):
        return False
    size = torch.linalg.vector_norm if whole else torch.abs
    error = size((value - expected)[finite])
    # Below the floor, 1 nat of log-probabilities, only the rounding of larger terms is seen.
    return bool((error <= tolerance * (size(expected[finite]) + floor)).all())


OneProgram = TypeVar("OneProgram", bound=Program)


class Programs(Generic[OneProgram]):
    """The programs of one pair, the newest first; says once why any of its calls run eagerly."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.kept: list[OneProgram] = []
        self.last: Signature | None = None
        self.refused = False
        self.numbers: dict[str, float] = {}  # among the arguments of the present call
        self.varied: set[Key] = set()  # numbers seen with two values
        self.unfit: set[Key] = set()  # those of them that a graph can't take as an input
        self.impossible: dict[Signature, bool] = {}  # to capture -> whether a check was made
        self._say = say

    def find(self, signature: Signature) -> tuple[OneProgram, list[float], list[Tensor]] | None:
        """Return a program that serves the pair as it stands, its numbers, the state's tensors."""
        for program in self.kept:
            if program.signature == signature:
                around = program.surroundings
                numbers = [] if around is None else around.current()
                tensors = None if numbers is None else program.state.current()
                if numbers is not None and tensors is not None:
                    return program, numbers, tensors
        return None

    def choose_inputs(self, signature: Signature, around: Surroundings) -> list[Key]:
        """Return the numbers that have changed before and that no graph has refused as an input."""
        alike = [each for each in self.kept if each.signature == signature and each.state.current()]
        of_one = [own.numbers for own in (each.surroundings for each in alike) if own]
        both = [(key, known[key]) for known in of_one for key in known.keys() & around.numbers.keys()]
        changed = {key: name for key, (name, value) in both if around.numbers[key][1] != value}
        self.varied |= changed.keys()
        inputs = [key for key in around.numbers if key in self.varied - self.unfit]
        if len(of_one) >= MAXIMUM_VALUES and not inputs:
            what = ", ".join(changed.values()) or "what it reads besides its arguments"
            raise CannotCaptureError(f"{what} changes time and again and is no input of a graph")
        return inputs

    def add(self, program: OneProgram) -> None:
        """Keep a program; the oldest goes where there are too many."""
        self.kept.insert(0, program)
        del self.kept[MAXIMUM_PROGRAMS:]

    def wants(self, signature: Signature) -> bool:
        """Whether to capture: not for a batch whose shapes differ and that came only once."""
        if len(self.kept) >= MAXIMUM_PROGRAMS:
            self.report(
                f"its arguments, flags or parameters changed {MAXIMUM_PROGRAMS} times; pass "
                "numbers that change as tensors"
            )
            return False
        again, self.last = signature == self.last, signature
        known = (each.signature for each in self.kept if each.signature[0] == signature[0])
        return again or all(each == signature for each in known)

    def report(self, reason: object) -> None:
        """Say once why the pair, or some of its calls, run eagerly."""
        say, self._say = self._say, None
        if say is not None:
            say(str(reason))

    def refuse(self, reason: object) -> None:
        """Run eagerly from now on."""
        self.refused = True
        self.kept.clear()
        self.report(reason)
