"""How fast annealing's leapfrog steps are beside a compiled loop written by hand for one network.

Both move the same chains of a 784-200-200-50 VAE (tanh, Bernoulli) at the end of the path, in turns;
the loop by hand knows the network's gradient, keeps no densities and tests no move.
"""

import argparse
import statistics
import time

import torch

import pyro_vae as pv
from pyro_vae.evaluation.annealing_path import AnnealingPath, multiply
from pyro_vae.pair.opened import open_pair
from pyro_vae.weights.particles import Particles


def hand_written(vae: pv.VAE, x: torch.Tensor, length: int):
    """Return a compiled function of positions that makes so many leapfrog steps of size 0.1."""
    layers = [each for each in vae.likelihood.modules() if isinstance(each, torch.nn.Linear)]
    (w1, b1), (w2, b2), (w3, b3) = ((each.weight, each.bias) for each in layers)

    def gradient(z):
        one = torch.tanh(z @ w1.T + b1)
        two = torch.tanh(one @ w2.T + b2)
        slope = (x - torch.sigmoid(two @ w3.T + b3)) @ w3 * (1 - two.square())
        return (slope @ w2 * (1 - one.square())) @ w1 - z

    def leapfrog(z):
        momentum, slope = torch.randn_like(z), gradient(z)
        for _ in range(length):
            momentum = momentum + 0.05 * slope
            z = z + 0.1 * momentum
            slope = gradient(z)
            momentum = momentum + 0.05 * slope
        return z

    return torch.compile(leapfrog)


def captured(path: AnnealingPath, state, factor: torch.Tensor, length: int):
    """Make so many leapfrog steps of size 0.1 as annealing does."""
    end = torch.ones(factor.shape[0], dtype=torch.float64)
    momentum = torch.randn_like(state.position)
    for _ in range(length):
        momentum = momentum + 0.05 * multiply(factor, state.gradient(end), transposed=True)
        state = path.evaluate(state.position + 0.1 * multiply(factor, momentum))
        momentum = momentum + 0.05 * multiply(factor, state.gradient(end), transposed=True)
    return state


def main() -> None:
    """Print the rate of both and the median of their ratios with quartiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=int, default=32)
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape, widths = (784,), (200, 200)
    vae = pv.VAE(
        pv.priors.StandardNormal(50),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(50, widths, activation="tanh"), shape),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(shape, widths, activation="tanh"), 50),
    )
    pair = open_pair(vae.model, vae.guide, (torch.rand(options.data, 784) < 0.2).float())
    with pair.evaluating(0):
        path = AnnealingPath(Particles(pair.part()), "prior")
        position = path.draw(options.chains)
        path.capture(position)
        state, factor = path.evaluate(position), torch.eye(50).expand(options.data, 50, 50)
        by_hand = hand_written(vae, pair.inputs[0], options.length)
        by_hand(position)
        found = []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            captured(path, state, factor, options.length)
            middle = time.perf_counter()
            by_hand(position)
            found.append((middle - begin, time.perf_counter() - middle))
    low, median, high = statistics.quantiles([ours / theirs for ours, theirs in found], n=4)
    count = options.chains * options.data * options.length
    rate = count / statistics.median(ours for ours, _ in found)
    print(f"{rate:,.0f} gradients a second")
    print(f"time to that of the loop by hand: {median:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
