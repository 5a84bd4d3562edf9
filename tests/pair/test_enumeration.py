"""Discrete latents that the model enumerates are summed out exactly, in every plate."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.infer import IWAE, TraceBound

EXACT = {"enumerate": "parallel"}
WEIGHTS, MEANS = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-2.0, 0.0, 3.0])
X = torch.linspace(-3.0, 4.0, 9)

# A grid on which a standard normal latent is integrated: the trapezium rule is exact on it.
GRID = torch.linspace(-9.0, 9.0, 1201, dtype=torch.float64)
STEP = (GRID[1] - GRID[0]).log()


def draws_nothing(*_):
    """Leave every latent to the sum."""


def mixture(x):
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(WEIGHTS), infer=EXACT)
        pyro.sample("x", dist.Normal(MEANS[kind], 0.7), obs=x)


def log_mixture(x):
    each = dist.Normal(MEANS.double(), 0.7).log_prob(x.double()[:, None])
    return (each + WEIGHTS.double().log()).logsumexp(-1)


def shifted_mixture(x):
    """A normal latent moves the means; each of two readings has a coin of its own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        kind = pyro.sample("kind", dist.Categorical(WEIGHTS), infer=EXACT)
        with pyro.plate("readings", 2, dim=-2):
            coin = pyro.sample("coin", dist.Bernoulli(torch.sigmoid(z + kind - 1.0)), infer=EXACT)
            loc = MEANS[kind] + z + coin
            pyro.sample("x", dist.Normal(loc, 0.7), obs=torch.stack([x, x + 1]))


def shift_guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.1 * x + loc, 1.1))


def log_shifted_mixture(x):
    kinds = []
    for weight, mean, kind in zip(WEIGHTS.double(), MEANS.double(), range(3), strict=True):
        log_prob = weight.log() + torch.zeros(len(GRID), len(x), dtype=torch.float64)
        up = torch.sigmoid(GRID + kind - 1.0).log()[:, None]
        down = torch.sigmoid(-GRID - kind + 1.0).log()[:, None]
        for reading in (x.double(), x.double() + 1):
            coins = [
                chance + dist.Normal((mean + GRID + coin)[:, None], 0.7).log_prob(reading)
                for chance, coin in ((up, 1.0), (down, 0.0))
            ]
            log_prob = log_prob + torch.stack(coins).logsumexp(0)
        kinds.append(log_prob)
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(GRID)[:, None]
    return (torch.stack(kinds).logsumexp(0) + prior).logsumexp(0) + STEP


