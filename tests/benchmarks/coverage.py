"""How often 95% intervals hold what they say: of log p(x) per data point, and of paired differences.

A linear Gaussian model with a normal guide, so that log p(x) and the weights' tail index are known.
Prints the tables of docs/coverage.md.
"""

from __future__ import annotations

import argparse
import math
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv

F64 = torch.float64
SIZES = (5, 20, 100, 1000)


class Exact:
    """x = W z + b + noise, with a guide that is the posterior shifted and scaled."""

    def __init__(self, num_latents: int, num_values: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(num_values, num_latents, dtype=F64, generator=draw)
        self.variance = 0.5
        identity = torch.eye(num_latents, dtype=F64)
        self.posterior = torch.linalg.inv(identity + self.weight.T @ self.weight / self.variance)
        self.covariance = self.weight @ self.weight.T + self.variance * torch.eye(
            num_values, dtype=F64
        )

    def draw(self, num_data: int, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        z = torch.randn(num_data, len(self.covariance), dtype=F64, generator=draw)
        return z @ torch.linalg.cholesky(self.covariance).T

    def log_prob(self, x: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
        mean = torch.full((x.shape[1],), offset, dtype=F64)
        return torch.distributions.MultivariateNormal(mean, self.covariance).log_prob(x)

    def pair(self, *, scale: float = 1.0, shift: float = 0.0, offset: float = 0.0):
        """Return model and guide; scale and shift are in standard deviations of the posterior."""
        noise, posterior = math.sqrt(self.variance), self.posterior
        move = shift * posterior.diagonal().sqrt()

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(posterior)), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.T + offset, noise).to_event(1), obs=x)

        def guide(x):
            mean = (x - offset) @ self.weight @ posterior / self.variance + move
            with pyro.plate("data", len(x)):
                pyro.sample(
                    "z", dist.MultivariateNormal(mean, covariance_matrix=scale**2 * posterior)
                )

        return model, guide


def share(inside: torch.Tensor) -> str:
    """Return a share with its standard error."""
    if not len(inside):
        return "none"
    mean = inside.double().mean().item()
    return f"{mean:.3f} ± {math.sqrt(max(mean * (1 - mean), 1e-9) / len(inside)):.3f}"


def measure_coverage(num_latents: int, num_data: int) -> None:
    """Print the coverage by the number of samples, of all and of the trusted data points."""
    exact = Exact(num_latents, 8, seed=5)
    x = exact.draw(num_data, seed=6)
    print("| guide | samples | covered | with the bias | trusted | covered of these |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, scale in (("30 % too wide", 1.3), ("25 % too narrow", 0.75)):
        for count in SIZES:
            found = pv.log_marginal(*exact.pair(scale=scale), x, num_samples=count, seed=count)
            error, width = found.log_prob - exact.log_prob(x), 1.96 * found.standard_error
            inside = error.abs() < width
            bias_allowed = (error - found.expected_bias).abs() < width
            row = (
                share(inside),
                share(bias_allowed),
                share(found.trusted),
                share(inside[found.trusted]),
            )
            print(f"| {name} | {count:,} | {' | '.join(row)} |")


def measure_by_k(num_latents: int, num_data: int) -> None:
    """Print error and coverage by Pareto k where all data points share one law of the weights."""
    exact = Exact(num_latents, 8, seed=5)
    x = exact.draw(num_data, seed=6)
    print("| samples | Pareto k | data points | mean error, nats | covered |")
    print("| --- | --- | --- | --- | --- |")
    for count in (100, 1000):
        pair = exact.pair(scale=0.75, shift=0.5)
        found = pv.log_marginal(*pair, x, num_samples=count, seed=count + 1)
        error, k, limit = found.log_prob - exact.log_prob(x), found.pareto_k, found.pareto_k_limit
        inside = error.abs() < 1.96 * found.standard_error
        groups = {
            "at most half the limit": k <= limit / 2,
            "up to the limit": (k > limit / 2) & (k <= limit),
            "above the limit": k > limit,
        }
        for name, rows in groups.items():
            mean = error[rows].mean().item() if rows.any() else math.nan
            print(
                f"| {count:,} | {name} | {int(rows.sum()):,} | {mean:+.3f} | {share(inside[rows])} |"
            )


def count_covered(repeats: int, num_data: int, num_samples: int) -> int:
    """Return in how many repeats compare's 95% interval of a difference holds the exact one.

    Each repeat draws new data; the exact difference is the expectation over the data.
    """
    exact = Exact(2, 6, seed=1)
    models = {"right": exact.pair(scale=1.2), "shifted": exact.pair(scale=1.2, offset=0.1)}
    # E[log p(x) - log p(x - b)] = b' C^-1 b / 2 for data from the first.
    step = torch.full((6,), 0.1, dtype=F64)
    wanted = -0.5 * (step @ torch.linalg.solve(exact.covariance, step)).item()
    covered = 0
    for seed in range(repeats):
        x = exact.draw(num_data, seed=1000 + seed)
        found = pv.compare(models, x, num_samples=num_samples, num_elbo_samples=2, seed=seed)
        difference = found.difference("shifted", to="right")
        covered += abs(difference.mean - wanted) < difference.half_width
    return covered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-data", type=int, default=4000, help="data points of a table's row")
    parser.add_argument("--num-latents", type=int, default=2, help="dimensions of the latent")
    parser.add_argument("--repeats", type=int, default=200, help="repeats of compare")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measure_coverage(options.num_latents, options.num_data)
    print()
    measure_by_k(options.num_latents, options.num_data)
    covered = count_covered(options.repeats, num_data=60, num_samples=50)
    print(f"\ncompare: {covered} of {options.repeats} intervals of 95 % hold the exact difference")


if __name__ == "__main__":
    main()
