"""A model/guide pair as its users see it: inputs, modules, device, mode, random state."""

from __future__ import annotations

import functools
import inspect
import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.errors import InputError

__all__ = [
    "HANDLER_LOCK",
    "Inputs",
    "as_inputs",
    "check_support",
    "device_of",
    "evaluation_mode",
    "modules_of",
    "owned_modules",
    "seeded",
    "training_mode",
]

Inputs = tuple[Tensor, ...]
PairFunction = Callable[..., Any]

# Pyro's handler stack is one per process: two threads that trace at once corrupt each other's traces.
# Everything here that runs a pair holds this lock. It is re-entrant, for fit evaluates as it goes.
HANDLER_LOCK = threading.RLock()


def as_inputs(x: Tensor | Sequence[Tensor]) -> Inputs:
    """Return the pair's inputs as a tuple of tensors that share their first dimension.

    Args:
        x: one tensor ``(N, ...)`` or several; several are passed as ``model(*x)``.

    Raises:
        InputError: no tensor, no data, or first dimensions that differ.
    """
    values = tuple(x) if isinstance(x, list | tuple) else (x,)
    inputs = tuple(_tensor(value) for value in values)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        got = ", ".join(sorted({type(value).__name__ for value in inputs})) or "nothing"
        raise InputError(
            f"expected x as a tensor or a tuple of tensors, got {got}: of a Dataset pass one part, "
            "e.g. data.test"
        )
    lengths = [len(value) if value.dim() else 0 for value in inputs]
    if len(set(lengths)) != 1:
        raise InputError(f"expected inputs that share their first dimension, got {lengths}")
    if lengths[0] == 0:
        raise InputError("expected at least one datum, got an empty data set")
    return inputs


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
    """Put every module the functions reach in eval mode; each submodule's mode is restored."""
    with _modes_restored(*functions) as parts:
        for part in parts:
            part.training = False
        yield


@contextmanager
def training_mode(*functions: PairFunction) -> Iterator[None]:
    """Put the modules the functions belong to in training mode; every mode is restored."""
    with _modes_restored(*functions):
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
def seeded(seed: int | None) -> Iterator[None]:
    """Run under a seed of its own and restore every generator; with None change nothing."""
    if seed is None:
        yield
        return
    if not 0 <= seed < 2**32:
        raise InputError(f"expected a seed from 0 to 2**32 - 1, got {seed}")
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            pyro.set_rng_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.as_tensor(value)  # NumPy computes in float64 where networks are float32
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _owner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__self__ if inspect.ismethod(function) else function


def _reach(value: Any, found: list[nn.Module], seen: set[int]) -> None:
    """Collect the modules in ``value``, following partials, methods, functions and containers."""
    if isinstance(value, functools.partial):
        _reach([value.args, value.keywords], found, seen)
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
        _reach([*names.nonlocals.values(), *named, *defaults], found, seen)
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
