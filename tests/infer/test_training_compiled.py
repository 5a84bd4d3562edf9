"""``fit`` by captured steps takes the steps of the eager one; what is captured, and what is not."""

import copy
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from small_vae import PIXELS, make_vae
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import (
    IWAE,
    AnalyticKL,
    Compiled,
    CompiledTrace_ELBO,
    FreeBits,
    StickingTheLanding,
    TraceBound,
)
from pyro_vae.infer.analytic_kl import DefaultBound
from pyro_vae.infer.engine import Engine
from pyro_vae.infer.stock_bound import bound_of


@pytest.fixture
def captures(monkeypatch):
    """The shapes of the batches that were captured."""
    shapes, capture = [], Engine._capture

    def noting(self, call, *args):
        shapes.append([tuple(value.shape) for value in call.args])
        return capture(self, call, *args)

    monkeypatch.setattr(Engine, "_capture", noting)
    return shapes


@pytest.fixture
def x():
    """Grey values, to be binarised."""
    return torch.rand(40, PIXELS, generator=torch.Generator().manual_seed(1))


def make_spherical_vae():
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(3, (8,)), pv.networks.MLPEncoder((PIXELS,), (8,))
    return pv.VAE(
        pv.priors.HypersphericalUniform(3),
        pv.likelihoods.Bernoulli(decoder, (PIXELS,)),
        pv.guides.VonMisesFisher(encoder, 3),
    )


class Conditional(nn.Module):
    """A pair that takes (x, y)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decode = nn.Linear(PIXELS + 2, 4), nn.Linear(2 + 2, PIXELS)

    def model(self, x, y):
        pyro.module("decode", self.decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decode(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x, y):
        pyro.module("encode", self.encode)
        with pyro.plate("data", len(x)):
            loc, raw = self.encode(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def binarized(x, *others):
    return (torch.bernoulli(x), *others)


def run(make, data, **options):
    pyro.clear_param_store()
    pair = make()
    settings = {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "seed": 4}
    settings |= {"transform": binarized, **options}
    return pv.fit(pair.model, pair.guide, data, **settings), pair.state_dict()


def assert_same(found, expected):
    result, state = found
    eager, eager_state = expected
    assert result.compiled
    assert not eager.compiled
    for name in set(result.history) - {"seconds", "data_per_second"}:
        np.testing.assert_allclose(result.history[name], eager.history[name], rtol=2e-4, err_msg=name)
    # Adam divides by the gradient's size: of one near 0 rounding moves a step by its length.
    torch.testing.assert_close(state, eager_state, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_vae, {"warmup_epochs": 2, "beta": 2.0}),
        pytest.param(make_vae, {"gradient_clip": 0.5, "schedule": "cosine"}, marks=pytest.mark.slow),
        (make_vae, {"precision": "bfloat16"}),
        (Conditional, {}),
        pytest.param(make_spherical_vae, {}, marks=pytest.mark.slow),
    ],
    ids=["warm-up", "clip and schedule", "bfloat16", "conditional", "von Mises-Fisher"],
)
def test_captured_fit_is_eager_fit(make, options, x, captures):
    data = (x, nn.functional.one_hot(torch.arange(40) % 2, 2).float()) if make is Conditional else x
    found = run(make, data, objective=CompiledTrace_ELBO(backend="eager"), **options)
    # Batches of 16, 16 and 8: the last is never captured, and beta is an input of the one graph.
    assert [shapes[0] for shapes in captures] == [(16, PIXELS)]
    assert_same(found, run(make, data, compile=False, objective=TraceBound(), **options))


@pytest.mark.parametrize(
    "objective",
    [
        IWAE(3),
        pytest.param(StickingTheLanding(), marks=pytest.mark.slow),
        pytest.param(AnalyticKL(), marks=pytest.mark.slow),
        DefaultBound(),
        pytest.param(TraceBound(num_particles=2, vectorize_particles=True), marks=pytest.mark.slow),
    ],
    ids=["IWAE", "sticking the landing", "closed form", "default", "vectorised particles"],
)
def test_other_bounds_are_captured(objective, x):
    found = run(make_vae, x, objective=Compiled(objective, backend="eager"))
    assert_same(found, run(make_vae, x, objective=objective, compile=False))


class StockMeanField(TraceMeanField_ELBO):
    """Pyro's own code: what derives from an objective is not taken for it."""


