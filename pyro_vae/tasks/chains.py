"""Markov chains over latents and missing values, all chains of all data at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs, tile_inputs
from pyro_vae.pair.sites import Given, Latents, Site, sample_sites, total


class Problem(NamedTuple):
    """A pair bound to data with filled hidden places.

    Attributes:
        model, guide: the pair.
        inputs: its inputs, ``(N, ...)`` each; the incomplete one is filled.
        missing: what is hidden of that one.
        position: which one it is.
        site: name of the site that observes it.
        plate: name of the data plate.
        data_axes: for each latent, the (negative) axis of its value that counts the data.
        divisible: whether the pair accepts more or fewer data than these.
    """

    model: PairFunction
    guide: PairFunction
    inputs: Inputs
    missing: Tensor
    position: int
    site: str
    plate: str
    data_axes: dict[str, int]
    divisible: bool

    @property
    def x(self) -> Tensor:
        """The incomplete input as filled, ``(N, *data_shape)``."""
        return self.inputs[self.position]

    def filled(self, x: Tensor) -> Problem:
        """Return the problem with other values in the hidden places."""
        inputs = (*self.inputs[: self.position], x, *self.inputs[self.position + 1 :])
        return self._replace(inputs=inputs)

    def rows(self, rows: slice) -> Problem:
        """Return the problem of some of the data."""
        inputs = tuple(value[rows] for value in self.inputs)
        return self._replace(inputs=inputs, missing=self.missing[rows])

    def tiled(self, count: int) -> Problem:
        """Return the problem with all data repeated, repetitions outermost."""
        if count == 1:
            return self
        *inputs, missing = tile_inputs((*self.inputs, self.missing), count)
        return self._replace(inputs=tuple(inputs), missing=missing)


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
    problem = problem.tiled(num_chains)
    state = _redrawn(problem, _propose(problem)[0])
    accepted = torch.zeros(len(problem.missing), device=problem.x.device)
    means = [torch.zeros_like(value) for value in (state.mean, state.square, state.log_joint)]
    deviations = torch.zeros_like(state.log_joint)
    half = num_steps // 2
    for step in range(num_steps):
        state, moved = _step(state, accept_all)
        accepted += moved
        if step < half:
            continue
        seen = step - half + 1
        before = state.log_joint - means[2]
        for mean, value in zip(means, (state.mean, state.square, state.log_joint), strict=True):
            mean += (value - mean) / seen
        deviations += before * (state.log_joint - means[2])
    mean, square, log_joint_mean = means
    variance = deviations / max(1, num_steps - half - 1)
    results = (state.problem.x, mean, square, accepted / num_steps, log_joint_mean, variance)
    return Chains(*(value.unflatten(0, (num_chains, count)) for value in results))


def draw_hidden(problem: Problem, latents: Latents) -> tuple[Tensor, list[Site], Site]:
    """Draw the hidden values given the latents.

    Returns:
        the data with the new fill ``(N, *data_shape)``, the model's sample sites with it in place,
        and the observed site among them.
    """
    with Given(latents):
        trace = poutine.trace(problem.model).get_trace(*problem.inputs)
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
        return _redrawn(problem, proposal), torch.ones_like(state.log_joint)
    with Given(proposal):
        trace = poutine.trace(problem.model).get_trace(*problem.inputs)
    log_joint = total(sample_sites(trace), problem.plate, problem.inputs)
    log_forward = total(sites, problem.plate, problem.inputs)
    log_ratio = log_joint - log_forward - state.log_joint + _log_reverse(state, sites)
    # NaN: neither point has a density; stay.
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    latents = {
        name: torch.where(_along(accepted, value, problem.data_axes[name]), value, old)
        for name, value in proposal.items()
        for old in (state.latents[name],)
    }
    return _redrawn(problem, latents), accepted.to(log_ratio.dtype)


def _propose(problem: Problem) -> tuple[Latents, list[Site]]:
    trace = poutine.trace(problem.guide).get_trace(*problem.inputs)
    latents = {name: trace.nodes[name]["value"] for name in problem.data_axes}
    return latents, sample_sites(trace)


def _log_reverse(state: _State, sites: list[Site]) -> Tensor:
    """Return log q of the latents the chains are at, given the data as filled now, ``(N,)``."""
    problem = state.problem
    if len(sites) == 1:
        # The site's distribution is there: the guide need not run again.
        sites = [{**sites[0], "value": state.latents[sites[0]["name"]]}]
    else:
        with Given(state.latents):
            sites = sample_sites(poutine.trace(problem.guide).get_trace(*problem.inputs))
    return total(sites, problem.plate, problem.inputs)


def _redrawn(problem: Problem, latents: Latents) -> _State:
    x, sites, site = draw_hidden(problem, latents)
    problem = problem.filled(x)
    log_joint = total(sites, problem.plate, problem.inputs)
    return _State(latents, problem, log_joint, *value_moments(site))


def _along(condition: Tensor, value: Tensor, axis: int) -> Any:
    """Return a condition ``(N,)`` in the shape that meets the data axis of a latent's value."""
    shape = [1] * value.dim()
    shape[axis] = len(condition)
    return condition.view(shape)
