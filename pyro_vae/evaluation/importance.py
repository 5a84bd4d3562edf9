"""log p(x) by importance sampling: streamed over samples, per datum, with its standard error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.infer.log_weights import Latents, PairScorer
from pyro_vae.infer.pair import (
    HANDLER_LOCK,
    PairFunction,
    as_inputs,
    evaluation_mode,
    seeded,
)

__all__ = ["LogMarginal", "log_marginal"]

# Data that share one pass of the guide: enough to fill the arithmetic units, few enough that many
# particles of each fit beside them.
_BLOCK = 1024


@dataclass(frozen=True)
class LogMarginal:
    """An estimate of log p(x), one value per datum (nats, float64, on the CPU).

    Attributes:
        log_prob: estimate of log p(x), ``(N,)``. Its expectation is a lower bound that tightens with
            the number of samples; ``-inf`` where every sample had likelihood 0.
        standard_error: Monte Carlo standard error of ``log_prob`` by the delta method, ``(N,)``; NaN
            (unknown) for a single sample, infinite where ``log_prob`` is ``-inf``.
        ess: effective sample size, (sum w)^2 / sum w^2, ``(N,)``.
        rate: E_q[log q(z|x) - log p(z)], ``(N,)``, Monte Carlo from the same draws.
        distortion: -E_q[log p(x|z)], ``(N,)``, Monte Carlo from the same draws.
        num_samples: draws per datum.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    rate: Tensor
    distortion: Tensor
    num_samples: int

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
        """Standard error of :attr:`mean` as an estimate over the data's distribution."""
        return self.log_prob.std().item() / math.sqrt(len(self.log_prob))


def log_marginal(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    num_samples: int = 5000,
    max_memory: int | None = None,
    plate: str = "data",
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LogMarginal:
    """Estimate log p(x) per datum by importance sampling from the guide.

    .. math:: log p(x) ~ log (1/K) sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x)

    Runs without gradients and with the pair's modules in eval mode, which is restored. The guide is
    run once per datum; samples are streamed in chunks, so memory does not grow with their number.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair; its cost per datum is paid once.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        num_samples: draws per datum, K.
        max_memory: bytes that a chunk may need; by default 512 MiB on a CPU and a quarter of the free
            memory on a GPU. More data than fit are taken block by block.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards. None draws from the
            global state.
        progress: called with (data done, N) after every block.

    Raises:
        InputError: a pair that can't be weighed rightly (see :func:`pyro_vae.log_weights`), a number
            of samples below 1, or a NaN from the pair.

    Source:
        Burda, Grosse, Salakhutdinov 2016, equation 8; delta-method error and effective sample size:
        Owen 2013, "Monte Carlo theory, methods and examples", sections 9.2 and 9.3.
    """
    if num_samples < 1:
        raise InputError(f"expected num_samples of at least 1, got {num_samples}")
    inputs = as_inputs(x)
    num_data = len(inputs[0])
    blocks: list[dict[str, Tensor]] = []
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide), seeded(seed):
        budget = max_memory or _memory_budget(inputs[0].device)
        for start in range(0, num_data, _BLOCK):
            block = tuple(value[start : start + _BLOCK] for value in inputs)
            scorer = PairScorer(model, guide, block, plate=plate)
            blocks.append(_stream(scorer, num_samples, budget))
            if progress is not None:
                progress(min(start + _BLOCK, num_data), num_data)
    joined = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return LogMarginal(num_samples=num_samples, **joined)


class _RunningMoments:
    """Streaming sums over particles of w and w^2 (relative to the largest w), rate and distortion."""

    def __init__(self, num_data: int, device: torch.device) -> None:
        zeros = torch.zeros(num_data, dtype=torch.float64, device=device)
        self.largest = zeros - math.inf
        self.sum_weights, self.sum_squares = zeros, zeros
        self.sum_rate, self.sum_distortion = zeros, zeros
        self.count = 0

    def add(self, log_likelihood: Tensor, log_prior: Tensor, log_proposal: Tensor) -> None:
        log_weights = log_likelihood + log_prior - log_proposal
        if log_weights.isnan().any():
            raise InputError(_nan_message(log_likelihood, log_prior, log_proposal))
        largest = torch.maximum(self.largest, log_weights.amax(0))
        # While every weight is 0 there is nothing to rescale; 0 stands in for -inf - (-inf).
        shift = torch.where(largest.isneginf(), 0.0, largest)
        rescale = (self.largest - shift).exp()
        weights = (log_weights - shift).exp()
        self.sum_weights = self.sum_weights * rescale + weights.sum(0)
        self.sum_squares = self.sum_squares * rescale.square() + weights.square().sum(0)
        self.largest = largest
        self.sum_rate = self.sum_rate + (log_proposal - log_prior).sum(0)
        self.sum_distortion = self.sum_distortion - log_likelihood.sum(0)
        self.count += len(log_weights)

    def result(self) -> dict[str, Tensor]:
        count = self.count
        log_prob = self.sum_weights.log() + self.largest - math.log(count)
        ess = self.sum_weights.square() / self.sum_squares
        # Var(log mean w) ~ Var(w) / (K mean(w)^2), with the unbiased sample variance of w.
        relative_variance = (1 / ess - 1 / count).clamp(min=0)
        correction = count / (count - 1) if count > 1 else math.nan
        standard_error = (relative_variance * correction).sqrt()
        impossible = self.largest.isneginf()
        return {
            "log_prob": torch.where(impossible, -math.inf, log_prob).cpu(),
            "standard_error": torch.where(impossible, math.inf, standard_error).cpu(),
            "ess": torch.where(impossible, 0.0, ess).cpu(),
            "rate": (self.sum_rate / count).cpu(),
            "distortion": (self.sum_distortion / count).cpu(),
        }


def _stream(scorer: PairScorer, num_samples: int, budget: int) -> dict[str, Tensor]:
    """Draw and score all samples of one block within the memory budget."""
    moments = _RunningMoments(scorer.num_data, scorer.inputs[0].device)
    # Half of the budget holds the latents drawn in one pass of the guide, the other half the chunk of
    # them that the model scores.
    drawn_at_once = max(1, min(num_samples, budget // (2 * scorer.bytes_per_proposal())))
    scored_at_once = max(1, budget // (2 * scorer.bytes_per_datum * scorer.num_data))
    for first in range(0, num_samples, drawn_at_once):
        count = min(drawn_at_once, num_samples - first)
        latents, log_proposal = scorer.propose(count)
        for start in range(0, count, scored_at_once):
            rows = slice(start, start + scored_at_once)
            chunk: Latents = {name: value[rows] for name, value in latents.items()}
            moments.add(*scorer.score(chunk), log_proposal[rows])
    return moments.result()


def _memory_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 4
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1 << 24, min(1 << 29, available // 4))


def _nan_message(log_likelihood: Tensor, log_prior: Tensor, log_proposal: Tensor) -> str:
    terms = {
        "log p(x|z)": log_likelihood,
        "log p(z)": log_prior,
        "log q(z|x)": log_proposal,
    }
    name, term = next((item for item in terms.items() if item[1].isnan().any()), ("weights", None))
    count = 0 if term is None else int(term.isnan().any(0).sum())
    return (
        f"expected finite log-probabilities, got NaN in {name} for {count} of "
        f"{log_likelihood.shape[1]} data: look for NaN parameters or a log of a negative number"
    )
