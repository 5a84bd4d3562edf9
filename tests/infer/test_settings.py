"""Learning rates, clipping and precision of a training run; its state."""

import itertools
import math

import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.infer import CompiledTrace_ELBO, TraceBound
from pyro_vae.infer.bounds import BoundTerms
from pyro_vae.infer.compiled import StepCapture
from pyro_vae.infer.settings import FitSettings
from pyro_vae.infer.trainer import Trainer, TrainingObjective
from pyro_vae.infer.validation import EarlyStopping
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.pair.precision import compute_in, multiply_in

PIXELS = 6


def make_vae():
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((PIXELS,), (8,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (PIXELS,)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )


def parameters_of(vae):
    return torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])


# --- learning rate ---


def test_cosine_schedule():
    settings = FitSettings(schedule="cosine")
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert [settings.multiplier_at(step, 8) for step in range(9)] == pytest.approx(expected)


def test_a_schedule_is_asked_at_every_step_with_the_fraction_done(x):
    vae, seen = make_vae(), []

    def schedule(fraction):
        seen.append(fraction)
        return 0.0

    before = parameters_of(vae)
    pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=4, schedule=schedule)
    assert sorted(set(seen)) == [0.0, 0.25, 0.5, 0.75]
    assert torch.equal(parameters_of(vae), before)  # multiplied by 0


@pytest.mark.parametrize("multiplier", [-1.0, math.nan, math.inf])
def test_a_multiplier_out_of_range_is_refused(x, multiplier):
    vae = make_vae()
    with pytest.raises(pv.InputError, match=r"multiplier of at least 0 from schedule\(0\)"):
        pv.fit(vae.model, vae.guide, x, epochs=1, schedule=lambda _: multiplier)


# --- clipping ---


@pytest.mark.parametrize(("clip", "norm"), [(None, 5.0), (2.5, 2.5), (100.0, 5.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, norm):
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    terms = BoundTerms(*torch.zeros(4, dtype=torch.float64))
    objective = TrainingObjective(TraceBound(), FitSettings(gradient_clip=clip))
    summary, clipped = objective.finish(terms, gradients)
    assert summary.tolist() == [0.0, 0.0, 0.0, 5.0, 0.0]
    for gradient, before in zip(clipped, gradients, strict=True):
        torch.testing.assert_close(gradient, before * norm / 5)


def test_a_clipped_run_moves_less(x):
    moved = []
    for clip in (None, 1e-10):  # far below Adam's epsilon
        pyro.clear_param_store()
        vae = make_vae()
        before = parameters_of(vae)
        pv.fit(vae.model, vae.guide, x, epochs=1, gradient_clip=clip)
        moved.append((parameters_of(vae) - before).norm())
    assert moved[1] < 0.1 * moved[0]


# --- precision ---


def test_layers_multiply_in_bfloat16_and_nothing_else_does():
    layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64)
    with multiply_in("bfloat16"):
        found, product = layer(x), x @ layer.weight.T
    exact = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(product + layer.bias, exact)
    error = (found - exact).norm() / exact.norm()
    assert 2**-12 < error < 2**-6  # bfloat16 has 8 bits


@pytest.mark.slow
def test_the_elbo_in_bfloat16_is_that_in_float32_within_its_noise(x):
    bounds = {}
    for precision in ("float32", "bfloat16"):
        pyro.clear_param_store()
        vae = make_vae()
        result = pv.fit(
            vae.model,
            vae.guide,
            x,
            epochs=60,
            batch_size=7,
            learning_rate=0.01,
            seed=0,
            precision=precision,
        )
        bounds[precision] = torch.as_tensor(result.history["train_elbo"][30:])
    difference = bounds["bfloat16"] - bounds["float32"]
    assert (difference != 0).all()
    # Epochs share their parameters' drift, so the spread of one epoch stands for all of them.
    assert abs(difference.mean()) < 5 * bounds["float32"].std() / 30**0.5 + 1e-6
    assert difference.abs().max() < 5 * bounds["float32"].std()


def test_the_flag_of_tf32_is_restored():
    before = torch.get_float32_matmul_precision()
    with compute_in("tf32", torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with compute_in("tf32", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


# --- state ---


def make_trainer(vae, x, *, captured=False, **options):
    """Four epochs of three steps."""
    settings = FitSettings(
        epochs=4, batch_size=3, learning_rate=0.01, schedule="cosine", warmup_epochs=2,
        objective=CompiledTrace_ELBO(backend="eager"), **options,
    )  # fmt: skip
    objective, device = TrainingObjective(TraceBound(), settings), torch.device("cpu")
    capture = StepCapture(objective, settings, device=device, num_steps=12)
    step = capture.step if captured else None
    pair = OpenedPair(vae.model, vae.guide, (x,))
    return Trainer(pair, objective, settings, device=device, captured_step=step)


@pytest.mark.parametrize("captured", [False, True])
def test_resumed_steps_are_those_of_the_uninterrupted_run(x, captured):
    vae = make_vae()
    trainer = make_trainer(vae, x, captured=captured)
    for epoch in (1, 2):
        trainer.run_epoch(epoch)
    state, generator = trainer.state_dict(), torch.get_rng_state()
    expected = [trainer.run_epoch(epoch) for epoch in (3, 4)]

    pyro.clear_param_store()
    other = make_vae()
    resumed = make_trainer(other, x, captured=captured)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    found = [resumed.run_epoch(epoch) for epoch in (3, 4)]
    assert torch.equal(parameters_of(other), parameters_of(vae))
    for row, other_row in itertools.product(["train_elbo", "gradient_norm", "beta"], [0, 1]):
        assert found[other_row][row] == expected[other_row][row]
    assert resumed.count == trainer.count == 12


def test_early_stopping_keeps_its_best_values_over_a_resumption(x):
    vae = make_vae()
    trainer = make_trainer(vae, x)
    best = EarlyStopping(patience=2, warmup_epochs=0)
    trainer.run_epoch(1)
    kept = parameters_of(vae)
    best.take_in(1, -3.0, trainer)
    assert not best.is_over(1)
    trainer.run_epoch(2)
    resumed = EarlyStopping(patience=2, warmup_epochs=0)
    resumed.load_state_dict(best.state_dict())
    resumed.take_in(2, -4.0, trainer)
    assert not resumed.is_over(2)
    resumed.take_in(3, -5.0, trainer)
    assert resumed.is_over(3)
    resumed.restore(trainer)
    assert resumed.epoch == 1
    assert torch.equal(parameters_of(vae), kept)