@pytest.mark.parametrize(
    ("options", "settings"),
    [({}, {}), ({"num_particles": 2}, {"warmup_epochs": 2, "beta": 0.5})],
    ids=["plain", "particles and warm-up"],
)
def test_pyros_closed_form_elbo_is_the_bound_that_can_be_captured(options, settings, x):
    bound = bound_of(TraceMeanField_ELBO(**options))
    assert type(bound) is AnalyticKL
    assert bound.num_particles == options.get("num_particles", 1)
    settings = settings | {"compile": False}
    expected = run(make_vae, x, objective=StockMeanField(**options), **settings)
    result, state = run(make_vae, x, objective=TraceMeanField_ELBO(**options), **settings)
    torch.testing.assert_close(state, expected[1])
    for name in ("train_distortion", "gradient_norm", "validation_elbo"):
        np.testing.assert_allclose(result.history[name], expected[0].history[name], rtol=1e-4)
    if not settings.get("warmup_epochs"):  # the bound leaves beta out of its value
        np.testing.assert_allclose(
            result.history["train_bound"], expected[0].history["train_bound"], rtol=1e-5
        )


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(IWAE(3), marks=pytest.mark.slow),
        pytest.param(StickingTheLanding(), marks=pytest.mark.slow),
        FreeBits(0.5),
    ],
    ids=["IWAE", "sticking the landing", "free bits"],
)
def test_other_bounds_are_captured_under_svi(objective, x):
    losses, states = [], []
    for loss in (objective, Compiled(objective, backend="eager")):
        pyro.clear_param_store()
        vae = make_vae()
        pyro.set_rng_seed(1)
        svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), loss)
        losses.append([svi.step(x.round()) for _ in range(4)])
        states.append(vae.state_dict())
    assert loss.num_graphs == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(states[1], states[0])


def test_only_bounds_are_compiled():
    with pytest.raises(pv.InputError, match="for Pyro's Trace_ELBO use CompiledTrace_ELBO"):
        Compiled(pyro.infer.Trace_ELBO())


def test_beta_of_a_compiled_objective_is_a_factor(x):
    found = run(make_vae, x, objective=CompiledTrace_ELBO(beta=2.0, backend="eager"), beta=0.5)
    assert_same(found, run(make_vae, x, compile=False, objective=TraceBound()))


def test_validation_between_epochs_recaptures_nothing(x, captures):
    run(make_vae, x, objective=CompiledTrace_ELBO(backend="eager"), validation=x.round())
    assert len(captures) == 1


@pytest.mark.slow
def test_inductor_takes_the_eager_steps(x):
    for make in (make_vae, make_spherical_vae):
        assert_same(run(make, x, compile=True), run(make, x, compile=False))


# --- the choice ---


