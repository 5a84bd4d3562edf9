"""Every function of evaluation and tasks on pairs unlike a VAE: the right answer, or one line."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae import evaluation, tasks

F64 = torch.float64
N = 8


def data(*shape, seed=0):
    return torch.randn(N, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


def hierarchical():
    """Two latents: x = part + noise, part = top + noise; the guide draws them the other way round."""

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", normal(torch.zeros(2, dtype=F64)))
            part = pyro.sample("part", normal(top, 0.5))
            pyro.sample("x", normal(part, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", normal(0.8 * x, 0.5))
            pyro.sample("top", normal(0.8 * part, 0.5))

    x = data(2)
    return model, guide, (x,), dist.Normal(0.0, math.sqrt(1.5)).log_prob(x).sum(1)


def mixture():
    """A discrete latent and a number given it, seen as numbers under a condition."""
    means, weights = torch.tensor([-2.0, 1.0], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)

    def model(x, shift):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(means[k], 1.0))
            pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)

    def guide(x, shift):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=torch.stack([shift - x, x - shift], -1)))
            pyro.sample("z", dist.Normal(0.8 * (x - shift) + 0.2 * means[k], 0.5))

    x, shift = data(), torch.arange(N, dtype=F64) / 10
    each = dist.Normal(means, math.sqrt(1.25)).log_prob((x - shift)[:, None]) + weights.log()
    return model, guide, (x, shift), each.logsumexp(1)


def not_amortised():
    """A guide with parameters for these data, in Pyro's store; float32 throughout."""
    x = data(3, seed=1).float()
    weight = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z @ weight, 0.7), obs=x)

    precision = weight @ weight.T / 0.49 + torch.eye(2)
    means = x @ weight.T / 0.49 @ torch.linalg.inv(precision)

    def guide(x):
        loc = pyro.param("loc", means.clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(loc, 0.6))

    covariance = weight.T @ weight + 0.49 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    return model, guide, (x,), exact.double()


PAIRS = {build.__name__: build for build in (hierarchical, mixture, not_amortised)}
QUICK = {"num_samples": 60, "num_elbo_samples": 60, "seed": 0}


def hidden(x):
    """Hide every other value of every datum, or every other datum's only one."""
    return (torch.arange(x[0].numel() if x.dim() > 1 else N) % 2 == 0).expand(x.shape)


def codes_of(guide, x):
    found = {}
    for name in ("top", "part", "k", "z"):
        try:
            found[name] = tasks.encode(guide, x, site=name, mean=False, seed=0)[0]
        except pv.InputError:
            continue
    return found


def first(x):
    return x[0] if isinstance(x, tuple) else x


