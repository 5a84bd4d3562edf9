"""An estimate of log p(x): the numbers per datum, and what says how far they can be trusted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.arviz import resampled_posterior
from pyro_vae.evaluation.pareto import PARETO_K_LIMIT
from pyro_vae.pair.opened import Progress


class Convergence(NamedTuple):
    """The estimate after fewer samples, for a figure of estimate against samples.

    Attributes:
        num_samples: numbers of samples, ``(T,)``.
        log_prob: estimate from the first so many samples of each datum, ``(T, N)``, nats.
    """

    num_samples: Tensor
    log_prob: Tensor


class PosteriorDraws(NamedTuple):
    """Weighted draws that were kept: the posterior by importance resampling.

    Attributes:
        latents: by site name, ``(S, N, ...)``.
        log_likelihood: log p(x given z), ``(S, N)``, nats.
        log_weights: ``(S, N)``, nats.
    """

    latents: dict[str, Tensor]
    log_likelihood: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class LogMarginal:
    """An estimate of log p(x), one value per datum (nats, float64, on the CPU).

    Attributes:
        log_prob: estimate of log p(x), ``(N,)``. Its expectation is a lower bound that tightens with
            the number of samples; ``-inf`` where every sample had likelihood 0.
        standard_error: Monte Carlo standard error of ``log_prob`` by the delta method, ``(N,)``; NaN
            (unknown) for a single sample, infinite where ``log_prob`` is ``-inf``.
        ess: effective sample size, (sum w)^2 / sum w^2, ``(N,)``.
        pareto_k: estimated tail index of the weights, ``(N,)``. Above 0.7 neither the estimate nor
            its standard error can be trusted. 0 for equal weights, NaN (unknown) below 21 weights.
        rate: E_q[log q(z|x) - log p(z)], ``(N,)``, Monte Carlo from draws of the guide; NaN where
            none were taken.
        distortion: -E_q[log p(x|z)], ``(N,)``, as the rate.
        num_samples: weights the estimate rests on, ``(N,)``: draws, or annealing chains.
        cost: evaluations of the model spent on each datum, pilots included, ``(N,)``.
        method: ``"importance"`` or ``"annealed"``.
        acceptance: mean acceptance probability of the transitions, ``(N,)``; annealing only.
        convergence: the estimate after fewer samples; None where data got different numbers of
            samples, and for annealing.
        draws: weighted draws kept for :meth:`to_arviz`.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    rate: Tensor
    distortion: Tensor
    num_samples: Tensor
    cost: Tensor
    method: str = "importance"
    acceptance: Tensor | None = None
    convergence: Convergence | None = field(default=None, repr=False)
    draws: PosteriorDraws | None = field(default=None, repr=False)

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound per datum, ``(N,)``: minus rate minus distortion."""
        return -self.rate - self.distortion

    @property
    def mean(self) -> float:
        """Mean of log p(x) over the data."""
        return self.log_prob.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """Monte Carlo standard error of :attr:`mean` (the data held fixed)."""
        return self.standard_error.square().sum().sqrt().item() / len(self.standard_error)

    @property
    def data_standard_error(self) -> float:
        """Standard error of :attr:`mean` as an estimate over the data's distribution.

        NaN (unknown) for a single datum.
        """
        if len(self.log_prob) < 2:
            return math.nan
        return self.log_prob.std().item() / math.sqrt(len(self.log_prob))

    @property
    def num_unreliable(self) -> int:
        """How many data have a Pareto k above 0.7; NaN (fewer than 21 weights) is not counted."""
        return int((self.pareto_k > PARETO_K_LIMIT).sum())

    def to_arviz(
        self, *, num_draws: int = 1000, seed: int = 0, labels: Sequence[Any] | None = None
    ) -> Any:
        """Return the estimate in ArviZ's data structure: see :func:`pyro_vae.evaluation.to_arviz`."""
        return to_arviz(self, num_draws=num_draws, seed=seed, labels=labels)


def to_arviz(
    estimate: LogMarginal,
    *,
    num_draws: int = 1000,
    seed: int = 0,
    labels: Sequence[Any] | None = None,
) -> Any:
    """Return an estimate as ArviZ's ``InferenceData`` (0.23) or as a ``DataTree`` (1.x).

    Groups, all with the data points as coordinate ``data``:

    - ``posterior``: the latents, resampled by their weights (chain, draw, data, ...);
    - ``log_likelihood``: log p(x given z) of these draws, as variable ``x`` (chain, draw, data);
    - ``sample_stats``: the log weights of these draws (chain, draw, data);
    - ``importance``: the log weights of all kept draws (sample, data), and the estimate per datum
      with its standard error, effective sample size and Pareto k.

    Each datum has latents of its own, so ``arviz.loo`` on the result is not predictive of new data:
    E[1 / p(x given z)] over the posterior is 1 / p(x), which makes it a (smoothed) harmonic mean
    estimate of log p(x), worse than the one in ``importance``.

    Args:
        estimate: what :func:`pyro_vae.log_marginal` returned.
        num_draws: posterior draws per datum, resampled from the weighted draws that were kept.
        seed: seed of the resampling.
        labels: names of the data points, N of them; by default their positions.

    Raises:
        InputError: no draws were kept (``keep_draws=0``), labels of another length, or a number of
            draws below 1.
    """
    if estimate.draws is None:
        raise InputError("expected an estimate that kept draws, got none: use keep_draws=1000")
    names = ("log_prob", "standard_error", "ess", "pareto_k")
    return resampled_posterior(
        *estimate.draws,
        {name: getattr(estimate, name) for name in names},
        method=estimate.method,
        num_draws=num_draws,
        seed=seed,
        labels=labels,
    )


