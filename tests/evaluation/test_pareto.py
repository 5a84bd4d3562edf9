"""The tail index: equal to ArviZ's, whatever the order and the chunks the weights come in."""

import importlib.metadata
import math

import pytest
import torch

from pyro_vae.evaluation.pareto import (
    TailWeights,
    generalized_pareto_shape,
    pareto_k_limit,
    tail_length,
)


def streamed(log_weights, chunk=7, dtype=torch.float64):
    tail = TailWeights(len(log_weights), torch.finfo(dtype).eps)
    for part in log_weights.split(chunk):
        tail.add(part)
    return tail.pareto_k()


def arviz_k(log_weights):
    import arviz

    rows = log_weights.T.numpy().copy()
    if hasattr(arviz, "psislw"):
        return torch.as_tensor(arviz.psislw(rows)[1])
    from arviz_stats.base import array_stats

    # The 1.x line takes log ratios of the opposite sign.
    return torch.as_tensor(array_stats.psislw(-rows, axis=-1)[1])


# At these numbers of samples both lines of ArviZ agree on the tail's length (the 1.x line rounds it
# down, the paper and the 0.x line up).
@pytest.mark.parametrize("num_samples", [100, 900, 4900])
def test_equal_to_arviz(num_samples):
    spread = torch.linspace(0.1, 8, 40).double()
    log_weights = torch.randn(num_samples, 40).double() * spread - 100
    log_weights[: num_samples // 2, 20:] *= 1.5
    torch.testing.assert_close(streamed(log_weights), arviz_k(log_weights), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(
    int(importlib.metadata.version("arviz").split(".")[0]) >= 1,
    reason="the 1.x line raises or gives NaN where weights tie, and rounds the tail's length down",
)
def test_equal_to_arviz_where_weights_vanish_and_tie():
    log_weights = torch.randn(500, 3).double()
    log_weights[::2, 0] = -math.inf
    log_weights[:, 1] *= 2000  # the cutoff underflows
    log_weights[:, 2] = (log_weights[:, 2] * 5).round()  # ties at the cutoff shorten the tail
    torch.testing.assert_close(streamed(log_weights), arviz_k(log_weights), rtol=1e-9, atol=1e-9)
    few = torch.randn(25, 10).double()
    torch.testing.assert_close(streamed(few), arviz_k(few), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [0.2, 0.7, 1.5])
def test_recovers_the_shape_of_generalized_pareto_draws(shape):
    uniform = torch.rand(200, 1000).double()
    draws = ((uniform ** (-shape) - 1) / shape).sort(1).values
    estimates = generalized_pareto_shape(draws)
    # Asymptotic standard deviation (1 + k) / sqrt(n); the prior pulls by 10 / (n + 10) to 0.5.
    pull = 10 / 1010 * (0.5 - shape)
    error = (1 + shape) / math.sqrt(1000)
    assert abs(estimates.mean() - shape - pull) < 5 * error / math.sqrt(200) + error**2
    assert estimates.std() == pytest.approx(error, rel=0.3)


def test_equal_weights_are_fine():
    log_weights = torch.full((100, 3), -50.0).double()
    log_weights[:, 1] += 1e-6 * torch.randn(100).double()  # rounding of float32 sums
    log_weights[:50, 2] = -math.inf  # half of the draws impossible, the others equal
    assert streamed(log_weights, dtype=torch.float32).tolist() == [0, 0, 0]
    k = streamed(log_weights)  # in float64 the same differences are no rounding
    assert k[[0, 2]].tolist() == [0, 0]
    assert k[1] != 0


def test_large_log_weights_have_the_tail_of_their_differences():
    """An offset of a million nats leaves ten digits of float64, and less than one of float32."""
    exponential = torch.rand(1000, 5).double().log().neg()
    heavy = exponential * torch.linspace(0.6, 1.4, 5)
    for offset in (-1e6, 1e6):
        torch.testing.assert_close(streamed(heavy + offset), streamed(heavy), rtol=1e-5, atol=1e-5)
    equal = torch.full((1000, 1), -1e6).double()
    assert streamed(equal) == 0
    # What float32 rounds to the same number may have had any tail.
    assert streamed(equal, dtype=torch.float32).isnan().all()
    assert streamed(equal + 10 * torch.randn(1000, 1), dtype=torch.float32).isfinite().all()


def test_the_limit_grows_with_the_number_of_samples():
    limits = pareto_k_limit(torch.tensor([10, 21, 100, 1000, 2200, 10**6]))
    wanted = [0, 1 - 1 / math.log10(21), 0.5, 2 / 3, 0.7, 0.7]
    assert limits.tolist() == pytest.approx(wanted, abs=1e-12)
    assert not pareto_k_limit(1) >= -1  # nothing is below it


def test_edges():
    assert streamed(torch.zeros(1, 2).double()).isnan().all()
    assert streamed(torch.randn(20, 2).double()).isnan().all()
    assert not streamed(torch.randn(21, 2).double()).isnan().any()
    assert (streamed(torch.full((100, 2), -math.inf).double()) == math.inf).all()
    one_giant = torch.zeros(100, 1).double()
    one_giant[3] = 1000
    assert streamed(one_giant) == math.inf


def test_only_the_tail_is_kept():
    tail = TailWeights(100_000)
    for _ in range(100):
        tail.add(torch.randn(1000, 2).double())
        assert sum(len(part) for part in tail._pending) < 2 * tail.kept + 1000
    assert tail.kept == tail_length(100_000) + 1 == 950
