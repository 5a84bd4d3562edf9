"""The annealing path of a pair in unconstrained coordinates, and Hamiltonian transitions on it."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, cast

import pyro
import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily, biject_to, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import IndependentTransform

from pyro_vae.errors import InputError
from pyro_vae.evaluation.captured_values import Values, capture_values
from pyro_vae.pair.contract import check_density_known
from pyro_vae.pair.sites import Latents, Site, counted_values, latent_sites
from pyro_vae.weights.particles import Particles

# Runs of a pair that must show the same latents, with the same shapes and supports.
_STRUCTURE_RUNS = 4

# Values of a latent that are looked at, and the share of them that may lie on the last number before
# an end of its support: of the mass there, beyond which all positions have one value, log p(x) would
# lack about that share.
_LOOKED_AT, _PILED_UP = 4096, 0.02


class State(NamedTuple):
    """Positions ``(C, N, D)`` of chains and the log densities there, ``(C, N)``, nats, float64."""

    position: Tensor
    base: Tensor  # at the path's start
    increment: Tensor  # at its end, minus that
    base_gradient: Tensor
    increment_gradient: Tensor

    def log_density(self, beta: Tensor) -> Tensor:
        """Return the log density at ``beta`` ``(N,)`` on the path, ``(C, N)``; -inf: undefined."""
        log_density = self.base + beta * self.increment
        return torch.where(log_density.isfinite(), log_density, -math.inf)

    def gradient(self, beta: Tensor) -> Tensor:
        """Return the gradient of :meth:`log_density`, ``(C, N, D)``; 0 where undefined."""
        weight = beta.to(self.base_gradient.dtype)[:, None]
        gradient = self.base_gradient + weight * self.increment_gradient
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def where(self, condition: Tensor, other: "State") -> "State":
        """Take this state where ``condition`` ``(C, N)`` holds, the other elsewhere."""
        of_each = condition[..., None]
        conditions = (of_each, condition, condition, of_each, of_each)
        return State(*map(torch.where, conditions, self, other))

    def take(self, chains: Tensor) -> "State":
        """Take for each datum the chains of these numbers ``(C, N)``."""
        data = torch.arange(chains.shape[1], device=chains.device)
        return State(*(value[chains, data] for value in self))


def multiply(factor: Tensor, vectors: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply vectors ``(C, N, D)`` by a matrix per datum, ``(N, D, D)``, or its diagonal."""
    if factor.dim() == 2:
        return factor * vectors
    return torch.einsum("nji,cnj->cni" if transposed else "nij,cnj->cni", factor, vectors)


def choose(ends: Tensor, count: int) -> Tensor:
    """Draw numbers ``(count, N)`` whose shares, summed up ``(K, N)``, end at 1; each but for one."""
    points = (torch.arange(count, device=ends.device)[:, None] + torch.rand_like(ends[:1])) / count
    return torch.searchsorted(ends.T.contiguous(), points.T.contiguous()).clamp(max=len(ends) - 1).T


class _Coordinates(NamedTuple):
    """One latent and its bijection from unconstrained space."""

    name: str
    transform: Any
    axis: int  # counts the data, in the constrained value
    free_axis: int  # counts the data, in the unconstrained value


