"""A captured step that can be replayed: where its tensors live, its run, its check."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from types import MethodType
from typing import Any, NamedTuple

import pyro
import torch
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_vae.infer.capture import AUTOCAST_DEVICES, CannotCaptureError, autocast_dtypes

# Programs kept per pair.  More distinct signatures than this mean that a number which changes from
# step to step is passed as a Python value; each would cost a compilation.
MAXIMUM_PROGRAMS = 16

# --- the tensors a program reads -------------------------------------------------------------


def _condition(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph assumes of a parameter or buffer besides its values."""
    return (tensor.requires_grad, tensor.dtype, tensor.shape, tensor.device, hooked(tensor))


def hooked(tensor: Tensor) -> bool:
    """Whether Python runs when this leaf's gradient arrives."""
    hooks = tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
    return bool(hooks)


_Holder = dict[str, Any] | None
_Place = tuple[_Holder, str]


class State:
    """Where a pair's parameters and buffers live, and the state of its modules.

    A place is a module's own dict and a name, or ``None`` and a name in Pyro's parameter store, or
    a fixed tensor.  The tensors are looked up at every step, so replaced ones are followed; where
    two places held one tensor at capture they must still do so.
    """

    def __init__(
        self, modules: Sequence[nn.Module], names: Sequence[str], leaves: Sequence[Tensor]
    ) -> None:
        store = pyro.get_param_store()
        places: list[_Place] = [(None, name) for name in names]
        for module in modules:
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]
            for holder in holders:
                places += [(holder, name) for name, value in holder.items() if value is not None]
        self.tensors: list[Tensor] = []
        self.places: list[_Place] = []
        self.copies: list[tuple[_Holder, str, int]] = []
        index: dict[int, int] = {}
        for place, name in places:
            tensor = (store._params if place is None else place).get(name)
            if tensor is None:
                raise CannotCaptureError(f"parameter {name!r} is not in Pyro's store")
            if id(tensor) in index:
                self.copies.append((place, name, index[id(tensor)]))
            else:
                index[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
                self.places.append((place, name))
        self.add_fixed([leaf for leaf in leaves if id(leaf) not in index])
        self.conditions = [_condition(tensor) for tensor in self.tensors]
        self.modules = [
            (
                weakref.ref(module),
                module.training,
                [(n, weakref.ref(m)) for n, m in module._modules.items() if m is not None],
            )
            for module in modules
        ]

    def add_fixed(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors that the pair closes over and nobody else holds."""
        self.tensors += tensors
        self.places += [({"": tensor}, "") for tensor in tensors]
        self.conditions = [_condition(tensor) for tensor in self.tensors]

    def live_modules(self) -> list[nn.Module]:
        """The modules, which the state itself does not keep alive."""
        return [module for reference, *_ in self.modules if (module := reference()) is not None]

    def name(self, tensor: Tensor) -> str:
        """Name one of the tensors for a message."""
        index = next(i for i, t in enumerate(self.tensors) if t is tensor)
        return self.places[index][1] or "a tensor the pair closes over"

    def current(self) -> list[Tensor] | None:
        """The tensors as they stand now, or None if the graph no longer describes the pair."""
        store = pyro.get_param_store()._params
        for reference, training, children in self.modules:
            module = reference()
            if module is None or module.training is not training:
                return None
            below = module._modules
            for name, child in children:
                if below.get(name) is not child():
                    return None
        tensors: list[Any] = [(store if h is None else h).get(name) for h, name in self.places]
        for tensor, condition in zip(tensors, self.conditions, strict=True):
            if tensor is None or _condition(tensor) != condition:
                return None
        for holder, name, index in self.copies:
            if (store if holder is None else holder).get(name) is not tensors[index]:
                return None
        return tensors


# --- replay ---


class Call(NamedTuple):
    """One call of the estimator: the pair and what it is given."""

    model: Any
    guide: Any
    args: Any
    kwargs: Any


class Reference(NamedTuple):
    """What one step gives by the code that is the standard a program is held to."""

    summary: Tensor
    gradients: dict[Tensor, Tensor]
    sites: tuple[str, ...]
    parameters: dict[str, dict[str, Any]]


class Program:
    """A captured step: a graph from (beta, arguments, state) to (summary, gradients)."""

    def __init__(
        self,
        signature: tuple[Hashable, Hashable],
        state: State,
        graph: torch.fx.GraphModule,
        reference: Reference,
    ) -> None:
        self.signature = signature
        self.state = state
        self.graph = graph
        self.run: Callable[..., Sequence[Tensor]] = graph
        self.sites = reference.sites
        position = {tensor: i for i, tensor in enumerate(state.tensors)}
        self.leaves = [position[leaf] for leaf in reference.gradients]
        self.device = state.tensors[self.leaves[0]].device
        self.cast = [
            device
            for device, dtype in zip(AUTOCAST_DEVICES, autocast_dtypes(), strict=True)
            if dtype is not None
        ]
        self._copies_outputs = False
        self._copied: list[tuple[int, int]] = []
        self._calls = 0
        self._messages = [
            (name, {k: v for k, v in message.items() if k not in ("name", "args")})
            for name, message in reference.parameters.items()
        ]
        self._constrained = {
            name
            for name, message in reference.parameters.items()
            if message["value"].unconstrained() is not message["value"]
        }

    def due(self, every: int) -> bool:
        """Count a call; True at every so many."""
        self._calls += 1
        return self._calls % every == 0

    def use(self, run: Callable[..., Sequence[Tensor]], *, device_graphs: bool = False) -> None:
        """Run by ``run``; with ``device_graphs`` it writes over its own earlier results."""
        self.run = run
        self._copies_outputs = device_graphs
        self._copied = []
        if device_graphs:
            for tensor in self.state.tensors:
                # Read in place by the graph; a moved one is noticed and recorded anew.
                torch._dynamo.mark_static_address(tensor, guard=False)

    def outputs(self, values: list[Tensor], *, keep: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Run the program: the summary and the gradients.

        They are the caller's own; without ``keep`` they last until the next run only.
        """
        with ExitStack() as contexts:
            contexts.enter_context(torch.no_grad())
            for device in self.cast:  # the graph holds its casts already
                contexts.enter_context(torch.autocast(device, enabled=False))
            if self._copies_outputs:
                torch.compiler.cudagraph_mark_step_begin()
            summary, *gradients = self.run(*values)
            if self._copies_outputs and keep:
                # Multiplying by one copies all the gradients in one launch.
                summary, gradients = summary.clone(), list(torch._foreach_mul(gradients, 1))
            for i, leaf in self._copied:
                gradients[i] = torch.empty_like(values[leaf]).copy_(gradients[i])
            return summary, gradients

    def note_layouts(self, values: list[Tensor], gradients: Sequence[Tensor]) -> None:
        """Find the gradients to be copied: those that share memory or aren't laid out as the leaf.

        ``backward`` hands out gradients that may be changed in place, and fused optimisers rely on
        the layout; which outputs of a graph fall short of that never changes.
        """
        first = len(values) - len(self.state.tensors)
        used = {value.untyped_storage().data_ptr() for value in values}
        for i, gradient in enumerate(gradients):
            leaf, storage = first + self.leaves[i], gradient.untyped_storage().data_ptr()
            if storage in used or gradient.stride() != values[leaf].stride():
                self._copied.append((i, leaf))
            used.add(storage)

    def emit(self, traces: Sequence[Any]) -> None:
        """Add the parameter sites to the traces that stand around the step, as the pair would."""
        store = pyro.get_param_store()
        for name, message in self._messages:
            if name in self._constrained:
                value = store[name]
            else:
                value = store._params[name]
                if "unconstrained" not in value.__dict__:
                    value.unconstrained = weakref.ref(value)
            message["value"] = value
            for trace in traces:
                trace.add_node(name, name=name, args=(name,), **message)


def accumulate(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add gradients to the leaves' ``grad`` as ``backward`` does."""
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf.grad is None:
            leaf.grad = gradient
        else:
            with torch.no_grad():
                leaf.grad.add_(gradient)


def refuse_gradients(state: State, reference: Reference) -> None:
    """Refuse gradients that a graph can't hand over."""
    for leaf, gradient in reference.gradients.items():
        if gradient.layout is not torch.strided:
            raise CannotCaptureError(f"the gradient of {state.name(leaf)!r} is sparse")
        if hooked(leaf):
            raise CannotCaptureError(f"a hook is registered on {state.name(leaf)!r}")


# --- comparison with stock Pyro --------------------------------------------------------------


def refuse_difference(
    program: Program,
    reference: Reference,
    own: Reference,
    names: Sequence[str],
    rounding: Sequence[torch.dtype] = (),
) -> None:
    """Refuse a program whose summary or gradients are not the reference's.

    Rounding is allowed for by the square root of the precision computed in, relative to the norm
    of each parameter's gradient plus a thousandth of the whole gradient's: a gradient that vanishes
    in exact arithmetic has nothing but the rounding of larger terms.
    """
    if set(own.gradients) != set(reference.gradients):
        raise CannotCaptureError("the set of parameters that get a gradient changes")
    dtypes = [gradient.dtype for gradient in reference.gradients.values()]
    dtypes += [*rounding, *(dtype for dtype in autocast_dtypes() if dtype is not None)]
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    for name, value, expected in zip(names, own.summary, reference.summary, strict=True):
        if not _close(value, expected, 1e3, tolerance):
            raise CannotCaptureError(
                f"its {name} {float(value):.6g} differs from the eager {float(expected):.6g}"
            )
    finite = (g.double().nan_to_num(0.0, 0.0, 0.0) for g in reference.gradients.values())
    whole = sum(float(gradient.norm()) ** 2 for gradient in finite) ** 0.5
    for leaf, gradient in reference.gradients.items():
        if not _close(own.gradients[leaf], gradient, whole, tolerance):
            name = program.state.name(leaf)
            raise CannotCaptureError(f"its gradient of {name!r} differs from the eager one")


def refuse_different_buffers(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Refuse a program that leaves other values in the modules' buffers than stock Pyro."""
    for theirs, ours in zip(expected, found, strict=True):
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        if not _close(ours, theirs, 0.0, eps**0.5):
            raise CannotCaptureError("it leaves other values in a buffer than stock Pyro")


def _close(value: Tensor, expected: Tensor, scale: float, tolerance: float) -> bool:
    if value.shape != expected.shape:
        return False
    value, expected = value.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return False
    error = (value - expected)[finite].norm()
    return bool(error <= tolerance * (expected[finite].norm() + 1e-3 * scale))


# --- pairs ---


class Pair:
    """The programs of one (model, guide), known by weak references to what the two consist of."""

    def __init__(
        self,
        parts: tuple[Any, ...],
        forget: Callable[[Any], Any],
        say: Callable[[str, str], None],
    ) -> None:
        self.references = [_weak(part, forget) for part in parts]
        self.title = f"model {_title(*parts[:2])} with guide {_title(*parts[2:])}"
        self.programs: list[Program] = []
        self.last: Any = None
        self.refused = False
        self._say: Callable[[str, str], None] | None = say

    def consists_of(self, parts: tuple[Any, ...]) -> bool:
        """Whether the pair is this very one, not one that lived at the same addresses."""
        return all(ref() is part for ref, part in zip(self.references, parts, strict=True))

    def wants(self, signature: Any) -> bool:
        """Whether to capture: not for a batch whose shapes differ and that came only once."""
        if len(self.programs) >= MAXIMUM_PROGRAMS:
            self.report(
                f"its arguments, flags or parameters changed {MAXIMUM_PROGRAMS} times; pass "
                "numbers that change as tensors"
            )
            return False
        again, self.last = signature == self.last, signature
        return again or not any(
            program.signature[0] == signature[0] and program.signature != signature
            for program in self.programs
        )

    def report(self, reason: object) -> None:
        """Say once why the pair, or some of its calls, run eagerly."""
        if self._say is not None:
            say, self._say = self._say, None
            say(self.title, str(reason))

    def refuse(self, reason: object) -> None:
        """Run eagerly from now on."""
        self.refused = True
        self.programs.clear()
        self.report(reason)


class DeviceLoss(Tensor):
    """A loss still on its way: reading it waits for the device and warns of NaN as Pyro does."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def item(self) -> float:
        """Read the loss."""
        value = float(super().item())
        warn_if_nan(value, "loss")
        return value


def parts_of(function: Any) -> tuple[Any, Any]:
    """A bound method is made anew at every access, so it is known by function and instance."""
    if type(function) is MethodType:
        return function.__func__, function.__self__
    return function, None


def _weak(part: Any, forget: Callable[[Any], Any]) -> Callable[[], Any]:
    try:
        return weakref.ref(part, forget)
    except TypeError:  # None, and the few objects that take no weak reference
        return lambda: part


def _title(function: Any, owner: Any) -> str:
    return repr(getattr(function, "__qualname__", type(function).__name__))
