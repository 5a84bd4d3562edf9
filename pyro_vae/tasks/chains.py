"""Markov chains over latents and missing values, all chains of all data at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.evaluation.elbo import Moments
from pyro_vae.pair.inputs import tile_inputs
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.pair.sites import Given, Latents, Site, sample_sites, total


class Problem(NamedTuple):
    """A pair opened on data with filled hidden places.

    Attributes:
        pair: the pair; of its inputs, ``(N, ...)`` each, the incomplete one is filled.
        missing: what is hidden of that one.
        position: which one it is.
        site: name of the site that observes it.
    """

    pair: OpenedPair
    missing: Tensor
    position: int
    site: str

    @property
    def x(self) -> Tensor:
        """The incomplete input as filled, ``(N, *data_shape)``."""
        return self.pair.inputs[self.position]

    @property
    def axes(self) -> dict[str, int]:
        """For each latent, the (negative) axis of its value that counts the data."""
        return {name: latent.axis for name, latent in self.pair.structure.latents.items()}

    def fill(self, x: Tensor) -> Problem:
        """Return the problem with other values in the hidden places."""
        return self._replace(pair=replace_input(self.pair, self.position, x))

    def rows(self, rows: slice) -> Problem:
        """Return the problem of some of the data."""
        return self._replace(pair=self.pair.part(rows), missing=self.missing[rows])

    def tile(self, count: int) -> Problem:
        """Return the problem with all data repeated, repetitions outermost."""
        if count == 1:
            return self
        *inputs, missing = tile_inputs((*self.pair.inputs, self.missing), count)
        return self._replace(pair=self.pair.on(tuple(inputs)), missing=missing)

    def trace_model(self, latents: Latents) -> Any:
        """Run the model on given latents."""
        with Given(latents):
            return self.pair.alone(self.pair.model).trace()

    def score(self, sites: list[Site]) -> Tensor:
        """Sum the sites' log-probabilities per datum, ``(N,)``, float64."""
        return total(sites, self.pair.plate, self.pair.inputs)


def replace_input(pair: OpenedPair, position: int, x: Tensor) -> OpenedPair:
    """Return the pair with another tensor as its input at a position."""
    return pair.on((*pair.inputs[:position], x, *pair.inputs[position + 1 :]))


class Chains(NamedTuple):
    """Where C chains of N data ended, and what they saw in their second halves.

    Attributes:
        x: the last fill, ``(C, N, *data_shape)``.
        mean, square: means over those steps of E[x | z] and E[x^2 | z], float64, as ``x``.
        acceptance: share of accepted proposals over all steps, ``(C, N)``.
        log_joint_mean, log_joint_variance: of log p(x, z) over those steps, ``(C, N)``.
    """

    x: Tensor
    mean: Tensor
    square: Tensor
    acceptance: Tensor
    log_joint_mean: Tensor
    log_joint_variance: Tensor


class _State(NamedTuple):
    """Latents, fill, log p(x, z) per datum, and the mean and mean square of x given z."""

    latents: Latents
    problem: Problem
    log_joint: Tensor
    mean: Tensor
    square: Tensor


def run_chains(problem: Problem, num_chains: int, num_steps: int, *, accept_all: bool) -> Chains:
    """Run chains from the fill of the problem; the first proposal is always accepted.

    Args:
        problem: a pair bound to its data.
        num_chains: C; more than one only for a divisible problem.
        num_steps: steps of each chain.
        accept_all: accept every proposal (pseudo-Gibbs) instead of the Metropolis test.
    """
    count = len(problem.missing)
    problem = problem.tile(num_chains)
    state = _redraw(problem, _propose(problem)[0])
    accepted = torch.zeros(len(problem.missing), device=problem.x.device)
    moments = [Moments() for _ in range(3)]
    for step in range(num_steps):
        state, moved = _step(state, accept_all)
        accepted += moved
        if step >= num_steps // 2:
            values = (state.mean, state.square, state.log_joint)
            for each, value in zip(moments, values, strict=True):
                each.add(value[None])
    mean, square, log_joint = (each.mean() for each in moments)
    variance = moments[2].variance()
    results = (state.problem.x, mean, square, accepted / num_steps, log_joint, variance)
    return Chains(*(value.unflatten(0, (num_chains, count)) for value in results))


def draw_hidden(problem: Problem, latents: Latents) -> tuple[Tensor, list[Site], Site]:
    """Draw the hidden values given the latents.

    Returns:
        the data with the new fill ``(N, *data_shape)``, the model's sample sites with it in place,
        and the observed site among them.
    """
    trace = problem.trace_model(latents)
    site = trace.nodes[problem.site]
    drawn = site["fn"].sample().to(problem.x.dtype)
    x = torch.where(problem.missing, drawn, problem.x)
    site["value"] = x
    return x, sample_sites(trace), site


def value_moments(site: Site) -> tuple[Tensor, Tensor]:
    """Return mean and mean square of the values at a site given the latents, float64.

    A distribution that doesn't say them is represented by its draw.
    """
    drawn = site["value"].double()
    try:
        mean, variance = site["fn"].mean.double(), site["fn"].variance.double()
    except NotImplementedError:
        return drawn, drawn.square()
    known = mean.isfinite() & variance.isfinite()
    return torch.where(known, mean, drawn), torch.where(known, variance + mean**2, drawn.square())


def _step(state: _State, accept_all: bool) -> tuple[_State, Tensor]:
    """Propose latents, accept or not, redraw the hidden values: one step of every chain."""
    problem = state.problem
    proposal, sites = _propose(problem)
    if accept_all:
        return _redraw(problem, proposal), torch.ones_like(state.log_joint)
    log_joint = problem.score(sample_sites(problem.trace_model(proposal)))
    log_ratio = log_joint - problem.score(sites) - state.log_joint + _log_reverse(state, sites)
    # NaN: neither point has a density; stay.
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    axes = problem.axes
    latents = {
        name: torch.where(_along(accepted, value, axes[name]), value, state.latents[name])
        for name, value in proposal.items()
    }
    return _redraw(problem, latents), accepted.to(log_ratio.dtype)


def _propose(problem: Problem) -> tuple[Latents, list[Site]]:
    trace = problem.pair.alone(problem.pair.guide).trace()
    return {name: trace.nodes[name]["value"] for name in problem.axes}, sample_sites(trace)


def _log_reverse(state: _State, sites: list[Site]) -> Tensor:
    """Return log q of the latents the chains are at, given the data as filled now, ``(N,)``."""
    if len(sites) == 1:
        # The site's distribution is there: the guide need not run again.
        sites = [{**sites[0], "value": state.latents[sites[0]["name"]]}]
    else:
        pair = state.problem.pair
        with Given(state.latents):
            sites = sample_sites(pair.alone(pair.guide).trace())
    return state.problem.score(sites)


def _redraw(problem: Problem, latents: Latents) -> _State:
    x, sites, site = draw_hidden(problem, latents)
    problem = problem.fill(x)
    return _State(latents, problem, problem.score(sites), *value_moments(site))


def _along(condition: Tensor, value: Tensor, axis: int) -> Any:
    """Return a condition ``(N,)`` in the shape that meets the data axis of a latent's value."""
    shape = [1] * value.dim()
    shape[axis] = len(condition)
    return condition.view(shape)