class AnnealingPath:
    r"""Densities :math:`f_0^{1 - \beta} p(x, z)^\beta` of the latents' unconstrained coordinates.

    f_0 is q(z given x), p(z) if ``start`` is ``"prior"``, or a mixture of normals; Jacobians are
    included. Coordinates under a mask, which have no density, are standard normal in all of them.
    """

    def __init__(self, particles: Particles, start: str | MixtureSameFamily) -> None:
        self.particles, self.start = particles, start
        model_sites, guide_sites = self._stable_sites()
        if start == "guide":
            check_density_known(guide_sites.values(), 'use start="both"')
        if not model_sites:
            advice = "use method='importance'"
            raise InputError(f"expected a latent to anneal, got none that isn't summed out: {advice}")
        self._sites = []
        for name, site in model_sites.items():
            transform = _transform_of(name, site, guide_sites[name])
            while counted_values(site) is not None and isinstance(transform, IndependentTransform):
                transform = transform.base_transform  # a mask may lie inside its event
            with particles.pair.put_back():  # its draws are not the run's
                _check_apart(name, site, transform)
            axis = particles.axes[name]
            shift = transform.codomain.event_dim - transform.domain.event_dim
            self._sites.append(_Coordinates(name, transform, axis, axis + shift))
        self._shapes: dict[str, torch.Size] = {}  # of one datum
        self._counted: Tensor | None = None  # coordinates outside masks, (1, N, D); None: all
        self._graphs: dict[tuple[str, torch.Size], Callable[[Sequence[Tensor]], Any] | None] = {}
        values = {n: site["value"][None] for n, site in model_sites.items()}
        shown = self.position({n: particles.with_axis(n, value) for n, value in values.items()})
        self.num_coordinates, self.dtype = shown.shape[-1], shown.dtype
        self._counted = self._counted_coordinates(model_sites, shown)

    def leave_from(self, start: str | MixtureSameFamily) -> Self:
        """Return the path to the same posterior from another start; recordings are shared."""
        path = copy.copy(self)
        path.start = start
        return path

    def draw(self, num_chains: int) -> Tensor:
        """Draw positions ``(C, N, D)`` from the start; a mixture's parts get their shares of them."""
        if isinstance(self.start, MixtureSameFamily):
            mixture = self.start
            part = choose(mixture.mixture_distribution.probs.T.cumsum(0), num_chains)
            drawn = mixture.component_distribution.sample((num_chains,))
            part = part[..., None, None].expand(-1, -1, -1, drawn.shape[-1])
            return drawn.gather(2, part)[:, :, 0].to(self.dtype)
        if self.start == "prior":
            return self.position(self.particles.propose_from_prior(num_chains))
        return self.guide_positions(num_chains)

    def guide_positions(self, num_draws: int) -> Tensor:
        """Draw positions ``(S, N, D)`` of the guide, whose density is not asked for."""
        return self.position(self.particles.propose(num_draws)[0])

    def latents(self, position: Tensor, counted: Tensor | None = None) -> tuple[Latents, Tensor]:
        """Return the latents at positions ``(C, N, D)`` and the log Jacobian ``(C, N)``.

        In place of the Jacobian, coordinates that are not ``counted`` ``(1, N, D)`` have their
        density.
        """
        latents: Latents = {}
        log_jacobian = torch.zeros(position.shape[:2], dtype=torch.float64, device=position.device)
        sizes = [self._shapes[site.name].numel() for site in self._sites]
        masks = [None] * len(sizes) if counted is None else counted.split(sizes, dim=2)
        for site, part, mask in zip(self._sites, position.split(sizes, dim=2), masks, strict=True):
            shape, transform = self._shapes[site.name], site.transform
            free = part.reshape(*position.shape[:2], *shape).movedim(1, site.free_axis)
            latents[site.name] = transform(free)
            jacobian = transform.log_abs_det_jacobian(free, latents[site.name]).double()
            jacobian = jacobian.movedim(site.axis + transform.codomain.event_dim, 1)
            if mask is not None:  # all of an event counts, or nothing
                mask = mask.reshape(1, -1, *shape)[_first_of_event(transform.domain.event_dim)]
                jacobian = jacobian * mask
            log_jacobian += jacobian.flatten(2).sum(2) if jacobian.dim() > 2 else jacobian
        if counted is not None:
            normal = -0.5 * (position.double().square() + math.log(2 * math.pi))
            log_jacobian = log_jacobian + torch.where(counted, 0.0, normal).sum(2)
        return latents, log_jacobian

    def log_guide(self, position: Tensor) -> Tensor:
        """Return log q at positions ``(C, N, D)``, ``(C, N)``, however the path starts."""
        latents, log_jacobian = self.latents(position, self._counted)
        return self.particles.score_proposal(latents) + log_jacobian

    def evaluate(self, position: Tensor) -> State:
        """Return densities and gradients at positions ``(C, N, D)``: one pass forward, one back."""
        prior, likelihood, prior_slope, likelihood_slope = self._run("model", position)
        if self.start == "prior":
            return State(position, prior, likelihood, prior_slope, likelihood_slope)
        joint, slope = prior + likelihood, prior_slope + likelihood_slope
        if isinstance(self.start, MixtureSameFamily):
            with torch.enable_grad():
                position = position.detach().requires_grad_()
                density = self.start.log_prob(position.double())
                base, base_slope = density.detach(), _gradient(density, position)
            position = position.detach()
        else:
            base, base_slope = self._run("guide", position)
        return State(position, base, joint - base, base_slope, slope - base_slope)

    def capture(self, position: Tensor) -> None:
        """Record :meth:`evaluate` for this shape: handlers cost more than a small model itself."""
        pair = self.particles.pair
        for kind in ("model", "guide") if self.start == "guide" else ("model",):
            if (kind, position.shape) in self._graphs:
                continue
            captured = capture_values(
                self.particles, (pair.model, pair.guide), ("annealing", kind),
                self._given(position), partial(self._compute, kind),
                # A branch on values that was baked in shows elsewhere than at capture.
                elsewhere=lambda: self._given(position + 0.1 * torch.randn_like(position)),
            )  # fmt: skip
            self._graphs[kind, position.shape] = None if captured is None else captured[0]

    def _run(self, kind: str, position: Tensor) -> Sequence[Tensor]:
        graph = self._graphs.get((kind, position.shape))
        if graph is not None:
            return cast(Sequence[Tensor], graph(self._given(position)))
        return self._compute(kind, self.particles, self._given(position))

    def _given(self, position: Tensor) -> list[Tensor]:
        """Return what a graph is given: the positions, and which of their coordinates count."""
        return [position.contiguous(), *([] if self._counted is None else [self._counted])]

    def _compute(self, kind: str, particles: Particles, given: Sequence[Tensor]) -> Values:
        """Return log densities, of prior and likelihood or of the guide, and their gradients."""
        # The pair was checked when it was first run.
        with torch.enable_grad(), pyro.validation_enabled(False):
            position = given[0].detach().requires_grad_()
            latents, log_jacobian = self.latents(position, *given[1:])
            if kind == "guide":
                terms: Values = (particles.score_proposal(latents) + log_jacobian,)
            else:
                log_likelihood, log_prior = particles.score(latents)
                terms = (log_prior + log_jacobian, log_likelihood)
            gradients = [_gradient(term, position) for term in terms]
        return tuple(value.detach() for value in (*terms, *gradients))

    def position(self, latents: Latents) -> Tensor:
        """Return the unconstrained positions ``(C, N, D)`` of latents ``(C, ...)``."""
        parts = []
        for site in self._sites:
            free = site.transform.inv(latents[site.name]).movedim(site.free_axis, 1)
            self._shapes[site.name] = free.shape[2:]
            parts.append(free.flatten(2) if free.dim() > 2 else free[..., None])
        position = torch.cat(parts, dim=2)
        if not position.isfinite().all():
            wanted = "draws inside the support of the model's latents"
            advice = "give guide and prior the same support"
            raise InputError(f"expected {wanted}, got some outside: {advice}")
        if self._counted is not None:
            position = torch.where(self._counted, position, torch.randn_like(position))
        return position

    def _counted_coordinates(self, sites: dict[str, Site], shown: Tensor) -> Tensor | None:
        """Return which of the coordinates ``(1, N, D)`` lie outside every mask; None: all."""
        masks = {name: counted_values(site) for name, site in sites.items()}
        if all(mask is None for mask in masks.values()):
            return None
        parts = []
        for site in self._sites:
            mask, shape = masks[site.name], self._shapes[site.name]
            if mask is None:
                parts.append(shown.new_ones(1, shown.shape[1], shape.numel(), dtype=torch.bool))
                continue
            codomain, domain = site.transform.codomain.event_dim, site.transform.domain.event_dim
            mask = self.particles.with_axis(site.name, mask[None])[_first_of_event(codomain)]
            mask = mask.movedim(site.axis + codomain, 1)
            mask = mask.reshape(*mask.shape, *[1] * domain).expand(1, -1, *shape)
            parts.append(mask.reshape(1, -1, shape.numel()))
        return torch.cat(parts, dim=2).contiguous()

    def _stable_sites(self) -> tuple[dict[str, Site], dict[str, Site]]:
        """Run the pair; at the first time a few times, to refuse latents that change."""
        pair = self.particles.pair
        knowledge, summed = pair.knowledge, pair.structure.summed

        def named(trace: Any) -> dict[str, Site]:
            return {s["name"]: s for s in latent_sites(trace) if s["name"] not in summed}

        count = 1 if knowledge.is_stable else _STRUCTURE_RUNS
        shown, *others = ([*map(named, pair.trace())] for _ in range(count))
        for first, other in (both for run in others for both in zip(shown, run, strict=True)):
            changed = sorted(set(first) ^ set(other))
            changed = changed or sorted(n for n in first if _differs(first[n], other[n]))
            if changed:
                raise InputError(
                    f"expected the same latents, shapes and supports in every run, {changed[0]!r} "
                    "changes: annealing needs one space to move in; use method='importance'"
                )
        knowledge.is_stable = True
        return shown[0], shown[1]


