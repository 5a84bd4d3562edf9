"""The inputs of a pair: made tensors, checked, placed on its device, cut and repeated."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.errors import InputError
from pyro_vae.pair.functions import PairFunction, device_of, modules_of, owned_modules
from pyro_vae.sources import gather

Inputs = tuple[Tensor, ...]
Data = Tensor | Sequence[Tensor]

# Bytes of data moved to a device whole, as a share of what is free there; the rest is to compute in.
_SHARE_OF_DEVICE = 0.5


def as_inputs(
    x: Data, *functions: PairFunction, are_given: bool = True, share_rows: bool = True
) -> Inputs:
    """Return the pair's inputs: tensors that share their first dimension, as the pair takes them.

    With functions, that is on the device of their parameters and, for floating-point data, in their
    type where they have one; whole numbers too where the model says that its data are numbers, for
    elsewhere they may be labels. Their number is checked if they ``are_given`` to the functions.
    """
    if torch.get_default_device().type == "meta":  # new tensors would be memory that nobody wrote
        mend = "torch.set_default_device(None) puts it back"
        raise InputError(f"expected a default device that holds numbers, got 'meta': {mend}")
    x = gather(x, *functions)
    inputs = tuple(map(_tensor, x if isinstance(x, list | tuple) else (x,)))
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        got = ", ".join(sorted({type(value).__name__ for value in inputs})) or "nothing"
        advice = "convert it with torch.as_tensor or numpy.asarray"
        if got == "Dataset":
            advice = "for a Dataset pass one part, e.g. data.test"
        elif got in ("str", "PosixPath"):
            advice = "load the file by pyro_vae.datasets.load, or by numpy or pandas"
        raise InputError(f"expected x as a tensor or a tuple of tensors, got {got}: {advice}")
    for value in inputs:
        _check_tensor(value)
    lengths = [len(value) if value.dim() else 0 for value in inputs]
    if share_rows and len(set(lengths)) != 1:
        raise InputError(f"expected inputs that share their first dimension, got {lengths}")
    if share_rows and lengths[0] == 0:
        raise InputError("expected at least one datum, got an empty data set")
    if not functions:
        return inputs
    if are_given:
        check_number(inputs, *functions)
    device = device_of(*functions, default=inputs[0].device)
    return place_inputs(_in_type_of(inputs, *functions), device)


def place_inputs(inputs: Inputs, device: torch.device) -> Inputs:
    """Move inputs to a device, or warn and leave them to be moved in blocks if they would fill it."""
    if device.type == "cuda" and any(value.device != device for value in inputs):
        needed = sum(value.nbytes for value in inputs)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > _SHARE_OF_DEVICE * free:
            room = f"the data ({needed / 2**30:.1f} GiB) are too large for {device}"
            what = f"({free / 2**30:.1f} GiB free): they stay where they are and are moved in blocks"
            warnings.warn(f"{room} {what}", stacklevel=3)
            return inputs
    return tuple(value.to(device) for value in inputs)


def tile_inputs(inputs: Inputs, count: int) -> Inputs:
    """Repeat inputs so that every particle of every datum is a row, particles outermost."""
    return tuple(value.expand(count, *value.shape).flatten(0, 1) for value in inputs)


def take_rows(inputs: Inputs, rows: slice | Tensor, device: torch.device) -> Inputs:
    """Return some rows of inputs on a device."""
    rows_at = (rows.to(v.device) if isinstance(rows, Tensor) else rows for v in inputs)
    return tuple(move(v[at] if v.dim() else v, device) for v, at in zip(inputs, rows_at, strict=True))


def move(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; to CUDA from pinned memory, so that nothing waits for it."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=device.type == "cuda")


def check_data(model: PairFunction, inputs: Inputs, *, to_train: bool = False) -> None:
    """Let a model's owner, as a ``VAE``, refuse data, and start a learned sigma at their scale."""
    for owner in owned_modules(model):
        check = getattr(owner, "check_data", None)
        # A pair made of one, such as that of the observed part, takes more.
        if check is not None and len(inputs) == getattr(owner, "num_inputs", 1):
            check(*inputs)
            start = getattr(getattr(owner, "likelihood", None), "start_sigma", None)
            if to_train and start is not None:
                start(inputs[0], again=False)


def _in_type_of(inputs: Inputs, *functions: PairFunction) -> Inputs:
    parameters = (each for module in modules_of(*functions) for each in module.parameters())
    types = {each.dtype for each in parameters if each.is_floating_point()}
    if len(types) != 1:
        return inputs
    kind = types.pop()
    numbers = any(hasattr(owner, "check_data") for owner in owned_modules(*functions))
    return tuple(v.to(kind) if numbers or v.is_floating_point() else v for v in inputs)


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
        kind = "a sparse, nested or quantised one"
        raise InputError(f"expected dense tensors, got {kind}: make it dense")
    if value.is_complex():
        raise InputError(f"expected real numbers, got {value.dtype}: pass real and imaginary parts")
    if value.device.type == "meta":
        raise InputError("expected data with values, got a tensor on the meta device: load them")


def check_number(inputs: Inputs, *functions: PairFunction) -> None:
    """Refuse another number of tensors than the functions take."""
    for function in functions:
        if isinstance(function, nn.Module) and type(function).forward is nn.Module.forward:
            got = f"a {type(function).__name__} without forward"
            advice = "pass its methods, e.g. vae.model and vae.guide"
            raise InputError(f"expected two functions, got {got}: {advice}")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # not every callable has one
            continue
        # A VAE takes as many as its likelihood does, which the signature of its model can't tell.
        wanted = getattr(getattr(function, "__self__", None), "num_inputs", len(inputs))
        try:
            signature.bind(*inputs)
            if len(inputs) != wanted:
                raise TypeError
        except TypeError:
            name = getattr(function, "__name__", type(function).__name__)
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs[:4])
            raise InputError(
                f"expected as many tensors as {name}{signature} takes, got {len(inputs)} of shapes "
                f"{shapes}: pass one for each argument, labels only where they are an argument, and "
                "a list of data points as one tensor by torch.stack"
            ) from None
