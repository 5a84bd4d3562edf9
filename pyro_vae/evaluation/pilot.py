"""The pilot of annealing: a few chains explore each posterior, and what they find is frozen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.evaluation.hmc import AnnealingPath, Mixture, Normal, State, multiply, transition

# The acceptance the pilot steers to: above the 0.65 that is optimal in high dimensions (Neal 2011,
# section 4.4), as a rejected trajectory costs a low-dimensional chain more. The gain by which a mean
# acceptance moves the step is a time constant of a few transitions.
_TARGET_ACCEPTANCE, _GAIN = 0.8, 0.3

# Chains of a pilot, its most stops, transitions at each and once it has arrived; from stop to stop
# the weights keep half of their effective sample size, unless the stops run out.
_CHAINS, _STOPS, _REPEATS, _ARRIVED, _CESS = 32, 40, 2, 6, 0.5

# Coordinates up to which the covariance is dense, and its ridge, as a share of the mean variance.
DENSE, _RIDGE = 64, 1e-5

# Draws of the guide that a normal like it is made of.
NUM_DRAWS = 256

# By how much a fitted start is wider than what was found: weights of too narrow a one have a tail.
_WIDER = 1.2

# How often clusters of positions are split, and the variance above which, as a multiple of what the
# gradients tell: 1 for a normal, 1.2 for Student's t of 4 degrees, 26 for two normals 50 of their
# deviations apart.
_SPLITS, _APART = 2, 2.0


class Tuning(NamedTuple):
    """What a pilot found, frozen before the first chain that counts starts.

    Attributes:
        stops: positions on the path, ``(S + 1, N)``, from 0 to 1; the others are for the last S.
        step_sizes: ``(S, N)``, in units of the factors.
        factors: F with F F^T near the covariance there, ``(S, N, D, D)`` or diagonals ``(S, N, D)``.
        lengths: of the path up to each stop, ``(S + 1, N)``: the sum of the standard deviations of
            the log weights' increments.
        cost: gradient evaluations per datum.
    """

    stops: Tensor
    step_sizes: Tensor
    factors: Tensor
    lengths: Tensor
    cost: int

    def schedule(self, num_steps: int) -> Tensor:
        """Return positions ``(T + 1, N)`` between which the weights' increments spread alike.

        Source:
            Zhou, Johansen, Aston 2016, "Toward Automatic Model Comparison: An Adaptive Sequential
            Monte Carlo Approach", section 3.3.
        """
        # A little of the plain distance keeps the positions apart where the weights say nothing.
        ruler = self.lengths / self.lengths[-1].clamp(min=1e-9) + 1e-3 * self.stops
        wanted = torch.linspace(0, 1, num_steps + 1, dtype=ruler.dtype, device=ruler.device)
        wanted = ruler[-1][:, None] * wanted
        after = torch.searchsorted(ruler.T.contiguous(), wanted).clamp(1, len(ruler) - 1).T
        low, high = ruler.gather(0, after - 1), ruler.gather(0, after)
        share = ((wanted.T - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        start, end = self.stops.gather(0, after - 1), self.stops.gather(0, after)
        betas = start + share * (end - start)
        betas[0], betas[-1] = 0.0, 1.0
        return betas

    def at(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Return step sizes and factors for positions ``(N,)`` on the path."""
        stop = (self.stops[1:-1] < beta).sum(0)
        data = torch.arange(len(beta), device=beta.device)
        return self.step_sizes[stop, data], self.factors[stop, data]


class Pilot(NamedTuple):
    """Where a pilot's chains arrived, ``(K, N, D)``, the gradients there, and its log p(x)."""

    position: Tensor
    gradient: Tensor
    log_prob: Tensor  # (N,), by sequential Monte Carlo, nats
    variance: Tensor  # of it, (N,), as far as the weights show it
    tuning: Tuning


