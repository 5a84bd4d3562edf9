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


def _bits(shape, *, generator):
    return torch.randint(2, shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (3, 8), (2, 5, 5), (3, 784)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", [_bits, torch.rand])
def test_bernoulli_pixels_without_gradients_have_the_same_density_at_every_size(shape, dtype, draw):
    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(4, *shape, generator=generator)).to(dtype)
    logits[0] = 0.0
    logits[1, 0] = 200.0  # where exp overflows
    value = draw(shape, generator=generator).to(dtype)

    def pixels(logits):
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(shape) - 1)

    with torch.no_grad():
        found = log_prob_of(pixels(logits), value)
        under_vmap = torch.vmap(lambda one: log_prob_of(pixels(one), value))(logits)
    expected = pixels(logits.double()).log_prob(value.double())
    rtol = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=2e-7 * shape[-1])
    torch.testing.assert_close(under_vmap, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saturated_pixels_of_half_precision_still_cost_something(dtype):
    logits = torch.full((1, 784), -6.0, dtype=dtype)
    with torch.no_grad():
        found = log_prob_of(dist.Bernoulli(logits=logits).to_event(1), torch.zeros(1, 784).to(dtype))
    expected = -784 * torch.tensor(-6.0).exp().log1p()
    torch.testing.assert_close(found[0].float(), expected, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("kind", [dist.Normal, torch.distributions.Normal])
@pytest.mark.parametrize("events", [0, 1, 2])
@pytest.mark.parametrize("scale_shape", [(), (1,), (4,), (3, 1), (5, 1, 1), (5, 3, 4), (2, 5, 3, 4)])
@pytest.mark.parametrize("value", [LOGITS[0] - 1, LOGITS + 1, LOGITS.double(), BITS[0].long()])
def test_normals_are_scored_as_torch_scores_them(kind, events, scale_shape, value):
    generator = torch.Generator().manual_seed(2)
    start = 0.1 + torch.rand(scale_shape, generator=generator)
    results, slopes = [], []
    for dtype, score in ((torch.float32, log_prob_of), (torch.float64, lambda fn, x: fn.log_prob(x))):
        loc, scale = (t.to(dtype, copy=True).requires_grad_() for t in (LOGITS, start))
        fn = kind(loc, scale, validate_args=False)
        if events:
            fn = torch.distributions.Independent(fn, events, validate_args=False)
        results.append(score(fn, value))
        results[-1].sum().backward()
        slopes.append((loc.grad.double(), scale.grad.double()))
    assert results[0].shape == results[1].shape
    torch.testing.assert_close(results[0].double(), results[1].double(), rtol=2e-6, atol=1e-5)
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_normals_under_vmap_share_their_scale_as_they_do_outside():
    x, loc = LOGITS[0], LOGITS
    for scale in (torch.tensor(0.3), torch.rand(4) + 0.1, torch.rand(5, 1, 1) + 0.1):
        mapped = 0 if scale.dim() == 3 else None

        def score(loc, scale):
            return log_prob_of(dist.Normal(loc, scale, validate_args=False).to_event(2), x)

        found = torch.vmap(score, (0, mapped))(loc, scale)
        torch.testing.assert_close(found, dist.Normal(loc, scale).to_event(2).log_prob(x))


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
        dist.Normal(LOGITS, 1.0).mask(False),
        dist.LogNormal(LOGITS, 1.0),
    ],
)
def test_any_other_distribution_scores_itself(fn):
    value = fn.sample()
    assert torch.equal(log_prob_of(fn, value), fn.log_prob(value))
