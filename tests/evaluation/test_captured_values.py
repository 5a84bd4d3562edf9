"""The compiled score: the same numbers, one compilation, and it follows the parameters."""

import gc
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation import annealing_path
from pyro_vae.evaluation import captured_values as module
from pyro_vae.evaluation.captured_values import PROGRAMS
from pyro_vae.infer import capture
from pyro_vae.infer.program import are_close, tolerance_of


def small_vae():
    return pv.VAE(
        pv.priors.StandardNormal(3),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(3, (16,)), (20,)),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((20,), (16,)), 3),
    )


def estimate(model, guide, x, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ data points have Pareto k")
        return pv.log_marginal(model, guide, x, num_samples=101, seed=0, **options)


@pytest.fixture
def compilations(monkeypatch):
    """Count the captures; they run uncompiled, which needs no C++ compiler and no time."""
    counted = []
    trace_graph = capture.trace_graph

    def counting(*args):
        counted.append(1)
        return trace_graph(*args)

    monkeypatch.setattr(capture, "trace_graph", counting)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    return counted


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    vae, x = small_vae(), torch.rand(7, 20).round()
    plain = estimate(vae.model, vae.guide, x, compile=False)
    compiled = estimate(vae.model, vae.guide, x, compile=True)
    torch.testing.assert_close(compiled.log_prob, plain.log_prob, rtol=1e-5, atol=1e-5)
    assert not torch.equal(compiled.log_prob, plain.log_prob)  # other kernels did run


def test_repeated_calls_and_trained_parameters(compilations):
    vae, x = small_vae(), torch.rand(7, 20).round()
    for _ in range(3):
        compiled = estimate(vae.model, vae.guide, x, compile=True, max_memory=1 << 20)
        plain = estimate(vae.model, vae.guide, x, compile=False, max_memory=1 << 20)
        torch.testing.assert_close(compiled.log_prob, plain.log_prob)
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(0.1)
    assert len(compilations) == 1
    vae.likelihood.logits.map.bias = torch.nn.Parameter(torch.ones(20))
    compiled = estimate(vae.model, vae.guide, x, compile=True, max_memory=1 << 20)
    plain = estimate(vae.model, vae.guide, x, compile=False, max_memory=1 << 20)
    torch.testing.assert_close(compiled.log_prob, plain.log_prob)


def test_other_data_of_the_same_shape_share_the_program(compilations):
    vae = small_vae()
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.rand(1100, 20).round()  # more than a block
        compiled = estimate(vae.model, vae.guide, x, compile=True)
        plain = estimate(vae.model, vae.guide, x, compile=False)
        torch.testing.assert_close(compiled.log_prob, plain.log_prob)
    assert len(compilations) == 1


def test_programs_die_with_their_model(compilations):
    vae = small_vae()
    estimate(vae.model, vae.guide, torch.rand(3, 20).round(), compile=True)
    assert PROGRAMS.get(vae.model) is not None
    reference = weakref.ref(vae)
    del vae
    gc.collect()
    assert reference() is None


def test_small_work_is_not_compiled(compilations):
    vae = small_vae()
    estimate(vae.model, vae.guide, torch.rand(3, 20).round())
    assert not compilations


def test_plain_functions_and_store_parameters(compilations):
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = torch.randn(4, 2)
    for value in (1.0, 2.0):
        pyro.get_param_store()["scale"] = torch.tensor(value)
        compiled = estimate(model, guide, x, compile=True)
        plain = estimate(model, guide, x, compile=False)
        torch.testing.assert_close(compiled.log_prob, plain.log_prob)
        assert compilations


def test_a_model_that_reads_values_runs_as_it_is():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.tensor(z.tolist())
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = torch.randn(4, 2)
    with pytest.warns(UserWarning, match="run uncompiled"):
        compiled = estimate(model, guide, x, compile=True)
    assert torch.equal(compiled.log_prob, estimate(model, guide, x, compile=False).log_prob)


# --- annealing gradients, by the same cache ---


def anneal(model, guide, x, **options):
    """Few steps, and blocks of the data where the memory is little."""
    settings = {"num_steps": 3, "num_leapfrog_steps": 1, "seed": 0, **options}
    return pv.log_marginal(model, guide, x, method="annealed", **settings).log_prob


class Shifted:
    """A pair whose model has a plain attribute and a parameter."""

    shift = 0.0

    def model(self, x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


def eagerly(monkeypatch, *arguments, **options):
    def draw_as_the_check_does(path, position):
        if position.shape not in path._graphs:
            path._graphs[position.shape] = torch.randn_like(position)

    with monkeypatch.context() as patch:
        patch.setattr(annealing_path.AnnealingPath, "capture", draw_as_the_check_does)
        return anneal(*arguments, **options)


def test_annealing_gradients_are_recorded_once_for_all_blocks_and_calls(compilations):
    pair, x = Shifted(), torch.randn(4, 2)
    first = anneal(pair.model, pair.guide, x, max_memory=1)  # blocks of two
    recorded = len(compilations)
    assert recorded == 1  # for the pilots and the estimate
    assert torch.equal(anneal(pair.model, pair.guide, x, max_memory=1), first)
    assert len(compilations) == recorded


def test_annealing_gradients_follow_parameters_and_attributes(compilations, monkeypatch):
    pair, x = Shifted(), torch.randn(4, 2)
    before = anneal(pair.model, pair.guide, x)
    recorded = len(compilations)
    pyro.get_param_store()["scale"] = torch.tensor(2.0)
    replaced = anneal(pair.model, pair.guide, x)
    assert len(compilations) == recorded
    assert torch.equal(replaced, eagerly(monkeypatch, pair.model, pair.guide, x))
    pair.shift = 1.0
    shifted = anneal(pair.model, pair.guide, x)
    assert len(compilations) == 2 * recorded
    assert torch.equal(shifted, eagerly(monkeypatch, pair.model, pair.guide, x))
    assert not torch.equal(before, replaced)
    assert not torch.equal(replaced, shifted)


def test_annealing_gradients_that_can_not_be_captured_are_tried_once(compilations, monkeypatch):
    pair, x = Shifted(), torch.randn(4, 2)
    monkeypatch.setattr(module.recorded, "are_close", lambda *_: False)
    options = {"start": "prior"}  # without pilots
    first = anneal(pair.model, pair.guide, x, **options)
    recorded = len(compilations)
    assert torch.equal(anneal(pair.model, pair.guide, x, **options), first)
    assert len(compilations) == recorded
    assert torch.equal(eagerly(monkeypatch, pair.model, pair.guide, x, **options), first)


# --- the rule ---


@pytest.mark.parametrize(
    ("value", "expected", "close"),
    [
        ([1000.0, 0.0], [1000.3, 0.0], True),
        ([1000.0, 0.0], [1000.0, 0.3], False),  # each by itself
        ([-torch.inf], [-torch.inf], True),
        ([torch.inf], [-torch.inf], False),
        ([torch.nan], [torch.nan], True),
        ([torch.nan], [torch.inf], False),
        ([torch.inf], [1.0], False),
        ([[1.0]], [1.0], False),
    ],
)
def test_values_are_held_against_the_reference_one_by_one(value, expected, close):
    tolerance = tolerance_of([torch.float32, torch.float64, torch.long])
    assert are_close(torch.tensor(value), torch.tensor(expected), tolerance) is close
