"""What is split into blocks or shuffled is first shown to be divisible, by a trial at an offset."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.pair.opened import open_pair

N = 40


def data(num=N):
    return torch.linspace(-2.0, 2.0, num)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.7))


def guide_of(loc_of):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc_of(x), 0.7))

    return guide


def amortised():
    return model, guide


def rows_in_pyros_store():
    return model, guide_of(lambda x: pyro.param("loc", torch.zeros(len(x))))


def sliced_rows_that_start_equal():
    return model, guide_of(lambda x: pyro.param("loc", torch.zeros(N))[: len(x)])


def rows_of_a_module():
    table = nn.Embedding(N, 1)
    nn.init.zeros_(table.weight)
    return model, guide_of(lambda x: table(torch.arange(len(x)))[:, 0])


def table_that_the_model_closes_over():
    offset = torch.linspace(0.0, 5.0, N)

    def shifted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + offset[: len(x)], 1.0), obs=x)

    return shifted, guide


def groups_that_begin_alike():
    """The first data points are all of one group: the offset alone would not show it."""
    group = (torch.arange(N) >= N - 3).long()
    means = torch.tensor([0.0, 4.0])

    def grouped(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(means[group[: len(x)]], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return grouped, guide


def attribute_of_a_module():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = torch.linspace(0.0, 5.0, N)  # no buffer

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.offset[: len(x)], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Shifted(), guide


def autonormal():
    return model, AutoNormal(model)


def autodiagonal():
    return model, AutoDiagonalNormal(model)


def statistics_of_the_batch():
    return model, guide_of(lambda x: 0.5 * (x - x.mean()))


def as_wide_as_the_data_are_many():
    """A layer as wide as the data are many gives each datum its own value all the same."""
    layer = nn.Sequential(nn.Linear(1, N), nn.Tanh(), nn.Linear(N, 1))
    return model, guide_of(lambda x: layer(x[:, None])[:, 0])


def pseudo_inputs_as_many_as_the_data():
    inputs = torch.linspace(-1.0, 1.0, N)

    def vamp(x):
        with pyro.plate("data", len(x)):
            components = dist.Normal(0.5 * inputs, 0.7)
            mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(N)), components)
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return vamp, guide


def dropout_and_batch_norm():
    layer = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    return model, guide_of(lambda x: layer(x[:, None])[:, 0])


DIVISIBLE = (
    amortised,
    as_wide_as_the_data_are_many,
    pseudo_inputs_as_many_as_the_data,
    dropout_and_batch_norm,
)
WHOLE = (
    rows_in_pyros_store,
    sliced_rows_that_start_equal,
    rows_of_a_module,
    table_that_the_model_closes_over,
    groups_that_begin_alike,
    attribute_of_a_module,
    autonormal,
    autodiagonal,
    statistics_of_the_batch,
)


@pytest.mark.parametrize("kind", [*DIVISIBLE, *WHOLE], ids=lambda kind: kind.__name__)
def test_a_trial_tells_and_leaves_the_pair_as_it_was(kind):
    pair = open_pair(*kind(), data())
    modules = pair.modules()
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    modes, state = [module.training for module in modules], torch.get_rng_state()
    assert pair.is_divisible() is (kind in DIVISIBLE)
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert modes == [module.training for module in modules]
    assert torch.equal(state, torch.get_rng_state())
    assert "loc" not in pyro.get_param_store()


@pytest.mark.parametrize("num_data", [1024, 1025, 1500])
def test_a_table_per_datum_is_never_cut_into_blocks(num_data):
    """log p(x) is exact on either side of the number of data that one block holds."""
    offset = torch.linspace(-3.0, 3.0, num_data, dtype=torch.float64)

    def shifted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + offset[: len(x)], 0.5), obs=x)

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * (x - offset[: len(x)]), 0.2**0.5))

    x = offset + 1.25**0.5 * torch.randn(num_data, dtype=torch.float64)
    exact = dist.Normal(offset, 1.25**0.5).log_prob(x)
    estimate = pv.log_marginal(shifted, posterior, x, num_samples=5, seed=0)
    torch.testing.assert_close(estimate.log_prob, exact, rtol=0, atol=1e-9)


def test_what_is_divisible_is_cut():
    pair = open_pair(model, guide, data(2500))
    assert [rows.stop - rows.start for rows in pair.split()] == [834, 834, 834]
    assert len(open_pair(*table_that_the_model_closes_over(), data()).split(10)) == 1


def test_values_beyond_the_first_block_are_checked_too():
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    x = (data(1500) > 0).float()
    assert pv.log_marginal(counts, guide, x, num_samples=2, seed=0).log_prob.isfinite().all()
    x[1400] = 0.5
    with pyro.validation_enabled(False), pytest.raises(pv.InputError, match="'x' of the model"):
        pv.log_marginal(counts, guide, x, num_samples=2, seed=0)
