"""A stream of importance weights: drawn and scored in chunks, kept as a few numbers per datum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.evaluation.compiled_score import compiled_score
from pyro_vae.evaluation.estimate import Convergence, LogMarginal, PosteriorDraws, summarise
from pyro_vae.evaluation.pareto import TailWeights
from pyro_vae.pair.sites import Latents
from pyro_vae.weights.particles import LogDensities, PairScorer, check_weights

Terms = tuple[Tensor, Tensor]

# Bytes of latents drawn in one pass of the guide: small beside any budget, so that the draws of a
# seed don't depend on how much memory happens to be free.
_DRAWN_BYTES = 1 << 24


class Block(NamedTuple):
    """What the data at some positions gave."""

    positions: Tensor
    per_datum: dict[str, Tensor]
    convergence: Convergence
    draws: PosteriorDraws


class Stream:
    """All samples of one block: drawn and scored in chunks that fit the memory budget."""

    def __init__(self, scorer: PairScorer, num_samples: int, budget: int, kept: int) -> None:
        self.scorer, self.num_samples, self.kept = scorer, num_samples, kept
        self.num_data = scorer.num_data
        self.moments = _RunningMoments(self.num_data, scorer.inputs[0].device)
        self.tail = TailWeights(num_samples)
        self.checkpoints = _checkpoints(num_samples)
        self.history: list[Tensor] = []
        self.draws: list[tuple[Latents, Tensor, Tensor]] = []
        # Half of the budget holds the latents drawn in one pass of the guide, the other half the
        # chunk of them that the model scores. Chunks are of equal size, as far as possible.
        scored = budget // (2 * scorer.bytes_per_datum * self.num_data)
        scored = max(1, min(num_samples, scored))
        self.scored_at_once = math.ceil(num_samples / math.ceil(num_samples / scored))
        drawn = min(budget // 2, _DRAWN_BYTES) // scorer.bytes_per_proposal()
        chunks = max(1, drawn // self.scored_at_once)
        self.drawn_at_once = min(num_samples, chunks * self.scored_at_once)

    def run(self, compile: bool | None) -> Iterator[float]:
        """Draw and score; yields the fraction done after every pass of the guide.

        Args:
            compile: whether to compile the model's score; None where that is repaid.
        """
        score, size = self.scorer.score, self.scored_at_once
        terms: Terms | None = None
        for first in range(0, self.num_samples, self.drawn_at_once):
            count = min(self.drawn_at_once, self.num_samples - first)
            latents, log_proposal = self.scorer.propose(count)
            if first == 0 and size > 1:
                work = self.num_samples * self.num_data * self.scorer.bytes_per_datum
                shown = {name: value[:size] for name, value in latents.items()}
                compiled = compiled_score(self.scorer, shown, work, compile)
                if compiled is not None:
                    program, terms = compiled  # the terms of this chunk are there already
                    score = partial(_padded, program, size=size)
            scored = []
            for start in range(0, count, size):
                chunk = {name: value[start : start + size] for name, value in latents.items()}
                scored.append(terms or score(chunk))
                terms = None
            # A chunk's weights are few: taken in by themselves they would cost more calls than sums.
            log_likelihood, log_prior = map(torch.cat, zip(*scored, strict=True))
            self._add(latents, LogDensities(log_likelihood, log_prior, log_proposal))
            yield (first + count) / self.num_samples

    def _add(self, latents: Latents, scores: LogDensities) -> None:
        check_weights(scores)
        self.tail.add(scores.log_weights)
        missing = self.kept - self.moments.count
        if missing > 0:
            kept = {name: value[:missing].cpu() for name, value in latents.items()}
            terms = (scores.log_likelihood[:missing].cpu(), scores.log_weights[:missing].cpu())
            self.draws.append((kept, *terms))
        while len(scores.log_proposal):
            until = self.checkpoints[len(self.history)] - self.moments.count
            self.moments.add(LogDensities(*(term[:until] for term in scores)))
            scores = LogDensities(*(term[until:] for term in scores))
            if self.moments.count == self.checkpoints[len(self.history)]:
                self.history.append(self.moments.result()["log_prob"].cpu())

    def result(self, positions: Tensor) -> Block:
        """Return what the block gave for its first data, which stand at ``positions``, on the CPU."""
        per_datum = {**self.moments.result(), "pareto_k": self.tail.pareto_k()}
        count = len(positions)
        log_prob = torch.stack(self.history)[:, :count]
        history = Convergence(torch.tensor(self.checkpoints), log_prob)
        return Block(
            positions,
            {name: value[:count].cpu() for name, value in per_datum.items()},
            history,
            _kept_draws(self.draws, self.scorer, count),
        )


class _RunningMoments:
    """Streaming sums over particles of w and w^2 (relative to the largest w), rate and distortion."""

    def __init__(self, num_data: int, device: torch.device) -> None:
        zeros = torch.zeros(num_data, dtype=torch.float64, device=device)
        self.largest = zeros - math.inf
        self.sum_weights, self.sum_squares = zeros, zeros
        self.sum_rate, self.sum_distortion = zeros, zeros
        self.count = 0

    def add(self, scores: LogDensities) -> None:
        log_weights = scores.log_weights
        largest = torch.maximum(self.largest, log_weights.amax(0))
        # While every weight is 0 there is nothing to rescale; 0 stands in for -inf - (-inf).
        shift = torch.where(largest.isneginf(), 0.0, largest)
        rescale = (self.largest - shift).exp()
        weights = (log_weights - shift).exp()
        self.sum_weights = self.sum_weights * rescale + weights.sum(0)
        self.sum_squares = self.sum_squares * rescale.square() + weights.square().sum(0)
        self.largest = largest
        self.sum_rate = self.sum_rate + (scores.log_proposal - scores.log_prior).sum(0)
        self.sum_distortion = self.sum_distortion - scores.log_likelihood.sum(0)
        self.count += len(log_weights)

    def result(self) -> dict[str, Tensor]:
        return {
            **summarise(self.largest, self.sum_weights, self.sum_squares, self.count),
            "rate": self.sum_rate / self.count,
            "distortion": self.sum_distortion / self.count,
        }


def _checkpoints(num_samples: int) -> list[int]:
    """Return numbers of samples 1, 2, 5, 10, 20, 50, ... up to ``num_samples``."""
    powers = range(int(math.log10(num_samples)) + 1)
    counts = {factor * 10**power for power in powers for factor in (1, 2, 5)}
    return sorted(count for count in counts | {num_samples} if count <= num_samples)


def _kept_draws(
    rows: list[tuple[Latents, Tensor, Tensor]], scorer: PairScorer, count: int
) -> PosteriorDraws:
    """Return the kept draws of the first ``count`` data."""
    if not rows:
        nothing = torch.zeros(0, count, dtype=torch.float64)
        return PosteriorDraws({}, nothing, nothing)
    latents = {
        name: torch.cat([row[0][name] for row in rows]).movedim(axis, 1)[:, :count]
        for name, axis in scorer.data_axes.items()
    }
    log_likelihood, log_weights = (
        torch.cat(part)[:, :count] for part in zip(*((row[1], row[2]) for row in rows), strict=True)
    )
    return PosteriorDraws(latents, log_likelihood, log_weights)


def _padded(score: Callable[[Latents], Terms], latents: Latents, size: int) -> Terms:
    """Score latents by a function of ``size`` particles; the last one is repeated to fill up."""
    count = len(next(iter(latents.values())))
    if count < size:
        filler = {
            name: value[-1:].expand(size - count, *value.shape[1:]) for name, value in latents.items()
        }
        latents = {name: torch.cat([value, filler[name]]) for name, value in latents.items()}
    log_likelihood, log_prior = score(latents)
    return log_likelihood[:count], log_prior[:count]


def join_blocks(
    blocks: list[Block], counts: Tensor, cost: Tensor, *, convergence: bool = True
) -> LogMarginal:
    """Put the blocks' data back in their order."""
    order = torch.cat([block.positions for block in blocks]).argsort()
    per_datum: dict[str, Any] = {
        name: torch.cat([block.per_datum[name] for block in blocks])[order]
        for name in blocks[0].per_datum
    }
    history = None
    if convergence:
        log_prob = torch.cat([block.convergence.log_prob for block in blocks], dim=1)
        history = Convergence(blocks[0].convergence.num_samples, log_prob[:, order])
    return LogMarginal(
        **per_datum,
        num_samples=counts,
        cost=cost,
        convergence=history,
        draws=join_draws([block.draws for block in blocks], order),
    )


def join_draws(
    draws: list[PosteriorDraws], order: Tensor, *, most: int | None = None
) -> PosteriorDraws | None:
    """Join kept draws along the data, as many as every block has and at most ``most``; None for 0."""
    fewest = min(len(part.log_weights) for part in draws)
    fewest = fewest if most is None else min(fewest, most)
    if not fewest:
        return None

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat([part[:fewest] for part in parts], dim=1)[:, order]

    return PosteriorDraws(
        {name: join([part.latents[name] for part in draws]) for name in draws[0].latents},
        join([part.log_likelihood for part in draws]),
        join([part.log_weights for part in draws]),
    )
