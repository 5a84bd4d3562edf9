"""``fit`` on pairs whose data plate subsamples, and on those that tie parameters to data points."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from small_vae import PIXELS, make_vae
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import IWAE, AnalyticKL, FreeBits, StickingTheLanding, TraceBound, bound_terms

N = 60


# --- plates that subsample ---


def standard(loc=0.0):
    return dist.Normal(torch.full((2,), loc), 1.0).to_event(1)


def subsampling_pair(size, how):
    """The model ignores z: each data point has the same distortion, and KL 1 from N(1, 1)."""

    def part(x, index):
        return x[index] if how == "index" else pyro.subsample(x, event_dim=1)

    def model(x):
        weight = pyro.param("weight", torch.zeros(2, 3))
        with pyro.plate("data", N, subsample_size=size) as index:
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=part(x, index))

    def guide(x):
        with pyro.plate("data", N, subsample_size=size):
            pyro.sample("z", standard(1.0))

    return model, guide


def minibatch_pair():
    """The same in the idiom of a batch that is itself a part of the plate."""

    def model(x):
        weight = pyro.param("weight", torch.zeros(2, 3))
        with pyro.plate("data", 60_000, subsample=x):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 60_000, subsample=x):
            pyro.sample("z", standard(1.0))

    return model, guide


DISTORTION = 3 * (0.5 * math.log(2 * math.pi) + math.log(0.5) + 2)

OBJECTIVES = {
    "default": None,
    "stock": Trace_ELBO(num_particles=2),
    "closed form": AnalyticKL(),
    "free bits": FreeBits(0.1),
    "sticking the landing": StickingTheLanding(),
    "particles": TraceBound(num_particles=2),
}


def history_of(pair, **options):
    given = {"epochs": 1, "learning_rate": 1e-12, "compile": False, "seed": 0, **options}
    return pv.fit(*pair, torch.ones(N, 3), validation=torch.ones(N, 3), **given).history


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("how", ["index", "pyro.subsample"])
@pytest.mark.parametrize("size", [60, 20, 6])
def test_a_pair_that_subsamples_the_whole_set_itself(size, how, objective):
    pair = subsampling_pair(size, how)
    history = history_of(pair, batch_size=N, objective=OBJECTIVES[objective])
    assert history["train_distortion"][0] == pytest.approx(DISTORTION, abs=1e-4)
    assert history["validation_distortion"][0] == pytest.approx(DISTORTION, abs=1e-4)
    if objective in ("closed form", "free bits"):
        assert history["train_rate"][0] == pytest.approx(1.0, abs=1e-4)
        assert history["train_bound"][0] == pytest.approx(-DISTORTION - 1, abs=1e-4)
    terms = bound_terms(*pair, torch.ones(N, 3))
    assert terms["distortion"] == pytest.approx(DISTORTION, abs=1e-4)
    # log q - log p at a draw of the guide is N(1, 2).
    assert abs(terms["rate"] - 1) < 5 * math.sqrt(2 / size)


@pytest.mark.parametrize("objective", [*OBJECTIVES, "IWAE"])
def test_a_batch_that_is_a_part_of_the_plate(objective):
    given = IWAE(2) if objective == "IWAE" else OBJECTIVES[objective]
    history = history_of(minibatch_pair(), batch_size=16, objective=given)
    assert history["train_distortion"][0] == pytest.approx(DISTORTION, abs=1e-3)
    assert history["validation_distortion"][0] == pytest.approx(DISTORTION, abs=1e-3)
    assert abs(history["train_rate"][0] - 1) < 5 * math.sqrt(2 / N)


def test_gradients_are_those_of_the_mean_however_the_plate_subsamples():
    # Of weights at 0 each row's gradient is z times the data's residual: its mean is 1 * 4.
    for pair in (subsampling_pair(60, "index"), subsampling_pair(20, "index"), minibatch_pair()):
        norm = history_of(pair, batch_size=N)["gradient_norm"]
        assert norm[0] == pytest.approx(4 * math.sqrt(6), rel=5 / math.sqrt(20))


def test_parts_for_a_pair_that_subsamples_the_whole_set_are_refused():
    with pytest.raises(pv.InputError, match=r"60 data points: .* batch_size=len\(x\)"):
        history_of(subsampling_pair(20, "index"), batch_size=30)


# --- parameters per data point ---


@pytest.fixture
def x():
    return 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))


def conjugate(x):
    """The posterior of z is Normal(x / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_hand(x):
    loc = pyro.param("loc", torch.zeros(len(x)))
    scale = pyro.param("scale", torch.ones(len(x)), dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def table_of(number):
    """A table made beforehand, of which a part takes the first rows."""
    table = nn.Embedding(number, 1)
    nn.init.zeros_(table.weight)

    def guide(x):
        pyro.module("table", table)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table.weight[: len(x), 0], 0.7))

    return guide


