"""Joint capture of loss and gradients: what a pair is given and owns, and its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_vae.infer.graph_rewrites import rewrite
from pyro_vae.pair.state import Snapshot

AUTOCAST_DEVICES = ("cpu", "cuda")
_CHECK = "_validate_sample"  # the method by which a distribution reads what it is given


class CannotCaptureError(Exception):
    """Why a pair can't be captured faithfully; its text completes "runs eagerly: ..."."""


class NothingToLearnError(CannotCaptureError):
    """Why one call can't be captured, while others of the same pair may be."""


def is_number(value: Any) -> bool:
    """Tell whether a value can be an input of a graph: a bool is a flag, an enum's member a name."""
    return type(value) in (int, float) or isinstance(value, np.floating | np.integer)


def describe(
    value: Any, tensors: list[Tensor], numbers: dict[str, float], path: str = "argument"
) -> Hashable:
    """Key of an argument up to its tensors' shapes and its numbers; both are noted beside it."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            raise CannotCaptureError(f"{path} is no plain dense tensor")
        if value.requires_grad and torch.is_grad_enabled():
            raise CannotCaptureError(f"{path} requires a gradient")
        tensors.append(value)
        return (value.dtype, value.device)
    if is_number(value):
        numbers[path] = value
        return float
    if isinstance(value, tuple | list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = tuple((k, describe(v, tensors, numbers, f"{path}[{k!r}]")) for k, v in items)
        return (type(value), found)
    if type(value) is partial:  # often a new one at each step
        parts = (value.func, value.args, value.keywords)
        return (partial, describe(parts, tensors, numbers, path))
    try:
        hash(value)
    except TypeError:
        kind = type(value).__name__
        raise CannotCaptureError(f"{path} is an unhashable {kind}: pass tensors") from None
    return (type(value), value)


def replace(
    value: Any, tensors: Iterator[Tensor], numbers: Mapping[str, Any], path: str = "argument"
) -> Any:
    """Rebuild an argument with its tensors taken, in order, and numbers taken by their path."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):  # of any class, which keeps what else it holds
        rebuilt = copy.copy(value)
        for k, v in value.items():
            rebuilt[k] = replace(v, tensors, numbers, f"{path}[{k!r}]")
        return rebuilt
    if isinstance(value, tuple | list):
        items = [replace(v, tensors, numbers, f"{path}[{i!r}]") for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is partial:
        parts = (value.func, value.args, value.keywords)
        function, args, keywords = replace(parts, tensors, numbers, path)
        return partial(function, *args, **keywords)
    return numbers.get(path, value)


def refuse_untraceable(before: Snapshot) -> None:
    """Refuse a run that did what a graph can't repeat."""
    for holder, name, buffer, _ in before.buffers:
        if holder.get(name) is not buffer:
            raise CannotCaptureError(f"buffer {name!r} is replaced, not updated in place")
    now, then = pyro.util.get_rng_state(), before.generators
    numpy_now, numpy_then = now["numpy"], then["numpy"]
    moved = numpy_now[2] != numpy_then[2] or (numpy_now[1] != numpy_then[1]).any()
    if now["random"] != then["random"] or moved:
        raise CannotCaptureError("Python's or NumPy's global random numbers are used")


def _leave_unchecked(*_: Any) -> None:
    return None


@contextmanager
def conditions() -> Iterator[None]:
    """No validation, whose checks read values, and no casts cached by autocast from other runs."""
    cached, check = torch.is_autocast_cache_enabled(), getattr(Distribution, _CHECK)
    try:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        # A distribution made once, as in ``self.prior`` or a PyroSample, holds its own flag.
        setattr(Distribution, _CHECK, _leave_unchecked)
        with pyro.validation_enabled(False):
            yield
    finally:
        setattr(Distribution, _CHECK, check)
        torch.set_autocast_cache_enabled(cached)


def autocast_dtypes() -> tuple[torch.dtype | None, ...]:
    """The dtype autocast computes in on each kind of device; None where it is off."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in AUTOCAST_DEVICES
    )


def refuse_handlers() -> None:
    """Only what SVI itself puts around a step may stand there: a graph would bake the rest in."""
    for handler in _PYRO_STACK:
        if type(handler) is not TraceMessenger or not handler.param_only:
            kind = type(handler).__name__
            raise CannotCaptureError(f"the handler {kind} stands around the step")


def refuse_pair(guide: Any, modules: Sequence[nn.Module]) -> None:
    """Refuse what Pyro's and torch's settings make of a pair."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise CannotCaptureError("the guide is a handler of the model")
    if pyro.settings.get("module_local_params"):
        raise CannotCaptureError("the setting module_local_params is on")
    for module in modules:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise CannotCaptureError("DistributedDataParallel reduces gradients in hooks")
        if isinstance(module, torch.jit.ScriptModule):
            name = getattr(module, "original_name", type(module).__name__)
            raise CannotCaptureError(f"{name!r} is a scripted module, whose operations can't be seen")


def refuse_changed_sites(expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Refuse a pair whose sites differ between two runs."""
    if expected != found:
        changed = sorted(set(expected) ^ set(found)) or list(found)
        raise CannotCaptureError(f"the sites change from run to run: {', '.join(changed)}")


class Sites(Messenger):
    """Notes the sites of a run, the last one, and what is drawn without a pathwise gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.last: str | None = None
        self.problem: str | None = None
        self.observed: list[tuple[Any, Any]] = []  # distributions and the values observed under them

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        self.names.append(name)
        if site_is_subsample(message):
            return
        self.last = name
        if message["is_observed"]:
            self.observed.append((message["fn"], message["value"]))
        if self.problem or message["is_observed"]:
            return
        if message["infer"].get("enumerate"):
            self.problem = f"site {name!r} is enumerated"
        elif not message["done"] and not message["fn"].has_rsample:
            self.problem = f"site {name!r} is not reparameterised"

    def outside(self, like: Tensor) -> Tensor:
        """Return 1 where an observed value is outside the support of its distribution, else 0."""
        found = like.new_zeros(())
        for fn, value in self.observed:
            try:
                found = torch.maximum(found, (~fn.support.check(value)).any().to(found))
            except NotImplementedError:  # a distribution that doesn't say
                continue
        return found

    def __str__(self) -> str:
        return f"near site {self.last!r}" if self.last else "before the first site"


class _RefuseReads(TorchFunctionMode):
    """Refuse the reads of a tensor's values that bypass the dispatcher, hence the capture."""

    READS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise CannotCaptureError("a tensor's values are read in Python")
        return func(*args, **(kwargs or {}))


class _Reads(TorchDispatchMode):
    """Refuse shapes that depend on values, which a capture would bake in; let constants be read.

    The tracer itself reads no constant of several elements, nor what is computed from one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants: list[Tensor] = []  # whose values were read, to be watched from then on
        self._recipes: dict[int, tuple[Tensor, Any, Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor
            or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        ):
            raise CannotCaptureError(f"a shape depends on tensor values ({func})")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = bool(tensors) and all(self._is_constant(tensor) for tensor in tensors)
        if func is torch.ops.aten._local_scalar_dense.default and known:
            with _disable_current_modes():
                return self._compute(args[0]).item()
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for tensor in tensors:
                self._recipes.pop(id(tensor), None)
        elif (
            known
            and isinstance(result, Tensor)
            and torch.Tag.nondeterministic_seeded not in func.tags
        ):
            self._recipes[id(result)] = (result, func, args, kwargs)
        return result

    def _is_constant(self, tensor: Tensor) -> bool:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

        mode = get_proxy_mode()
        is_traced = mode is not None and get_proxy_slot(tensor, mode.tracer, None) is not None
        return id(tensor) in self._recipes or not is_traced

    def _compute(self, tensor: Tensor) -> Tensor:
        """Compute a constant again, from tensors that the pair holds or from literals of its code."""
        if id(tensor) not in self._recipes:
            self.constants.append(tensor)
            return tensor
        _, func, args, kwargs = self._recipes[id(tensor)]
        compute = partial(tree_map_only, Tensor, self._compute)
        return func(*compute(args), **compute(kwargs))


def trace_graph(
    function: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[torch.fx.GraphModule, list[Tensor], list[Tensor]]:
    """Record ``function()`` as a graph over ``inputs`` and whatever else it read.

    Returns the graph, the tensors that are its further inputs, and those whose values are baked in.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    site, reads = Sites(), _Reads()
    # Without a mode of its own the recording makes a new one for every operation: half of its time.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))

    def guarded(*_: Tensor) -> tuple[Tensor, ...]:
        with poutine.block(), site, reads, _RefuseReads():
            return function()

    try:
        with tracing(context):
            module = make_fx(guarded)(*inputs)
    except Exception as error:
        if isinstance(error, CannotCaptureError):
            text = f"{error} {site}"
        elif "get value out of a tracing tensor" in str(error):
            text = f"Python reads a tensor's value (.item(), bool, if) {site}"
        else:
            text = f"{type(error).__name__} {site}: {str(error).strip().splitlines()[:1]}"
        raise CannotCaptureError(text) from error
    return module, _constants_to_inputs(module), reads.constants


def _constants_to_inputs(module: torch.fx.GraphModule) -> list[Tensor]:
    """Turn tensors held by the graph into inputs; literals of the code stay constants."""
    graph = module.graph
    added: dict[str, torch.fx.Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        literal = torch.ops.aten.lift_fresh_copy.default
        if all(user.target is literal for user in node.users):
            continue
        if node.target not in added:
            with graph.inserting_after(last):
                last = added[node.target] = graph.placeholder(node.target.replace(".", "_"))
        node.replace_all_uses_with(added[node.target])
        graph.erase_node(node)
    rewrite(graph)
    graph.eliminate_dead_code()
    module.recompile()
    tensors = [getattr(module, target) for target in added]
    for target in added:
        delattr(module, target)
    return tensors
