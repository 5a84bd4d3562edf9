"""Latents outside the data plate count once per data set in ``fit``, whatever the batch."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyro_vae as pv
from pyro_vae import infer

N, NOISE, WIDTH = 256, 2.0, 3.0
OPTIONS = {"compile": False, "seed": 0}


def data():
    return 1.5 + NOISE * torch.randn(N)


def rows_of_the_batch(x):
    return pyro.plate("data", len(x))


def rows_of_the_data(x):
    return pyro.plate("data", N, subsample=torch.arange(len(x)))


def normal_mean(plate=rows_of_the_batch):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), WIDTH))
        with plate(x):
            pyro.sample("x", dist.Normal(mean, NOISE), obs=x)

    return model


def mean_guide(x):
    loc, log_scale = pyro.param("loc", torch.zeros(())), pyro.param("log_scale", torch.zeros(()))
    pyro.sample("mean", dist.Normal(loc, log_scale.exp()))


def posterior_of_mean(x, noise=NOISE):
    variance = 1 / (1 / WIDTH**2 + len(x) / noise**2)
    return variance * x.sum() / noise**2, math.sqrt(variance)


def divergence(mean, deviation):
    return torch.distributions.kl_divergence(dist.Normal(mean, deviation), dist.Normal(0.0, WIDTH))


def many_draws():
    """Against the noise of a draw times that of a batch."""
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    return infer.StickingTheLanding(num_particles=64, **options)


@pytest.mark.slow
@pytest.mark.parametrize("plate", [rows_of_the_batch, rows_of_the_data])
def test_batches_find_the_posterior_of_a_mean(plate):
    x = data()
    mean, deviation = posterior_of_mean(x)
    settings = {"batch_size": 32, "epochs": 80, "learning_rate": 0.1, "schedule": "cosine"}
    objective = many_draws()
    result = pv.fit(normal_mean(plate), mean_guide, x, objective=objective, **settings, **OPTIONS)
    found = pyro.param("loc").item(), pyro.param("log_scale").exp().item()
    assert abs(found[0] - mean) < 0.1 * deviation
    assert found[1] == pytest.approx(deviation, rel=0.03)
    rate = result.history["global_rate"][-1]
    assert rate == pytest.approx(divergence(torch.tensor(found[0]), found[1]).item(), rel=1e-4)
    assert result.warnings == ()


@pytest.mark.parametrize("plate", [rows_of_the_batch, rows_of_the_data])
@pytest.mark.parametrize(
    "objective",
    [infer.TraceBound, infer.AnalyticKL, infer.StickingTheLanding, lambda: infer.FreeBits(0.0)],
)
def test_every_batch_estimates_the_gradient_of_the_whole(plate, objective):
    """Over the batches of one epoch, at a learning rate of nearly 0: means are those of one batch."""
    x = data()
    gathered = []
    for batch_size in (N, 48):
        pyro.clear_param_store()
        kept = {"batch_size": batch_size, "learning_rate": 1e-12, "objective": objective()}
        history = pv.fit(normal_mean(plate), constant_guide, x, epochs=1, **kept, **OPTIONS).history
        gathered.append(history)
    whole, batches = gathered
    distortion = whole["train_distortion"][0]
    assert batches["train_distortion"][0] == pytest.approx(distortion, rel=1e-4)
    # Where there is no closed form, log q of a draw varies by its square's deviation, half of 2.
    noise = 5 * 2 * math.sqrt(0.5) / N
    assert abs(batches["train_rate"][0] - whole["train_rate"][0]) < noise
    assert whole["train_rate"][0] > 1.5 * noise


def constant_guide(x):
    """So narrow that its draws are its mean."""
    loc = pyro.param("loc", torch.tensor(0.7))
    pyro.sample("mean", dist.Normal(loc, torch.tensor(1e-6)))


def test_the_bound_of_a_data_set_counts_them_once():
    x = data()
    terms = infer.bound_terms(normal_mean(), constant_guide, x)
    exact = math.log(1 / 1e-6) - dist.Normal(0.0, WIDTH).log_prob(torch.tensor(0.7)) - 1.42
    assert terms["rate"] * N == pytest.approx(exact.item(), abs=6)  # a draw's log q varies by 1
    whole = infer.bound_terms(normal_mean(), constant_guide, x, plate=None)
    assert whole["distortion"] == pytest.approx(N * terms["distortion"], rel=1e-4)
    result = pv.fit(normal_mean(), constant_guide, x, epochs=1, plate=None, **OPTIONS)
    assert result.history["train_distortion"][0] == pytest.approx(whole["distortion"], rel=1e-4)


def hierarchy(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), WIDTH))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


@pytest.mark.slow
def test_local_latents_beside_a_shared_one_end_at_the_posterior():
    """The guide q(mean) q(z given mean, x) holds the posterior."""
    x = data()

    def guide(x):
        loc, log_scale = pyro.param("loc", torch.zeros(())), pyro.param("log_scale", torch.zeros(()))
        slope, pull = pyro.param("slope", torch.zeros(())), pyro.param("pull", torch.zeros(()))
        scale = pyro.param("scale", torch.zeros(()))
        mean = pyro.sample("mean", dist.Normal(loc, log_scale.exp()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x + pull * mean, scale.exp()))

    settings = {"batch_size": 16, "epochs": 120, "learning_rate": 0.05, "schedule": "cosine"}
    pv.fit(hierarchy, guide, x, objective=many_draws(), **settings, **OPTIONS)
    mean, deviation = posterior_of_mean(x, math.sqrt(NOISE**2 + 1))
    assert abs(pyro.param("loc").item() - mean) < 0.1 * deviation
    assert pyro.param("log_scale").exp().item() == pytest.approx(deviation, rel=0.03)
    assert pyro.param("scale").exp().item() == pytest.approx(math.sqrt(0.8), rel=0.03)


@pytest.mark.slow
def test_a_mean_field_guide_ends_at_its_own_optimum():
    """Its deviation of the shared mean is 0.707 of the posterior's where both variances are 1."""
    x = 1.5 + math.sqrt(2) * torch.randn(N)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), WIDTH))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mean_guide(x)
        slope, offset = pyro.param("slope", torch.zeros(())), pyro.param("offset", torch.zeros(()))
        scale = pyro.param("scale", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x + offset, scale.exp()))

    settings = {"batch_size": 16, "epochs": 120, "learning_rate": 0.05, "schedule": "cosine"}
    pv.fit(model, guide, x, objective=many_draws(), **settings, **OPTIONS)
    mean, deviation = posterior_of_mean(x, math.sqrt(2))
    own = 1 / math.sqrt(1 / WIDTH**2 + N)  # of the mean given every z
    assert own / deviation == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert abs(pyro.param("loc").item() - mean) < 0.1 * deviation
    assert pyro.param("log_scale").exp().item() == pytest.approx(own, rel=0.03)
    assert pyro.param("scale").exp().item() == pytest.approx(math.sqrt(0.5), rel=0.03)


