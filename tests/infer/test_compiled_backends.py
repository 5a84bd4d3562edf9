"""CompiledTrace_ELBO through compilers: inductor, CUDA graphs, and none that works."""

import warnings

import pyro
import pytest
import torch
from compiled_pairs import VAE, CountingELBO, compiled, make_vae, run
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.infer.compiled import CompiledTrace_ELBO
from pyro_vae.infer.engine import Engine


def test_without_a_compiler_the_graph_runs_uncompiled_with_one_warning(x):
    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    with pytest.warns(UserWarning, match="no compiler found") as caught:
        losses, _, _ = run(make_vae, compiled(backend=broken), [(x,)] * 3)
    assert len(caught) == 1
    expected, _, _ = run(make_vae, Trace_ELBO(), [(x,)] * 3)
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_inductor_takes_stock_steps(x, num_particles, mode):
    options = {"num_particles": num_particles, "vectorize_particles": True}
    expected, params, _ = run(make_vae, Trace_ELBO(**options), [(x,)] * 6)
    elbo = CompiledTrace_ELBO(**options, mode=mode, compile_after=0)
    found, found_params, _ = run(make_vae, elbo, [(x,)] * 6)
    assert elbo.num_graphs == 1
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in params.items():
        torch.testing.assert_close(found_params[name], value, rtol=1e-3, atol=1e-5)


def test_a_graph_runs_as_recorded_before_it_is_compiled(x, monkeypatch):
    """At a fixed step, and what is compiled is held against stock Pyro before it counts."""
    compiled_at, checked_at, check = [], [], Engine._check

    def compile(graph, *, backend, options, **how):
        assert backend == "inductor"
        compiled_at.append(elbo.replays)
        return graph

    def noting(*given):
        checked_at.append(elbo.replays)
        check(*given)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(Engine, "_check", noting)
    expected, _, _ = run(make_vae, Trace_ELBO(), [(x,)] * 12)
    elbo = CountingELBO(compile_after=6)
    found, _, _ = run(make_vae, elbo, [(x,)] * 12)
    assert compiled_at == [5]  # five steps were replayed, the sixth is compiled
    assert checked_at == [0, 0, 1, 3, 5, 7]
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(pv.InputError, match="compile_after"):
        CompiledTrace_ELBO(compile_after=-1)


def test_a_graph_that_compiles_wrong_is_not_taken(x, monkeypatch):
    def wrong(graph, **how):
        return lambda *given: [value + 1 for value in graph(*given)]

    monkeypatch.setattr(torch, "compile", wrong)
    expected, _, _ = run(make_vae, Trace_ELBO(), [(x,)] * 6)
    with pytest.warns(UserWarning, match=r"its loss [\d.]+ differs") as caught:
        found, _, _ = run(make_vae, CompiledTrace_ELBO(compile_after=2), [(x,)] * 6)
    assert len(caught) == 1
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_inductor_follows_beta_parameters_and_dropout(x):
    class Dropping(VAE):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 6))

    vae = Dropping()
    elbo = CompiledTrace_ELBO(compile_after=0)
    elbo.loss_and_grads(vae.model, vae.guide, x)
    elbo.beta = 0.0
    with torch.no_grad():
        vae.loc.bias.fill_(0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [elbo.loss_and_grads(vae.model, vae.guide, x) for _ in range(400)]
    stock = CompiledTrace_ELBO(beta=0.0)
    expected = [stock.loss(vae.model, vae.guide, x) for _ in range(400)]
    losses, expected = torch.tensor(losses), torch.tensor(expected)
    error = (losses.var() / 400 + expected.var() / 400).sqrt()
    assert abs(losses.mean() - expected.mean()) < 5 * error + 1e-6
    assert elbo.num_graphs == 1


@pytest.mark.gpu
def test_cuda_graph_results_outlive_the_next_replay(x):
    vae, x = VAE().cuda(), x.cuda()
    elbo = CompiledTrace_ELBO()
    for _ in range(3):
        elbo.loss_and_grads(vae.model, vae.guide, x)
    gradients, losses = [], []
    for seeds in ((1,), (2,), (1, 2)):
        vae.zero_grad(set_to_none=True)
        for seed in seeds:
            pyro.set_rng_seed(seed)
            losses.append(elbo.loss_and_grads(vae.model, vae.guide, x))
        gradients.append([p.grad for p in vae.parameters()])
    for one, two, both in zip(*gradients, strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-5)
    assert losses[0].item() == pytest.approx(losses[2].item())
    assert losses[1].item() == pytest.approx(losses[3].item())
    assert losses[0].item() != pytest.approx(losses[1].item())


@pytest.mark.gpu
def test_cuda_run_is_stock(x):
    def make():
        vae = VAE().cuda()
        return vae.model, vae.guide

    expected, _, _ = run(make, Trace_ELBO(), [(x.cuda(),)] * 6)
    elbo = CompiledTrace_ELBO()
    found, _, _ = run(make, elbo, [(x.cuda(),)] * 6)
    assert elbo.num_graphs == 1
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("validates", [True, False])
def test_cuda_nan_is_told_when_the_loss_is_read(x, validates):
    vae, x = VAE().cuda(), x.cuda()
    elbo = CompiledTrace_ELBO(backend="eager")
    with pyro.validation_enabled(validates):
        elbo.loss_and_grads(vae.model, vae.guide, x)
        with torch.no_grad():
            vae.loc.bias.fill_(float("nan"))
        loss = elbo.loss_and_grads(vae.model, vae.guide, x)
        if validates:  # as stock Pyro does
            with pytest.raises(ValueError, match="Expected parameter loc"):
                loss.item()
        else:
            with pytest.warns(UserWarning, match="Encountered NaN: loss"):
                loss.item()
