"""The pilot of annealing: a few chains explore each posterior, and what they find is frozen."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as dist
from torch.distributions import MixtureSameFamily

from pyro_vae.evaluation.annealing_path import AnnealingPath, State, choose, multiply, transition

# The acceptance the pilot steers to: above the 0.65 that is optimal in high dimensions (Neal 2011,
# section 4.4), as a rejected trajectory costs a low-dimensional chain more. The gain by which a mean
# acceptance moves the step is a time constant of a few transitions.
_TARGET_ACCEPTANCE, _GAIN = 0.8, 0.3

# Chains of a pilot, its most stops and transitions at each; rounds of transitions at the end. From
# stop to stop the weights keep half of their effective sample size, unless the stops run out.
CHAINS, _STOPS, _REPEATS, _ROUNDS, _ARRIVED, _CESS = 32, 40, 2, 3, 4, 0.5

# Coordinates up to which the covariance is dense, and its ridge, as a share of the mean variance.
DENSE, _RIDGE = 64, 1e-5

# By how much a fitted start is wider than what was found: weights of too narrow a one have a tail.
# And the variance above which a cluster is split, beside the most that chance gives to a normal.
_WIDER, _APART = 1.2, 2.0


class Tuning(NamedTuple):
    """What a pilot found, frozen before the first chain that counts starts."""

    stops: Tensor  # positions on the path, (S + 1, N), from 0 to 1
    step_sizes: Tensor  # in units of the factors, on the way to each stop but the first, (S, N)
    factors: Tensor  # F with F F^T near the covariance there, (S, N, D, D) or diagonals (S, N, D)
    lengths: Tensor  # (S + 1, N), up to each stop: the log weights' increments' standard deviations
    cost: int  # gradient evaluations per datum

    def schedule(self, num_steps: int) -> Tensor:
        """Return positions ``(T + 1, N)`` between which the weights' increments spread alike.

        Source:
            Zhou, Johansen, Aston 2016, "Toward Automatic Model Comparison: An Adaptive Sequential
            Monte Carlo Approach", section 3.3.
        """
        # A little of the plain distance keeps the positions apart where the weights say nothing.
        ruler = self.lengths / self.lengths[-1].clamp(min=1e-9) + 1e-3 * self.stops
        wanted = torch.linspace(0, 1, num_steps + 1, dtype=ruler.dtype, device=ruler.device)
        wanted = (ruler[-1] * wanted[:, None]).T.contiguous()
        after = torch.searchsorted(ruler.T.contiguous(), wanted).clamp(1, len(ruler) - 1).T
        ends = (after - 1, after)
        (low, high), (start, end) = ([v.gather(0, at) for at in ends] for v in (ruler, self.stops))
        share = ((wanted.T - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        betas = start + share * (end - start)
        betas[0], betas[-1] = 0.0, 1.0
        return betas

    def at(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Return step sizes and factors for positions ``(N,)`` on the path."""
        stop = (self.stops[1:-1] < beta).sum(0)
        data = torch.arange(len(beta), device=beta.device)
        # On the way to the end, what was found there at last.
        stop = torch.where(self.stops[stop + 1, data] < 1, stop, len(self.factors) - 1)
        return self.step_sizes[stop, data], self.factors[stop, data]


class Evidence(NamedTuple):
    """Log p(x) by sequential Monte Carlo, nats, ``(N,)``."""

    log_prob: Tensor
    variance: Tensor  # of that, as far as the weights show it


class Pilot(NamedTuple):
    """Where a pilot's chains arrived, and what they found."""

    position: Tensor  # (K, N, D)
    gradient: Tensor  # of the log posterior there
    log_joint: Tensor  # (K, N), there, at the end of the path
    evidence: Evidence
    tuning: Tuning


