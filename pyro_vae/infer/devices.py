"""Where a pair computes: the device that is meant, and what may be moved there."""

from __future__ import annotations

import torch

from pyro_vae.errors import InputError
from pyro_vae.infer.pair import PairFunction, device_of, owned_modules

__all__ = ["place_pair", "resolve_device"]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant by ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; refuse an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"expected a device auto, cpu or cuda, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"expected a device auto, cpu or cuda, got {device!r}")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise InputError(
            f"expected a device that is here, got {device!r}: {count} CUDA devices found"
        )
    return chosen


def place_pair(
    model: PairFunction, guide: PairFunction, device: str | torch.device, given: torch.device
) -> torch.device:
    """Move what may be moved and return the device the pair computes on.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        device: where it is wanted; ``auto`` takes CUDA where there is one.
        given: where plain functions without parameters compute: the data's device.

    Raises:
        InputError: plain functions whose parameters are elsewhere.
    """
    owned = owned_modules(model, guide)
    if owned:
        place = resolve_device(device)
        for module in owned:
            module.to(place)
        return place
    default = given if device == "auto" else resolve_device(device)
    place = device_of(model, guide, default=default)
    if device != "auto" and place.type != default.type:
        raise InputError(
            f"expected the parameters of plain functions on {device}, they are on {place}: move "
            "their modules there, plain functions are never moved"
        )
    return place
