"""Pairs of one number of data, and pairs that subsample: the right answer, or one line."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import tasks

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
LOC = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ WEIGHT, 0.5), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(x[:, :2], 0.1))


def own_guide(x):
    """A guide with parameters per datum."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(LOC, 0.1))


def own_model(x):
    """A model with parameters per datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ WEIGHT + torch.arange(N)[:, None], 0.5), obs=x)


def subsampling(function):
    """Take four of the data at random."""

    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            function(x[rows])

    return subsampled


@subsampling
def few_model(x):
    z = pyro.sample("z", normal(torch.zeros(2)))
    pyro.sample("x", normal(z @ WEIGHT, 0.5), obs=x)


@subsampling
def few_guide(x):
    pyro.sample("z", normal(x[:, :2], 0.1))


def test_parameters_per_datum_in_the_guide_are_served():
    assert tasks.encode(own_guide, X).equal(LOC)
    walk = tasks.traverse(model, own_guide, X, num_steps=3)
    assert walk.data.shape == (2, 3, N, 3)
    # The first coordinate moves the first value, the second stays at the code.
    torch.testing.assert_close(walk.data[0, :, :, 1], LOC[:, 1].expand(3, N))
    sheet = tasks.manifold(model, own_guide, X, num_steps=3)
    assert sheet.data.shape == (3, 3, 3)
    way = tasks.interpolate(model, own_guide, X, X.flip(0), num_steps=3)
    torch.testing.assert_close(way[0], LOC @ WEIGHT)
    rebuilt = tasks.reconstruct(model, own_guide, X, seed=0)
    assert ((rebuilt - LOC @ WEIGHT).abs() < 1).all()
    drawn = tasks.generate(model, torch.zeros(50, 3), guide=own_guide, data=X, seed=0)
    assert drawn.shape == (50, 3)
    missing = torch.tensor([True, False, False]).expand(N, 3)
    for method in tasks.completion.METHODS:
        options = {"num_samples": 50} if method == "importance" else {"num_steps": 5}
        options |= {"method": method, "num_draws": 2, "seed": 0}
        filled = tasks.complete(model, own_guide, X, missing, **options)
        assert filled.draws[:, ~missing].equal(X[~missing].expand(2, -1))


ANY_NUMBER = "expected a model that takes any number of data.* got an error for"
FIXED_MODEL = {
    "decode": lambda: tasks.decode(own_model, LOC, X),
    "traverse": lambda: tasks.traverse(own_model, guide, X),
    "manifold": lambda: tasks.manifold(own_model, guide, X),
    "interpolate": lambda: tasks.interpolate(own_model, guide, X, X.flip(0)),
    "compare_autoencoder": lambda: tasks.compare_autoencoder(
        pv.Autoencoder(pv.networks.MLPEncoder((3,), (4,)), pv.networks.MLPDecoder(2, (4,))),
        own_model,
        guide,
        X,
        X,
    ),
}


@pytest.mark.parametrize("task", FIXED_MODEL)
def test_parameters_per_datum_in_the_model_are_refused_where_others_are_decoded(task):
    with pytest.raises(pv.InputError, match=ANY_NUMBER) as caught:
        FIXED_MODEL[task]()
    assert "\n" not in str(caught.value)


def test_parameters_per_datum_in_the_model_are_served_where_the_data_are_these():
    drawn = tasks.generate(own_model, X, mean=False, seed=0)
    assert drawn.shape == X.shape
    rebuilt = tasks.reconstruct(own_model, guide, X, seed=0)
    expected = X[:, :2] @ WEIGHT + torch.arange(N)[:, None]
    assert ((rebuilt - expected).abs() < 1).all()


SUBSAMPLED = {
    "encode": lambda: tasks.encode(few_guide, X),
    "decode": lambda: tasks.decode(few_model, LOC, X),
    "generate": lambda: tasks.generate(few_model, X),
    "generate from data": lambda: tasks.generate(model, X, guide=few_guide),
    "reconstruct": lambda: tasks.reconstruct(few_model, few_guide, X),
    "traverse": lambda: tasks.traverse(few_model, few_guide, X),
    "traverse by the model": lambda: tasks.traverse(few_model, guide, X),
    "interpolate": lambda: tasks.interpolate(few_model, guide, X, X),
    "manifold": lambda: tasks.manifold(few_model, guide, X),
    "complete": lambda: tasks.complete(few_model, few_guide, X, X > 0),
}


@pytest.mark.parametrize("task", SUBSAMPLED)
def test_pairs_that_subsample_are_refused(task):
    with pytest.raises(pv.InputError, match=r"expected (site|a model that takes)") as caught:
        SUBSAMPLED[task]()
    assert "\n" not in str(caught.value)


def test_a_batch_of_a_larger_data_set_is_served():
    """The idiom of Pyro for training: the plate knows how many data there are in all."""

    def batch_model(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z @ WEIGHT, 0.5), obs=x)

    def batch_guide(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            pyro.sample("z", normal(x[:, :2], 0.1))

    code = tasks.encode(batch_guide, X)
    assert code.equal(X[:, :2])
    torch.testing.assert_close(tasks.decode(batch_model, code, X), code @ WEIGHT)
    assert tasks.reconstruct(batch_model, batch_guide, X).shape == X.shape
    walk = tasks.traverse(batch_model, batch_guide, X[:1], dimensions=[0], num_steps=3)
    assert walk.data.shape == (1, 3, 1, 3)


def test_a_plate_that_goes_datum_by_datum_is_refused():
    def one_by_one(x):
        for row in pyro.plate("data", len(x)):
            pyro.sample(f"z_{row}", normal(x[row, :2]))

    with pytest.raises(pv.InputError, match="'z_0' inside the data plate 'data', got one outside"):
        tasks.encode(one_by_one, X)


def test_categories_have_no_mean_and_are_drawn():
    def categories(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", dist.Categorical(logits=z @ WEIGHT), obs=x)

    def code_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(torch.zeros(len(x), 2)))

    x = torch.arange(N) % 3
    for task in (
        lambda mean: tasks.generate(categories, x, mean=mean),
        lambda mean: tasks.reconstruct(categories, code_guide, x, mean=mean),
        lambda mean: tasks.decode(categories, LOC, x, mean=mean),
    ):
        with pytest.raises(
            pv.InputError, match="expected Categorical at 'x' to have a mean, got NaN: draw"
        ):
            task(True)
        assert task(False).max() < 3


def test_a_reconstruction_needs_every_latent():
    def partial_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("other", normal(x[:, :2]))

    with pytest.raises(pv.InputError, match="a guide that draws every latent, 'z' is missing"):
        tasks.reconstruct(model, partial_guide, X)


def test_a_guide_of_point_masses_is_served():
    """The most probable code of each datum, as Pyro's AutoDelta has it."""

    def most_probable(x):
        loc = pyro.param("loc", LOC.clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(loc, event_dim=1))

    torch.testing.assert_close(tasks.reconstruct(model, most_probable, X), LOC @ WEIGHT)
    for mean in (True, False):
        code = tasks.encode(most_probable, X, mean=mean)
        assert not code.requires_grad


def test_codes_and_means_are_no_parameters():
    """What is done to them in place is not done to the pair."""

    def learned_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(pyro.param("code", LOC.clone()), 0.1))

    def learned_model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(pyro.param("mean", X.clone())), obs=x)

    code = tasks.encode(learned_guide, X)
    mean = tasks.reconstruct(learned_model, learned_guide, X)
    assert not code.requires_grad
    assert not mean.requires_grad
    code.zero_()
    mean.zero_()
    assert pyro.param("code").equal(LOC)
    assert pyro.param("mean").equal(X)
