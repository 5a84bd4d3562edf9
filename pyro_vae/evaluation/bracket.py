"""Bidirectional Monte Carlo: a lower and an upper bound of log p(x) on data drawn from the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.annealing import (
    AnnealingOptions,
    annealed_weights,
    annealing_blocks,
    tune,
)
from pyro_vae.evaluation.estimate import log_mean_weights
from pyro_vae.evaluation.hamiltonian import AnnealingPath
from pyro_vae.infer.log_weights import PairScorer
from pyro_vae.infer.pair import (
    HANDLER_LOCK,
    Inputs,
    PairFunction,
    as_inputs,
    evaluation_mode,
    seeded,
)
from pyro_vae.infer.sites import Latents, Site, data_dim, latent_sites, sample_sites

__all__ = ["Bidirectional", "bidirectional"]


@dataclass(frozen=True)
class Bidirectional:
    """Bounds of log p(x) per simulated datum (nats, float64, on the CPU).

    Both hold in expectation, and the upper one for data simulated from the model only: it starts from
    an exact posterior draw, which real data don't come with.

    Attributes:
        lower: log of the mean forward weight, ``(M,)``.
        upper: minus the log of the mean inverse reverse weight, ``(M,)``.
        x: the simulated data, as the pair takes them.
        num_chains: chains per datum and direction.
        num_steps: intermediate distributions.
        acceptance: mean acceptance of forward and of reverse transitions, ``(2, M)``.
    """

    lower: Tensor
    upper: Tensor
    x: Inputs
    num_chains: int
    num_steps: int
    acceptance: Tensor

    @property
    def gap(self) -> Tensor:
        """Upper minus lower bound per datum, ``(M,)``: how far annealing can be off."""
        return self.upper - self.lower

    @property
    def mean_lower(self) -> float:
        """Mean of the lower bound."""
        return self.lower.mean().item()

    @property
    def mean_upper(self) -> float:
        """Mean of the upper bound."""
        return self.upper.mean().item()

    @property
    def mean_gap(self) -> float:
        """Mean of the gap."""
        return self.gap.mean().item()

    @property
    def mean_gap_standard_error(self) -> float:
        """Standard error of :attr:`mean_gap` over simulated data; NaN for a single one."""
        if len(self.gap) < 2:
            return math.nan
        return self.gap.std().item() / math.sqrt(len(self.gap))

    def __str__(self) -> str:
        return (
            f"log p(x) of {len(self.gap)} data simulated from the model lies between "
            f"{self.mean_lower:.3f} and {self.mean_upper:.3f} nats per datum (gap "
            f"{self.mean_gap:.3f} +- {self.mean_gap_standard_error:.3f}, {self.num_chains} chains, "
            f"{self.num_steps} steps); the upper side holds for simulated data only"
        )


def bidirectional(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_data: int | None = None,
    num_chains: int = 16,
    num_steps: int = 1000,
    num_leapfrog_steps: int = 5,
    num_transitions: int = 1,
    start: str = "guide",
    schedule: str = "sigmoid",
    max_memory: int | None = None,
    plate: str = "data",
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bidirectional:
    r"""Draw data from the model and bracket their log p(x) by annealing in both directions.

    .. math:: E[\log w_{forward}] \le \log p(x) \le E[-\log w_{reverse}^{-1}]

    The gap says what annealed importance sampling with these options can be trusted for on this
    model. The upper side holds for simulated data only.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        x: a template ``(N, ...)``: its shapes, and its inputs that the model does not observe
            (labels), which are repeated as often as needed. Its observed values are not used.
        num_data: data to simulate, M; by default N.
        num_chains: chains per datum and direction.
        num_steps: intermediate distributions.
        num_leapfrog_steps: most gradient evaluations of a transition.
        num_transitions: transitions at each intermediate distribution.
        start: ``"guide"`` or ``"prior"``, the far end of the path.
        schedule: ``"sigmoid"`` or ``"linear"``.
        max_memory: bytes that a block of chains may need.
        plate: name of the data plate.
        seed: seed of all draws; the generators' state is restored afterwards.
        progress: called with (data done, M).

    Raises:
        InputError: a pair that can't be annealed, or whose observed sites are not inputs as they are.

    Source:
        Grosse, Ancha, Roy 2016, "Measuring the reliability of MCMC inference with bidirectional
        Monte Carlo", section 3.
    """
    options = AnnealingOptions(
        num_chains, num_steps, num_leapfrog_steps, num_transitions, start, schedule
    )
    template = as_inputs(x, model, guide)
    num_data = len(template[0]) if num_data is None else num_data
    if num_data < 1:
        raise InputError(f"expected num_data of at least 1, got {num_data}")
    bounds: list[Tensor] = []
    acceptance: list[Tensor] = []
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide), seeded(seed):
        PairScorer(model, guide, template, plate=plate)  # refuses what can't be weighed
        inputs, latents = simulate(model, template, num_data, plate)
        for rows in annealing_blocks(model, guide, inputs, num_chains, plate, max_memory):
            block = tuple(value[rows] for value in inputs)
            drawn = {
                name: value.movedim(axis, 0)[rows].movedim(0, axis)
                for name, (value, axis) in latents.items()
            }
            path = AnnealingPath(PairScorer(model, guide, block, plate=plate), start)
            both, accepted = _both_ways(path, options, drawn)
            bounds.append(both)
            acceptance.append(accepted)
            if progress is not None:
                progress(sum(part.shape[1] for part in bounds), num_data)
    lower, upper = torch.cat(bounds, dim=1)
    return Bidirectional(lower, upper, inputs, num_chains, num_steps, torch.cat(acceptance, dim=1))


def _both_ways(
    path: AnnealingPath, options: AnnealingOptions, drawn: Latents
) -> tuple[Tensor, Tensor]:
    """Return the bounds ``(2, N)`` and the acceptances ``(2, N)`` of one block."""
    tuning = tune(path, options)
    position, _ = path.draw(options.num_chains)
    path.evaluate(position)
    path.capture(position)
    forward, _, accepted = annealed_weights(path, path.evaluate(position), options, tuning)
    exact = path.position({name: value[None] for name, value in drawn.items()})
    exact = exact.expand(options.num_chains, *exact.shape[1:])
    reverse, _, accepted_back = annealed_weights(
        path, path.evaluate(exact), options, tuning, reverse=True
    )
    lower = log_mean_weights(forward)["log_prob"]
    upper = -log_mean_weights(-reverse)["log_prob"]
    return torch.stack([lower, upper]).cpu(), torch.stack([accepted, accepted_back]).cpu()


def simulate(
    model: PairFunction, template: Inputs, num_data: int, plate: str
) -> tuple[Inputs, dict[str, tuple[Tensor, int]]]:
    """Draw data and their latents from the model.

    Args:
        model: the generative function of the pair.
        template: inputs of the pair; those that the model observes are replaced.
        num_data: how many data to draw.
        plate: name of the data plate.

    Returns:
        the inputs with the drawn data, and each latent with the (negative) axis that counts the data.

    Raises:
        InputError: an observed site that is not one of the inputs as it is.
    """
    observed = sample_sites(poutine.trace(model).get_trace(*template))
    sources = {site["name"]: _source(site, template) for site in observed if site["is_observed"]}
    positions = torch.arange(num_data) % len(template[0])
    inputs = [value[positions.to(value.device)] for value in template]
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*inputs)
    for name, index in sources.items():
        value = trace.nodes[name]["value"]
        inputs[index] = value.reshape(inputs[index].shape).to(inputs[index].dtype)
    latents = {
        site["name"]: (site["value"], data_dim(site, plate) - site["fn"].event_dim)
        for site in latent_sites(trace)
        if site["name"] not in sources
    }
    return tuple(inputs), latents


def _source(site: Site, template: Inputs) -> int:
    """Return which input an observed site observes."""
    value: Any = site["value"]
    for index, given in enumerate(template):
        same_memory = isinstance(value, Tensor) and value.data_ptr() == given.data_ptr()
        if same_memory and value.numel() == given.numel() and not isinstance(site["fn"], dist.Unit):
            return index
    raise InputError(
        f"expected observed site {site['name']!r} to observe an input as it is, got other values: "
        "simulated data can't be put in their place; pass what is observed as an input of its own"
    )
