"""log p(x) by annealed importance sampling: from the guide or the prior to each datum's posterior."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_choice, check_counts, check_room
from pyro_vae.evaluation import estimate as estimates
from pyro_vae.evaluation.annealing_path import AnnealingPath, State, transition
from pyro_vae.evaluation.estimate import LogMarginal, PosteriorDraws, Report
from pyro_vae.evaluation.pilot import CHAINS, DENSE, Evidence, Tuning, explore, fit_start
from pyro_vae.pair.opened import BLOCK, OpenedPair
from pyro_vae.weights.particles import Particles, check_weights

# The variance of a log weight that the number of steps is chosen for, by the length of the path, and
# the fewest steps: at half of them the estimate must be the same.
_VARIANCE, _FEWEST_STEPS = 0.3, 16

# Evaluations of so many chains before their recording, about a hundred of them long, is repaid.
_WORTH_RECORDING = 150

# What the diagnostics allow: differences in their standard errors, acceptance at the worst place of
# the path, and the effective share of the chains. Below 0.2 a weight's logarithm has a variance above
# 1.6, and the error of the mean of few such weights is not known.
_DEVIATIONS, _LEAST_ACCEPTANCE, _LEAST_SHARE = 3.5, 0.3, 0.2

# The most that an error of few weights is told larger than these show it.
_MOST_MORE = 1.5

# Scoring forward and backward keeps and makes about three times what scoring forward makes.
GRADIENT_MEMORY = 3


@dataclass(frozen=True)
class AnnealingOptions:
    """How to anneal: the options of :func:`pyro_vae.log_marginal` of the same names."""

    num_chains: int = 32
    num_steps: int = 1000
    num_leapfrog_steps: int = 5
    num_transitions: int = 1
    start: str = "both"
    schedule: str = "adaptive"

    def __post_init__(self) -> None:
        check_counts(**{n: value for n, value in vars(self).items() if n.startswith("num_")})
        check_room("temperatures", 32 * self.num_steps, "lower num_steps")
        check_choice("start", self.start, ("both", "guide", "prior"))
        check_choice("schedule", self.schedule, ("adaptive", "sigmoid", "linear"))

    def betas(self) -> list[float]:
        """Return the positions on a path that does not adapt, T + 1 numbers from 0 to 1."""
        line = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        if self.schedule == "sigmoid":
            # The range is that of Grosse, Ancha, Roy 2016, section 6.1.
            curve = torch.sigmoid(4 * (2 * line - 1))
            line = (curve - curve[0]) / (curve[-1] - curve[0])
        return line.tolist()

    def schedule_for(self, tuning: Tuning) -> Tensor:
        """Return the positions on the path, ``(T + 1, N)`` from 0 to 1; T is at most num_steps."""
        if self.schedule != "adaptive":
            betas = torch.tensor(self.betas(), dtype=torch.float64, device=tuning.stops.device)
            return betas[:, None].expand(-1, tuning.stops.shape[1])
        steps = max(_FEWEST_STEPS, math.ceil(tuning.lengths[-1].square().max().item() / _VARIANCE))
        return tuning.schedule(min(steps, self.num_steps))

    @property
    def mean_length(self) -> float:
        """Expected number of gradient evaluations per transition."""
        return (1 + self.num_leapfrog_steps) / 2


class Plan(NamedTuple):
    """How the chains of a block move, frozen before the first chain that counts."""

    path: AnnealingPath
    tuning: Tuning
    betas: Tensor  # (T + 1, N)
    prior: Evidence | None  # of paths from the prior, where the path is another one
    cost: int  # gradient evaluations per datum so far


def anneal(
    pair: OpenedPair, options: AnnealingOptions, *, max_memory: int | None, report: Report,
    keep_draws: int | None = None,
) -> LogMarginal:  # fmt: skip
    r"""Estimate log p(x) per datum by annealed importance sampling.

    A pilot decides schedule, step sizes and covariances; fresh chains, never resampled, give the
    estimate, so that E[w] = p(x) holds.

    .. math:: \log w = \sum_t (\beta_t - \beta_{t-1}) [\log p(x, z_{t-1}) - \log f_0(z_{t-1})]

    Source:
        Neal 2001, "Annealed Importance Sampling"; for decoders: Wu, Burda, Salakhutdinov, Grosse
        2017, "On the Quantitative Analysis of Decoder-Based Generative Models".
    """
    blocks = []
    for _, part in pair.blocks(annealing_block_size(pair, options.num_chains, max_memory)):
        blocks.append(_anneal_block(Particles(part), options, report))
        report.finish(blocks[-1].log_prob)
        report.tell()
    whole = estimates.concatenate(blocks, keep_draws=keep_draws)
    return replace(whole, pseudo_likelihood=pair.is_pseudo_likelihood())


def annealing_block_size(pair: OpenedPair, num_chains: int, max_memory: int | None) -> int:
    """Return how many data points may be annealed together for their chains to fit the memory."""
    if pair.device.type == "cpu":
        least = 2 * GRADIENT_MEMORY * pair.structure.bytes_per_datum * num_chains
        check_room("chains", least, "lower num_chains")
    # And a factor at each of some twenty stops of the pilot.
    coordinates = sum(latent.shape_for(1).numel() for latent in pair.structure.latents.values())
    factors = 160 * coordinates * min(coordinates, DENSE)
    moves = GRADIENT_MEMORY * pair.structure.bytes_per_datum * num_chains
    return max(2, min(BLOCK, pair.memory(max_memory) // (moves + factors)))


def make_plan(path: AnnealingPath, options: AnnealingOptions) -> Plan:
    """Explore the posteriors by pilots, and choose the path and the steps on it.

    With the start ``"both"`` two pilots come from the prior (one alone may lose a mode by chance) and
    one starts at draws of the guide; the path then leaves from a mixture of normals fitted to where
    they arrive, which a further one tries.
    """
    longest, pilots, prior = options.num_leapfrog_steps, [], None
    if options.start == "both":
        start = path.leave_from("prior")
        pilots = [explore(start, longest) for _ in range(2)]
        both = zip(*(pilot.evidence for pilot in pilots), strict=True)
        log_prob, variance = (torch.stack(values) for values in both)
        prior = Evidence(log_prob.logsumexp(0) - math.log(2), variance.mean(0) / 2)
        pilots.append(explore(start, longest, path.guide_positions(CHAINS)))
        path = path.leave_from(fit_start(pilots))
    tuning = explore(path, longest).tuning
    betas = options.schedule_for(tuning)
    if len(betas) * options.num_transitions * options.mean_length > _WORTH_RECORDING:
        path.capture(path.draw(options.num_chains))
    return Plan(path, tuning, betas, prior, tuning.cost + sum(pilot.tuning.cost for pilot in pilots))


def annealed_weights(
    plan: Plan, state: State, options: AnnealingOptions, *, betas: Tensor | None = None,
    reverse: bool = False, tell: Callable[[float], None] | None = None,
) -> tuple[Tensor, State, Tensor]:  # fmt: skip
    """Move chains along the path; return log weights ``(C, N)``, last state, acceptance ``(T, N)``.

    Their mean weight is p(x); with ``reverse``, from posterior draws, their mean inverse 1 / p(x).
    """
    betas = plan.betas if betas is None else betas
    log_weights, acceptance = torch.zeros_like(state.base), []
    steps = range(len(betas) - 1)
    for count, index in enumerate(reversed(steps) if reverse else steps, start=1):
        beta, rise = betas[index + 1], betas[index + 1] - betas[index]
        if not reverse:
            log_weights = log_weights + rise * state.increment
        step_size, factor = plan.tuning.at(beta)
        for _ in range(options.num_transitions):
            longest = options.num_leapfrog_steps
            state, probability = transition(plan.path, state, beta, step_size, factor, longest)
            acceptance.append(probability.mean(0))
        if reverse:
            log_weights = log_weights + rise * state.increment
        if tell is not None and count % 10 == 0:
            tell(count / len(steps))
    return log_weights, state, torch.stack(acceptance)


def _anneal_block(particles: Particles, options: AnnealingOptions, report: Report) -> LogMarginal:
    path = AnnealingPath(particles, options.start)
    rate = distortion = torch.full((particles.num_data,), torch.nan, dtype=torch.float64)
    if options.start != "prior":
        densities = particles.draw(options.num_chains)
        check_weights(densities)
        rate = (densities.log_proposal - densities.log_prior).mean(0)
        distortion = -densities.log_likelihood.mean(0)
    plan = make_plan(path, options)
    path = plan.path
    state = path.evaluate(path.draw(options.num_chains))
    bad = (state.increment.isnan() | state.increment.isposinf() | state.base.isnan()).any(0)
    if bad.any():
        wanted = "finite log-probabilities where the chains start"
        got = f"NaN or infinity for {int(bad.sum())} of {len(bad)} data points"
        raise InputError(f"expected {wanted}, got {got}: look for NaN parameters")

    def tell(fraction: float) -> None:  # of the last data point once the block's numbers are in
        report.tell(min(fraction, 0.999) * particles.num_data)

    log_weights, state, acceptance = annealed_weights(plan, state, options, tell=tell)
    # As many chains again, of half the steps: where these are too few the estimate still rises.
    few = plan.betas[torch.linspace(0, len(plan.betas) - 1, (len(plan.betas) + 2) // 2).long()]
    start = path.evaluate(path.draw(options.num_chains))
    from_half, _, _ = annealed_weights(plan, start, options, betas=few)
    estimate = estimates.measure_weights(log_weights, path.particles.pair.structure.precision)
    diagnostics = _diagnose(estimate, log_weights, from_half, acceptance, plan)
    estimate["standard_error"] = error_of_few(log_weights, estimate["standard_error"])
    num_transitions = (len(plan.betas) + len(few) - 2) * options.num_transitions
    evaluations = options.num_chains * (2 + num_transitions * options.mean_length) + plan.cost
    per_datum: dict[str, Any] = {
        **estimate,
        "rate": rate,
        "distortion": distortion,
        "acceptance": acceptance.mean(0),
        "num_samples": torch.full_like(rate, options.num_chains, dtype=torch.long),
        "cost": torch.full_like(rate, math.ceil(evaluations), dtype=torch.long),
        "trusted": torch.stack([value <= 1 for value in diagnostics.values()]).all(0),
    }
    latents, _ = path.latents(state.position)
    log_likelihood, _ = path.particles.score(latents)
    draws = PosteriorDraws(path.particles.data_first(latents), log_likelihood, log_weights)
    return LogMarginal(
        **{name: value.cpu() for name, value in per_datum.items()},
        method="annealed",
        diagnostics={name: value.cpu() for name, value in diagnostics.items()},
        draws=draws.map(Tensor.cpu),
    )


def error_of_few(log_weights: Tensor, standard_error: Tensor) -> Tensor:
    """Return the standard error to report for a log mean of few weights ``(K, N)``, ``(N,)``, nats.

    Where the largest weights have not been drawn, the mean is low and the error the weights show is
    too small. A sum of many small steps, a log weight is about normal, and of normal ones with
    variance s^2 the error is sqrt((exp(s^2) - 1) / K). The larger of both is told, at most half more
    than shown: chains that arrived nowhere are no normal's tail.

    Source:
        Neal 2001, "Annealed importance sampling", section 4.
    """
    if len(log_weights) < 2:
        return standard_error
    of_normal = (log_weights.var(0).exp() - 1).div(len(log_weights)).sqrt()
    larger = torch.maximum(standard_error, torch.minimum(of_normal, _MOST_MORE * standard_error))
    return torch.where(of_normal.isnan(), standard_error, larger)


def _diagnose(
    found: Any, log_weights: Tensor, from_half: Tensor, acceptance: Tensor, plan: Plan
) -> dict[str, Tensor]:
    """Return what the weights of a block show, each ``(N,)`` as a share of its limit."""
    value, error = found["log_prob"], found["standard_error"]

    def deviate(difference: Tensor, *errors: Tensor) -> Tensor:
        return difference / (_DEVIATIONS * torch.stack(errors).square().sum(0).sqrt() + 1e-3)

    half = estimates.log_mean_weights(from_half)
    # By turns: the chains of one part of a mixture stand together. One chain has no halves.
    halves = (log_weights[::2], log_weights[1::2]) if len(log_weights) > 1 else (log_weights,) * 2
    one, other = map(estimates.log_mean_weights, halves)
    errors = one["standard_error"], other["standard_error"]
    shares = {
        "steps": deviate((value - half["log_prob"]).abs(), error, half["standard_error"]),
        "halves": deviate((one["log_prob"] - other["log_prob"]).abs(), *errors),
        "acceptance": (1 - acceptance.amin(0)) / (1 - _LEAST_ACCEPTANCE),
        "weights": _LEAST_SHARE * len(log_weights) / found["ess"],
    }
    if plan.prior is not None:
        # What is missed shows as a higher evidence; a path too short for it finds too little.
        above = (plan.prior.log_prob - value).clamp(min=0)
        shares["prior"] = deviate(above, error, plan.prior.variance.sqrt())
    return shares
