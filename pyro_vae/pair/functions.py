"""A pair's two functions: the modules they reach, their device, mode, lock and random state."""

import functools
import inspect
import operator
import os
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_vae.errors import InputError

PairFunction = Callable[..., Any]


class _HandlerLock:
    """The re-entrant lock held wherever a pair runs: Pyro has one handler stack per process.

    A handler left open around a call would change every draw inside it without a word.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._process = threading.RLock(), 0, 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock whatever handlers are open: to seed, which draws of others would notice."""
        self._acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _acquire(self) -> None:
        if not self._lock.acquire(blocking=False):
            if self._process != os.getpid():
                raise InputError(
                    "expected no other thread to run a pair when this process was forked, got one "
                    "whose lock is never given back here: fork before, or start processes by 'spawn'"
                )
            self._lock.acquire()
        self._process = os.getpid()

    def __enter__(self) -> None:
        self._acquire()
        # An optimiser's own trace, which notes parameters and nothing else, does no harm.
        others = (each for each in _PYRO_STACK if not getattr(each, "param_only", False))
        handlers = [type(each).__name__ for each in others]
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
            error.args = (str(error.args[0]).partition("\n")[0],)


HANDLER_LOCK = _HandlerLock()


def owned_modules(*functions: PairFunction) -> list[nn.Module]:
    """Return the modules the functions belong to: a module itself, or the owner of its method."""
    return _unique_modules(_owner(function) for function in functions)


def modules_of(*functions: PairFunction) -> list[nn.Module]:
    """Return every module the functions can reach: owners, closures and the globals they name."""
    return _unique_modules(_reach(functions, set()))


def has_batch_norm(*functions: PairFunction) -> bool:
    """Tell whether the functions reach a batch norm of vectors, which fails on one data point."""
    parts = (part for module in modules_of(*functions) for part in module.modules())
    return any(isinstance(part, nn.BatchNorm1d) for part in parts)


def tensors_of(*functions: PairFunction) -> list[Tensor]:
    """Return every tensor the functions can reach in the same way that is no module's parameter."""
    found: list[Any] = list(_reach(functions, set()))
    for module in _unique_modules(found):
        found += [value for part in module.modules() for value in vars(part).values()]
    return [value for value in found if isinstance(value, Tensor)]


def device_of(*functions: PairFunction, default: torch.device) -> torch.device:
    """Return the device of the functions' parameters, or ``default`` where they have none."""
    parameters = (value for module in modules_of(*functions) for value in module.parameters())
    return next((parameter.device for parameter in parameters), default)


@contextmanager
def evaluation_mode(*functions: PairFunction) -> Iterator[None]:
    """Put every module the functions reach in eval mode; each submodule's mode is restored."""
    with eval_mode(*functions) as parts, forget_new_names(parts):
        yield


@contextmanager
def eval_mode(*functions: PairFunction) -> Iterator[list[nn.Module]]:
    """Put every module the functions reach in eval mode and give them; names in Pyro's store stay."""
    with _restore_modes(*functions) as parts:
        for part in parts:
            part.training = False
        yield parts


@contextmanager
def training_mode(*functions: PairFunction) -> Iterator[None]:
    """Put the modules the functions belong to in training mode; every mode is restored."""
    with _restore_modes(*functions), torch.inference_mode(False), torch.enable_grad():
        for module in owned_modules(*functions):
            module.train()
        yield


@contextmanager
def _restore_modes(*functions: PairFunction) -> Iterator[list[nn.Module]]:
    modes = {part: part.training for module in modules_of(*functions) for part in module.modules()}
    try:
        yield list(modes)
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def forget_new_names(parts: list[nn.Module] | None = None) -> Iterator[Callable[[], list[str]]]:
    """Take out of Pyro's store what is put there inside; give a function that names it."""
    store = pyro.get_param_store()
    before = set(store.keys())

    def new_names() -> list[str]:
        return [name for name in store.keys() if name not in before]  # noqa: SIM118

    try:
        yield new_names
    finally:
        own = {id(p) for part in parts or () for p in part.parameters(recurse=False)}
        for name in new_names():
            if parts is None or id(store._params[name]) in own:
                del store[name]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under a seed of its own, with the lock, and restore every generator; None: do nothing."""
    if seed is None:
        yield
        return
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise InputError(f"expected a seed from 0 to 2**32 - 1, got {seed!r}")
    # Every device is named, for torch warns of several that are not.
    with HANDLER_LOCK.alone(), torch.random.fork_rng(range(torch.cuda.device_count())):
        state = pyro.util.get_rng_state()
        try:
            pyro.set_rng_seed(number)
            yield
        finally:
            pyro.util.set_rng_state(state)


def _owner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__self__ if inspect.ismethod(function) else function


def _reach(value: Any, seen: set[int]) -> Iterator[nn.Module | Tensor]:
    """Yield the modules and tensors in ``value``, through partials, functions and containers."""
    if isinstance(value, functools.partial):
        for inner in (value.args, value.keywords):
            yield from _reach(inner, seen)
    value = _owner(value)
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module | Tensor):
        yield value
    elif isinstance(value, types.FunctionType):
        names = inspect.getclosurevars(value)
        # A library's function that is only named holds nothing of the pair; one closed over may.
        named = [
            inner
            for inner in names.globals.values()
            if not isinstance(inner, types.FunctionType) or inner.__module__ == value.__module__
        ]
        defaults = [value.__defaults__, value.__kwdefaults__]
        # One by one: a list made here would leave its id to the next one, which would pass for seen.
        for inner in [*names.nonlocals.values(), *named, *defaults]:
            yield from _reach(inner, seen)
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _reach(inner, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
        for inner in list(vars(value).values()):
            yield from _reach(inner, seen)


def _unique_modules(values: Iterable[Any]) -> list[nn.Module]:
    return list({id(value): value for value in values if isinstance(value, nn.Module)}.values())


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant by ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; refuse an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = None
    with suppress(RuntimeError, TypeError):
        chosen = torch.device(device)
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"expected a device auto, cpu or cuda, got {device!r}")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        advice = f"{count} CUDA devices found"
        raise InputError(f"expected a device that is here, got {device!r}: {advice}")
    return chosen


def place_pair(
    model: PairFunction, guide: PairFunction, device: str | torch.device, given: torch.device
) -> torch.device:
    """Move what may be moved and return the device the pair computes on."""
    owned = owned_modules(model, guide)
    if owned:
        place = resolve_device(device)
        for module in owned:
            module.to(place)
        return place
    default = given if device == "auto" else resolve_device(device)
    place = device_of(model, guide, default=default)
    if device != "auto" and place.type != default.type:
        wanted = f"the parameters of plain functions on {device}"
        advice = "move their modules there, plain functions are never moved"
        raise InputError(f"expected {wanted}, they are on {place}: {advice}")
    return place