def explore(path: AnnealingPath, num_leapfrog_steps: int) -> Pilot:
    """Take a few chains along the path by sequential Monte Carlo; learn how to move there.

    Source:
        Del Moral, Doucet, Jasra 2006, "Sequential Monte Carlo samplers", section 3.
    """
    position, _ = path.draw(_CHAINS)
    path.capture(position)
    state = path.evaluate(position)
    log_prob = torch.zeros_like(state.base[0])
    beta, variance, length = (torch.zeros_like(log_prob) for _ in range(3))
    # The stability limit of leapfrog steps on a unit normal is 2; in D dimensions the acceptance
    # wants D^(-1/4) (Neal 2011, section 4.4).
    log_step = torch.full_like(log_prob, -0.25 * math.log(path.num_coordinates))
    stops, lengths, tunings, visited = [beta], [length], [], [state]
    evaluations = 1

    def move(times: int) -> list[State]:
        nonlocal state, log_step, evaluations
        passed = []
        for _ in range(times):
            state, probability = transition(
                path, state, beta, log_step.exp(), factor, num_leapfrog_steps
            )
            log_step = log_step + _GAIN * (probability.mean(0) - _TARGET_ACCEPTANCE)
            passed.append(state)
            evaluations += (1 + num_leapfrog_steps) / 2
        return passed

    for left in range(_STOPS, 0, -1):
        rise, share = _next_rise(state.increment, 1 - beta, left)
        weights = _weigh(rise, state.increment)
        log_prob = log_prob + weights.logsumexp(0) - math.log(_CHAINS)
        variance = variance + (1 / share - 1) / _CHAINS
        length = length + (-share.log()).clamp(min=0).sqrt()
        beta = torch.where(rise < 1 - beta, beta + rise, 1.0)
        state = state.take(_resample(weights))
        factor = whiten(*_gather([*visited, state], beta))
        visited = move(_REPEATS)
        stops.append(beta)
        lengths.append(length)
        tunings.append((log_step.exp(), factor))
        if bool((beta == 1).all()):
            break
    for _ in range(2):
        factor = whiten(*_gather([*visited, state], beta))
        visited = move(_ARRIVED // 2)
    position, gradient = _gather(visited, beta)
    tunings[-1] = log_step.exp(), factor
    step_sizes, factors = map(torch.stack, zip(*tunings, strict=True))
    for stop in range(len(tunings) - 1):  # a datum that arrived early is known best at the end
        early = stops[stop + 1] == 1
        step_sizes[stop, early], factors[stop, early] = step_sizes[-1, early], factors[-1, early]
    cost = math.ceil(_CHAINS * evaluations)
    tuning = Tuning(torch.stack(stops), step_sizes, factors, torch.stack(lengths), cost)
    return Pilot(position, gradient, log_prob, variance, tuning)


def normal_like(position: Tensor) -> Mixture:
    """Return the normal of the mean and the covariance of positions ``(K, N, D)``."""
    mean, dtype = position.double().mean(0), position.dtype
    centred = position.double() - mean
    # A point mass gets some width: the prior's scale is about 1 in most models.
    factor = spread = centred.square().mean(0).sqrt().clamp(min=1e-3)
    if position.shape[-1] <= DENSE:
        weights = torch.full_like(centred[..., :1], 1 / len(position))
        lower = torch.linalg.cholesky(_covariance(centred / spread, weights))
        factor = spread[..., None] * lower
    return Mixture([Normal.of(mean.to(dtype), factor.to(dtype))], torch.zeros_like(mean[None, :, 0]))


def fit_start(pilots: list[Pilot]) -> Mixture:
    """Fit a mixture of normals per datum to where pilots arrived, each weighed by its evidence.

    A part is split in two where its positions spread more than its gradients tell: up to four modes.
    """
    doubt = 1 + torch.stack([pilot.variance for pilot in pilots]).sum(0)
    evidence = torch.stack([pilot.log_prob for pilot in pilots]) / doubt
    shares = evidence.nan_to_num(nan=-math.inf).softmax(0).nan_to_num(nan=1 / len(pilots))
    position = torch.cat([pilot.position for pilot in pilots])
    gradient = torch.cat([pilot.gradient for pilot in pilots])
    weights = torch.cat(
        [share.expand(len(p.position), -1) for share, p in zip(shares, pilots, strict=True)]
    )
    clusters = [weights / weights.sum(0)]
    for _ in range(_SPLITS):
        clusters = [half for each in clusters for half in _split(position, gradient, each)]
    # The root hedges: a mode that few chains found gets more of those that count.
    sizes = torch.stack([each.sum(0) for each in clusters]).sqrt()
    parts = [_fit_normal(position, gradient, each / each.sum(0)) for each in clusters]
    return Mixture(parts, (sizes / sizes.sum(0)).log())


def _fit_normal(position: Tensor, gradient: Tensor, weights: Tensor) -> Normal:
    mean, factor, white = _make_white(position, gradient, weights)
    # Of each chain several positions are known, one after the other.
    num_chains = _CHAINS / len(position) * 2 / weights.square().sum(0)
    factor = _shrunk(factor, white, weights, num_chains)
    return Normal.of(mean.to(position), factor.to(position))


def _make_white(position: Tensor, gradient: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of positions, a factor, and the positions that it makes white, float64."""
    mean = (weights[..., None] * position).sum(0)
    factor = whiten(position, gradient, weights).double()
    return mean, factor, multiply(Normal.of(mean, factor).inverse, position.double() - mean)


def _split(position: Tensor, gradient: Tensor, weights: Tensor) -> list[Tensor]:
    """Split a cluster along the direction of its greatest spread, where that is no normal's."""
    _, _, white = _make_white(position, gradient, weights / weights.sum(0))
    if position.shape[-1] > DENSE:
        return [weights]
    own = (weights / weights.sum(0))[..., None]
    spreads, directions = torch.linalg.eigh(_covariance(white, own))
    along = (white * directions[:, :, -1]).sum(-1)
    border = torch.zeros_like(along[0])
    for _ in range(8):  # two means on a line
        sums = [(weights * side).sum(0) for side in (along > border, along <= border)]
        means = [
            (weights * side * along).sum(0) / total.clamp(min=1e-30)
            for side, total in zip((along > border, along <= border), sums, strict=True)
        ]
        border = (means[0] + means[1]) / 2
    above = along > border
    # The largest of the variances of so few chains in so many directions: Marchenko, Pastur 1967.
    num_chains = _CHAINS / len(position) * 2 / own[..., 0].square().sum(0)
    largest = (1 + (position.shape[-1] / num_chains).sqrt()).square()
    apart = (spreads[:, -1] > _APART * largest) & above.any(0) & ~above.all(0)
    if not bool(apart.any()):
        return [weights]
    half = weights / 2
    return [torch.where(apart, weights * side, half) for side in (above, ~above)]


def whiten(position: Tensor, gradient: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return F per datum with F F^T near the covariance, from positions ``(K, N, D)`` and gradients.

    It is the geometric mean of the positions' covariance and the inverse of the gradients', exact for
    a normal density whatever the positions are, dense up to 64 coordinates.

    .. math:: \Sigma = \arg\min E |\nabla \log p(z) + \Sigma^{-1} (z - m)|^2_\Sigma

    Source:
        Seyboldt 2020, the package covadapt, "low rank approximation of mass matrices", which derives
        this minimum.
    """
    weights = torch.full_like(position[..., 0], 1 / len(position)) if weights is None else weights
    weights = weights.double()[..., None]
    position, gradient, dtype = position.double(), gradient.double(), position.dtype
    position = position - (weights * position).sum(0)
    gradient = gradient - (weights * gradient).sum(0)
    spread, slope = ((weights * value.square()).sum(0).sqrt() for value in (position, gradient))
    scale = (spread / slope).sqrt()
    usable = scale.isfinite() & (scale > 0)
    scale = torch.where(usable, scale, torch.where(spread > 0, spread, 1.0))
    if position.shape[-1] > DENSE:
        return scale.to(dtype)
    ours = _covariance(position / scale, weights)
    theirs = _covariance(gradient * scale, weights)
    lower, failed = torch.linalg.cholesky_ex(theirs)
    values, vectors = torch.linalg.eigh((lower.mT @ ours @ lower).nan_to_num())
    white = torch.linalg.solve_triangular(
        lower.mT, vectors * values.clamp(min=1e-30)[:, None] ** 0.25, upper=True
    )
    plain = (failed != 0) | ~white.isfinite().all(-1).all(-1)
    eye = torch.eye(position.shape[-1], dtype=white.dtype, device=white.device)
    return (scale[..., None] * torch.where(plain[:, None, None], eye, white)).to(dtype)


def _covariance(centred: Tensor, weights: Tensor) -> Tensor:
    covariance = (weights * centred).permute(1, 2, 0) @ centred.movedim(0, 1)
    mean = covariance.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(centred.shape[-1], dtype=centred.dtype, device=centred.device)
    return covariance + (_RIDGE * mean + 1e-30)[:, None, None] * eye


def _shrunk(factor: Tensor, white: Tensor, weights: Tensor, num_chains: Tensor) -> Tensor:
    """Correct a factor by the covariance S of positions that it is to make white, shrunk to 1.

    Source:
        The least mean squared error: Ledoit, Wolf 2004, "A well-conditioned estimator for
        large-dimensional covariance matrices", section 2, with the variance of a normal's S.
    """
    if factor.dim() == 2:
        square = (weights[..., None] * white.square()).sum(0)
        noise, away = 2 * square.square() / num_chains[:, None], (square - 1).square()
        trust = 1 - (noise / away.clamp(min=1e-30)).clamp(max=1)
        return _WIDER * factor * (1 + trust * (square - 1)).sqrt()
    square = _covariance(white, weights[..., None])
    away = square - torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    trace = square.diagonal(dim1=1, dim2=2).sum(1)
    noise = (square.square().sum((1, 2)) + trace.square()) / num_chains
    trust = 1 - (noise / away.square().sum((1, 2)).clamp(min=1e-30)).clamp(max=1)
    lower = torch.linalg.cholesky(square - (1 - trust)[:, None, None] * away)
    return _WIDER * factor @ lower


def _gather(states: list[State], beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of states and the gradients there at ``beta``, ``(K, N, D)``."""
    return (
        torch.cat([state.position for state in states]),
        torch.cat([state.gradient(beta) for state in states]),
    )


def _weigh(rise: Tensor, increment: Tensor) -> Tensor:
    weights = torch.where(rise > 0, rise * increment, 0.0)
    return weights.nan_to_num(nan=-math.inf, neginf=-math.inf)


def _next_rise(increment: Tensor, left: Tensor, stops_left: int) -> tuple[Tensor, Tensor]:
    """Return how far to go on the path, and the share of the sample size that its weights leave."""

    def share_left(rise: Tensor) -> Tensor:
        weights = _weigh(rise, increment)
        twice = 2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)
        return (twice.exp() / len(weights)).nan_to_num(nan=1 / len(weights))

    # The rise is found as a share of what is left, on a logarithmic scale.
    low, high = torch.full_like(left, -25.0), torch.zeros_like(left)
    for _ in range(16):
        middle = (low + high) / 2
        enough = share_left(left * middle.exp()) >= _CESS
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    rise = left * torch.where(share_left(left) >= _CESS, 1.0, low.exp())
    rise = torch.maximum(rise, left / stops_left**2)
    return rise, share_left(rise)


def _resample(log_weights: Tensor) -> Tensor:
    """Return which chains go on, ``(C, N)``, by systematic resampling."""
    count, num_data = log_weights.shape
    ends = log_weights.softmax(0).nan_to_num(nan=1 / count).cumsum(0).T.contiguous()
    shift = torch.rand(num_data, 1, dtype=ends.dtype, device=ends.device)
    points = (torch.arange(count, device=ends.device) + shift) / count
    return torch.searchsorted(ends, points).clamp(max=count - 1).T