FUNCTIONS = {
    "to a target": lambda m, g, x: pv.log_marginal(
        m, g, x, num_samples=50, target_standard_error=0.2, seed=0
    ),
    "annealed": lambda m, g, x: pv.log_marginal(
        m, g, x, method="annealed", num_steps=10, num_chains=30, num_leapfrog_steps=2, seed=0
    ),
    "compare": lambda m, g, x: pv.compare({"a": (m, g)}, x, **QUICK),
    "compare held": lambda m, g, x: pv.compare({"a": (m, g)}, x, hold="model", **QUICK),
    "compare by quadrature": lambda m, g, x: pv.compare(
        {"a": (m, g)}, x, posterior="quadrature", **QUICK
    ),
    "bidirectional": lambda m, g, x: evaluation.bidirectional(
        m, g, x, num_steps=10, num_chains=30, num_leapfrog_steps=2, seed=0
    ),
    "calibration": lambda m, g, x: evaluation.calibration(
        m, g, x, num_data=100, num_draws=19, seed=0
    ),
    "posterior_predictive": lambda m, g, x: evaluation.posterior_predictive(m, g, x, num_draws=3),
    "aggregate_posterior": lambda m, g, x: evaluation.aggregate_posterior(m, g, x, num_draws=3),
    "posterior_divergence": lambda m, g, x: evaluation.posterior_divergence(m, g, x, num_points=41),
    "inference_gaps": lambda m, g, x: evaluation.inference_gaps(m, g, x),
    "representation": lambda m, g, x: evaluation.representation(
        m, g, x, labels=[0, 1] * (N // 2), num_neighbours=1, num_folds=2
    ),
    "decode": lambda m, g, x: tasks.decode(m, codes_of(g, x), x),
    "generate": lambda m, g, x: tasks.generate(m, x, guide=g, mean=False),
    "generate, colder": lambda m, g, x: tasks.generate(m, x, temperature=0.5),
    "reconstruct": lambda m, g, x: tasks.reconstruct(m, g, x),
    "interpolate": lambda m, g, x: tasks.interpolate(m, g, x, x, num_steps=3),
    "traverse": lambda m, g, x: tasks.traverse(m, g, x, site=next(iter(codes_of(g, x))), num_steps=3),
    "manifold": lambda m, g, x: tasks.manifold(m, g, x, site=next(iter(codes_of(g, x))), num_steps=3),
    **{
        f"complete by {method}": lambda m, g, x, method=method: tasks.complete(
            m, g, x, hidden(first(x)), method=method, num_draws=2, seed=0
        )
        for method in ("metropolis", "importance", "pseudo-gibbs")
    },
}

DISCRETE = "'k' is discrete"
REFUSED = {
    ("hierarchical", "compare by quadrature"): "one latent site for quadrature, got 2",
    ("hierarchical", "posterior_divergence"): "one latent site for quadrature, got 2",
    ("hierarchical", "inference_gaps"): "got a plain guide: pass family=",
    ("mixture", "annealed"): DISCRETE,
    ("mixture", "bidirectional"): DISCRETE,
    ("mixture", "compare by quadrature"): "one latent site for quadrature, got 2",
    ("mixture", "posterior_divergence"): "one latent site for quadrature, got 2",
    ("mixture", "inference_gaps"): "got a plain guide: pass family=",
    ("mixture", "representation"): DISCRETE,
    ("mixture", "generate, colder"): "'k' is Categorical: leave temperature at 1",
    ("mixture", "interpolate"): DISCRETE,
    ("mixture", "traverse"): DISCRETE,
    ("mixture", "manifold"): DISCRETE,
    ("not_amortised", "calibration"): "expected a pair that takes any number of data points",
    ("not_amortised", "inference_gaps"): "got a plain guide: pass family=",
}


def numbers_in(result):
    """Return the tensors of a result, whatever holds them."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [value for inner in result.values() for value in numbers_in(inner)]
    if isinstance(result, list | tuple):
        return [value for inner in result for value in numbers_in(inner)]
    return numbers_in(vars(result)) if type(result).__module__.startswith("pyro_vae") else []


@pytest.mark.filterwarnings("ignore:.* data points have Pareto k", "ignore:.*no closed form")
# In turn, so that each function and each pair has half of its cases in the fast part; chains of the
# defaults' length are slow.
@pytest.mark.parametrize(
    ("pair", "function"),
    [
        pytest.param(
            pair,
            function,
            marks=pytest.mark.slow if (i + j) % 2 or "metropolis" in function else (),
        )
        for i, pair in enumerate(PAIRS)
        for j, function in enumerate(FUNCTIONS)
    ],
)
def test_a_function_serves_an_odd_pair_or_says_why_not(pair, function):
    model, guide, inputs, _ = PAIRS[pair]()
    x = inputs if len(inputs) > 1 else inputs[0]
    if (pair, function) in REFUSED:
        with pytest.raises(pv.InputError, match=REFUSED[pair, function]) as caught:
            FUNCTIONS[function](model, guide, x)
        assert "\n" not in str(caught.value)
        return
    found = numbers_in(FUNCTIONS[function](model, guide, x))
    assert found
    for value in found:
        assert not value.is_floating_point() or value.isfinite().all()
        assert not value.requires_grad


@pytest.mark.filterwarnings("ignore:.* data points have Pareto k")
@pytest.mark.parametrize("pair", PAIRS)
def test_log_p_of_an_odd_pair_is_the_exact_one(pair):
    model, guide, inputs, exact = PAIRS[pair]()
    estimate = pv.log_marginal(model, guide, inputs, num_samples=20_000, seed=0)
    assert ((estimate.log_prob - exact).abs() < 5 * estimate.standard_error + 1e-5).all()
    if pair != "mixture":
        annealed = pv.log_marginal(
            model, guide, inputs, method="annealed", num_steps=20, num_chains=60,
            num_leapfrog_steps=2, seed=0,
        )  # fmt: skip
        error = 5 * annealed.standard_error + 1e-5
        assert ((annealed.log_prob - exact).abs() < error).all()
