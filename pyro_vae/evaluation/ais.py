"""log p(x) by annealed importance sampling: from the guide or the prior to each datum's posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.estimate import (
    Block,
    LogMarginal,
    PosteriorDraws,
    Report,
    join_blocks,
    log_mean_weights,
)
from pyro_vae.evaluation.hmc import AnnealingPath, State, transition
from pyro_vae.evaluation.pareto import TailWeights
from pyro_vae.pair.opened import BLOCK, OpenedPair
from pyro_vae.weights.particles import Particles

# The acceptance the pilot steers to: above the 0.65 that is optimal in high dimensions (Neal 2011,
# section 4.4), as a rejected trajectory costs a low-dimensional chain more.
_TARGET_ACCEPTANCE = 0.8

# Chains of the pilot, and the gain by which their mean acceptance moves the step: a time constant of
# a few transitions, so that it keeps up with a posterior that narrows fast.
_PILOT_CHAINS, _PILOT_GAIN = 4, 0.3

# Most stops of the pilot on the path, transitions at each, and before it leaves the start; step sizes
# are averaged over so many stops on either side, against their noise.
_PILOT_STOPS, _PILOT_REPEATS, _PILOT_WARM_UP, _PILOT_SMOOTHING = 100, 4, 30, 2

# Scoring forward and backward keeps and makes about three times what scoring forward makes.
GRADIENT_MEMORY = 3


@dataclass(frozen=True)
class AnnealingOptions:
    """How to anneal: the options of :func:`pyro_vae.log_marginal` of the same names."""

    num_chains: int = 16
    num_steps: int = 1000
    num_leapfrog_steps: int = 5
    num_transitions: int = 1
    start: str = "guide"
    schedule: str = "sigmoid"

    def __post_init__(self) -> None:
        check_counts(**{n: value for n, value in vars(self).items() if n.startswith("num_")})
        if self.start not in ("guide", "prior"):
            raise InputError(f"expected start 'guide' or 'prior', got {self.start!r}")
        if self.schedule not in ("sigmoid", "linear"):
            raise InputError(f"expected schedule 'sigmoid' or 'linear', got {self.schedule!r}")

    def betas(self) -> list[float]:
        """Return the positions on the path, T + 1 numbers from 0 to 1."""
        line = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        if self.schedule == "sigmoid":
            # The range is that of Grosse, Ancha, Roy 2016, section 6.1.
            curve = torch.sigmoid(4 * (2 * line - 1))
            line = (curve - curve[0]) / (curve[-1] - curve[0])
        return line.tolist()

    @property
    def mean_length(self) -> float:
        """Expected number of gradient evaluations per transition."""
        return (1 + self.num_leapfrog_steps) / 2


class Tuning(NamedTuple):
    """What the pilot found, frozen before the first chain that counts starts."""

    step_sizes: Tensor  # (T, N), in units of the scales
    scales: Tensor  # (N, D)
    cost: int  # gradient evaluations per datum


def anneal(
    pair: OpenedPair,
    options: AnnealingOptions,
    *,
    max_memory: int | None,
    report: Report,
    keep_draws: int | None = None,
) -> LogMarginal:
    r"""Estimate log p(x) per datum by annealed importance sampling.

    .. math:: \log w = \sum_t (\beta_t - \beta_{t-1}) [\log p(x, z_{t-1}) - \log f_0(z_{t-1})]

    Source:
        Neal 2001, "Annealed Importance Sampling"; for decoders: Wu, Burda, Salakhutdinov, Grosse
        2017, "On the Quantitative Analysis of Decoder-Based Generative Models".
    """
    blocks, positions = [], torch.arange(pair.num_data)
    for rows, part in pair.blocks(annealing_block_size(pair, options.num_chains, max_memory)):
        path = AnnealingPath(Particles(part), options.start)
        blocks.append(_anneal_block(path, options, positions[rows], report))
        report.finish(blocks[-1].per_datum["log_prob"])
        report.tell()
    counts = torch.full((pair.num_data,), options.num_chains)
    return join_blocks(blocks, keep_draws=keep_draws, num_samples=counts, method="annealed")


def annealing_block_size(pair: OpenedPair, num_chains: int, max_memory: int | None) -> int:
    """Return how many data points may be annealed together for their chains to fit the memory."""
    budget = pair.memory(max_memory)
    size = budget // (GRADIENT_MEMORY * pair.structure.bytes_per_datum * num_chains)
    return max(2, min(BLOCK, size))


def tune(path: AnnealingPath, options: AnnealingOptions) -> Tuning:
    """Anneal a few chains, adapting the step size of each datum, and record it along the path."""
    scales = path.scales()
    # The stability limit of leapfrog steps on a unit normal is 2; in D dimensions the acceptance
    # wants D^(-1/4) (Neal 2011, section 4.4).
    log_step = torch.full((len(scales),), 0.7 * path.num_coordinates**-0.25).log().to(scales.device)
    position, _ = path.draw(_PILOT_CHAINS)
    state = path.evaluate(position)
    path.capture(position)
    betas = options.betas()[1:]
    stops = torch.linspace(0, len(betas) - 1, min(_PILOT_STOPS, len(betas))).round().long().tolist()
    longest, beta_at = options.num_leapfrog_steps, [0.0] * _PILOT_WARM_UP
    beta_at += [betas[stop] for stop in stops for _ in range(_PILOT_REPEATS)]
    recorded = []
    for beta in beta_at:
        state, probability = transition(path, state, beta, log_step.exp(), scales, longest)
        log_step = log_step + _PILOT_GAIN * (probability.mean(0).to(log_step) - _TARGET_ACCEPTANCE)
        recorded.append(log_step)
    settled = torch.stack(recorded[_PILOT_WARM_UP + _PILOT_REPEATS - 1 :: _PILOT_REPEATS])
    padded = F.pad(settled.T[:, None], (_PILOT_SMOOTHING,) * 2, mode="replicate")
    smooth = F.avg_pool1d(padded, 2 * _PILOT_SMOOTHING + 1, stride=1)[:, 0].T
    # Steps between two stops interpolate the logarithm.
    log_steps = F.interpolate(smooth.T[None], len(betas), mode="linear", align_corners=True)[0].T
    cost = _PILOT_CHAINS * (1 + len(recorded) * options.mean_length)
    return Tuning(log_steps.exp(), scales, math.ceil(cost))


def annealed_weights(
    path: AnnealingPath,
    state: State,
    options: AnnealingOptions,
    tuning: Tuning,
    *,
    reverse: bool = False,
    tell: Callable[[float], None] | None = None,
) -> tuple[Tensor, State, Tensor]:
    """Move chains along the path; return log weights ``(C, N)``, last state and acceptance ``(N,)``.

    Their mean weight is p(x); with ``reverse``, from posterior draws, their mean inverse 1 / p(x).
    """
    betas, longest = options.betas(), options.num_leapfrog_steps
    log_weights, acceptance = torch.zeros_like(state.base), torch.zeros_like(state.base[0])
    steps = range(options.num_steps)
    for count, index in enumerate(reversed(steps) if reverse else steps, start=1):
        beta, step_size = betas[index + 1], tuning.step_sizes[index]
        rise = beta - betas[index]
        if not reverse:
            log_weights = log_weights + rise * state.increment
        for _ in range(options.num_transitions):
            state, probability = transition(path, state, beta, step_size, tuning.scales, longest)
            acceptance = acceptance + probability.mean(0)
        if reverse:
            log_weights = log_weights + rise * state.increment
        if tell is not None and count % 10 == 0:
            tell(count / options.num_steps)
    return log_weights, state, acceptance / (options.num_steps * options.num_transitions)


def _anneal_block(
    path: AnnealingPath, options: AnnealingOptions, positions: Tensor, report: Report
) -> Block:
    tuning = tune(path, options)
    position, densities = path.draw(options.num_chains)
    state = path.evaluate(position)
    bad = (state.increment.isnan() | state.increment.isposinf() | state.base.isnan()).any(0)
    if bad.any():
        raise InputError(
            f"expected finite log-probabilities where the chains start, got NaN or infinity for "
            f"{int(bad.sum())} of {len(bad)} data: look for NaN parameters"
        )
    path.capture(position)
    log_weights, state, acceptance = annealed_weights(
        path,
        state,
        options,
        tuning,
        # The last data point is told of once the block's numbers are in.
        tell=lambda fraction: report.tell(min(fraction, 0.999) * len(positions)),
    )
    tail = TailWeights(options.num_chains)
    tail.add(log_weights)
    rate = distortion = torch.full_like(acceptance, torch.nan)
    if densities is not None:
        rate = (densities.log_proposal - densities.log_prior).mean(0)
        distortion = -densities.log_likelihood.mean(0)
    num_transitions = options.num_steps * options.num_transitions
    evaluations = options.num_chains * (1 + num_transitions * options.mean_length)
    per_datum = {
        **log_mean_weights(log_weights),
        "pareto_k": tail.pareto_k(),
        "rate": rate,
        "distortion": distortion,
        "acceptance": acceptance,
        "cost": torch.full_like(acceptance, math.ceil(evaluations) + tuning.cost, dtype=torch.long),
    }
    latents, _ = path.latents(state.position)
    log_likelihood, _ = path.particles.score(latents)
    draws = {name: value.cpu() for name, value in path.particles.data_first(latents).items()}
    kept = PosteriorDraws(draws, log_likelihood.cpu(), log_weights.cpu())
    return Block(positions, {name: value.cpu() for name, value in per_datum.items()}, kept)
