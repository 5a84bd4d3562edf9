"""KL from a guide to the true posterior, exactly, where the latent has one or two dimensions."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from pyro.distributions import constraints
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError, check_optional_counts
from pyro_vae.evaluation.elbo import single_latent
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import OpenedPair, Progress, open_pair
from pyro_vae.pair.sites import innermost, latent_sites
from pyro_vae.summary import shown
from pyro_vae.weights.particles import Particles

# Grid points per dimension, odd, so that every second point makes a grid with the same ends.
_POINTS = {1: 1025, 2: 161}

# By how much a grid's spacing is cut where two disagree, in turn, and the values held at once then.
_REFINED, _HELD_VALUES = {1: (4, 16, 64), 2: (2, 4)}, 1 << 22

# In units of 1 + KL nats: two grids agree below the first; off by the second the finest is refused.
_AGREE, _REFUSE = 1e-4, 1e-2

# Draws that place the first box, and rounds in which it is fitted to where the mass is.
_PLACING_DRAWS, _ROUNDS = 200, 12


@shown
class PosteriorDivergence(NamedTuple):
    """KL(q(z|x) || p(z|x)) per datum by quadrature (nats, float64, on the CPU, ``(N,)`` each).

    Attributes:
        kl: the divergence.
        log_prob: log p(x) on the same grid.
        error: numerical error, an upper one in practice: how much a grid of twice the spacing
            differs, and by how much the grid misses the guide's mass; infinite where it finds no end.
        pseudo_likelihood: whether ``log_prob`` is one, as in :class:`pyro_vae.LogMarginal`.
    """

    kl: Tensor
    log_prob: Tensor
    error: Tensor
    pseudo_likelihood: bool = False


def posterior_divergence(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    num_points: int | None = None, max_memory: int | None = None, plate: str = "data",
    seed: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> PosteriorDivergence:  # fmt: skip
    r"""Integrate the posterior on a grid that is fitted to each datum.

    .. math:: KL(q \| p(z|x)) = \int q(z|x) [\log q(z|x) - \log p(x, z)] dz + \log \int p(x, z) dz

    Both integrals by the trapezoidal rule, which for smooth densities that vanish at the ends of the
    box converges faster than any power of the spacing. With z = c + s sinh(u), c and s from the
    guide's draws, the grid is regular in u: tails that fall as a power of z fall exponentially in u.
    The box holds the mass of both densities. The grid is refined until two of them agree.

    Args:
        model, x, max_memory, plate, progress: as in :func:`pyro_vae.log_marginal`.
        guide: its variational function, with one real latent site of one or two dimensions per datum.
        num_points: grid points per dimension of the first grid, odd; by default 1,025 and 161.
        seed: seed of the draws that place the box; the result hardly depends on it.

    Raises:
        InputError: several latent sites, a latent of another size or support, a number of points that
            is even or below 9, another option out of range, or densities that no grid resolves.

    Source:
        Trefethen, Weideman 2014, "The Exponentially Convergent Trapezoidal Rule", sections 5 and 14.
    """
    check_optional_counts(num_points=num_points, max_memory=max_memory)
    if num_points is not None and (num_points < 9 or num_points % 2 == 0):
        raise InputError(f"expected an odd num_points of at least 9, got {num_points}")
    check_callables(progress=progress)
    pair = open_pair(model, guide, x, plate=plate)
    with pair.evaluating(seed):
        how: dict[str, Any] = {"max_memory": max_memory, "progress": progress}
        found = measure_divergence(pair, num_points=num_points, **how)
    if found.kl.isnan().any():
        wanted = "densities that a grid resolves"
        got = f"none for {int(found.kl.isnan().sum())} of {len(found.kl)} data points"
        raise InputError(f"expected {wanted}, got {got}: raise num_points, or use inference_gaps")
    return found


def measure_divergence(
    pair: OpenedPair, *, num_points: int | None = None, max_memory: int | None = None,
    progress: Progress | None = None,
) -> PosteriorDivergence:  # fmt: skip
    """Do the work of :func:`posterior_divergence` for an open pair; NaN where no grid resolves it."""
    budget, blocks = pair.memory(max_memory), pair.blocks(256, progress)
    parts = [_refine(part, num_points, budget) for _, part in blocks]
    kl, log_prob, error = map(torch.cat, zip(*parts, strict=True))
    kl = torch.where(error <= _REFUSE * (1 + kl.abs()), kl, torch.nan)
    return PosteriorDivergence(kl, log_prob, error, pair.is_pseudo_likelihood())


def _refine(pair: OpenedPair, num_points: int | None, budget: int) -> tuple[Tensor, ...]:
    """Integrate on one grid, and where it does not agree with its half on ever finer ones."""
    grid = _Grid(Particles(pair), num_points, budget)
    grid.fit()
    found = grid.divergence(1)
    for factor in _REFINED[grid.size]:
        rows = (~(found[2] <= _AGREE * (1 + found[0].abs()))).nonzero()[:, 0]
        if not len(rows):
            break
        if not pair.is_divisible():
            found = grid.divergence(factor)
            continue
        for own in rows.split(max(1, _HELD_VALUES // (factor * grid.points) ** grid.size)):
            for old, new in zip(found, grid.at(own).divergence(factor), strict=True):
                old[own] = new
    return found


class _Grid:
    """A box per datum around the mass of guide and posterior, with a regular grid in it."""

    def __init__(self, particles: Particles, num_points: int | None, budget: int) -> None:
        self.particles = particles
        self.name, self.size = latent_on_grid(particles.pair.trace()[1], particles.num_data)
        self.points = num_points or _POINTS[self.size]
        at_each = particles.pair.structure.bytes_per_datum * particles.num_data
        self.at_once = max(2, budget // at_each)
        self.axis = particles.axes[self.name]
        self.rest = list(particles.latent_shapes[self.name])
        del self.rest[self.axis]

    def fit(self) -> None:
        """Find a box that holds the mass, in u, and where it can't."""
        low, high = self._first_box()
        for _ in range(_ROUNDS):
            low, high, moved, cut = self._fitted(low, high)
            if not moved:
                break
        self.low, self.high, self.cut = low, high, cut

    def at(self, rows: Tensor) -> Self:
        """Return the fitted grids of some of the data points."""
        part = copy.copy(self)
        part.particles = Particles(self.particles.pair.part(rows))
        for name in ("low", "high", "cut", "centre", "scale"):
            value = getattr(self, name)
            setattr(part, name, value[rows.to(value.device)])
        return part

    def divergence(self, factor: int) -> tuple[Tensor, Tensor, Tensor]:
        """Integrate on ``factor`` times as many points per dimension: KL, log p(x) and error."""
        points = factor * (self.points - 1) + 1
        log_joint, log_q = self._densities(self.low, self.high, points)
        spacing = (self.high - self.low) / (points - 1)
        kl, log_prob, missed = _integrals(log_joint, log_q, spacing.log().sum(1))
        half = (slice(None, None, 2),) * self.size
        coarse = _integrals(log_joint[half], log_q[half], (2 * spacing).log().sum(1))
        error = (kl - coarse[0]).abs().maximum((log_prob - coarse[1]).abs()) + missed
        error = error + self.particles.pair.structure.precision * (1 + log_prob.abs())  # rounding
        return kl.cpu(), log_prob.cpu(), torch.where(self.cut, torch.inf, error).cpu()

    def _first_box(self) -> tuple[Tensor, Tensor]:
        """Return ends ``(N, size)`` in u around draws of guide and prior, with room to spare."""
        drawn = self.particles.propose(_PLACING_DRAWS)[0][self.name]
        prior = self.particles.propose_from_prior(_PLACING_DRAWS // 4)[self.name]
        self.dtype = drawn.dtype
        # Half of it, as densities square their arguments and scales differ.
        self.furthest = 0.5 * math.log(torch.finfo(drawn.dtype).max)
        values = torch.cat([drawn, prior]).movedim(self.axis, 1).unsqueeze(-1).flatten(2).double()
        quarters = torch.tensor([0.25, 0.5, 0.75]).to(values)
        quarter, self.centre, most = values[:_PLACING_DRAWS].quantile(quarters, dim=0)
        self.scale = (most - quarter).clamp(min=1e-6 * (1 + self.centre.abs()))
        values = ((values - self.centre) / self.scale).asinh()
        return values.amin(0) - 1, values.amax(0) + 1

    def _fitted(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, bool, Tensor]:
        """Shrink the box to the mass, or let it grow where the mass touches a side, and is cut."""
        log_joint, log_q = self._densities(low, high, self.points)
        dims = tuple(range(self.size))
        filled = torch.zeros_like(log_q, dtype=torch.bool)
        for density in (log_joint, log_q):
            # Elsewhere it is below exp(-40) = 4e-18 of its highest value, which counts as empty.
            filled |= density > density.amax(dims, keepdim=True) - 40
        spacing = (high - low) / (self.points - 1)
        new_low, new_high = low.clone(), high.clone()
        cut = torch.zeros_like(low[:, 0], dtype=torch.bool)
        for dim in dims:
            along = (filled.any(1 - dim) if self.size == 2 else filled).int()  # (points, N)
            before, after = along.argmax(0) - 1, along.flip(0).argmax(0) - 1  # empty points
            cut |= (before < 0) | (after < 0)
            grow = -0.5 * (high[:, dim] - low[:, dim])
            new_low[:, dim] += torch.where(before < 0, grow, before * spacing[:, dim])
            new_high[:, dim] -= torch.where(after < 0, grow, after * spacing[:, dim])
        new_low, new_high = (end.clamp(-self.furthest, self.furthest) for end in (new_low, new_high))
        change = ((new_low - low).abs() + (new_high - high).abs()) / (high - low)
        return new_low, new_high, bool((change > 0.1).any()), cut

    def _densities(self, low: Tensor, high: Tensor, points: int) -> tuple[Tensor, Tensor]:
        """Return log p(x, z) and log q of u on the grid, each ``(points, ..., N)``, float64."""
        line = torch.linspace(0, 1, points, dtype=torch.float64, device=low.device)
        mesh = torch.stack(torch.meshgrid(*[line] * self.size, indexing="ij"), -1)
        unit = mesh.reshape(-1, 1, self.size)
        joint, proposal = [], []
        for part in unit.split(self.at_once):
            u = low + part * (high - low)
            values = (self.centre + self.scale * u.sinh()).to(self.dtype)
            values = values.unflatten(2, self.rest) if self.rest else values[..., 0]
            latents = {self.name: values.movedim(1, self.axis)}
            log_likelihood, log_prior = self.particles.score(latents)
            slope = (self.scale * u.cosh()).log().sum(-1)
            joint.append(log_likelihood + log_prior + slope)
            proposal.append(self.particles.score_proposal(latents) + slope)
        shape = (*[points] * self.size, self.particles.num_data)
        return torch.cat(joint).view(shape), torch.cat(proposal).view(shape)


def _integrals(log_joint: Tensor, log_q: Tensor, log_cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL, log p(x) and what the box leaves out of the guide's mass and of the KL, ``(N,)``."""
    # The ends of the box are empty, so the trapezoidal rule is a plain sum. The KL's part beyond them
    # is taken as what a box of twice the size would add if its integrand stayed what it is there.
    dims = tuple(range(log_q.dim() - 1))
    log_prob = log_joint.logsumexp(dims) + log_cell
    q = (log_q + log_cell).exp()
    integrand = torch.where(q > 0, q * (log_q - log_joint), 0.0)
    size, inner = integrand.abs(), (slice(1, -1),) * len(dims)
    beyond = len(q) * (size.sum(dims) - size[inner].sum(dims))
    return integrand.sum(dims) + log_prob, log_prob, (q.sum(dims) - 1).abs() + beyond


def latent_on_grid(guide_trace: Trace, num_data: int) -> tuple[str, int]:
    """Return the name of a guide's latent and its size per datum; refuse what has no grid."""
    site = single_latent(guide_trace)
    if site is None:
        wanted, count = "one latent site for quadrature", len(latent_sites(guide_trace))
        raise InputError(f"expected {wanted}, got {count}: leave posterior out")
    support = innermost(site["fn"].support, "base_constraint")
    size = site["value"].numel() // num_data
    if support is not constraints.real or size not in _POINTS:
        wanted = "a real latent of 1 or 2 dimensions for quadrature"
        got = f"{site['name']!r} of {size} on {support}"
        raise InputError(f"expected {wanted}, got {got}: leave posterior out")
    return site["name"], size
