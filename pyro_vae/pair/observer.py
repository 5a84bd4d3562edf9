"""What a plain run of a function does besides its result: bytes it allocates, values it reads."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor, ops
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Whose reads of values decide nothing: checks of arguments and of samples.
_LIBRARIES = ("torch", "pyro", __name__)


class RunObserver:
    """Watches the operations that run inside.

    Attributes:
        bytes: of every operation's results: an upper bound of the memory they need.
        reads_values: whether code outside torch and Pyro read a tensor's value (``.item()``, ``if``).
    """

    def __init__(self) -> None:
        self.bytes, self.reads_values = 0, False
        self._operations, self._functions = _Operations(self), _Functions(self)

    def __enter__(self) -> RunObserver:
        self._operations.__enter__()
        self._functions.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._functions.__exit__(*error)
        self._operations.__exit__(*error)


class _Operations(TorchDispatchMode):
    def __init__(self, observer: RunObserver) -> None:
        super().__init__()
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.observer.bytes += value.numel() * value.element_size()
        if func is ops.aten._local_scalar_dense.default and _is_read_by_user():
            self.observer.reads_values = True
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