class Discrete(nn.Module):
    """A pair with a latent that has no pathwise gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decode = nn.Linear(PIXELS, 1), nn.Linear(1, PIXELS)

    def model(self, x):
        pyro.module("decode", self.decode)
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(x.new_full((len(x),), 0.3)))
            logits = self.decode(kind[..., None])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encode", self.encode)
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(logits=self.encode(x)[:, 0]))


def test_short_runs_on_the_cpu_are_eager_by_themselves(x):
    result, _ = run(make_vae, x)
    assert not result.compiled
    assert result.compile_choice.startswith("eager: 9 steps")


def test_runs_of_middle_length_replay_the_recorded_graph(x, monkeypatch, tmp_path):
    """And one that is resumed goes on in its own gear, whatever a new one would take."""
    monkeypatch.setattr("pyro_vae.infer.compiled.RECORDED_FROM_STEPS", 9)
    expected, state = run(make_vae, x)
    assert (expected.compiled, expected.compile_choice) == (
        True,
        "recorded: 9 steps, compiling pays from 5000 on",
    )
    _, eager = run(make_vae, x, compile=False)
    for name, value in eager.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)

    def stop(epoch, row):
        if epoch == 1:
            raise KeyboardInterrupt

    how = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(make_vae, x, on_epoch=stop, checkpoint_minutes=0, **how)
    monkeypatch.setattr("pyro_vae.infer.compiled.RECORDED_FROM_STEPS", 10_000)
    resumed, found = run(make_vae, x, resume=True, **how)
    assert resumed.compile_choice == "recorded: as the run was begun"
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.raises(pv.InputError, match="compiled"):
        run(make_vae, x, resume=True, compile=False, **how)


def test_long_runs_are_compiled_by_themselves_or_say_silently_why_not(x, monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.compiled.COMPILED_FROM_STEPS", 9)
    result, _ = run(Discrete, x)
    assert not result.compiled
    assert result.compile_choice == (
        "compiled: 9 steps on cpu; eager after all: site 'kind' is not reparameterised"
    )


def test_a_pair_that_can_not_be_captured_is_named_once_when_compiling_was_asked_for(x):
    with pytest.warns(UserWarning, match="site 'kind' is not reparameterised") as caught:
        result, state = run(Discrete, x, compile=True)
    assert len(caught) == 1
    assert not result.compiled
    _, expected = run(Discrete, x, compile=False)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_an_elbo_that_reads_values_runs_eagerly(x):
    objective = pyro.infer.TraceGraph_ELBO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not run(make_vae, x, objective=objective)[0].compiled
    with pytest.warns(UserWarning, match="TraceGraph_ELBO eagerly"):
        assert not run(make_vae, x, objective=objective, compile=True)[0].compiled


def test_a_transform_with_random_numbers_of_its_own_is_not_baked_in(x):
    generator = np.random.default_rng(0)

    def noisy(batch):
        return (batch + torch.as_tensor(generator.random(), dtype=batch.dtype)).clamp(0, 1).round()

    objective = CompiledTrace_ELBO(backend="eager")
    with pytest.warns(UserWarning, match="the pair changes .generator. itself at each run"):
        assert not run(make_vae, x, objective=objective, transform=noisy)[0].compiled


@pytest.mark.gpu
def test_captured_fit_on_cuda(x):
    """The whole step as a CUDA graph, its results read once an epoch."""
    found = run(make_vae, x, device="cuda", epochs=6)
    expected = run(make_vae, x, device="cuda", epochs=6, compile=False)
    assert_same(found, expected)


# --- steps that are not finite ---


@pytest.mark.parametrize("options", [{"compile": False}, {}], ids=["eager", "captured"])
@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_not_applied(kind, options, x):
    """Rows with a negative first pixel spoil the batch they fall into."""
    net = nn.Linear(PIXELS, 2)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            first, bad = net(x)[:, 0], x[:, 0] < 0
            if kind == "loss":
                loc = first / torch.where(bad, 0.0, 1.0)
            else:  # finite, but its derivative at 0 is not
                loc = first + torch.where(bad, first - first.detach(), 1.0).sqrt()
            pyro.sample("x", dist.Normal(z.sum(-1) + loc, 1.0), obs=x[:, 1])

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    spoiled = x.clone()
    spoiled[:, 0] = -1.0
    options = dict(options)
    if not options:
        options["objective"] = CompiledTrace_ELBO(backend="eager")
    before = copy.deepcopy(net.state_dict())
    settings = {"epochs": 2, "batch_size": 10, "learning_rate": 0.01, "seed": 0, **options}
    with pytest.raises(pv.InputError, match=f"finite {kind}, got .* in epoch 1, batch 1:"):
        pv.fit(model, guide, spoiled, **settings)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    one = x.clone()
    one[7, 0] = -1.0
    if "compile" in options:  # what is made of the steps that were skipped, whoever took them
        with pytest.raises(pv.InputError, match=r"no step of the epoch was left, 4 were skipped\)"):
            pv.fit(model, guide, spoiled, on_nonfinite="skip", **settings)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        with pytest.raises(pv.InputError, match=r"epoch 2, batch \d \(2 steps were skipped\)"):
            pv.fit(model, guide, one, on_nonfinite="skip", nonfinite_limit=1, **settings)
        net.load_state_dict(before)
    result = pv.fit(model, guide, one, on_nonfinite="skip", **settings)
    assert result.skipped_steps == 2
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert np.isfinite(result.history["train_elbo"]).all()
