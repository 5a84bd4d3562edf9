"""A second look, from the prior, at importance sampling; annealing of what it does not clear."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.ais import AnnealingOptions, anneal, annealing_block_size
from pyro_vae.evaluation.annealing_path import AnnealingPath
from pyro_vae.evaluation.estimate import LogMarginal, PosteriorDraws, Report, log_mean_weights
from pyro_vae.evaluation.pilot import CHAINS, explore
from pyro_vae.pair.opened import BLOCK, OpenedPair
from pyro_vae.weights.particles import Particles

_Draws = PosteriorDraws | None

# Stricter than the published limit of 0.7: of exact problems with heavier tails too few estimates lie
# within two of their standard errors.
_PARETO_K_LIMIT = 0.4

# Where samples fall less than so often per unit of the posterior's mass, a chain from the prior that
# arrives there shows that it may be missed. The evidence from the prior may be higher by so many
# standard errors.
_VISITS, _DEVIATIONS = 100, 3.5

# Data points looked at for each that may be annealed: a look costs about a quarter.
LOOKS = 4


@dataclass(frozen=True)
class AutoOptions:
    """When and how to anneal after importance sampling.

    At most ``max_annealed`` data points are annealed, and four times as many looked at.
    """

    importance: Any  # ImportanceOptions
    annealing: AnnealingOptions
    max_annealed: int = 100

    def __post_init__(self) -> None:
        check_counts(max_annealed=self.max_annealed)

    def most_gradients(self, num_data: int) -> int:
        """Return the gradient evaluations that the looks and the annealing take at most."""
        how = self.annealing
        look = CHAINS * (1 + 100 * how.mean_length)
        steps = 1.5 * how.num_steps * how.num_transitions * how.mean_length
        looks, annealed = min(num_data, LOOKS * self.max_annealed), min(num_data, self.max_annealed)
        return math.ceil(looks * look + annealed * (3 * look + how.num_chains * (2 + steps)))


def why_not_annealed(pair: OpenedPair, start: str = "both") -> str | None:
    """Return why a pair can't be annealed, or None. The caller holds the lock, in eval mode."""
    try:
        AnnealingPath(Particles(pair.few(BLOCK)), start)
    except InputError as error:
        return str(error)
    return None


def is_unclear(estimate: LogMarginal) -> Tensor:
    """Return which data points their weights do not clear, bool ``(N,)``."""
    return ~((estimate.pareto_k <= _PARETO_K_LIMIT) & estimate.log_prob.isfinite())


def anneal_alike(
    pairs: Mapping[str, OpenedPair], estimates: Mapping[str, LogMarginal], options: AutoOptions,
    run: Callable[[OpenedPair, int], AbstractContextManager[None]], *, max_memory: int | None,
) -> dict[str, LogMarginal]:  # fmt: skip
    """Anneal what any of the pairs, by name, does not clear in every one: they stay comparable.

    Where one can't be annealed no data point of any is trusted, for none can be looked at again.
    ``run`` opens a pair for one of its steps, which has a number.
    """
    for name, pair in pairs.items():
        with run(pair, 0):
            reason = why_not_annealed(pair)
        if reason is not None:
            whose = f"{name}: " * (len(pairs) > 1)
            text = f"no data point is trusted without annealing: {whose}{reason}"
            warnings.warn(text, stacklevel=4)
            nothing = torch.zeros(pair.num_data, dtype=torch.bool)
            return {n: replace(e, method="auto", trusted=nothing) for n, e in estimates.items()}
    looks = {}
    for name, pair in pairs.items():
        with run(pair, 2):
            looks[name] = look_again(pair, estimates[name], options)
    cleared = torch.stack([own for _, own in looks.values()]).all(0)
    urgent = torch.stack([is_unclear(estimate) for estimate, _ in looks.values()]).any(0)
    found = {}
    for name, pair in pairs.items():
        with run(pair, 3):
            how: dict[str, Any] = {"urgent": urgent, "max_memory": max_memory}
            found[name] = anneal_uncleared(pair, looks[name][0], cleared, options, **how)
    return found