GUIDES = {
    "AutoNormal": lambda number: AutoNormal(conjugate),
    "by hand": lambda number: by_hand,
    "table": table_of,
}


@pytest.mark.parametrize(
    "kind",
    ["AutoNormal", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("by hand", "table"))],
)
def test_parameters_per_data_point_are_trained_on_the_whole_set_in_its_order(kind, x):
    guide = GUIDES[kind](len(x))
    options = {"epochs": 300, "batch_size": 1000, "learning_rate": 0.1, "schedule": "cosine"}
    pv.fit(conjugate, guide, x, compile=False, seed=0, **options)
    pyro.set_rng_seed(0)
    draws = torch.stack(
        [pyro.poutine.trace(guide).get_trace(x).nodes["z"]["value"] for _ in range(400)]
    )
    # Draws of N(x / 2, 1/2), and what Adam still moves by.
    assert (draws.detach().mean(0) - x / 2).abs().max() < 5 * math.sqrt(0.5 / 400) + 0.05


@pytest.mark.parametrize("batch_size", [63, 32, 16])
@pytest.mark.parametrize("kind", GUIDES)
def test_parts_of_the_data_are_refused_for_parameters_per_data_point(kind, batch_size, x):
    guide = GUIDES[kind](len(x))
    state = torch.get_rng_state()
    with pytest.raises(pv.InputError, match=r"each of the 64 data points: .* batch_size=len\(x\)"):
        pv.fit(conjugate, guide, x, epochs=1, batch_size=batch_size)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [1024, 1500])
def test_a_long_table_is_seen_too(number):
    with pytest.raises(pv.InputError, match="batch_size="):
        pv.fit(conjugate, table_of(number), torch.randn(number), epochs=1)


def test_a_transform_before_parameters_per_data_point_is_refused(x):
    options = {"epochs": 1, "transform": lambda batch: batch + 0.0}
    with pytest.raises(pv.InputError, match=r"under a transform, got one .* by batch_size="):
        pv.fit(conjugate, table_of(len(x)), x, batch_size=32, **options)


def test_the_steps_are_those_of_svi_on_the_whole_set(x):
    guides = [AutoNormal(conjugate), AutoNormal(conjugate)]
    pyro.set_rng_seed(1)
    pv.fit(conjugate, guides[0], x, epochs=20, batch_size=64, learning_rate=0.05, compile=False)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guides[1](x)  # is made by its first call, as in the trial
    pyro.set_rng_seed(1)
    svi = SVI(conjugate, guides[1], pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(x)
    torch.testing.assert_close(guides[0].locs.z, guides[1].locs.z, rtol=1e-3, atol=1e-3)


# --- what must go on to be trained in parts ---


class Denoising(nn.Module):
    """A guide that adds noise to its data, outside any sample site."""

    def __init__(self):
        super().__init__()
        self.vae = make_vae()

    def model(self, x):
        self.vae.model(x)

    def guide(self, x):
        self.vae.guide(x + 0.1 * torch.randn_like(x))


class Standardising(nn.Module):
    """A guide that reads statistics of its batch, also where it is evaluated."""

    def __init__(self):
        super().__init__()
        self.vae = make_vae()
        self.norm = nn.BatchNorm1d(PIXELS, affine=False, track_running_stats=False)

    def model(self, x):
        self.vae.model(x)

    def guide(self, x):
        self.vae.guide(self.norm(x))


@pytest.mark.parametrize("kind", [Denoising, Standardising])
def test_noise_on_the_data_and_statistics_of_a_batch_are_trained_in_parts(kind):
    pair = kind()
    data = torch.bernoulli(torch.full((40, PIXELS), 0.5))
    result = pv.fit(pair.model, pair.guide, data, epochs=2, batch_size=16, seed=0)
    assert np.isfinite(result.history["train_elbo"]).all()


def test_a_trial_looks_at_few_data_points_of_a_large_set():
    vae, seen = make_vae(), []
    vae.variational_family.encoder.register_forward_hook(lambda *args: seen.append(len(args[2])))
    data = torch.bernoulli(torch.full((1000, PIXELS), 0.5))
    pv.fit(vae.model, vae.guide, data, epochs=1, batch_size=200, compile=False)
    # Rows of the trial, of the look at the first batch, of five steps and of the diagnosis.
    assert seen == [*(rows for rows in seen if rows <= 64), *(7 * [200])]
    assert len(seen) <= 12
