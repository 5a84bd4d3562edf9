"""Joint capture of loss and gradients: what a pair is given and owns, and its graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.pair.state import Snapshot

AUTOCAST_DEVICES = ("cpu", "cuda")


class CannotCaptureError(Exception):
    """Why a pair can't be captured faithfully; its text completes "runs eagerly: ..."."""


def describe(value: Any, tensors: list[Tensor], path: str = "argument") -> Hashable:
    """Key of an argument up to its tensors' shapes; its tensors are appended to ``tensors``."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            raise CannotCaptureError(f"{path} is no plain dense tensor")
        if value.requires_grad and torch.is_grad_enabled():
            raise CannotCaptureError(f"{path} requires a gradient")
        tensors.append(value)
        return (value.dtype, value.device)
    if isinstance(value, tuple | list):
        items = tuple(describe(v, tensors, f"{path}[{i}]") for i, v in enumerate(value))
        return (type(value), items)
    if type(value) is dict:
        return (dict, tuple((k, describe(v, tensors, f"{path}[{k!r}]")) for k, v in value.items()))
    try:
        hash(value)
    except TypeError:
        kind = type(value).__name__
        raise CannotCaptureError(f"{path} is an unhashable {kind}: pass tensors") from None
    return (type(value), value)


def replace_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Rebuild an argument with its tensors taken, in order, from ``tensors``."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replace_tensors(v, tensors) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(replace_tensors(v, tensors) for v in value)
    if type(value) is dict:
        return {k: replace_tensors(v, tensors) for k, v in value.items()}
    return value


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


@contextmanager
def conditions() -> Iterator[None]:
    """No validation, whose checks read values, and no casts cached by autocast from other runs."""
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        with pyro.validation_enabled(False):
            yield
    finally:
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
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        raise CannotCaptureError("DistributedDataParallel reduces gradients in hooks")


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

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        self.names.append(name)
        if site_is_subsample(message):
            return
        self.last = name
        if self.problem or message["is_observed"]:
            return
        if message["infer"].get("enumerate"):
            self.problem = f"site {name!r} is enumerated"
        elif not message["done"] and not message["fn"].has_rsample:
            self.problem = f"site {name!r} is not reparameterised"

    def __str__(self) -> str:
        return f"near site {self.last!r}" if self.last else "before the first site"


class _RefuseReads(TorchFunctionMode):
    """Refuse the reads of a tensor's values that bypass the dispatcher, hence the capture."""

    READS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise CannotCaptureError("a tensor's values are read in Python")
        return func(*args, **(kwargs or {}))


class _RefuseDynamicShapes(TorchDispatchMode):
    """Refuse results whose shape depends on values: a capture would bake the shape in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor
            or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        ):
            raise CannotCaptureError(f"a shape depends on tensor values ({func})")
        return func(*args, **(kwargs or {}))


def trace_graph(
    function: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Record ``function()`` as a graph over ``inputs`` and whatever else it read; return both."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    site = Sites()
    # Without a mode of its own the recording makes a new one for every operation: half of its time.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))

    def guarded(*_: Tensor) -> tuple[Tensor, ...]:
        with poutine.block(), site, _RefuseDynamicShapes(), _RefuseReads():
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
    return module, _constants_to_inputs(module)


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
    graph.eliminate_dead_code()
    module.recompile()
    tensors = [getattr(module, target) for target in added]
    for target in added:
        delattr(module, target)
    return tensors
