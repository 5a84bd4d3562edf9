"""The Pareto tail index of importance weights, from a stream of them, many data points at once."""

import math

import torch
from torch import Tensor

# Above it the weights have so heavy a tail that the estimate and its standard error can't be trusted
# at any practical number of samples (Vehtari et al. 2024, section 3).
_HIGHEST_LIMIT = 0.7

# Fewer tail weights than this say nothing about a tail.
_SMALLEST_TAIL = 5

# Units in the last place to which the largest log weights may agree by rounding: no tail, k = 0.
_LAST_PLACES = 64

# Nats: where rounding alone makes more than that, weights that look equal may be anything.
_COARSE = 0.1


def pareto_k_limit(num_samples: Tensor | int) -> Tensor:
    """Return the k above which weights can't be trusted, min(0.7, 1 - 1 / log10 S): 0.5 at S = 100.

    Source:
        Vehtari et al. 2024, "Pareto Smoothed Importance Sampling", section 3.2.4.
    """
    return (1 - 1 / torch.as_tensor(num_samples).double().log10()).clamp(max=_HIGHEST_LIMIT)


def tail_length(num_samples: int) -> int:
    """Return how many of the largest weights make the tail, ceil(min(S / 5, 3 sqrt(S)))."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


class TailWeights:
    """The largest log weights of each datum, kept while ``num_samples`` of them stream by.

    ``precision`` is the relative spacing of the numbers that the weights' terms were computed in.
    """

    def __init__(self, num_samples: int, precision: float = torch.finfo(torch.float64).eps) -> None:
        self.num_samples, self.precision = num_samples, precision
        self.kept = tail_length(num_samples) + 1  # the one below the tail is the cutoff
        self._pending: list[Tensor] = []
        self._count = 0

    def add(self, log_weights: Tensor) -> None:
        """Add weights ``(num_new, N)``, float64, nats."""
        self._pending.append(log_weights)
        self._count += len(log_weights)
        if self._count >= 2 * self.kept:
            self._compress()

    def pareto_k(self) -> Tensor:
        """Return the estimated tail index per datum, ``(N,)``.

        NaN: not known, of fewer than 21 samples or of weights that are equal but for a rounding
        coarse enough to hide a tail. 0: the largest weights are equal. Infinity: fewer than 5 weights
        rise above the cutoff, or every weight is 0.
        """
        self._compress()
        (largest_first,) = self._pending
        if len(largest_first) < self.kept or self.kept <= _SMALLEST_TAIL:
            return largest_first.new_full((largest_first.shape[1],), math.nan)
        return _pareto_k(largest_first.T.contiguous(), self.precision)

    def _compress(self) -> None:
        weights = torch.cat(self._pending)
        weights = weights.topk(min(self.kept, len(weights)), dim=0).values
        self._pending, self._count = [weights], len(weights)


def _pareto_k(largest_first: Tensor, precision: float) -> Tensor:
    """Return k from the M + 1 largest log weights per datum, ``(N, M + 1)``, largest first."""
    largest, cutoff = largest_first[:, 0], largest_first[:, -1]
    pareto_k = torch.full_like(largest, math.inf)
    rounding = _LAST_PLACES * precision * largest.abs().clamp(min=1)
    equal, possible = largest - cutoff <= rounding, largest.isfinite()
    # Weights too small for float64 beside the largest one are no part of a tail.
    smallest = math.log(torch.finfo(torch.float64).tiny)
    relative = largest_first - torch.where(possible, largest, 0.0)[:, None]
    relative_cutoff = relative[:, -1].clamp(min=smallest)
    lengths = (relative > relative_cutoff[:, None]).sum(1)
    has_tail = possible & ~equal & (lengths >= _SMALLEST_TAIL)
    for length in lengths[has_tail].unique().tolist():
        rows = has_tail & (lengths == length)
        base = relative_cutoff[rows, None]
        exceedances = base.exp() * (relative[rows, :length] - base).expm1()
        pareto_k[rows] = generalized_pareto_shape(exceedances.flip(1))
    return torch.where(possible & equal, torch.where(rounding > _COARSE, math.nan, 0.0), pareto_k)


def generalized_pareto_shape(exceedances: Tensor) -> Tensor:
    r"""Estimate the shape k of generalized Pareto distributions from ascending values ``(rows, n)``.

    .. math:: p(y | k, \sigma) = (1 + k y / \sigma)^{-1/k - 1} / \sigma

    The profile parameter :math:`b = -k / \sigma` gets its posterior mean over a grid of quasi-prior
    quantiles; k follows from it and is shrunk towards 0.5 by a prior worth ten observations.

    Source:
        Zhang, Stephens 2009, "A New and Efficient Estimation Method for the Generalized Pareto
        Distribution", equations 5 to 9; prior on k: Vehtari et al. 2024, appendix G.
    """
    count = exceedances.shape[1]
    grid_size = 30 + int(math.sqrt(count))
    quartile = exceedances[:, int(count / 4 + 0.5) - 1, None]
    index = torch.arange(1, grid_size + 1, dtype=exceedances.dtype, device=exceedances.device)
    spread = (1 - (grid_size / (index - 0.5)).sqrt()) / (3 * quartile)
    grid = 1 / exceedances[:, -1:] + spread
    shapes = torch.stack([_shape_given(b, exceedances) for b in grid.unbind(1)], dim=1)
    profile = count * ((-grid / shapes).log() - shapes - 1)
    weights = profile.nan_to_num(nan=-math.inf).softmax(dim=1)
    shape = _shape_given((weights * grid).sum(1), exceedances)
    return (count * shape + 10 * 0.5) / (count + 10)


def _shape_given(b: Tensor, exceedances: Tensor) -> Tensor:
    """Return the shape that maximises the likelihood at a profile parameter b, one per row."""
    return torch.log1p(-b[:, None] * exceedances).mean(1)
