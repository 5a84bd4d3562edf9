"""log p(x) by importance sampling: streamed over samples, per datum, with its standard error."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_choice, check_counts, check_optional_counts, real_number
from pyro_vae.evaluation import estimate as estimates
from pyro_vae.evaluation.captured_values import compiled_score
from pyro_vae.evaluation.estimate import Convergence, LogMarginal, PosteriorDraws, Report
from pyro_vae.evaluation.pareto import TailWeights, pareto_k_limit
from pyro_vae.pair.opened import BLOCK, OpenedPair
from pyro_vae.pair.sites import Latents
from pyro_vae.weights.particles import LogDensities, Particles, check_weights

Terms = tuple[Tensor, Tensor]

# Bytes of the draws kept for ArviZ by default, and of latents drawn in one pass of the guide: small
# beside any budget, so that the draws of a seed don't depend on how much memory happens to be free.
_KEPT_BYTES, _DRAWN_BYTES = 1 << 23, 1 << 24
# The GNU C library gives memory back to the system beyond twice the largest block that was freed, of
# at most 32 MiB, and takes it anew page by page: up to a third of the time of scoring.
_FREED_BYTES = (1 << 25) - (1 << 16)


@dataclass(frozen=True)
class ImportanceOptions:
    """How to sample: the options of :func:`log_marginal` of the same names."""

    num_samples: int = 5000
    target_standard_error: float | None = None
    max_samples: int | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        target = self.target_standard_error
        check_counts(num_samples=self.num_samples)
        check_optional_counts(max_samples=self.max_samples)
        check_choice("compile as", self.compile, (None, True, False))
        if target is None:
            if self.max_samples is not None:
                text = "expected target_standard_error with max_samples, got none: pass both"
                raise InputError(text)
        elif not 0 < real_number("target_standard_error", target) < math.inf:
            raise InputError(f"expected a target_standard_error above 0, got {target}")
        elif self.num_samples < 2:
            pilot = "the pilot of target_standard_error"
            raise InputError(f"expected num_samples of at least 2 for {pilot}, got 1")


def sample_importance(
    pair: OpenedPair, options: ImportanceOptions, *, max_memory: int | None, report: Report,
    keep_draws: int | None,
) -> LogMarginal:  # fmt: skip
    """Estimate log p(x) of an open pair by draws of its guide; warn of nothing."""
    target, num_pilot = options.target_standard_error, options.num_samples
    counts = torch.full((pair.num_data,), num_pilot)
    budget = pair.memory(max_memory)
    mark: dict[str, Any] = {"pseudo_likelihood": pair.is_pseudo_likelihood()}
    if target is None:
        found = _sample_all(pair, counts, budget, keep_draws, options.compile, report)
        return replace(found, **mark)
    pilot = _sample_all(pair, counts, budget, 0, options.compile, Report(pair.num_data))
    most = options.max_samples or 20 * num_pilot
    wanted = num_pilot * (pilot.standard_error / target).square()
    # Rounded up to powers of 5/4 the numbers fall into a few groups, each run as one. One step more:
    # the pilot's error is itself uncertain.
    steps = (wanted.clamp(min=1, max=float(most)).log() / math.log(1.25)).ceil() + 1
    # 200 fresh ones at least make the delta method and the tail index meaningful for all data.
    counts = (1.25**steps).ceil().long().clamp(min(200, most), most)
    if not pair.is_divisible():
        counts = counts.max().expand(pair.num_data)
    found = _sample_all(pair, counts, budget, keep_draws, options.compile, report)
    missed, cost = ~(found.standard_error <= target), counts + num_pilot
    return replace(found, cost=cost, missed_target=missed, convergence=None, **mark)


def _sample_all(
    pair: OpenedPair, counts: Tensor, budget: int, kept: int | None, compile: Any, report: Report
) -> LogMarginal:
    """Take each data point's number of samples, equal numbers together."""
    torch.empty(_FREED_BYTES, dtype=torch.uint8, device="cpu")  # and freed at once
    blocks, places = [], []
    fewest = int(counts.min())
    for count in counts.unique().tolist():
        equal = (counts == count).nonzero()[:, 0]
        for positions, part in _cut(pair, equal):
            particles, most = Particles(part), kept
            if most is None:
                elements = sum(shape.numel() for shape in particles.latent_shapes.values())
                bytes_per_draw = (8 * elements + 16 * part.num_data) * pair.num_data
                most = _KEPT_BYTES * part.num_data // bytes_per_draw
            stream = _Stream(particles, count, budget, min(fewest, most))
            work = count * len(equal) * part.structure.bytes_per_datum  # they share a program
            for fraction in stream.run(compile, work):
                report.tell(fraction * len(positions), partial(stream.log_prob, len(positions)))
            blocks.append(stream.result(len(positions)))
            places.append(positions)
            report.finish(blocks[-1].log_prob)
    return estimates.concatenate(blocks, positions=places, keep_draws=None)


