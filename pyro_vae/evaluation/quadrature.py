"""KL from a guide to the true posterior, exactly, where the latent has one or two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError, check_optional_counts
from pyro_vae.evaluation.elbo import single_latent
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import OpenedPair, Progress, open_pair
from pyro_vae.pair.sites import latent_sites
from pyro_vae.weights.particles import Particles

# Grid points per dimension, odd, so that every second point makes a grid with the same ends.
_POINTS = {1: 1025, 2: 161}

# Draws that place the first box, and rounds in which it is fitted to where the mass is.
_PLACING_DRAWS, _ROUNDS = 200, 12


class PosteriorDivergence(NamedTuple):
    """KL(q(z|x) || p(z|x)) per datum by quadrature (nats, float64, on the CPU, ``(N,)`` each).

    Attributes:
        kl: the divergence.
        log_prob: log p(x) on the same grid.
        error: numerical error: how much a grid of twice the spacing differs, and by how much the
            grid misses the guide's mass.
    """

    kl: Tensor
    log_prob: Tensor
    error: Tensor


def posterior_divergence(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_points: int | None = None,
    max_memory: int | None = None,
    plate: str = "data",
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PosteriorDivergence:
    r"""Integrate the posterior on a grid that is fitted to each datum.

    .. math:: KL(q \| p(z|x)) = \int q(z|x) [\log q(z|x) - \log p(x, z)] dz + \log \int p(x, z) dz

    Both integrals by the trapezoidal rule, which for smooth densities that vanish at the ends of the
    box converges faster than any power of the spacing. The box holds the mass of both densities.

    Args:
        model: the generative function of the pair.
        guide: its variational function, with one real latent site of one or two dimensions per datum.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        num_points: grid points per dimension, odd; by default 1,025 and 161.
        max_memory: bytes that a chunk of the grid may need.
        plate: name of the data plate.
        seed: seed of the draws that place the box; the result hardly depends on it.
        progress: called with (data done, N).

    Raises:
        InputError: several latent sites, a latent of another size or support, a number of points that
            is even or below 9, or another option out of range.

    Source:
        Trefethen, Weideman 2014, "The Exponentially Convergent Trapezoidal Rule", section 5.
    """
    check_optional_counts(num_points=num_points)
    if num_points is not None and (num_points < 9 or num_points % 2 == 0):
        raise InputError(f"expected an odd num_points of at least 9, got {num_points}")
    check_optional_counts(max_memory=max_memory)
    check_callables(progress=progress)
    options: dict[str, Any] = {"max_memory": max_memory, "progress": progress}
    pair = open_pair(model, guide, x, plate=plate)
    with pair.evaluating(seed):
        return measure_divergence(pair, num_points=num_points, **options)


def measure_divergence(
    pair: OpenedPair,
    *,
    num_points: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> PosteriorDivergence:
    """Do the work of :func:`posterior_divergence` for a pair that is open."""
    budget = pair.memory(max_memory)
    blocks = (_Grid(Particles(part), num_points, budget) for _, part in pair.blocks(256, progress))
    parts = [grid.divergence() for grid in blocks]
    return PosteriorDivergence(*map(torch.cat, zip(*parts, strict=True)))


class _Grid:
    """A box per datum around the mass of guide and posterior, with a regular grid in it."""

    def __init__(self, particles: Particles, num_points: int | None, budget: int) -> None:
        self.particles = particles
        self.name, self.size = latent_on_grid(particles.traces()[1], particles.num_data)
        self.points = num_points or _POINTS[self.size]
        self.at_once = max(2, budget // (particles.bytes_per_datum * particles.num_data))
        self.axis = particles.axes[self.name]
        self.rest = list(particles.latent_shapes[self.name])
        del self.rest[self.axis]

    def divergence(self) -> PosteriorDivergence:
        """Fit the boxes, then integrate."""
        low, high = self._first_box()
        for _ in range(_ROUNDS):
            low, high, moved = self._fitted(low, high)
            if not moved:
                break
        log_joint, log_q = self._densities(low, high)
        spacing = (high - low) / (self.points - 1)
        kl, log_prob, mass = _integrals(log_joint, log_q, spacing.log().sum(1))
        half = (slice(None, None, 2),) * self.size
        coarse, *_ = _integrals(log_joint[half], log_q[half], (2 * spacing).log().sum(1))
        error = (kl - coarse).abs() + (mass - 1).abs()
        return PosteriorDivergence(kl.cpu(), log_prob.cpu(), error.cpu())

    def _first_box(self) -> tuple[Tensor, Tensor]:
        """Return ends ``(N, size)`` around draws of guide and prior, with room to spare."""
        drawn = self.particles.propose(_PLACING_DRAWS)[0][self.name]
        prior = self.particles.propose_from_prior(_PLACING_DRAWS // 4)[self.name]
        self.dtype = drawn.dtype
        values = torch.cat([drawn, prior]).movedim(self.axis, 1).unsqueeze(-1).flatten(2).double()
        low, high = values.amin(0), values.amax(0)
        room = (high - low).clamp(min=1e-6)
        return low - room, high + room

    def _fitted(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Shrink the box to the mass, or let it grow where the mass touches a side."""
        log_joint, log_q = self._densities(low, high)
        dims = tuple(range(self.size))
        filled = torch.zeros_like(log_q, dtype=torch.bool)
        for density in (log_joint, log_q):
            # Elsewhere it is below exp(-40) = 4e-18 of its highest value, which counts as empty.
            filled |= density > density.amax(dims, keepdim=True) - 40
        spacing = (high - low) / (self.points - 1)
        new_low, new_high = low.clone(), high.clone()
        for dim in dims:
            along = (filled.any(1 - dim) if self.size == 2 else filled).int()  # (points, N)
            before, after = along.argmax(0) - 1, along.flip(0).argmax(0) - 1  # empty points
            grow = -0.5 * (high[:, dim] - low[:, dim])
            new_low[:, dim] += torch.where(before < 0, grow, before * spacing[:, dim])
            new_high[:, dim] -= torch.where(after < 0, grow, after * spacing[:, dim])
        change = ((new_low - low).abs() + (new_high - high).abs()) / (high - low)
        return new_low, new_high, bool((change > 0.1).any())

    def _densities(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x, z) and log q on the grid, each ``(points, ..., N)``, float64."""
        line = torch.linspace(0, 1, self.points, dtype=torch.float64, device=low.device)
        mesh = torch.stack(torch.meshgrid(*[line] * self.size, indexing="ij"), -1)
        unit = mesh.reshape(-1, 1, self.size)
        joint, proposal = [], []
        for part in unit.split(self.at_once):
            values = (low + part * (high - low)).to(self.dtype)
            values = values.unflatten(2, self.rest) if self.rest else values[..., 0]
            latents = {self.name: values.movedim(1, self.axis)}
            log_likelihood, log_prior = self.particles.score(latents)
            joint.append(log_likelihood + log_prior)
            proposal.append(self.particles.score_proposal(latents))
        shape = (*[self.points] * self.size, self.particles.num_data)
        return torch.cat(joint).view(shape), torch.cat(proposal).view(shape)


def _integrals(log_joint: Tensor, log_q: Tensor, log_cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL, log p(x) and the guide's mass, ``(N,)`` each.

    The ends of the box are empty, so the trapezoidal rule is a plain sum.
    """
    dims = tuple(range(log_q.dim() - 1))
    log_prob = log_joint.logsumexp(dims) + log_cell
    q = (log_q + log_cell).exp()
    integrand = torch.where(q > 0, q * (log_q - log_joint), 0.0)
    return integrand.sum(dims) + log_prob, log_prob, q.sum(dims)


def latent_on_grid(guide_trace: Trace, num_data: int) -> tuple[str, int]:
    """Return the name of a guide's latent and its size per datum; refuse what has no grid."""
    site = single_latent(guide_trace)
    if site is None:
        raise InputError(
            f"expected one latent site for quadrature, got {len(latent_sites(guide_trace))}: leave "
            "posterior out"
        )
    support = site["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    size = site["value"].numel() // num_data
    if support is not constraints.real or size not in _POINTS:
        raise InputError(
            f"expected a real latent of 1 or 2 dimensions for quadrature, got {site['name']!r} of "
            f"{size} on {support}: leave posterior out"
        )
    return site["name"], size