def test_a_mixture_is_its_summed_density():
    estimate = pv.log_marginal(mixture, draws_nothing, X, num_samples=30)
    torch.testing.assert_close(estimate.log_prob, log_mixture(X), rtol=0, atol=1e-6)
    assert estimate.standard_error.eq(0).all()
    assert estimate.rate.abs().max() < 1e-6
    whole = pv.log_marginal(mixture, draws_nothing, X, num_samples=2, plate=None)
    torch.testing.assert_close(whole.log_prob, log_mixture(X).sum()[None], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_latents_that_are_drawn_stand_beside_summed_ones_in_nested_plates():
    exact = log_shifted_mixture(X)
    for options in ({"num_samples": 2000}, {"method": "annealed", "num_steps": 10}):
        estimate = pv.log_marginal(shifted_mixture, shift_guide, X, seed=0, **options)
        error = (estimate.log_prob - exact).abs()
        assert (error < 5 * estimate.standard_error + 1e-6).all(), options


def test_the_importance_weighted_bound_sums_out_too():
    seen = pv.log_weights(shifted_mixture, shift_guide, X, num_samples=7)
    assert seen.shape == (7, len(X))
    bound = IWAE(40)
    losses = torch.tensor([bound.loss(shifted_mixture, shift_guide, X) for _ in range(40)])
    exact = log_shifted_mixture(X).sum()
    # A lower bound, and near: log p(x) minus half the weights' relative variance over K.
    assert -losses.mean() < exact
    assert -losses.mean() > exact - 1.0
    result = pv.fit(
        shifted_mixture, shift_guide, X, objective=IWAE(5), epochs=1, compile=False, seed=0
    )
    assert result.history["train_bound"].shape == (1,)


INITIAL = torch.tensor([0.5, 0.3, 0.2])
MOVES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
STEPS = 20


def chain(x, lengths):
    """A hidden Markov model of sequences that end where their lengths say."""
    with pyro.plate("data", len(x)):
        state = None
        for step in pyro.markov(range(STEPS)):
            with poutine.mask(mask=step < lengths):
                chances = INITIAL if state is None else MOVES[state]
                state = pyro.sample(f"state_{step}", dist.Categorical(chances), infer=EXACT)
                pyro.sample(f"x_{step}", dist.Normal(MEANS[state], 0.8), obs=x[:, step])


def forward(x, length):
    def emitted(value):
        return dist.Normal(MEANS.double(), 0.8).log_prob(value.double())

    alpha = INITIAL.double().log() + emitted(x[0])
    for value in x[1:length]:
        alpha = (alpha[:, None] + MOVES.double().log()).logsumexp(0) + emitted(value)
    return alpha.logsumexp(0)


def test_ragged_chains_agree_with_the_forward_algorithm():
    x, lengths = torch.randn(6, STEPS), torch.tensor([STEPS, 1, 5, STEPS, 2, 13])
    exact = torch.stack([forward(x[i], int(lengths[i])) for i in range(6)])
    estimate = pv.log_marginal(chain, draws_nothing, (x, lengths), num_samples=2)
    torch.testing.assert_close(estimate.log_prob, exact, rtol=0, atol=1e-5)
    one = pv.log_marginal(chain, draws_nothing, (x[1:2], lengths[1:2]), num_samples=1)
    torch.testing.assert_close(one.log_prob, exact[1:2], rtol=0, atol=1e-6)


def test_what_the_guide_draws_is_weighed_at_its_draws():
    def guide(x):
        with pyro.plate("data", len(x)):
            logits = dist.Normal(MEANS, 0.7).log_prob(x[:, None]) + WEIGHTS.log()
            pyro.sample("kind", dist.Categorical(logits=logits), infer=EXACT)

    weights = pv.log_weights(mixture, guide, X, num_samples=5)
    torch.testing.assert_close(weights, log_mixture(X).expand(5, -1), rtol=0, atol=1e-5)


def test_a_latent_of_all_the_data_is_summed_out_where_they_are_one_datum():
    def model(x):
        sign = pyro.sample("sign", dist.Bernoulli(torch.tensor(0.3)), infer=EXACT)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2 * sign - 1, 1.0), obs=x)

    up, down = (dist.Normal(loc, 1.0).log_prob(X).double().sum() for loc in (1.0, -1.0))
    exact = torch.logaddexp(up + torch.tensor(0.3).log(), down + torch.tensor(0.7).log())
    whole = pv.log_marginal(model, draws_nothing, X, num_samples=1, plate=None)
    torch.testing.assert_close(whole.log_prob, exact[None], rtol=0, atol=1e-5)
    with pytest.raises(pv.InputError, match=r"'sign' of the model inside .* plate=None"):
        pv.log_marginal(model, draws_nothing, X, num_samples=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enumerate": "sequential"}, "'kind' is missing"),
        ({"enumerate": "parallel", "num_samples": 4}, "'kind' is missing"),
    ],
)
def test_what_is_not_summed_exactly_is_missing_from_the_guide(options, words):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            kind = pyro.sample("kind", dist.Categorical(WEIGHTS), infer=options)
            pyro.sample("x", dist.Normal(MEANS[kind] + z, 0.7), obs=x)

    with pytest.raises(pv.InputError, match=words):
        pv.log_weights(model, shift_guide, X, num_samples=2)


def test_refusals_name_what_is_summed_out():
    with pytest.raises(pv.InputError, match="got none that isn't summed out"):
        pv.log_marginal(mixture, draws_nothing, X, method="annealed")
    with pytest.raises(pv.InputError, match=r"'(kind|coin)' is missing.*here nothing is summed out"):
        pv.fit(shifted_mixture, shift_guide, X, objective=TraceBound(), epochs=1, compile=False)
    with pytest.raises(pv.InputError, match="here nothing is summed out"):
        pv.tasks.reconstruct(shifted_mixture, shift_guide, X)

    def tied(x):
        columns, rows = pyro.plate("columns", 2, dim=-2), pyro.plate("rows", 2, dim=-3)
        with pyro.plate("data", len(x)):
            with columns:
                left = pyro.sample("left", dist.Bernoulli(torch.tensor(0.5)), infer=EXACT)
            with rows:
                right = pyro.sample("right", dist.Bernoulli(torch.tensor(0.5)), infer=EXACT)
            with columns, rows:
                pyro.sample("x", dist.Normal(left + right, 1.0), obs=x.expand(2, 2, -1))

    with pytest.raises(pv.InputError, match="plates nested like a tree"):
        pv.log_weights(tied, draws_nothing, X, num_samples=1)
