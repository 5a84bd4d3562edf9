"""Log-probabilities in few passes are those of the distributions themselves."""

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.distributions.values import log_prob_of

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 20 * torch.randn(5, 3, 4, generator=GENERATOR)
BITS = torch.randint(2, (5, 3, 4), generator=GENERATOR).float()


@pytest.mark.parametrize("kind", [dist.Bernoulli, torch.distributions.Bernoulli])
@pytest.mark.parametrize("events", [0, 1, 2])
@pytest.mark.parametrize("value", [BITS, BITS[0], BITS.double(), torch.rand(5, 3, 4)])
def test_bernoulli_logits_are_scored_as_torch_scores_them(kind, events, value):
    logits = LOGITS.clone().requires_grad_()
    exact = LOGITS.double().requires_grad_()
    results = []
    for given, score in ((logits, log_prob_of), (exact, lambda fn, x: fn.log_prob(x.double()))):
        fn = kind(logits=given, validate_args=False)
        if events:
            fn = torch.distributions.Independent(fn, events, validate_args=False)
        result = score(fn, value)
        result.sum().backward()
        results.append(result)
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_value_that_is_no_bit_is_refused_where_stock_refuses_it():
    fn = dist.Bernoulli(logits=LOGITS, validate_args=True).to_event(1)
    with pytest.raises(ValueError, match="support"):
        log_prob_of(fn, BITS + 2)
    torch.testing.assert_close(log_prob_of(fn, BITS), fn.log_prob(BITS), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Bernoulli(probs=torch.tensor([0.0, 0.3, 1.0])).to_event(1),
        dist.Bernoulli(logits=LOGITS).to_event(1).mask(False),
        dist.Normal(LOGITS, 1.0),
    ],
)
def test_any_other_distribution_scores_itself(fn):
    value = fn.sample()
    assert torch.equal(log_prob_of(fn, value), fn.log_prob(value))
