"""Whether a shortcut gives what plain calls give, as far as rounding determines it."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from torch import Tensor

from pyro_vae.pair.sites import Latents

# What a pair may raise when it is called in a way it was not written for.
CALLING_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)

# Batched and plain kernels round differently (about 1e-6 of the sum of the terms in float32); a
# particle that met another particle's or another datum's numbers is off by much more.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3
# Sums of many terms are off by several units in the last place, and a few directions tell only up to
# a small factor how steep a density is in the direction of such an error. Both are generous: they are
# multiplied by a steepness that is nothing where a wrong result could hide.
_LAST_DIGITS, _STEEP = 8, 8


def all_close(batched: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> bool:
    """Tell whether batched and plain results are the same but for rounding."""
    return all(
        left.shape == right.shape
        and torch.allclose(left, right, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
        for left, right in zip(batched, plain, strict=True)
    )


def agree(
    batched: tuple[Tensor, ...],
    plain: Callable[[Latents], tuple[Tensor, ...]],
    latents: Latents,
) -> bool:
    """Tell whether batched results are those of plain calls, as far as rounding determines these.

    A steep density multiplies the rounding of the latents, and more so one that a flow or a full-rank
    normal knows from drawing while a plain call must find it from the point. By how much is seen from
    plain calls at latents moved in their last digits; it is nothing where a density is tame. A latent
    that holds nothing but whole numbers is taken for a discrete one.
    """
    expected = plain(latents)
    if all_close(batched, expected):
        return True
    if any(left.shape != right.shape for left, right in zip(batched, expected, strict=True)):
        return False
    if not all(map(torch.equal, plain(latents), expected)):
        return False  # what is drawn anew in every call would pass for steep
    slack = [torch.zeros_like(value) for value in expected]
    with pyro.validation_enabled(False):
        for period in (1, 2, 4):
            moved = plain({name: _moved(value, period) for name, value in latents.items()})
            slack = [
                torch.maximum(most, (left - right).abs())
                for most, left, right in zip(slack, moved, expected, strict=True)
            ]
    # A latent that was moved over an edge says nothing of how steep the density is before it.
    slack = [most.where(most.isfinite(), 0.0) for most in slack]
    return all(
        bool(((left - right).abs() <= _ABSOLUTE + _RELATIVE * right.abs() + _STEEP * extra).all())
        for left, right, extra in zip(batched, expected, slack, strict=True)
    )


def _moved(value: Tensor, period: int) -> Tensor:
    """Move a latent by some units in its last place, up and down by turns of ``period`` numbers."""
    if not value.is_floating_point() or torch.equal(value, value.round()):
        return value
    turns = torch.arange(value.numel(), device=value.device).div(period, rounding_mode="floor") % 2
    size = _LAST_DIGITS * torch.finfo(value.dtype).eps
    return value * (1 + size * (2 * turns - 1).to(value.dtype).view(value.shape))