def _cut(pair: OpenedPair, positions: Tensor) -> Iterator[tuple[Tensor, OpenedPair]]:
    """Yield blocks of some data points: which they are, and the pair of these."""
    # Blocks of one size share one compiled program: the last is filled up by its last data point.
    size = len(positions)
    if pair.num_data > BLOCK and pair.is_divisible():
        size = math.ceil(size / math.ceil(size / BLOCK))
    for own in positions.split(size):
        yield own, pair.part(torch.cat([own, own[-1:].expand(size - len(own))]))


class _Stream:
    """All samples of one block: drawn and scored in chunks that fit the memory budget."""

    def __init__(self, particles: Particles, num_samples: int, budget: int, kept: int) -> None:
        self.particles, self.num_samples, self.kept = particles, num_samples, kept
        self.moments = _RunningMoments()
        self.tail = TailWeights(num_samples, particles.pair.structure.precision)
        powers = range(int(math.log10(num_samples)) + 1)
        rounds = {factor * 10**power for power in powers for factor in (1, 2, 5)}
        self.checkpoints = sorted(n for n in rounds | {num_samples} if n <= num_samples)
        self.history: list[Tensor] = []
        self.draws: list[PosteriorDraws] = []
        # Half of the budget holds the latents drawn in one pass of the guide, a third the chunk that
        # the model scores. Chunks are of equal size, as far as possible.
        scored = budget // (3 * particles.pair.structure.bytes_per_datum * particles.num_data)
        scored = max(1, min(num_samples, scored))
        self.scored_at_once = math.ceil(num_samples / math.ceil(num_samples / scored))
        drawn = min(budget // 2, _DRAWN_BYTES) // particles.bytes_per_proposal()
        chunks = max(1, drawn // self.scored_at_once)
        self.drawn_at_once = min(num_samples, chunks * self.scored_at_once)

    def run(self, compile: bool | None, work: int) -> Iterator[float]:
        """Draw and score; yields the fraction done after every pass of the guide.

        ``work`` are the bytes that all blocks like this one allocate.
        """
        particles, size = self.particles, self.scored_at_once
        score: Callable[[Latents], Terms] = particles.score
        terms: Terms | None = None
        for first in range(0, self.num_samples, self.drawn_at_once):
            count = min(self.drawn_at_once, self.num_samples - first)
            latents, log_proposal = particles.propose(count)
            rows = (slice(start, start + size) for start in range(0, count, size))
            chunks = [{name: value[own] for name, value in latents.items()} for own in rows]
            if first == 0 and size > 1:
                compiled = compiled_score(particles, chunks[0], work, compile)
                if compiled is not None:
                    program, terms = compiled  # the terms of this chunk are there already
                    score = partial(_pad_and_score, program, size)
            scored = []
            for chunk in chunks:
                scored.append(terms or score(chunk))
                terms = None
            # A chunk's weights are few: taken in by themselves they would cost more calls than sums.
            log_likelihood, log_prior = map(torch.cat, zip(*scored, strict=True))
            self._add(latents, LogDensities(log_likelihood, log_prior, log_proposal))
            yield (first + count) / self.num_samples

    def _add(self, latents: Latents, densities: LogDensities) -> None:
        check_weights(densities)
        self.tail.add(densities.log_weights)
        missing = self.kept - self.moments.count
        if missing > 0:
            draws = PosteriorDraws(latents, densities.log_likelihood, densities.log_weights)
            self.draws.append(draws.map(lambda value: value[:missing].cpu()))
        while len(densities.log_proposal):
            until = self.checkpoints[len(self.history)] - self.moments.count
            self.moments.add(LogDensities(*(term[:until] for term in densities)))
            densities = LogDensities(*(term[until:] for term in densities))
            if self.moments.count == self.checkpoints[len(self.history)]:
                self.history.append(self.moments.result()["log_prob"].cpu())

    def log_prob(self, count: int) -> Tensor:
        """Return the estimates so far of the first ``count`` data points."""
        return self.moments.result()["log_prob"][:count]

    def result(self, count: int) -> LogMarginal:
        """Return the estimate of the first ``count`` data points."""
        found = {**self.moments.result(), "pareto_k": self.tail.pareto_k()}
        per_datum: dict[str, Any] = {name: value[:count].cpu() for name, value in found.items()}
        num_samples, history = torch.full((count,), self.num_samples), torch.stack(self.history)
        draws = None
        if self.draws:
            rows, *terms = zip(*self.draws, strict=True)
            latents = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            draws = PosteriorDraws(self.particles.data_first(latents), *map(torch.cat, terms))
        return LogMarginal(
            **per_datum,
            num_samples=num_samples,
            cost=num_samples,
            trusted=per_datum["pareto_k"] <= pareto_k_limit(num_samples),
            convergence=Convergence(torch.tensor(self.checkpoints), history[:, :count]),
            draws=draws and draws.map(lambda value: value[:, :count]),
        )


class _RunningMoments:
    """Streaming sums over particles of w and w^2 (relative to the largest w), rate and distortion."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, densities: LogDensities) -> None:
        log_weights = densities.log_weights
        if not self.count:
            zeros = torch.zeros_like(log_weights[0])
            self.largest = zeros - math.inf
            self.sum_weights = self.sum_squares = self.sum_rate = self.sum_distortion = zeros
        largest = torch.maximum(self.largest, log_weights.amax(0))
        # While every weight is 0 there is nothing to rescale; 0 stands in for -inf - (-inf).
        shift = torch.where(largest.isneginf(), 0.0, largest)
        rescale = (self.largest - shift).exp()
        weights = (log_weights - shift).exp()
        self.sum_weights = self.sum_weights * rescale + weights.sum(0)
        self.sum_squares = self.sum_squares * rescale.square() + weights.square().sum(0)
        self.largest = largest
        self.sum_rate = self.sum_rate + (densities.log_proposal - densities.log_prior).sum(0)
        self.sum_distortion = self.sum_distortion - densities.log_likelihood.sum(0)
        self.count += len(log_weights)

    def result(self) -> dict[str, Tensor]:
        found = estimates.summarise(self.largest, self.sum_weights, self.sum_squares, self.count)
        means = {"rate": self.sum_rate, "distortion": self.sum_distortion}
        return found | {name: total / self.count for name, total in means.items()}


def _pad_and_score(score: Callable[[Latents], Terms], size: int, latents: Latents) -> Terms:
    """Score latents by a function of ``size`` particles; the last one is repeated to fill up."""
    count = len(next(iter(latents.values())))
    if count < size:
        latents = {
            name: torch.cat([value, value[-1:].expand(size - count, *value.shape[1:])])
            for name, value in latents.items()
        }
    log_likelihood, log_prior = score(latents)
    return log_likelihood[:count], log_prior[:count]
