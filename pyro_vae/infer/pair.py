"""A model/guide pair as its users see it: inputs, modules, device, mode, random state."""

from __future__ import annotations

import functools
import inspect
import operator
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyro_vae.errors import InputError

__all__ = [
    "HANDLER_LOCK",
    "Inputs",
    "as_inputs",
    "check_number",
    "check_support",
    "device_of",
    "evaluation_mode",
    "modules_of",
    "owned_modules",
    "placed",
    "seeded",
    "training_mode",
]

Inputs = tuple[Tensor, ...]
PairFunction = Callable[..., Any]


class _HandlerLock:
    """The lock that everything here holds while it runs a pair.

    Pyro's handler stack is one per process: two threads that trace at once corrupt each other's
    traces, and a handler left open around a call would change every draw inside it without a word.
    The lock is re-entrant, for fit evaluates as it goes.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.RLock(), 0

    def __enter__(self) -> None:
        self._lock.acquire()
        # An optimiser's own trace, which notes parameters and nothing else, does no harm.
        handlers = [
            type(handler).__name__
            for handler in _PYRO_STACK
            if not (isinstance(handler, TraceMessenger) and handler.param_only)
        ]
        if handlers and not self._depth:
            self._lock.release()
            raise InputError(
                f"expected no Pyro handler around the call, got {', '.join(handlers)}: leave its "
                "`with` block (or wait for the thread that is in it), or wrap the model and the guide"
            )
        self._depth += 1

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._depth -= 1
        self._lock.release()
        if isinstance(error, InputError):  # to what is raised inside a trace Pyro adds its shapes
            error.args = (str(error).partition("\n")[0],)


HANDLER_LOCK = _HandlerLock()

# Bytes of data that are moved to a device whole, as a share of what is free there: the other half is
# for the networks and for what they compute.
_SHARE_OF_DEVICE = 0.5


def as_inputs(
    x: Tensor | Sequence[Tensor], *functions: PairFunction, are_given: bool = True
) -> Inputs:
    """Return the pair's inputs: tensors that share their first dimension, as the pair takes them.

    NumPy arrays are taken without a copy where torch can read them as they are, so that a
    memory-mapped file may be larger than the memory; their floats become the default type.

    With the pair's functions given, the inputs are moved to the device of its parameters (see
    :func:`placed`), and floating-point data take on the type of the parameters where these have one
    type: float64, half and bfloat16 data serve a float32 pair. Whole numbers and bits do so where the
    model says that its data are numbers, as a :class:`pyro_vae.VAE` does; elsewhere they may be
    labels and stay what they are.

    Args:
        x: one tensor ``(N, ...)`` or several; several are passed as ``model(*x)``.
        functions: model and guide.
        are_given: whether the functions are given these tensors, and not what is made of them.

    Raises:
        InputError: no tensor, no real numbers, no data, first dimensions that differ, or another
            number of inputs than the functions take.
    """
    values = tuple(x) if isinstance(x, list | tuple) else (x,)
    inputs = tuple(_tensor(value) for value in values)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        got = ", ".join(sorted({type(value).__name__ for value in inputs})) or "nothing"
        raise InputError(
            f"expected x as a tensor or a tuple of tensors, got {got}: of a Dataset pass one part, "
            "e.g. data.test"
        )
    for value in inputs:
        _check_tensor(value)
    lengths = [len(value) if value.dim() else 0 for value in inputs]
    if len(set(lengths)) != 1:
        raise InputError(f"expected inputs that share their first dimension, got {lengths}")
    if lengths[0] == 0:
        raise InputError("expected at least one datum, got an empty data set")
    if not functions:
        return inputs
    if are_given:
        check_number(inputs, *functions)
    return placed(_in_type_of(inputs, *functions), device_of(*functions, default=inputs[0].device))


def placed(inputs: Inputs, device: torch.device) -> Inputs:
    """Move inputs to a device, or leave them where they are if they would fill it.

    What is left is to be moved block by block, by ``block.to(device)``.

    Warns:
        UserWarning: the data stay where they are, and why.
    """
    if device.type == "cuda" and any(value.device != device for value in inputs):
        needed = sum(value.nbytes for value in inputs)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > _SHARE_OF_DEVICE * free:
            warnings.warn(
                f"the data ({needed / 2**30:.1f} GiB) are too large for {device} "
                f"({free / 2**30:.1f} GiB free): they stay where they are and are moved in blocks",
                stacklevel=3,
            )
            return inputs
    return tuple(value.to(device) for value in inputs)


def check_support(model: PairFunction, inputs: Inputs) -> None:
    """Let the owner of a model refuse data its likelihood is not defined for.

    The owner of a method that has a ``check_data`` (as :class:`pyro_vae.VAE` does) is asked.
    """
    for owner in owned_modules(model):
        check = getattr(owner, "check_data", None)
        if check is not None and len(inputs) == 1:
            check(*inputs)


def owned_modules(*functions: PairFunction) -> list[nn.Module]:
    """Return the modules the functions belong to: a module itself, or the owner of its method."""
    owners = (_owner(function) for function in functions)
    return _unique(owner for owner in owners if isinstance(owner, nn.Module))


def modules_of(*functions: PairFunction) -> list[nn.Module]:
    """Return every module the functions can reach: owners, closures and the globals they name."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    for function in functions:
        _reach(function, found, seen)
    return _unique(found)


