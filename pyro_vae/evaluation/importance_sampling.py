"""log p(x) by importance sampling: streamed over samples, per datum, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.errors import InputError, real_number
from pyro_vae.evaluation.ais import AnnealingOptions, anneal
from pyro_vae.evaluation.blocks import (
    Progress,
    blocks_of,
    can_be_split,
    memory_budget,
    rows_of,
)
from pyro_vae.evaluation.estimate import LogMarginal, warn_if_unreliable
from pyro_vae.evaluation.options import check_counts, check_max_memory
from pyro_vae.evaluation.streaming import Block, Stream, join_blocks
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, evaluation_mode, seeded
from pyro_vae.pair.inputs import Inputs, as_inputs, check_data
from pyro_vae.weights.particles import PairScorer

# Data that share one pass of the guide: enough to fill the arithmetic units, few enough that many
# particles of each fit beside them.
_BLOCK = 1024

# Bytes of the draws kept for ArviZ by default.
_KEPT_BYTES = 1 << 23

# The target's variance is estimated from the pilot; so many fresh samples at least make the delta
# method and the tail index meaningful for the data that need hardly any.
_FEWEST_SAMPLES = 200


def log_marginal(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_samples: int = 5000,
    method: str = "importance",
    target_standard_error: float | None = None,
    max_samples: int | None = None,
    num_chains: int = 16,
    num_steps: int = 1000,
    num_leapfrog_steps: int = 5,
    num_transitions: int = 1,
    start: str = "guide",
    schedule: str = "sigmoid",
    max_memory: int | None = None,
    keep_draws: int | None = None,
    compile: bool | None = None,
    plate: str = "data",
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    running_mean: Callable[[float], None] | None = None,
) -> LogMarginal:
    r"""Estimate log p(x) per datum: by importance sampling from the guide, or by annealing from it.

    .. math:: \log p(x) \approx \log \frac1K \sum_k p(x, z_k) / q(z_k | x), \quad z_k \sim q(z | x)

    Runs without gradients of parameters and with the pair's modules in eval mode, which is restored.
    Samples are streamed in chunks, so memory does not grow with their number. The
    annealed estimate moves each draw from q to the posterior in ``num_steps`` small steps.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair; its cost per datum is paid once.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        num_samples: draws per datum, K; with ``target_standard_error`` those of the pilot.
        method: ``"importance"``, or ``"annealed"`` where the guide is too poor a proposal.
        target_standard_error: nats. A pilot of ``num_samples`` draws then decides how many fresh ones
            each datum gets. The pilot is thrown away: to stop at a value one has seen would bias it.
        max_samples: most fresh draws per datum for the target; by default 20 times ``num_samples``.
        num_chains: annealing: chains per datum.
        num_steps: annealing: intermediate distributions.
        num_leapfrog_steps: annealing: most gradient evaluations of a transition.
        num_transitions: annealing: transitions at each intermediate distribution.
        start: annealing: ``"guide"`` or ``"prior"``.
        schedule: annealing: ``"sigmoid"`` or ``"linear"``.
        max_memory: bytes that a chunk may need; by default 128 MiB on a CPU and a quarter of the free
            memory on a GPU. More data than fit are taken block by block.
        keep_draws: weighted draws per datum to keep for ``to_arviz``; by default up to 8 MiB in all,
            and of annealing every chain's end.
        compile: whether to capture and compile the model's score (importance sampling only). None
            does so for work long enough to pay for it; a pair that can't be captured runs as it is.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards. None draws from the
            global state.
        progress: called with (data done, N) as the work goes on.
        running_mean: called beside ``progress`` with the mean estimate over the data begun so far.

    Raises:
        InputError: a pair that can't be weighed rightly (see :func:`pyro_vae.log_weights`), an option
            out of range or without effect, or a NaN from the pair.

    Warns:
        UserWarning: data with Pareto k > 0.7, and how many.

    Source:
        Burda, Grosse, Salakhutdinov 2016, equation 8; delta-method error and effective sample size:
        Owen 2013, "Monte Carlo theory, methods and examples", sections 9.2 and 9.3.
    """
    _check_options(num_samples, method, target_standard_error, max_samples, keep_draws, compile)
    check_max_memory(max_memory)
    check_callables(progress=progress, running_mean=running_mean)
    inputs = as_inputs(x, model, guide)
    check_data(model, inputs)
    report = Progress(progress, running_mean)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide), seeded(seed):
        if method == "annealed":
            options = AnnealingOptions(
                num_chains, num_steps, num_leapfrog_steps, num_transitions, start, schedule
            )
            estimate = anneal(
                model,
                guide,
                inputs,
                options,
                plate=plate,
                max_memory=max_memory,
                report=report,
                keep_draws=keep_draws,
            )
        else:
            budget = max_memory or memory_budget(inputs[0].device)
            sampler = _Sampler(model, guide, inputs, plate, budget, keep_draws, compile, report)
            if target_standard_error is None:
                estimate = sampler.run(num_samples)
            else:
                most = max_samples or 20 * num_samples
                estimate = sampler.run_to_target(num_samples, target_standard_error, most)
            warn_if_unreliable(estimate, stacklevel=2)
    return estimate


def _check_options(
    num_samples: int,
    method: str,
    target: float | None,
    max_samples: int | None,
    keep_draws: int | None,
    compile: bool | None,
) -> None:
    check_counts(num_samples=num_samples)
    if method not in ("importance", "annealed"):
        raise InputError(f"expected method 'importance' or 'annealed', got {method!r}")
    if compile not in (None, True, False):
        raise InputError(f"expected compile as None, True or False, got {compile!r}")
    if compile and method == "annealed":
        raise InputError(
            "expected method='importance' with compile=True, got 'annealed': leave it out"
        )
    if keep_draws is not None:
        check_counts(keep_draws=keep_draws, least=0)
    if max_samples is not None:
        check_counts(max_samples=max_samples)
        if target is None:
            raise InputError("expected target_standard_error with max_samples, got none: pass both")
    if target is not None:
        if method != "importance":
            raise InputError(
                "expected method='importance' with target_standard_error, got 'annealed': "
                "set num_chains and num_steps instead"
            )
        if not 0 < real_number("target_standard_error", target) < math.inf:
            raise InputError(f"expected a target_standard_error above 0, got {target}")
        if num_samples < 2:
            raise InputError(
                "expected num_samples of at least 2 for the pilot of target_standard_error, got 1"
            )


class _Sampler:
    """Importance sampling of one data set, block by block."""

    def __init__(
        self,
        model: PairFunction,
        guide: PairFunction,
        inputs: Inputs,
        plate: str,
        budget: int,
        keep_draws: int | None,
        compile: bool | None,
        report: Progress,
    ) -> None:
        self.model, self.guide, self.inputs, self.plate = model, guide, inputs, plate
        self.budget, self.keep_draws, self.compile, self.report = budget, keep_draws, compile, report
        self.num_data = len(inputs[0])

    def run(self, num_samples: int) -> LogMarginal:
        """Take as many samples of every datum."""
        everything = torch.arange(self.num_data)
        blocks = self._sample(everything, num_samples, self._kept(num_samples), [])
        counts = torch.full((self.num_data,), num_samples)
        return join_blocks(blocks, counts, counts)

    def run_to_target(self, num_pilot: int, target: float, most: int) -> LogMarginal:
        """Let a pilot decide how many fresh samples each datum gets."""
        everything = torch.arange(self.num_data)
        quiet = _Sampler(
            self.model,
            self.guide,
            self.inputs,
            self.plate,
            self.budget,
            0,
            self.compile,
            Progress(None, None),
        )
        pilot = quiet.run(num_pilot)
        wanted = num_pilot * (pilot.standard_error / target).square()
        # Rounded up to powers of 5/4 the numbers fall into a few groups, each run as one.
        steps = (wanted.clamp(min=1, max=float(most)).log() / math.log(1.25)).ceil()
        counts = (1.25**steps).ceil().long().clamp(min(_FEWEST_SAMPLES, most), most)
        if not can_be_split(self.model, self.guide, self.inputs, self.plate):
            counts = counts.max().expand(self.num_data)
        kept = self._kept(int(counts.min()))
        blocks: list[Block] = []
        for count in counts.unique().tolist():
            blocks += self._sample(everything[counts == count], count, kept, blocks)
        return join_blocks(blocks, counts, counts + num_pilot, convergence=False)

    def _kept(self, num_samples: int) -> int:
        return num_samples if self.keep_draws is None else min(num_samples, self.keep_draws)

    def _sample(
        self, positions: Tensor, num_samples: int, kept: int, before: list[Block]
    ) -> list[Block]:
        """Sample the data at these positions; ``before`` are blocks done earlier, for the report."""
        blocks: list[Block] = []
        whole = len(positions) == self.num_data
        selected = self.inputs if whole else _picked(self.inputs, positions)
        size = None
        for rows in blocks_of(self.model, self.guide, selected, self.plate, _BLOCK):
            block = rows_of(selected, rows)
            size = size or len(block[0])
            # Blocks of one size share one compiled program: the last is filled up by its last datum.
            block = tuple(_filled(value, size) for value in block)
            scorer = PairScorer(self.model, self.guide, block, plate=self.plate)
            if self.keep_draws is None:
                elements = sum(math.prod(shape) for shape in scorer.latent_shapes.values())
                bytes_per_draw = (8 * elements + 16 * len(block[0])) * self.num_data
                kept = min(kept, _KEPT_BYTES * len(block[0]) // bytes_per_draw)
            done = before + blocks
            stream = Stream(scorer, num_samples, self.budget, kept)
            for fraction in stream.run(self.compile):
                self._tell(done, fraction, stream)
            blocks.append(stream.result(positions[rows]))
        return blocks

    def _tell(self, done: list[Block], fraction: float, stream: Stream) -> None:
        data_done = sum(len(block.positions) for block in done)
        if self.report.data is not None:
            done_now = data_done + int(fraction * stream.num_data)
            self.report.data(min(done_now, self.num_data), self.num_data)
        if self.report.mean is not None:
            sums = [block.per_datum["log_prob"].sum() for block in done]
            sums.append(stream.moments.result()["log_prob"].sum().cpu())
            self.report.mean(torch.stack(sums).sum().item() / (data_done + stream.num_data))


def _picked(inputs: Inputs, positions: Tensor) -> Inputs:
    return tuple(value[positions.to(value.device)] for value in inputs)


def _filled(value: Tensor, size: int) -> Tensor:
    missing = size - len(value)
    return torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]) if missing else value