def explore(path: AnnealingPath, longest: int, position: Tensor | None = None) -> Pilot:
    """Take a few chains along the path by sequential Monte Carlo; learn how to move there.

    Chains that are given a position ``(C, N, D)`` move at the end of the path alone.

    Source:
        Del Moral, Doucet, Jasra 2006, "Sequential Monte Carlo samplers", section 3.
    """
    given, position = position is not None, path.draw(CHAINS) if position is None else position
    path.capture(position)
    state = path.evaluate(position)
    log_prob, variance, length = (torch.zeros_like(state.base[0]) for _ in range(3))
    beta = torch.full_like(log_prob, float(given))
    # The stability limit of leapfrog steps on a unit normal is 2; in D dimensions the acceptance
    # wants D^(-1/4) (Neal 2011, section 4.4).
    log_step = torch.full_like(log_prob, -0.25 * math.log(position.shape[-1]))
    stops, lengths = [torch.zeros_like(beta)], [length]
    steps, factors = list[Tensor](), list[Tensor]()
    visited, moves, stops_left, rounds_left = [state], 0, _STOPS, _ROUNDS
    while rounds_left:
        repeats = _REPEATS
        if bool((beta < 1).any()):
            rise, share = _next_rise(state.increment, 1 - beta, stops_left)
            weights = _weigh(rise, state.increment)
            log_prob = log_prob + weights.logsumexp(0) - math.log(len(weights))
            variance = variance + (1 / share - 1) / len(weights)
            length = length + (-share.log()).clamp(min=0).sqrt()
            beta = torch.where(rise < 1 - beta, beta + rise, 1.0)
            # Which chains go on, by systematic resampling.
            shares = weights.softmax(0).nan_to_num(nan=1 / len(weights))
            state = state.take(choose(shares.cumsum(0), len(weights)))
            stops_left -= 1
        else:
            repeats, rounds_left = _ARRIVED, rounds_left - 1
        factor = whiten(*_gather([*visited, state], beta))
        visited = []
        for _ in range(repeats):
            state, probability = transition(path, state, beta, log_step.exp(), factor, longest)
            log_step = log_step + _GAIN * (probability.mean(0) - _TARGET_ACCEPTANCE)
            visited.append(state)
        moves += repeats
        found = (beta, length, log_step.exp(), factor)
        for record, value in zip((stops, lengths, steps, factors), found, strict=True):
            record.append(value)
    cost = math.ceil(len(position) * (1 + moves * (1 + longest) / 2))
    along = [torch.stack(values) for values in (stops, steps, factors, lengths)]
    log_joint = torch.cat([each.log_density(beta) for each in visited])
    tuning = Tuning(along[0], along[1], along[2], along[3], cost)
    return Pilot(*_gather(visited, beta), log_joint, Evidence(log_prob, variance), tuning)


def fit_start(pilots: list[Pilot]) -> MixtureSameFamily:
    """Fit a mixture of normals per datum to where pilots arrived, for a path to leave from.

    What spreads more than its gradients tell is split in two and again: up to four modes of each
    pilot. The shares follow from the evidence of each part, as if it were normal.
    """
    clusters = [(pilot, torch.ones_like(pilot.position[..., 0])) for pilot in pilots]
    for _ in range(2):
        clusters = [(pilot, part) for pilot, each in clusters for part in _split(pilot, each)]
    fitted = zip(*(_fit_normal(pilot, members) for pilot, members in clusters), strict=True)
    means, factors, evidence = (torch.stack(values, 1) for values in fitted)
    # The root hedges: what is found to be small gets more chains than its share.
    shares = dist.Categorical(logits=(evidence / 2).nan_to_num(nan=-1e9, neginf=-1e9))
    # Unchecked: where a trajectory ran away to there is a density of none.
    how: Any = {"validate_args": False}
    if factors.dim() == 3:
        parts: Any = dist.Independent(dist.Normal(means, factors, **how), 1, **how)
    else:
        parts = dist.MultivariateNormal(means, scale_tril=factors, **how)
    return MixtureSameFamily(shares, parts, **how)