def device_of(*functions: PairFunction, default: torch.device) -> torch.device:
    """Return the device of the functions' parameters, or ``default`` where they have none."""
    for module in modules_of(*functions):
        for parameter in module.parameters():
            return parameter.device
    return default


@contextmanager
def evaluation_mode(*functions: PairFunction) -> Iterator[None]:
    """Put every module the functions reach in eval mode; each submodule's mode is restored.

    So is Pyro's parameter store: what ``pyro.module`` names again on the way is taken out, or each
    model that was ever evaluated would be kept alive.
    """
    with _modes_restored(*functions) as parts, _names_restored(parts):
        for part in parts:
            part.training = False
        yield


@contextmanager
def training_mode(*functions: PairFunction) -> Iterator[None]:
    """Put the modules the functions belong to in training mode; every mode is restored.

    Gradients are on inside, whatever the caller's mode is.
    """
    with _modes_restored(*functions), torch.inference_mode(False), torch.enable_grad():
        for module in owned_modules(*functions):
            module.train()
        yield


@contextmanager
def _modes_restored(*functions: PairFunction) -> Iterator[list[nn.Module]]:
    modes = {part: part.training for module in modules_of(*functions) for part in module.modules()}
    try:
        yield list(modes)
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _names_restored(parts: list[nn.Module]) -> Iterator[None]:
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        own = {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}
        for name in [name for name in store.keys() if name not in before]:  # noqa: SIM118
            if id(store._params[name]) in own:
                del store[name]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under a seed of its own and restore every generator; with None change nothing."""
    if seed is None:
        yield
        return
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise InputError(f"expected a seed from 0 to 2**32 - 1, got {seed!r}")
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Every device is named, for torch warns of several that are not.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            pyro.set_rng_seed(number)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _in_type_of(inputs: Inputs, *functions: PairFunction) -> Inputs:
    types = {
        parameter.dtype
        for module in modules_of(*functions)
        for parameter in module.parameters()
        if parameter.is_floating_point()
    }
    if len(types) != 1:
        return inputs
    kind = types.pop()
    numbers = any(hasattr(owner, "check_data") for owner in owned_modules(*functions))
    return tuple(
        value.to(kind) if numbers or value.is_floating_point() else value for value in inputs
    )


# Types of whole numbers that torch knows but hardly computes with -> the next one that it does.
_WIDER = {"u2": np.int32, "u4": np.int64, "u8": np.int64}


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise InputError("expected an array without a mask, got a masked one: fill it first")
    if value.dtype.kind not in "fiub":
        raise InputError(f"expected real numbers, got an array of {value.dtype}: convert it")
    kind = _WIDER.get(value.dtype.str[1:], value.dtype.newbyteorder("="))
    kind = np.float64 if value.dtype.itemsize > 8 else kind
    if kind != value.dtype or min(value.strides, default=0) < 0:
        value = np.ascontiguousarray(value, dtype=kind)
    if not value.flags.writeable and not isinstance(value, np.memmap):
        value = value.copy()
    with warnings.catch_warnings():
        # A file mapped for reading is not written to here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.as_tensor(value)
    # NumPy computes in float64 where networks are float32.
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _check_tensor(value: Tensor) -> None:
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise InputError(
            "expected dense tensors, got a sparse, nested or quantised one: make it dense"
        )
    if value.is_complex():
        raise InputError(f"expected real numbers, got {value.dtype}: pass real and imaginary parts")
    if value.device.type == "meta":
        raise InputError("expected data with values, got a tensor on the meta device: load them")


def check_number(inputs: Inputs, *functions: PairFunction) -> None:
    """Refuse another number of tensors than the functions take."""
    for function in functions:
        _check_number(function, inputs)


def _check_number(function: PairFunction, inputs: Inputs) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not every callable has one
        return
    try:
        signature.bind(*inputs)
    except TypeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise InputError(
            f"expected as many tensors as {_name_of(function)}{signature} takes, got {len(inputs)} "
            f"of shapes {shapes}: pass one for each argument, labels only where they are an argument"
        ) from None


def _name_of(function: PairFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _owner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__self__ if inspect.ismethod(function) else function


def _reach(value: Any, found: list[nn.Module], seen: set[int]) -> None:
    """Collect the modules in ``value``, following partials, methods, functions and containers."""
    if isinstance(value, functools.partial):
        for inner in (value.args, value.keywords):
            _reach(inner, found, seen)
    value = _owner(value)
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        found.append(value)
    elif isinstance(value, types.FunctionType):
        names = inspect.getclosurevars(value)
        # A function from elsewhere that is only named (a library's) holds nothing of the pair; one
        # that is closed over (a handler's, around the pair) may.
        named = [
            inner
            for inner in names.globals.values()
            if not isinstance(inner, types.FunctionType) or inner.__module__ == value.__module__
        ]
        defaults = [value.__defaults__, value.__kwdefaults__]
        # One by one: a list made here would leave its id to the next one, which would pass for seen.
        for inner in [*names.nonlocals.values(), *named, *defaults]:
            _reach(inner, found, seen)
    elif isinstance(value, list | tuple):
        for inner in value:
            _reach(inner, found, seen)
    elif isinstance(value, dict):
        for inner in value.values():
            _reach(inner, found, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
        for inner in list(vars(value).values()):
            _reach(inner, found, seen)


def _unique(modules: Iterator[nn.Module] | list[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())
