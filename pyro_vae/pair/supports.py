"""Where a guide draws and where the prior has its mass: a guide must reach all of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import _Cat, _Stack

from pyro_vae.distributions.sphere import unit_sphere
from pyro_vae.errors import InputError

_BOUNDED_VECTORS = {
    constraints.simplex: (0.0, 1.0),
    constraints.sphere: (-1.0, 1.0),
    unit_sphere: (-1.0, 1.0),
}


class _Bounds(NamedTuple):
    """The smallest box that holds a support; open and closed ends are not told apart."""

    lower: Tensor
    upper: Tensor
    is_discrete: bool


def check_guide_support(guide_site: dict[str, Any], model_site: dict[str, Any]) -> None:
    """Refuse a guide that can't draw where the prior has mass: what it misses leaves no trace.

    Both supports are known as boxes of coordinates; of others nothing is said.
    """
    own, prior = _bounds_at(guide_site), _bounds_at(model_site)
    if own is None or prior is None or (prior.is_discrete and not own.is_discrete):
        return
    try:
        misses = (own.lower > prior.lower) | (own.upper < prior.upper)
    except RuntimeError:  # shapes that do not broadcast are refused elsewhere
        return
    if bool(misses.any()) or (own.is_discrete and not prior.is_discrete):
        name = guide_site["name"]
        raise InputError(
            f"expected a guide that draws {name!r} wherever the prior has mass, got "
            f"{_shown(own)} in the guide and {_shown(prior)} in the model: log p(x) would be too low "
            "without a sign; widen the guide, or truncate the prior alike"
        )


def _bounds_at(site: dict[str, Any]) -> _Bounds | None:
    try:
        return _bounds(site["fn"].support)
    except (NotImplementedError, AttributeError):
        return None


def _bounds(support: Any) -> _Bounds | None:
    """Return a support's box with one entry per coordinate where they differ; None: unknown."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(support, _Stack | _Cat):
        return _joined(support)
    if support in _BOUNDED_VECTORS:
        return _box(*_BOUNDED_VECTORS[support], False)
    if support is constraints.boolean:
        return _box(0, 1, True)
    if support is constraints.real:
        return _box(-math.inf, math.inf, False)
    lower, upper = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    is_discrete = bool(support.is_discrete)
    if lower is None and (upper is None or is_discrete):
        return None
    ends = (-math.inf if lower is None else lower, math.inf if upper is None else upper)
    return _box(*ends, is_discrete)


def _joined(support: Any) -> _Bounds | None:
    """Join the boxes of stacked or concatenated supports along their dimension."""
    parts = [_bounds(part) for part in support.cseq]
    known = [part for part in parts if part is not None]
    scalars = all(part.lower.dim() == 0 and part.upper.dim() == 0 for part in known)
    if len(known) < len(parts) or not scalars or support.dim not in (-1, 0):
        return None
    lengths = getattr(support, "lengths", [1] * len(parts))
    ends = [
        torch.cat([getattr(part, name).expand(n) for part, n in zip(known, lengths, strict=True)])
        for name in ("lower", "upper")
    ]
    return _Bounds(ends[0], ends[1], any(part.is_discrete for part in known))


def _box(lower: Any, upper: Any, is_discrete: bool) -> _Bounds:
    low, high = (torch.as_tensor(end).detach().double().cpu() for end in (lower, upper))
    return _Bounds(low, high, is_discrete)


def _shown(bounds: _Bounds) -> str:
    kind = "whole numbers" if bounds.is_discrete else "numbers"
    return f"{kind} from {bounds.lower.min():g} to {bounds.upper.max():g}"
