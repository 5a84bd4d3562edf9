"""Many particles at once: how a function written for one is called, and checked, for many."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import Given, Latents, Site, data_dim, sample_sites, site_log_prob, sum_to

# What a pair may raise when particles are batched in a way it was not written for.
BATCHING_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)

# Batched and plain kernels round differently (about 1e-6 of the sum of the terms in float32); a
# particle that met another particle's or another datum's numbers is off by much more.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3
# Sums of many terms are off by several units in the last place, and a few directions tell only up to
# a small factor how steep a density is in the direction of such an error. Both are generous: they are
# multiplied by a steepness that is nothing where a wrong result could hide.
_LAST_DIGITS, _STEEP = 8, 8

Terms = tuple[Tensor, Tensor]


class GivenScore:
    """Score given latents of many particles under one function of a pair.

    All particles are scored in one call under ``torch.vmap``, so that the function sees the shapes
    it was written for. One that does not survive that sees every particle as a datum of its own, the
    inputs repeated; one that does not survive that either is called particle by particle. What is
    chosen has agreed with plain calls on the first few particles.

    Args:
        function: model or guide.
        kind: "model" or "guide", for the warning.
        inputs: the pair's inputs.
        plate: name of the data plate.
        data_axes: for each latent, the (negative) axis of its value that counts the data.
    """

    def __init__(
        self,
        function: PairFunction,
        kind: str,
        inputs: Inputs,
        plate: str,
        data_axes: dict[str, int],
    ) -> None:
        self.function, self.kind = function, kind
        self.inputs, self.plate, self.data_axes = inputs, plate, data_axes
        self._chosen: Callable[[Latents], Terms] | None = None

    def __call__(self, latents: Latents) -> Terms:
        """Return the log-densities of observed and of latent sites, each ``(num_samples, N)``."""
        if num_particles(latents) == 1:
            return self.plain(latents)
        if self._chosen is None:
            self._chosen = first_faithful(
                {self.under_vmap: 2, self.tiled: 8},
                lambda score, count: self._is_faithful(score, latents, count),
                self.plain,
                self.kind,
            )
        return self._chosen(latents)

    def _is_faithful(self, score: Callable[[Latents], Terms], latents: Latents, count: int) -> bool:
        first = {name: value[:count].detach() for name, value in latents.items()}
        return agree(score(first), self.plain, first)

    @property
    def strategy(self) -> str:
        """Name of the method that scores (known once two particles have been scored)."""
        return "plain" if self._chosen is None else self._chosen.__name__

    def one(self, latents: Latents, inputs: Inputs | None = None) -> Terms:
        """Score one particle: log-densities of observed and of latent sites, each ``(N,)``."""
        inputs = inputs or self.inputs
        with Given(latents):
            trace = poutine.trace(self.function).get_trace(*inputs)
        sites = sample_sites(trace)
        observed = [site for site in sites if site["is_observed"]]
        latent = [site for site in sites if not site["is_observed"]]
        return total(observed, self.plate, inputs), total(latent, self.plate, inputs)

    def plain(self, latents: Latents) -> Terms:
        """Score particle by particle: the reference."""
        return stacked(
            [
                self.one({name: value[index] for name, value in latents.items()})
                for index in range(num_particles(latents))
            ]
        )

    def under_vmap(self, latents: Latents) -> Terms:
        """Score all particles in one vectorised call."""
        with pyro.validation_enabled(False):
            return torch.vmap(self.one, randomness="different")(latents)

    def tiled(self, latents: Latents) -> Terms:
        """Score all particles as if they were more data."""
        count = num_particles(latents)
        tiled = tile_latents(latents, self.data_axes)
        observed, latent = self.one(tiled, tile(self.inputs, count))
        return observed.view(count, -1), latent.view(count, -1)


def total(sites: list[Site], plate: str, inputs: Inputs) -> Tensor:
    """Sum the sites' log-probabilities per datum, ``(N,)``, float64."""
    terms = [sum_to(site_log_prob(site), (data_dim(site, plate),)) for site in sites]
    if not terms:
        return torch.zeros(len(inputs[0]), dtype=torch.float64, device=inputs[0].device)
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def tile(inputs: Inputs, count: int) -> Inputs:
    """Repeat the inputs so that every particle of every datum is a row, particles outermost."""
    return tuple(value.expand(count, *value.shape).flatten(0, 1) for value in inputs)


