"""Of random exact problems: which data points `auto` trusts, and how many of these are right.

``--limits`` shows what the limit of Pareto k that `auto` takes rests on: of the numbers that
the second look clears at any k, how many lie within two of their errors, by limit. Set it on one half
of the problems (``--problems 30``) and hold it against the other (``--first-seed 30``).
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_exact_pairs import KINDS, make

import pyro_vae as pv
from pyro_vae.evaluation import auto
from pyro_vae.evaluation.ais import AnnealingOptions
from pyro_vae.evaluation.importance_sampling import ImportanceOptions
from pyro_vae.evaluation.methods import estimate_log_prob
from pyro_vae.pair.opened import open_pair

LIMITS = (-1.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)


def main() -> None:
    """Print a line per kind, and of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", type=int, default=10, help="data points of each problem")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--limits", action="store_true", help="by Pareto k instead; anneals nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.limits:
        _print_limits(range(options.first_seed, options.first_seed + options.problems), options.data)
        return
    rows: dict[str, list[torch.Tensor]] = {kind.__name__: [] for kind in KINDS}
    begin = time.perf_counter()
    for seed in range(options.first_seed, options.first_seed + options.problems):
        problem = make(seed, options.data)
        pair = problem.model, problem.guide, problem.x
        first = pv.log_marginal(*pair, seed=seed)
        found = pv.log_marginal(*pair, method=options.method, seed=seed)
        exact = problem.log_prob
        # The mean of a logarithm is low by half the square of its error.
        error = (found.log_prob + found.standard_error.square() / 2 - exact).abs()
        deviations = error / found.standard_error.clamp(min=1e-9)
        right = (first.log_prob - exact).abs() <= 2 * first.standard_error
        annealed = torch.zeros_like(right) if found.was_annealed is None else found.was_annealed
        columns = found.trusted, deviations <= 2, deviations > 3, right, annealed, deviations
        rows[KINDS[seed % len(KINDS)].__name__].append(torch.stack([c.double() for c in columns]))
        print(f"{seed}", end=" ", flush=True)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    everything = torch.cat([part for parts in rows.values() for part in parts], 1)
    for name, parts in (*rows.items(), ("all", [everything])):
        if parts:
            _print(name, torch.cat(parts, 1))


def _print_limits(seeds: range, num_data: int) -> None:
    """Print how the numbers cleared by the look from the prior are covered, up to each limit of k."""
    auto._PARETO_K_LIMIT = float("inf")  # the second look alone decides
    importance = ImportanceOptions(compile=False)
    how = auto.AutoOptions(importance, AnnealingOptions())
    columns = []
    for seed in seeds:
        problem = make(seed, num_data)
        pair = open_pair(problem.model, problem.guide, problem.x)
        with pair.evaluating(seed):
            found = estimate_log_prob(pair, importance)
            found, cleared = auto.look_again(pair, found, how)
        error = found.log_prob + found.standard_error.square() / 2 - problem.log_prob
        deviations = error.abs() / found.standard_error.clamp(min=1e-9)
        columns.append(torch.stack([found.pareto_k, deviations, cleared.double()]))
        print(f"{seed}", end=" ", flush=True)
    k, deviations, cleared = torch.cat(columns, 1)
    print(f"\n{len(k)} data points, {int(cleared.sum())} cleared from the prior")
    print("| Pareto k at most | data points | within 2 errors | beyond 3 |\n" + "| --- " * 4 + "|")
    for limit in LIMITS:
        those = deviations[cleared.bool() & (k <= limit)]
        share = (those <= 2).double().mean()
        print(f"| {limit} | {len(those)} | {share:.3f} | {int((those > 3).sum())} |")


def _print(name: str, columns: torch.Tensor) -> None:
    trusted, within, far, right, annealed = columns[:5].bool()
    covered = within[trusted].double().mean()
    kept = trusted[right].double().mean()
    plain = trusted & ~annealed
    print(
        f"{name:16} {len(trusted):4} data points, {annealed.double().mean():.2f} annealed, "
        f"{trusted.double().mean():.3f} trusted: {covered:.3f} within 2 errors "
        f"({within[plain].double().mean():.3f} of those not annealed), {int(far[trusted].sum())} "
        f"beyond 3, at most {columns[5][trusted].max():.1f}; first number right "
        f"{right.double().mean():.3f}, trusted of these {kept:.3f}"
    )


if __name__ == "__main__":
    main()