def test_auto_guides_of_shared_latents_take_batches_and_others_all_the_data():
    x = data()
    guide = AutoDiagonalNormal(normal_mean())
    result = pv.fit(normal_mean(), guide, x, batch_size=100, epochs=1, **OPTIONS)
    assert result.history["global_rate"].shape == (1,)
    for kind in (AutoDiagonalNormal, AutoNormal):
        pyro.clear_param_store()
        with pytest.raises(pv.InputError, match=r"one joint draw.*batch_size=len\(x\)"):
            pv.fit(hierarchy, kind(hierarchy), x, batch_size=100, epochs=1, **OPTIONS)
        result = pv.fit(hierarchy, kind(hierarchy), x, batch_size=N, epochs=1, **OPTIONS)
        assert math.isnan(result.history["global_rate"][0]) is (kind is AutoDiagonalNormal)


def test_objectives_that_weigh_each_data_point_refuse_shared_latents():
    with pytest.raises(pv.InputError, match="'mean' of the guide inside the data plate"):
        pv.fit(normal_mean(), mean_guide, data(), objective=infer.IWAE(3), epochs=1, **OPTIONS)
    with pytest.raises(pv.InputError, match="'x' of the model inside the data plate 'elsewhere'"):
        pv.fit(normal_mean(), mean_guide, data(), plate="elsewhere", epochs=1, **OPTIONS)


def mixture(x):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        kind = pyro.sample(
            "kind", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])), infer={"enumerate": "parallel"}
        )
        pyro.sample("x", dist.Normal(locs[kind], NOISE), obs=x)


def test_the_history_under_enumeration_is_the_objectives():
    x = data()
    guide = AutoNormal(poutine.block(mixture, hide=["kind"]))
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    settings = {"batch_size": 100, "epochs": 2, "validation": x}
    history = pv.fit(mixture, guide, x, objective=objective, **settings, **OPTIONS).history
    torch.testing.assert_close(
        *(torch.from_numpy(history[name]) for name in ("train_elbo", "train_bound")),
        rtol=1e-5,
        atol=1e-5,
    )
    assert torch.tensor(history["validation_elbo"]).isfinite().all()
    assert (history["global_rate"] > 0).all()
    joint = pv.log_weights(mixture, guide, x, num_samples=2, plate=None)
    assert joint.shape == (2, 1)
    with pytest.raises(pv.InputError, match="no warm-up where 'kind' is summed out"):
        pv.fit(mixture, guide, x, objective=objective, beta=0.5, epochs=1, **OPTIONS)
