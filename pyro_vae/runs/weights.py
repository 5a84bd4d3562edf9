"""The weights of a run: safetensors with a checksum, checked before any is assigned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialised
from torch import Tensor, nn

from pyro_vae.errors import InputError, expecting
from pyro_vae.files import UNREADABLE, checksum_of, read_tensors, write_whole
from pyro_vae.runs.files import WEIGHTS, own_file, read_config
from pyro_vae.vae import VAE

# One entry alone: the order of several in the file would differ from process to process.
_CHECKSUM = "checksum"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_weights(vae: VAE, folder: Path) -> None:
    """Write the weights; the file's bytes depend on the description, the names and values alone."""
    _check_values(state := tensors_of({"": vae}))  # or they could not be loaded
    write_weights(folder, read_config(folder)["model"], state)


def write_weights(folder: Path, description: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, with a checksum over them and what describes them."""
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(folder / WEIGHTS, serialised(state, {_CHECKSUM: checksum_of(description, state)}))


def read_weights(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read the weights of a run and the checksum written with them."""
    path = own_file(folder, WEIGHTS)
    if path is None:
        raise InputError(f"expected weights at {folder / WEIGHTS}, got none: the run did not finish")
    with expecting(f"safetensors weights in {path}", *UNREADABLE):
        weights, metadata = read_tensors(path)
    return weights, metadata.get(_CHECKSUM)


def assign(vae: VAE, weights: Mapping[str, Tensor], checksum: str | None, model: Any) -> None:
    """Check every tensor and the checksum, then assign all; the VAE takes on their float type."""
    check_weights(tensors_of({"": vae}), weights)
    types = _check_values(weights)
    check_checksum(model, weights, checksum)
    for dtype in types:
        vae.to(dtype)
    vae.load_state_dict(weights, strict=False)  # the names were checked above


def _check_values(weights: Mapping[str, Tensor]) -> set[torch.dtype]:
    """Refuse numbers that are not finite, or of several floating-point types; return the type."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"expected finite weights, got NaN or infinity in {name}")
    types = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(types) > 1:
        raise InputError(f"expected weights of one floating-point type, got {len(types)}")
    return types


def check_checksum(description: Any, weights: Mapping[str, Tensor], checksum: str | None) -> None:
    """Refuse weights or a description that are not those written together."""
    if checksum != checksum_of(description, weights):
        wanted = "settings and weights as they were written"
        advice = "one of the files is damaged, changed or from another run; save the model again"
        raise InputError(f"expected {wanted}, got another checksum: {advice}")


def check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse names, shapes and kinds of numbers that are not the expected ones."""
    missing, surplus = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or surplus:
        raise InputError(
            f"expected the weights that the settings describe, {len(missing)} are missing and "
            f"{len(surplus)} surplus (first: {(missing + surplus)[0][:80]!r})"
        )
    for name, value in weights.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            got, shape = tuple(value.shape), tuple(wanted.shape)
            raise InputError(f"expected weight {name} of shape {shape}, got {got}")
        real = wanted.is_floating_point()
        if (value.dtype not in _FLOATS) if real else (value.dtype != wanted.dtype):
            raise InputError(f"expected weight {name} as {wanted.dtype}, got {value.dtype}")


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return parameters and buffers of modules by name; a shared one once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict(keep_vars=True).items():  # the very tensors
            found.setdefault(id(value), (prefix + name, value))
    return dict(found.values())
