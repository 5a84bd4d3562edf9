"""Pairs compared over several runs: kinds of error kept apart, one interval, no winner by chance."""

import numpy as np
import pyro
import pytest
import torch
from compared_pairs import QUICK, bits, comparison_of, measured, pair_of, small_vae

import pyro_vae as pv
from pyro_vae.app.pages import conclude
from pyro_vae.errors import InputError


def test_three_kinds_of_error_are_kept_apart():
    random = np.random.default_rng(0)
    base = random.normal(-20, 3, 400)
    shifts = {"a": (0.0, 0.2, -0.1), "b": (-1.0, -0.7, -1.2)}
    noise = {name: random.normal(0, 0.5, 400) for name in shifts}
    found = comparison_of(
        **{
            name: [measured(base + noise[name] + shift) for shift in own]
            for name, own in shifts.items()
        }
    )
    row = found.to_dict()["pairs"]["b"]
    assert row["log_prob_standard_error"] == pytest.approx(0.01 / (3 * 400) ** 0.5)
    mean = base + noise["b"] + np.mean(shifts["b"])
    assert row["log_prob_data_standard_error"] == pytest.approx(np.std(mean, ddof=1) / 20)
    assert row["log_prob_run_deviation"] == pytest.approx(np.std(shifts["b"], ddof=1))
    difference = found.difference("b")
    paired = noise["b"] - noise["a"]
    by_run = np.subtract(shifts["b"], shifts["a"]) + paired.mean()
    assert difference.by_run == pytest.approx(by_run)
    assert difference.standard_error == pytest.approx(np.std(paired, ddof=1) / 20)
    assert difference.run_standard_error == pytest.approx(np.std(by_run, ddof=1) / 3**0.5)
    # The 97.5 % points of Student's t with 399 degrees of freedom and with two.
    widths = 1.96593 * difference.standard_error, 4.30265 * difference.run_standard_error
    assert difference.half_width == pytest.approx(np.hypot(*widths), rel=1e-4)
    assert row["log_prob_difference_half_width"] == difference.half_width
    assert (found.verdict("a"), found.verdict("b")) == ("best", "behind")


def test_a_pair_under_two_names_wins_nothing():
    base = np.random.default_rng(0).normal(-20, 3, 100)
    own = [measured(base), measured(base + 0.1)]
    found = comparison_of(first=own, second=own)
    assert {found.verdict(name) for name in found.pairs} == {"tied"}
    assert found.difference("second").mean == 0
    assert "do not distinguish" in conclude(found)


@pytest.mark.parametrize("num_runs", [1, 3])
def test_intervals_cover_the_true_difference(num_runs):
    # 0.3 over data points and runs; both vary it, and so does every single measurement.
    random, covered, without_runs = np.random.default_rng(1), 0, 0
    repeats, num_data, run_spread = 500, 12, 0.3 * (num_runs > 1)
    for _ in range(repeats):
        base = random.normal(-20, 3, num_data)
        datum, run = random.normal(0, 0.8, num_data), random.normal(0, run_spread, num_runs)
        runs = {
            name: [
                measured(base + sign * (0.3 + datum + own + random.normal(0, 0.2, num_data)), 0.1)
                for own in run
            ]
            for name, sign in (("a", 0), ("b", 1))
        }
        difference = comparison_of(**runs).difference("b", to="a")
        error = abs(difference.mean - 0.3)
        covered += error < difference.half_width
        without_runs += error < 2.201 * difference.standard_error
    slack = 5 * (0.95 * 0.05 / repeats) ** 0.5
    assert covered / repeats > 0.95 - slack
    assert covered / repeats < 0.95 + slack
    assert (without_runs / repeats > 0.95 - slack) == (num_runs == 1)


def test_one_run_is_tied_within_students_interval_of_its_data_points():
    values = torch.tensor([-1.0, -1.2, -0.8], dtype=torch.float64)
    # 4.303 is the 97.5 % point of Student's t with two degrees of freedom.
    error = 4.30265 * values.std().item() / 3**0.5
    for factor, verdict in ((0.99, "tied"), (1.01, "behind")):
        found = comparison_of(
            a=[measured(torch.zeros(3), 0.0)],
            b=[measured(values - values.mean() - factor * error, 0.0)],
        )
        assert found.verdict("b") == verdict
        assert found.difference("b").half_width == pytest.approx(error, rel=1e-5)
        assert np.isnan(found.difference("b").run_standard_error)


@pytest.fixture(scope="module")
def two_runs():
    runs = []
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        x = bits(10)  # few: each has its grid of the quadrature
        for _ in range(2):
            pairs = {"one": pair_of(small_vae()), "two": pair_of(small_vae(family="FullRankNormal"))}
            options = {"fit_options": {"epochs": 1}, "posterior": "quadrature", **QUICK}
            runs.append(pv.compare(pairs, x, train=x, **options))
    return runs, pv.Comparison.of_runs(runs)


def test_comparisons_become_runs_of_one(two_runs):
    runs, joined = two_runs
    assert joined.num_runs == 2
    for name, pair in joined.pairs.items():
        own = [run.pairs[name] for run in runs]
        for quantity in ("log_prob", "elbo", "iwae", "rate", "distortion", "posterior_divergence"):
            expected = torch.stack([getattr(run, quantity).value for run in own]).mean(0)
            torch.testing.assert_close(getattr(pair, quantity).value, expected)
        assert pair.seconds_per_epoch == sum(run.seconds_per_epoch for run in own) / 2 > 0
        assert len(pair.estimate.pareto_k) == 20
    difference = joined.difference("one", to="two")
    by_run = [run.difference("one", to="two").mean for run in runs]
    assert difference.by_run == pytest.approx(by_run)
    assert difference.mean == pytest.approx(np.mean(by_run))
    alone = pv.Comparison.of_runs(runs[:1])
    assert alone.difference("one", to="two")[:3] == runs[0].difference("one", to="two")[:3]


def test_what_comes_out_of_several_runs(two_runs):
    _, joined = two_runs
    text = str(joined)
    assert "10 data points, nats per data point, mean of 2 runs" in text
    assert "deviation between runs" in text
    assert "over data points and runs" in text
    plain = joined.to_dict(per_datum=True)
    assert plain["num_runs"] == 2
    assert len(plain["pairs"]["one"]["per_datum"]["pareto_k"]) == plain["num_data"] == 10
    (axes,) = joined.plot().axes
    worst = next(name for name in joined.pairs if name != joined.best())
    dots = [tuple(line.get_xdata()) for line in axes.lines]
    assert joined.difference(worst).by_run in dots
    assert len(joined.to_arviz()["one"].pareto_k) == 10


def test_runs_of_something_else_are_not_joined(two_runs):
    runs, joined = two_runs
    other = comparison_of(one=[measured([0.0])], two=[measured([0.0])])
    for comparisons, message in (
        ([], "expected at least one comparison, got none"),
        (
            [runs[0], other],
            r"differ in their seed alone, got .* on 10 data points .* beside one, two on 1",
        ),
        (
            [joined, comparison_of(one=[measured([0.0])])],
            "got one, two on 10 .* beside one on 1 data",
        ),
    ):
        with pytest.raises(InputError, match=message):
            pv.Comparison.of_runs(comparisons)
    assert pv.Comparison.of_runs([joined, *runs]).num_runs == 4
