"""What a run does besides its result: generators and buffers moved, bytes taken, values read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor, nn, ops
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Whose reads of values decide nothing: checks of arguments and of samples.
_LIBRARIES = ("torch", "pyro", __name__)


def with_submodules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """All the modules below ``modules``, each once."""
    return list({m: None for root in modules for m in root.modules()})


class Snapshot:
    """Generators and module buffers as they stand, to be put back by :meth:`restore`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.buffers = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
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

    def __enter__(self) -> RunObserver:
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