def tile_latents(latents: Latents, axes: dict[str, int]) -> Latents:
    """Make every particle of every datum a datum of its own, as :func:`tile` does of the inputs.

    Args:
        latents: by site name, ``(num_particles, *shape of one draw)``.
        axes: for each of them, the (negative) axis that counts the data.
    """
    return {
        name: value.movedim(0, axes[name] - 1).flatten(axes[name] - 1, axes[name])
        for name, value in latents.items()
    }


def untile(value: Tensor, axis: int, count: int) -> Tensor:
    """Bring a latent drawn from tiled inputs to ``(count, *shape of one draw)``, as a view."""
    return value.unflatten(axis, (count, -1)).movedim(axis - 1, 0)


def num_particles(latents: Latents) -> int:
    """Return the number of particles of a batch of latents."""
    return len(next(iter(latents.values())))


def first_faithful(
    candidates: dict[Callable[..., Any], int],
    is_faithful: Callable[[Any, int], bool],
    plain: Callable[..., Any],
    kind: str,
) -> Callable[..., Any]:
    """Return the first candidate that agrees with plain calls, or the plain call itself.

    Args:
        candidates: shortcuts, and on how many particles each is checked: few where particles can't
            meet (``torch.vmap`` keeps them apart and refuses branches on their values), more where
            a branch on a value may take the right side for a few particles by luck.
        is_faithful: whether a shortcut agrees with plain calls on so many particles.
        plain: the particle by particle call.
        kind: "model" or "guide", for the warning.
    """
    for candidate, count in candidates.items():
        try:
            with torch.no_grad():
                if is_faithful(candidate, count):
                    return candidate
        except BATCHING_ERRORS:
            continue
    warnings.warn(
        f"the {kind} of this pair gives other values when its particles are batched; "
        "it is called once per particle instead, which is exact and slow",
        stacklevel=6,
    )
    return plain


def stacked(rows: list[Any]) -> Any:
    """Stack equal structures of tensors (tuples, dicts) along a new first dimension."""
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.stack(rows)
    if isinstance(first, dict):
        return {name: stacked([row[name] for row in rows]) for name in first}
    return tuple(stacked([row[index] for row in rows]) for index in range(len(first)))


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
    plain calls at latents moved in their last digits; it is nothing where a density is tame.

    Args:
        batched: results at these latents.
        plain: the plain calls, as a function of the latents.
        latents: by site name; one that holds nothing but whole numbers is taken for a discrete one.
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
    return all(
        bool(((left - right).abs() <= _ABSOLUTE + _RELATIVE * right.abs() + _STEEP * extra).all())
        for left, right, extra in zip(batched, expected, map(_finite, slack), strict=True)
    )


def _finite(slack: Tensor) -> Tensor:
    """A latent that was moved over an edge says nothing of how steep the density is before it."""
    return slack.where(slack.isfinite(), 0.0)


def _moved(value: Tensor, period: int) -> Tensor:
    """Move a latent by some units in its last place, up and down by turns of ``period`` numbers."""
    if not value.is_floating_point() or torch.equal(value, value.round()):
        return value
    turns = torch.arange(value.numel(), device=value.device).div(period, rounding_mode="floor") % 2
    size = _LAST_DIGITS * torch.finfo(value.dtype).eps
    return value * (1 + size * (2 * turns - 1).to(value.dtype).view(value.shape))


class AllocationCounter(TorchDispatchMode):
    """Sum the bytes of every operation's results: an upper bound of the memory they need."""

    bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.bytes += value.numel() * value.element_size()
        return result
