"""log p(x) by importance sampling: streamed over samples, per datum, with its standard error."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_choice, check_counts, check_optional_counts, real_number
from pyro_vae.evaluation import estimate as estimates
from pyro_vae.evaluation.ais import AnnealingOptions, anneal
from pyro_vae.evaluation.auto import AutoOptions, anneal_alike
from pyro_vae.evaluation.compiled_score import compiled_score
from pyro_vae.evaluation.estimate import Convergence, LogMarginal, PosteriorDraws, Report
from pyro_vae.evaluation.pareto import TailWeights, pareto_k_limit
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import BLOCK, OpenedPair, Progress, open_pair
from pyro_vae.pair.precision import check_precision, compute_in, multiply_in
from pyro_vae.pair.sites import Latents
from pyro_vae.weights.particles import LogDensities, Particles, check_weights

Terms = tuple[Tensor, Tensor]

# Bytes of the draws kept for ArviZ by default, and of latents drawn in one pass of the guide: small
# beside any budget, so that the draws of a seed don't depend on how much memory happens to be free.
_KEPT_BYTES, _DRAWN_BYTES = 1 << 23, 1 << 24


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


def log_marginal(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    num_samples: int = 5000, method: str = "importance", target_standard_error: float | None = None,
    max_samples: int | None = None, num_chains: int = 32, num_steps: int = 1000,
    num_leapfrog_steps: int = 5, num_transitions: int = 1, start: str = "both",
    schedule: str = "adaptive", max_annealed: int = 100, max_memory: int | None = None,
    keep_draws: int | None = None, compile: bool | None = None, precision: str = "float32",
    plate: str | None = "data", seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    running_mean: Callable[[float], None] | None = None,
) -> LogMarginal:  # fmt: skip
    r"""Estimate log p(x) per datum: by importance sampling from the guide, or by annealing from it.

    .. math:: \log p(x) \approx \log \frac1K \sum_k p(x, z_k) / q(z_k | x), \quad z_k \sim q(z | x)

    Runs without gradients of parameters and with the pair's modules in eval mode, which is restored.
    Samples are streamed in chunks, so memory does not grow with their number. The
    annealed estimate moves chains to the posterior in small steps: a pilot comes from the guide and
    the prior and fits where the fresh chains that count start. ``"auto"``, the recommended method,
    anneals what importance sampling and a second look from the prior do not clear.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair; its cost per datum is paid once.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        num_samples: draws per datum, K; with ``target_standard_error`` those of the pilot.
        method: ``"importance"``, ``"annealed"`` or ``"auto"``: draws of the guide can't show what the
            guide misses, and chains from the prior can.
        target_standard_error: nats. A pilot of ``num_samples`` draws then decides how many fresh ones
            each datum gets. The pilot is thrown away: to stop at a value one has seen would bias it.
        max_samples: most fresh draws per datum for the target; by default 20 times ``num_samples``.
        num_chains: annealing: chains per datum.
        num_steps: annealing: intermediate distributions; of the adaptive schedule at most so many.
        num_leapfrog_steps: annealing: most gradient evaluations of a transition.
        num_transitions: annealing: transitions at each intermediate distribution.
        start: annealing: ``"guide"``, ``"prior"``, or ``"both"``, where pilots from each arrive.
        schedule: annealing: ``"adaptive"`` by the weights' spread, ``"sigmoid"`` or ``"linear"``.
        max_annealed: auto: data points to anneal at most; four times as many are looked at.
        max_memory: bytes that a chunk may need; by default 128 MiB on a CPU, 4 GiB on a GPU (or a
            quarter of a smaller one's). More data than fit are taken block by block.
        keep_draws: draws per datum kept for ``to_arviz``; by default 8 MiB, or every chain's end.
        compile: whether to capture and compile the model's score (importance sampling only). None
            does so for work long enough to pay for it; a pair that can't be captured runs as it is.
        precision: of the layers' products, as in :func:`pyro_vae.fit`: the networks are so rounded.
        plate: name of the data plate. None: the whole data set is one datum (see
            :func:`pyro_vae.log_weights`) and the estimate that of its joint evidence, all latents in
            one weight, shared and local ones alike: with many local ones it takes annealing, or
            ``joint`` of :func:`pyro_vae.evaluation.predictive_log_prob`.
        seed: seed of the draws; the generators' state is restored afterwards.
        progress: called with (data done, N) as the work goes on.
        running_mean: called beside ``progress`` with the mean estimate over the data begun so far.

    Raises:
        InputError: a pair that can't be weighed rightly (see :func:`pyro_vae.log_weights`), an option
            out of range or without effect, or a NaN from the pair.

    Warns:
        UserWarning: how many data points can't be trusted (of importance sampling: with a Pareto k
            above min(0.7, 1 - 1 / log10 S), or not known), or missed ``target_standard_error``.

    Source:
        Burda, Grosse, Salakhutdinov 2016, equation 8; delta-method error and effective sample size:
        Owen 2013, "Monte Carlo theory, methods and examples", sections 9.2 and 9.3.
    """
    check_choice("method", method, ("importance", "annealed", "auto"))
    options: ImportanceOptions | AnnealingOptions | AutoOptions
    options = ImportanceOptions(num_samples, target_standard_error, max_samples, compile)
    if method == "annealed" and (compile or target_standard_error is not None):
        name, advice = "target_standard_error", "set num_chains and num_steps instead"
        if compile:
            name, advice = "compile=True", "leave it out"
        raise InputError(f"expected method='importance' with {name}, got 'annealed': {advice}")
    if method != "importance":
        numbers = num_chains, num_steps, num_leapfrog_steps, num_transitions
        annealing = AnnealingOptions(*numbers, start, schedule)
        options = annealing if method == "annealed" else AutoOptions(options, annealing, max_annealed)
    check_optional_counts(max_memory=max_memory)
    check_optional_counts(keep_draws=keep_draws, least=0)
    check_callables(progress=progress, running_mean=running_mean)
    pair = open_pair(model, guide, x, plate=plate, serves=Serves.WHOLE | Serves.SUMMED)
    report = Report(pair.num_data, progress, running_mean)
    check_precision(precision)
    with pair.evaluating(seed), compute_in(precision, pair.device), multiply_in(precision):
        how: dict[str, Any] = {"max_memory": max_memory, "keep_draws": keep_draws}
        estimate = estimate_log_prob(pair, options, report=report, **how)
    estimates.warn_if_unreliable(estimate, stacklevel=2)
    return estimate


def estimate_log_prob(
    pair: OpenedPair, options: ImportanceOptions | AnnealingOptions | AutoOptions, *,
    max_memory: int | None = None, keep_draws: int | None = None, progress: Progress | None = None,
    report: Report | None = None,
) -> LogMarginal:  # fmt: skip
    """Estimate log p(x) of an open pair by the method that the options are of; warn of nothing."""
    report = report or Report(pair.num_data, progress)
    if isinstance(options, AutoOptions):
        how: dict[str, Any] = {"max_memory": max_memory, "keep_draws": keep_draws}
        first = estimate_log_prob(pair, options.importance, report=report, **how)
        one, run = {"": pair}, lambda *_: nullcontext()
        return anneal_alike(one, {"": first}, options, run, max_memory=max_memory)[""]
    if isinstance(options, AnnealingOptions):
        return anneal(pair, options, max_memory=max_memory, report=report, keep_draws=keep_draws)
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
    """Take so many samples of each data point, those of one number together."""
    blocks, places = [], []
    fewest = int(counts.min())
    for count in counts.unique().tolist():
        for positions, part in _cut(pair, (counts == count).nonzero()[:, 0]):
            particles, most = Particles(part), kept
            if most is None:
                elements = sum(shape.numel() for shape in particles.latent_shapes.values())
                bytes_per_draw = (8 * elements + 16 * part.num_data) * pair.num_data
                most = _KEPT_BYTES * part.num_data // bytes_per_draw
            stream = _Stream(particles, count, budget, min(fewest, most))
            for fraction in stream.run(compile):
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
        # Half of the budget holds the latents drawn in one pass of the guide, the other half the
        # chunk of them that the model scores. Chunks are of equal size, as far as possible.
        scored = budget // (2 * particles.pair.structure.bytes_per_datum * particles.num_data)
        scored = max(1, min(num_samples, scored))
        self.scored_at_once = math.ceil(num_samples / math.ceil(num_samples / scored))
        drawn = min(budget // 2, _DRAWN_BYTES) // particles.bytes_per_proposal()
        chunks = max(1, drawn // self.scored_at_once)
        self.drawn_at_once = min(num_samples, chunks * self.scored_at_once)

    def run(self, compile: bool | None) -> Iterator[float]:
        """Draw and score; yields the fraction done after every pass of the guide."""
        particles, size = self.particles, self.scored_at_once
        score: Callable[[Latents], Terms] = particles.score
        terms: Terms | None = None
        for first in range(0, self.num_samples, self.drawn_at_once):
            count = min(self.drawn_at_once, self.num_samples - first)
            latents, log_proposal = particles.propose(count)
            rows = (slice(start, start + size) for start in range(0, count, size))
            chunks = [{name: value[own] for name, value in latents.items()} for own in rows]
            if first == 0 and size > 1:
                work = (
                    self.num_samples * particles.num_data * particles.pair.structure.bytes_per_datum
                )
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
