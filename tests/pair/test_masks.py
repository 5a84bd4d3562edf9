"""Latents under masks: what lies behind a sequence's end has no density, and nothing rests on it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.pair.sites import counted_values

LENGTHS = torch.tensor([4, 1, 2, 3, 4, 2])
TIMES = 4
MASK = torch.arange(TIMES) < LENGTHS[:, None]


def walk(x, mask):
    """A random walk seen with noise."""
    z = torch.zeros(len(x), dtype=x.dtype)
    with pyro.plate("data", len(x)):
        for time in pyro.markov(range(TIMES)):
            with poutine.mask(mask=mask[:, time]):
                z = pyro.sample(f"z_{time}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{time}", dist.Normal(z, 0.5), obs=x[:, time])


def walk_guide(x, mask):
    with pyro.plate("data", len(x)):
        for time in range(TIMES):
            with poutine.mask(mask=mask[:, time]):
                pyro.sample(f"z_{time}", dist.Normal(0.8 * x[:, time], 0.6))


def exact_walk(x, mask):
    """Log density of each sequence's own values: a normal of covariance min(s, t) + noise."""
    times = torch.arange(1.0, TIMES + 1, dtype=x.dtype)
    covariance = torch.minimum(times, times[:, None]) + 0.25 * torch.eye(TIMES, dtype=x.dtype)
    return torch.stack(
        [
            dist.MultivariateNormal(torch.zeros(n, dtype=x.dtype), covariance[:n, :n]).log_prob(v[:n])
            for v, n in zip(x, mask.sum(1).tolist(), strict=True)
        ]
    )


def walks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LENGTHS), TIMES, generator=generator, dtype=torch.float64).cumsum(1)
    return x.masked_fill(~MASK, 1e3)  # what lies behind the end must not matter


@pytest.mark.parametrize("start", ["guide", "prior", "both"])
def test_annealed_sequences_of_many_lengths(start):
    x = walks()
    found = pv.log_marginal(
        walk, walk_guide, (x, MASK), method="annealed", start=start, num_steps=100, seed=0
    )
    exact = exact_walk(x, MASK)
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error + 0.01).all()
    assert found.standard_error.max() < 0.3


@pytest.mark.slow
def test_a_guide_that_misses_is_annealed_where_it_is_masked():
    def shifted(x, mask):
        with pyro.plate("data", len(x)):
            for time in range(TIMES):
                with poutine.mask(mask=mask[:, time]):
                    pyro.sample(f"z_{time}", dist.Normal(0.8 * x[:, time] + 1.5, 0.3))

    x = walks()
    found = pv.log_marginal(walk, shifted, (x, MASK), method="auto", num_samples=200, seed=0)
    exact = exact_walk(x, MASK)
    assert found.was_annealed.any()
    assert found.trusted.all()
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error + 0.01).all()


def counts(x, mask):
    """Poisson counts whose rates, one for each value, are Gamma: masked inside the event."""
    with pyro.plate("data", len(x)):
        rates = dist.Gamma(torch.full(x.shape, 2.0), 1.0).mask(mask).to_event(1)
        rate = pyro.sample("rate", rates)
        pyro.sample("x", dist.Poisson(rate).mask(mask).to_event(1), obs=x)


def counts_guide(x, mask):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(1.5 + 0.8 * x, 1.6).mask(mask).to_event(1))


@pytest.mark.slow
def test_positive_latents_masked_inside_their_event():
    x = torch.distributions.Poisson(torch.full(MASK.shape, 2.0)).sample()
    found = pv.log_marginal(counts, counts_guide, (x, MASK), method="annealed", num_steps=100, seed=0)
    each = dist.GammaPoisson(torch.tensor(2.0), torch.tensor(1.0)).log_prob(x)
    exact = (each * MASK).sum(1)
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error + 0.01).all()


def test_which_values_count():
    def site(fn, mask):
        return {"fn": fn, "mask": mask, "value": fn.sample()}

    normal = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    rows = torch.tensor([True, False, True])
    assert counted_values(site(normal, None)) is None
    assert counted_values(site(normal, True)) is None
    assert not counted_values(site(normal, False)).any()
    assert counted_values(site(normal, rows)).tolist() == [[True] * 2, [False] * 2, [True] * 2]
    inner = torch.tensor([[True, False]] * 3)
    masked = dist.Normal(torch.zeros(3, 2), 1.0).mask(inner).to_event(1)
    assert counted_values(site(masked, rows)).tolist() == (inner & rows[:, None]).tolist()


def test_a_mask_in_one_of_the_two_is_refused():
    def unmasked(x, mask):
        with pyro.plate("data", len(x)):
            for time in range(TIMES):
                pyro.sample(f"z_{time}", dist.Normal(0.8 * x[:, time], 0.6))

    with pytest.raises(pv.InputError, match=r"latent 'z_1' under one mask in model and guide"):
        pv.log_marginal(walk, unmasked, (walks(), MASK), num_samples=10)
    x = walks().clamp(-9, 9)
    with pytest.raises(pv.InputError, match=r"latent 'z_1' under one mask in model and guide"):
        pv.tasks.complete(walk, unmasked, (x, MASK), (torch.arange(TIMES) == 0).expand(x.shape))


def test_a_gap_on_which_later_values_rest_is_refused():
    gap = torch.ones_like(MASK)
    gap[:, 1] = False
    with pytest.raises(pv.InputError, match=r"nothing depends on where they are masked.*'z_2'"):
        pv.log_weights(walk, walk_guide, (walks().clamp(-9, 9), gap), num_samples=10)