def look_again(
    pair: OpenedPair, estimate: LogMarginal, options: AutoOptions
) -> tuple[LogMarginal, Tensor]:
    """Return which data points are cleared, bool ``(N,)``: by their weights and from the prior.

    The estimate is returned with what the look cost.
    """
    samples = estimate.num_samples.double()
    cleared = ~is_unclear(estimate)
    rows = cleared.nonzero()[:, 0][: LOOKS * options.max_annealed]
    if len(rows) < pair.num_data and not pair.is_divisible():
        rows = rows[:0]  # it takes all of its data or none
    if any(latent.is_point_mass for latent in pair.structure.latents.values()):
        rows = rows[:0]  # the guide's density is known at its own draws alone
    found, cost = torch.zeros_like(cleared), estimate.cost.clone()
    if not len(rows):
        return estimate, found
    part = pair.part(rows)
    for block, small in part.blocks(annealing_block_size(part, CHAINS, None)):
        path = AnnealingPath(Particles(small), "prior")
        own = rows[block]
        value, error = (v[own].to(pair.device) for v in (estimate.log_prob, estimate.standard_error))
        pilot = explore(path, options.annealing.num_leapfrog_steps)
        cost[own] += pilot.tuning.cost
        log_weights = pilot.log_joint - path.log_guide(pilot.position)
        rare = log_weights - value > (samples[own].to(value) / _VISITS).log()
        doubt = torch.hypot(pilot.evidence.variance.sqrt(), error)
        higher = pilot.evidence.log_prob - value > _DEVIATIONS * doubt
        found[own] = (~rare.any(0) & ~higher).cpu()
    return replace(estimate, cost=cost), found


def anneal_uncleared(
    pair: OpenedPair, estimate: LogMarginal, cleared: Tensor, options: AutoOptions, *,
    urgent: Tensor, max_memory: int | None = None,
) -> LogMarginal:  # fmt: skip
    """Return the estimate with the numbers of data points not cleared from annealing.

    Where the budget is too small for all, ``urgent`` ones ``(N,)`` come first.
    """
    rows = (~cleared).nonzero()[:, 0]
    rows = rows[(~urgent[rows]).long().argsort(stable=True)]
    takes_a_part = len(rows) < pair.num_data or len(rows) > options.max_annealed
    if takes_a_part and not pair.is_divisible():
        rows = rows[:0]
    rows = rows[: options.max_annealed]
    numbers: dict[str, Any] = {
        "trusted": cleared.clone(),
        "was_annealed": torch.zeros_like(cleared),
        "acceptance": torch.full_like(estimate.log_prob, math.nan),
    }
    if not len(rows):
        return replace(estimate, method="auto", **numbers)
    part, report = pair.part(rows), Report(len(rows))
    found = anneal(part, options.annealing, max_memory=max_memory, report=report)
    found = replace(found, cost=found.cost + estimate.cost[rows])
    for name in ("log_prob", "standard_error", "ess", "pareto_k", "num_samples", "cost"):
        numbers[name] = getattr(estimate, name).clone()
    for name, value in numbers.items():
        value[rows] = True if name == "was_annealed" else getattr(found, name).to(value.dtype)
    unknown = torch.where(cleared, 0.0, math.nan)
    diagnostics = {n: unknown.index_put((rows,), v.float()) for n, v in found.diagnostics.items()}
    draws = _replace_draws(estimate.draws, found.draws, rows)
    return replace(estimate, method="auto", diagnostics=diagnostics, draws=draws, **numbers)


def _replace_draws(kept: _Draws, found: _Draws, rows: Tensor) -> _Draws:
    """Put the annealed chains' ends, resampled by their weights, in place of the rows' draws."""
    if kept is None or found is None:
        return None
    chosen, columns = found.choose(len(kept.log_weights)), torch.arange(len(rows))
    whole, part = kept.map(Tensor.clone), found.map(lambda value: value[chosen, columns])
    for name, value in part.latents.items():
        whole.latents[name][:, rows] = value
    whole.log_likelihood[:, rows] = part.log_likelihood
    whole.log_weights[:, rows] = log_mean_weights(found.log_weights)["log_prob"]
    # Chains have no auxiliary latents.
    return whole._replace(latents={name: whole.latents[name] for name in part.latents})