def _fit_normal(pilot: Pilot, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, factor and log evidence of a cluster, whose members ``(K, N)`` are 1."""
    mean, factor, _, spread, num_chains = _make_white(pilot, members)
    if factor.dim() == 3:
        # S shrunk towards 1 with the least squared error: Ledoit, Wolf 2004, "A well-conditioned
        # estimator for large-dimensional covariance matrices", with the variance of a normal's S.
        away = spread - torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
        trace = spread.diagonal(dim1=1, dim2=2).sum(1)
        noise = (spread.square().sum((1, 2)) + trace.square()) / num_chains
        trust = 1 - (noise / away.square().sum((1, 2)).clamp(min=1e-30)).clamp(max=1)
        covariance = factor @ (spread - (1 - trust)[:, None, None] * away) @ factor.mT
        factor = torch.linalg.cholesky(covariance)
    diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)
    log_joint = (members * pilot.log_joint).nan_to_num(nan=-1e9, neginf=-1e9).sum(0)
    return mean, _WIDER * factor, log_joint / members.sum(0) + diagonal.log().sum(1)


def _make_white(pilot: Pilot, members: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a cluster's mean and factor, all positions in its white coordinates, and of its own.

    Of these the covariance and the number of chains; of each several positions are known, one after
    the other.
    """
    position = pilot.position.double()
    weights = members / members.sum(0)
    mean = (weights[..., None] * position).sum(0)
    factor = whiten(position, pilot.gradient, weights)
    inverse = factor.reciprocal() if factor.dim() == 2 else torch.linalg.inv(factor)
    white = multiply(inverse, position - mean)
    spread = _covariance(white, weights[..., None]) if factor.dim() == 3 else factor
    return mean, factor, white, spread, members.sum(0) / len(position) * 2 * CHAINS


def _split(pilot: Pilot, members: Tensor) -> list[Tensor]:
    """Split a cluster along the direction of its greatest spread, where that is no normal's."""
    _, factor, white, spread, num_chains = _make_white(pilot, members)
    if factor.dim() == 2:
        return [members]
    spreads, directions = torch.linalg.eigh(spread)
    along = (white * directions[:, :, -1]).sum(-1)
    above = along > 0
    for _ in range(8):  # two means on a line
        sides = [members * above, members * ~above]
        means = [(side * along).sum(0) / side.sum(0).clamp(min=1) for side in sides]
        above = along > (means[0] + means[1]) / 2
    # The largest variance of so few chains in so many directions: Marchenko, Pastur 1967.
    largest = (1 + (white.shape[-1] / num_chains).sqrt()).square()
    sides = [members * above, members * ~above]
    apart = (spreads[:, -1] > _APART * largest) & (sides[0].sum(0) > 0) & (sides[1].sum(0) > 0)
    return [torch.where(apart, side, members) for side in sides] if bool(apart.any()) else [members]


def whiten(position: Tensor, gradient: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return F per datum with F F^T near the covariance, from positions and gradients there.

    It is the geometric mean of the positions' covariance and the inverse of the gradients', exact
    for a normal density whatever the positions ``(K, N, D)`` are; diagonal above 64 coordinates.

    .. math:: \Sigma = \arg\min E |\nabla \log p(z) + \Sigma^{-1} (z - m)|^2_\Sigma

    Source:
        Seyboldt 2020, the package covadapt, which derives this minimum.
    """
    weights = torch.full_like(position[..., 0], 1 / len(position)) if weights is None else weights
    weights, dtype = weights.double()[..., None], position.dtype
    position, gradient = (value.double() - (weights * value).sum(0) for value in (position, gradient))
    spread, slope = ((weights * value.square()).sum(0).sqrt() for value in (position, gradient))
    scale = (spread / slope).sqrt()
    usable = scale.isfinite() & (scale > 0)
    scale = torch.where(usable, scale, torch.where(spread > 0, spread, 1.0))
    if position.shape[-1] > DENSE:
        return scale.to(dtype)
    lower, failed = torch.linalg.cholesky_ex(_covariance(gradient * scale, weights))
    inner = lower.mT @ _covariance(position / scale, weights) @ lower
    values, vectors = torch.linalg.eigh(inner.nan_to_num())
    roots = values.clamp(min=1e-30)[:, None] ** 0.25
    white = torch.linalg.solve_triangular(lower.mT, vectors * roots, upper=True)
    bad = (failed != 0) | ~white.isfinite().all(-1).all(-1)
    eye = torch.eye(position.shape[-1], dtype=white.dtype, device=white.device)
    return (scale[..., None] * torch.where(bad[:, None, None], eye, white)).to(dtype)


def _covariance(centred: Tensor, weights: Tensor) -> Tensor:
    covariance = (weights * centred).permute(1, 2, 0) @ centred.movedim(0, 1)
    ridge = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    eye = torch.eye(centred.shape[-1], dtype=centred.dtype, device=centred.device)
    return covariance + ridge[:, None, None] * eye


def _gather(states: list[State], beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of states and the gradients there at ``beta``, ``(K, N, D)``."""
    positions = torch.cat([state.position for state in states])
    return positions, torch.cat([state.gradient(beta) for state in states])


def _weigh(rise: Tensor, increment: Tensor) -> Tensor:
    return torch.where(rise > 0, rise * increment, 0.0).nan_to_num(nan=-math.inf, neginf=-math.inf)


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