def log_mean_weights(log_weights: Tensor) -> dict[str, Tensor]:
    """Estimate log p(x) from log weights ``(K, N)``: estimate, standard error, ess, each ``(N,)``."""
    largest = log_weights.amax(0)
    weights = (log_weights - torch.where(largest.isneginf(), 0.0, largest)).exp()
    return summarise(largest, weights.sum(0), weights.square().sum(0), len(log_weights))


def summarise(
    largest: Tensor, sum_weights: Tensor, sum_squares: Tensor, count: int
) -> dict[str, Tensor]:
    """Turn sums of w and w^2, relative to the largest weight, into the estimate and its error.

    Source:
        Owen 2013, "Monte Carlo theory, methods and examples", sections 9.2 and 9.3.
    """
    log_prob = sum_weights.log() + largest - math.log(count)
    ess = sum_weights.square() / sum_squares
    # Var(log mean w) ~ Var(w) / (K mean(w)^2), with the unbiased sample variance of w.
    relative_variance = (1 / ess - 1 / count).clamp(min=0)
    correction = count / (count - 1) if count > 1 else math.nan
    standard_error = (relative_variance * correction).sqrt()
    impossible = largest.isneginf()
    return {
        "log_prob": torch.where(impossible, -math.inf, log_prob),
        "standard_error": torch.where(impossible, math.inf, standard_error),
        "ess": torch.where(impossible, 0.0, ess),
    }


def warn_if_unreliable(estimate: LogMarginal, *, stacklevel: int) -> None:
    """Warn of data whose weights have too heavy a tail."""
    count = estimate.num_unreliable
    advice = 'method="annealed", a wider guide or more samples'
    if estimate.method == "annealed":
        advice = "more steps or chains"
    if count:
        warnings.warn(
            f"{count} of {len(estimate.log_prob)} data have Pareto k > {PARETO_K_LIMIT}: their "
            f"log p(x) is probably too low and their standard error too small; use {advice}",
            stacklevel=stacklevel + 1,
        )


class Report:
    """Tells how far an estimate has come, and its mean over the data points so far."""

    def __init__(
        self,
        num_data: int,
        progress: Progress | None = None,
        running_mean: Callable[[float], None] | None = None,
    ) -> None:
        self.num_data, self.progress, self.running_mean = num_data, progress, running_mean
        self.done, self.total = 0, 0.0

    def tell(self, in_block: float = 0, so_far: Callable[[], Tensor] | None = None) -> None:
        """Tell of the finished blocks and the one under way: its data that count as done, its estimates."""
        if self.progress is not None:
            self.progress(self.done + int(in_block), self.num_data)
        if self.running_mean is not None:
            begun = torch.zeros(0) if so_far is None else so_far()
            count = self.done + len(begun)
            if count:
                self.running_mean((self.total + begun.sum().item()) / count)

    def finish(self, log_prob: Tensor) -> None:
        """Take in the estimates of a finished block."""
        self.done, self.total = self.done + len(log_prob), self.total + log_prob.sum().item()


class Block(NamedTuple):
    """What a block of the data gave, on the CPU: fields of :class:`LogMarginal`, ``(n,)`` each."""

    positions: Tensor
    per_datum: dict[str, Tensor]
    draws: PosteriorDraws
    convergence: Convergence | None = None


def join_blocks(
    blocks: list[Block], *, keep_draws: int | None = None, convergence: bool = False, **fields: Any
) -> LogMarginal:
    """Put the blocks' data points back in their order, with ``keep_draws`` draws of each at most.

    ``convergence`` says whether that of all blocks is of the same numbers of samples.
    """
    order = torch.cat([block.positions for block in blocks]).argsort()

    def join(parts: list[Tensor], dim: int = 0) -> Tensor:
        return torch.cat(parts, dim).index_select(dim, order)

    joined: dict[str, Any] = {
        n: join([block.per_datum[n] for block in blocks]) for n in blocks[0].per_datum
    }
    kept = min(len(block.draws.log_weights) for block in blocks)
    kept = kept if keep_draws is None else min(kept, keep_draws)

    def join_draws(parts: list[Tensor]) -> Tensor:
        return join([part[:kept] for part in parts], 1)

    draws = history = None
    if kept:
        parts = [block.draws for block in blocks]
        draws = PosteriorDraws(
            {name: join_draws([part.latents[name] for part in parts]) for name in parts[0].latents},
            join_draws([part.log_likelihood for part in parts]),
            join_draws([part.log_weights for part in parts]),
        )
    histories = [block.convergence for block in blocks if block.convergence is not None]
    if convergence and histories:
        log_prob = join([each.log_prob for each in histories], 1)
        history = Convergence(histories[0].num_samples, log_prob)
    return LogMarginal(**joined, convergence=history, draws=draws, **fields)