def _first_of_event(event_dim: int) -> Any:
    """Return the index of an event's first value: all of an event are masked alike."""
    return (..., *[0] * event_dim)


def _check_apart(name: str, site: Site, transform: Any) -> None:
    """Refuse a latent much of whose mass lies where its numbers don't tell positions apart."""
    codomain = getattr(transform.codomain, "base_constraint", transform.codomain)
    if codomain is constraints.real or not isinstance(site["value"], Tensor):
        return
    drawn = site["fn"].sample((max(1, _LOOKED_AT // max(1, site["value"].numel())),))
    free = transform.inv(drawn)
    here = transform(free)
    stuck = (transform(free + 1) == here) | (transform(free - 1) == here)
    share = stuck.flatten(0, -1 - site["fn"].event_dim).double().mean(0).max().item()
    if share > _PILED_UP:
        wider = "compute in float64, " * (drawn.dtype != torch.float64)
        raise InputError(
            f"expected a prior of {name!r} whose draws differ as numbers, {share:.0%} are the "
            f"last number before an end of its support: {wider}keep it from the ends, or use "
            "method='importance'"
        )


def transition(
    path: AnnealingPath, state: State, beta: Tensor, step_size: Tensor, factor: Tensor, longest: int
) -> tuple[State, Tensor]:
    """Move every chain once at ``beta``; return state and acceptance probabilities ``(C, N)``.

    At most ``longest`` leapfrog steps; positions on the path and step sizes are per datum, ``(N,)``;
    the momentum's covariance is the inverse of F F^T, the factor's (see :func:`multiply`).

    Source:
        Neal 2011, "MCMC using Hamiltonian dynamics", sections 3.2, 4.1 and 4.2.
    """
    momentum = torch.randn_like(state.position)  # in coordinates that F makes white
    jitter = 0.8 + 0.4 * torch.rand_like(state.position[..., :1])
    steps = jitter * step_size.to(factor.dtype)[:, None]
    # Drawn anew each time: a trajectory of fixed length may close on itself, and then moves nothing.
    length = int(torch.randint(1, longest + 1, ()))
    before = state.log_density(beta) - kinetic(momentum)

    def kick(at: State) -> Tensor:
        return 0.5 * steps * multiply(factor, at.gradient(beta), transposed=True)

    proposal, pull = state, kick(state)
    for _ in range(length):
        momentum = momentum + pull
        proposal = path.evaluate(proposal.position + steps * multiply(factor, momentum))
        pull = kick(proposal)
        momentum = momentum + pull
    gain = proposal.log_density(beta) - kinetic(momentum) - before
    # NaN: neither point has a density (or the trajectory ran away); stay.
    probability = gain.nan_to_num(nan=-math.inf, posinf=math.inf).clamp(max=0).exp()
    return proposal.where(torch.rand_like(probability) < probability, state), probability


def kinetic(momentum: Tensor) -> Tensor:
    """Return half the squared length of vectors ``(C, N, D)``, ``(C, N)``, float64."""
    return 0.5 * momentum.double().square().sum(-1)


def _gradient(value: Tensor, position: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(position)
    return torch.autograd.grad(value.sum(), position, retain_graph=True, materialize_grads=True)[0]


def _transform_of(name: str, model_site: Site, guide_site: Site) -> Any:
    """Return the bijection from unconstrained space to a latent's support, or refuse the latent."""
    for site in (model_site, guide_site):
        try:
            support = _support(site)
        except NotImplementedError:
            continue
        if support.is_discrete:
            advice = "annealing moves along gradients; use method='importance'"
            raise InputError(f"expected continuous latents, {name!r} is discrete: {advice}")
        try:
            return biject_to(support)
        except NotImplementedError:
            break
    raise InputError(
        f"expected latents with a bijection from unconstrained space, {name!r} "
        f"({type(model_site['fn']).__name__}) has none: use method='importance'"
    )


def _support(site: Site) -> Any:
    support = site["fn"].support
    # A mixture's is wrapped in a check of its components, for which there is no bijection.
    return support.base_constraint if isinstance(support, MixtureSameFamilyConstraint) else support


def _differs(first: Site, other: Site) -> bool:
    if first["value"].shape != other["value"].shape:
        return True
    try:
        pair = [_support(site) for site in (first, other)]
        if pair[0].is_discrete:
            return False
        one, two = (biject_to(support).inv(first["value"]) for support in pair)
    except NotImplementedError:
        return False
    return not torch.equal(one, two)
