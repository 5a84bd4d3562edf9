"""What every objective promises, and the bound that is Pyro's Trace_ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_pairs import make_vae
from objective_pairs import Gaussian, gradient, make_pair
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.app import names
from pyro_vae.infer import FusedOptim, bounds, capture, scale_latents, stock_bound

OBJECTIVES = {
    "TraceBound": pv.infer.TraceBound,
    "StickingTheLanding": pv.infer.StickingTheLanding,
    "AnalyticKL": pv.infer.AnalyticKL,
    "FreeBits": lambda: pv.infer.FreeBits(0.05),
    "IWAE": lambda: pv.infer.IWAE(4),
    "IWAE plain": lambda: pv.infer.IWAE(4, "plain"),
    "IWAE one particle": lambda: pv.infer.IWAE(1),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def subclasses(kind):
    return {kind} | {deeper for direct in kind.__subclasses__() for deeper in subclasses(direct)}


def test_every_public_objective_is_tested():
    public = {getattr(pv.infer, name) for name in pv.infer.__all__}
    tested = {type(make()) for make in OBJECTIVES.values()}
    assert public & subclasses(pv.infer.Bound) == tested | {pv.infer.Bound}


# --- what every objective promises ---


@every_objective
def test_a_step_of_svi_trains_both_functions(name, x):
    model, guide = make_vae()
    before = [p.detach().clone() for p in model.__self__.parameters()]
    svi = SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1e-2}), OBJECTIVES[name]())
    losses = [svi.step(x) for _ in range(3)]
    assert all(isinstance(loss, float) for loss in losses)
    assert len(set(losses)) == 3
    after = model.__self__.parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert isinstance(svi.evaluate_loss(x), float)


# Other settings of a bound are captured like the bound: they are recorded with the slow tests.
@pytest.mark.parametrize(
    ("name", "pair", "beta"),
    [
        pytest.param(name, *given, marks=pytest.mark.slow if slow or " " in name else ())
        for name in OBJECTIVES
        for given, slow in ((("hierarchical", 0.7), False), (("VampPrior", None), True))
    ],
)
def test_captured_graph_gives_the_same_loss_and_gradients(name, pair, beta):
    model, guide, modules = make_pair(pair)
    x = torch.rand(5, 4).bernoulli()
    scale = None if beta is None else torch.tensor(beta)
    if beta is not None:
        model, guide = scale_latents(model, scale), scale_latents(guide, scale, is_guide=True)
    objective = OBJECTIVES[name]()
    objective.loss(model, guide, x)  # parameters and ways of batching are found by plain calls
    leaves = list(modules.parameters())

    def step():
        terms = objective.terms(model, guide, (x,), {})
        found = torch.autograd.grad(terms.surrogate, leaves, allow_unused=True)
        zeros = (torch.zeros_like(leaf) for leaf in leaves)
        grads = (g if g is not None else z for g, z in zip(found, zeros, strict=True))
        return terms.loss, terms.rate, terms.distortion, *grads

    inputs = [x, *leaves] if scale is None else [x, scale, *leaves]
    with capture.conditions():
        graph, constants, _ = capture.trace_graph(step, inputs)
    for value in (None,) if scale is None else (beta, 0.0):
        if scale is not None:
            scale.fill_(value)  # an input of the graph
        pyro.set_rng_seed(1)
        expected = step()
        pyro.set_rng_seed(1)
        found = graph(*inputs, *constants)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=1e-5)


@every_objective
def test_rate_and_distortion_are_the_elbo_whatever_is_optimised(name):
    pair, x = Gaussian(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    copies = x.repeat(1000)
    functions = scale_latents(pair.model, 0.3), scale_latents(pair.guide, 0.3, is_guide=True)
    rows = [OBJECTIVES[name]().terms(*functions, (copies,), {}) for _ in range(20)]
    for found, exact in (("rate", pair.rate(x)), ("distortion", pair.distortion(x))):
        values = torch.stack([getattr(row, found) for row in rows]) / 1000
        standard_error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - exact.sum()) < 5 * standard_error + 1e-6


@every_objective
def test_beta_is_taken_out_of_the_reported_bound(name):
    pair, x = Gaussian(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)

    def loss(model, guide):
        pyro.set_rng_seed(3)
        return OBJECTIVES[name]().loss(model, guide, x)

    scaled = scale_latents(pair.model, 0.3), scale_latents(pair.guide, 0.3, is_guide=True)
    found, plain = loss(*scaled), loss(pair.model, pair.guide)
    if name == "TraceBound":  # the number Pyro's own Trace_ELBO gives
        pyro.set_rng_seed(3)
        assert found == pytest.approx(Trace_ELBO().loss(*scaled, x))
        assert found != pytest.approx(plain)
    else:
        assert found == pytest.approx(plain)


@every_objective
def test_gradient_at_beta_zero_is_the_distortions(name, x):
    """Warm-up starts there: no latent term may be left, nor a division by 0."""
    model, guide, modules = make_pair("standard")
    x = x[:, :4]
    scaled = scale_latents(model, 0.0), scale_latents(guide, 0.0, is_guide=True)
    found = gradient(OBJECTIVES[name](), *scaled, modules, x, part="guide")
    assert found.isfinite().all()
    if "IWAE" in name and "one" not in name:
        return  # the log of a mean of likelihoods
    pyro.set_rng_seed(4)
    found = gradient(OBJECTIVES[name](), *scaled, modules, x)
    pyro.set_rng_seed(4)
    modules.zero_grad(set_to_none=True)
    trace = pyro.poutine.trace(guide).get_trace(x)
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(x)
    (-replayed.nodes["x"]["fn"].log_prob(x).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in modules.parameters()])
    torch.testing.assert_close(found, expected)


@every_objective
def test_minibatches_of_a_plate_scale_all_terms_and_the_gradient(name):
    """A plate of 40 that holds 4 is worth ten times its batch."""
    pair, x = Gaussian(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)

    def with_size(size):
        def model(x):
            pyro.module("gaussian.model", pair.model_part)
            with pyro.plate("data", size, subsample=torch.arange(4)):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x[0]), 1.0))
                pyro.sample("x", dist.Normal(z, pair.model_part["noise"]), obs=x)

        def guide(x):
            pyro.module("gaussian.guide", pair.guide_part)
            part = pair.guide_part
            with pyro.plate("data", size, subsample=torch.arange(4)):
                loc = part["shift"] + part["slope"] * x
                pyro.sample("z", dist.Normal(loc, part["scale"]))

        return model, guide

    found = {}
    for size in (4, 40):
        pyro.set_rng_seed(2)
        terms = OBJECTIVES[name]().terms(*with_size(size), (x,), {})
        pyro.set_rng_seed(2)
        gradients = gradient(OBJECTIVES[name](), *with_size(size), pair, x)
        found[size] = terms.loss, gradients, terms.rate, terms.distortion
    for small, large in zip(found[4], found[40], strict=True):
        torch.testing.assert_close(large, 10 * small)


@every_objective
def test_enumerated_sites_are_refused_by_name(name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.raises(pv.InputError, match="'which' is enumerated"):
        OBJECTIVES[name]().loss(model, guide, torch.zeros(3))


def discrete_pair():
    chance = nn.Parameter(torch.tensor(0.3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("which", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x):
        pyro.param("chance", chance)
        with pyro.plate("data", len(x)):
            pyro.sample("which", dist.Bernoulli(logits=chance))

    return model, guide, chance


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "TraceBound"])
def test_draws_without_a_gradient_are_refused_by_name(name):
    model, guide, _ = discrete_pair()
    with pytest.raises(pv.InputError, match="'which'"):
        OBJECTIVES[name]().loss(model, guide, torch.zeros(3))


# --- the bound of Trace_ELBO ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_particles": 3},
        {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
    ],
)
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_trace_bound_is_trace_elbo(options, beta, x):
    model, guide, modules = make_pair("hierarchical")
    model, guide = scale_latents(model, beta), scale_latents(guide, beta, is_guide=True)
    found = []
    for kind in (Trace_ELBO, pv.infer.TraceBound):
        for method in ("loss_and_grads", "differentiable_loss", "loss"):
            pyro.set_rng_seed(6)
            modules.zero_grad(set_to_none=True)
            value = getattr(kind(**options), method)(model, guide, x[:, :4])
            if method == "differentiable_loss":
                value.backward()
                value = value.item()
            if method != "loss":
                found += [p.grad.clone() for p in modules.parameters()]
            found.append(torch.tensor(value, dtype=torch.float64))
    half = len(found) // 2
    torch.testing.assert_close(found[half:], found[:half], rtol=1e-5, atol=1e-6)


def test_score_function_term_is_pyros(x):
    model, guide, chance = discrete_pair()
    found = []
    for kind in (Trace_ELBO, pv.infer.TraceBound):
        pyro.set_rng_seed(6)
        chance.grad = None
        kind(num_particles=5).loss_and_grads(model, guide, x[:, 0])
        found.append(chance.grad)
    assert found[0] != 0
    torch.testing.assert_close(*found)


def test_nan_is_warned_of():
    pair = Gaussian()
    x = torch.full((2,), torch.nan, dtype=torch.float64)
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="NaN"):
        pv.infer.TraceBound().loss(pair.model, pair.guide, x)


def test_an_objective_of_ones_own_needs_terms_alone(x):
    class Distortion(pv.infer.Bound):
        def terms(self, model, guide, args, kwargs):
            terms = pv.infer.TraceBound().terms(model, guide, args, kwargs)
            return bounds.BoundTerms(terms.distortion, terms.surrogate, terms.rate, terms.distortion)

    model, guide = make_vae()
    svi = SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1e-2}), Distortion())
    assert svi.step(x) > 0


def test_objectives_by_name_are_those_of_the_command_line_and_train_as_instances_do(x):
    assert tuple(stock_bound.OBJECTIVES) == names.OBJECTIVES
    histories = []
    for objective in ("iwae", pv.infer.IWAE(5)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        options = {"epochs": 2, "seed": 0, "compile": False}
        histories.append(pv.fit(*make_vae(), x, objective=objective, **options).history)
    assert (histories[0]["train_bound"] == histories[1]["train_bound"]).all()


@pytest.mark.parametrize(
    ("name", "words"), [("iwea", "did you mean 'iwae'"), ("free-bits", r"FreeBits\(floor\)")]
)
def test_names_of_objectives_that_say_too_little_are_refused(x, name, words):
    with pytest.raises(pv.InputError, match=words):
        pv.fit(*make_vae(), x, objective=name, epochs=1)
