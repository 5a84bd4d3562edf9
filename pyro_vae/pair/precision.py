"""The precision that products are computed in: float32, TF32 on CUDA, or bfloat16 inside layers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.errors import InputError

PRECISIONS = ("float32", "tf32", "bfloat16")

# What layers multiply in besides float32, rounded by kernel: TF32 has the mantissa of float16.
ROUNDING = {"tf32": (torch.float16,), "bfloat16": (torch.bfloat16,)}

# What layers multiply by their weights. Products of tensors that are none of a layer's (a
# Cholesky factor times noise, a density's quadratic form) are not among them.
_PRODUCTS = {F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d}
_PRODUCTS |= {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


def check_precision(precision: str) -> None:
    """Refuse a precision that is not one of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise InputError(f"expected a precision {', '.join(PRECISIONS)}, got {precision!r}")


class _BFloat16Products(TorchFunctionMode):
    """Layers multiply in bfloat16 and hand on float32, which ``torch.autocast`` would not do."""

    is_on = False  # the innermost of what was asked for holds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not self.is_on:
            return func(*args, **kwargs)
        narrow = [_narrow(value) for value in args]
        result = func(*narrow, **{name: _narrow(value) for name, value in kwargs.items()})
        return result.float() if result.dtype == torch.bfloat16 else result


def _narrow(value: Any) -> Any:
    is_float32 = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.to(torch.bfloat16) if is_float32 else value


@contextmanager
def multiply_in(precision: str) -> Iterator[None]:
    """Let the layers that run inside multiply in bfloat16 if that is the precision, and else not."""
    is_narrow = precision == "bfloat16"
    before, _BFloat16Products.is_on = _BFloat16Products.is_on, is_narrow
    try:
        with _BFloat16Products() if is_narrow else nullcontext():
            yield
    finally:
        _BFloat16Products.is_on = before


@contextmanager
def compute_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32 if asked for, and else not.

    What torch's flags say, the old ones (``allow_tf32``, ``set_float32_matmul_precision``) and the
    new (``fp32_precision``), is put back. Inside both say the same, for torch raises else.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    new = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    above = {backends.fp32_precision, backends.cudnn.fp32_precision} - {"none"}  # "none" follows
    before = ["none" if flag.fp32_precision in above else flag.fp32_precision for flag in new]

    def say(products: str, convolutions: bool, precisions: list[str]) -> None:
        torch.set_float32_matmul_precision(products)
        backends.cudnn.allow_tf32 = convolutions
        for flag, each in zip(new, precisions, strict=True):  # the old ones have set them too
            flag.fp32_precision = each

    # The old flags can be read only where the new ones don't contradict them.
    new[0].fp32_precision = new[1].fp32_precision = new[2].fp32_precision = "ieee"
    products, convolutions = torch.get_float32_matmul_precision(), True
    with suppress(RuntimeError):  # they do: it is True
        convolutions = backends.cudnn.allow_tf32
    is_tf32 = precision == "tf32"
    say("high" if is_tf32 else "highest", is_tf32, ["tf32" if is_tf32 else "ieee"] * 3)
    try:
        yield
    finally:
        say(products, convolutions, before)


def precision_now() -> str:
    """Return the precision of what runs; a graph holds the one that it was recorded in."""
    if _BFloat16Products.is_on:
        return "bfloat16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
