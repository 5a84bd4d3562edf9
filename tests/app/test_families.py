"""Families compared over several runs: three kinds of error kept apart, and no winner by chance."""

import numpy as np
import pytest
import torch

from pyro_vae.app.comparison_page import conclusion
from pyro_vae.app.families import Families
from pyro_vae.evaluation.comparison_result import Measured
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal


def measured(log_prob, error=0.01):
    """Make up what was measured of one run from its log p(x) per datum."""
    values = torch.as_tensor(log_prob, dtype=torch.float64)
    errors = torch.full_like(values, error)
    quantity, zero = PerDatum(values, errors), torch.zeros_like(values)
    estimate = LogMarginal(values, errors, zero + 5, zero, zero, -values, zero + 10, zero)
    return Measured(
        quantity, quantity, quantity, None, PerDatum(zero, zero), quantity, True, None, estimate,
        10, 5, 0.1, None,
    )  # fmt: skip


def families(**runs):
    return Families.of(
        runs, likelihood="probability", num_importance=50, num_samples=10, hold=None, seed=0
    )


def test_three_kinds_of_error_are_kept_apart():
    random = np.random.default_rng(0)
    base = random.normal(-20, 3, 400)
    shifts = {"a": (0.0, 0.2, -0.1), "b": (-1.0, -0.7, -1.2)}
    noise = {name: random.normal(0, 0.5, 400) for name in shifts}
    found = families(
        **{
            name: [measured(base + noise[name] + shift) for shift in own]
            for name, own in shifts.items()
        }
    )
    row = found.rows()["b"]
    assert row["log_prob_standard_error"] == pytest.approx(0.01 / (3 * 400) ** 0.5)
    mean = base + noise["b"] + np.mean(shifts["b"])
    assert row["log_prob_data_standard_error"] == pytest.approx(np.std(mean, ddof=1) / 20)
    assert row["log_prob_run_deviation"] == pytest.approx(np.std(shifts["b"], ddof=1))
    difference = found.difference("b", "log_prob")
    paired = noise["b"] - noise["a"]
    by_run = np.subtract(shifts["b"], shifts["a"]) + paired.mean()
    assert difference.by_run == pytest.approx(by_run)
    assert difference.data_standard_error == pytest.approx(np.std(paired, ddof=1) / 20)
    assert difference.run_standard_error == pytest.approx(np.std(by_run, ddof=1) / 3**0.5)
    # 4.3027 is the 97.5 % point of Student's t with two degrees of freedom.
    widths = 1.95996 * difference.data_standard_error, 4.30265 * difference.run_standard_error
    assert difference.half_width == pytest.approx(np.hypot(*widths), rel=1e-4)
    assert (found.verdict("a"), found.verdict("b")) == ("best", "behind")


def test_a_family_under_two_names_wins_nothing():
    base = np.random.default_rng(0).normal(-20, 3, 100)
    own = [measured(base), measured(base + 0.1)]
    found = families(first=own, second=own)
    assert {found.verdict(name) for name in found.runs} == {"tied"}
    assert found.difference("second", "log_prob").mean == 0
    assert "not told apart" in conclusion(found)
