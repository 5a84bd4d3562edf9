"""Data simulated from a model: which pairs they can be simulated from, and which are refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.errors import InputError
from pyro_vae.evaluation import bidirectional, calibration

F64 = torch.float64
FEW = {"num_data": 100, "num_draws": 19, "num_bins": 20, "seed": 0}


def normal_guide(*inputs):
    with pyro.plate("data", len(inputs[0])):
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def model_of(likelihood):
    """Observe what ``likelihood`` does inside the data plate, given z ``(N, 1)``."""

    def model(*inputs):
        with pyro.plate("data", len(inputs[0])):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            likelihood(z, *inputs)

    return model


def looks_back(z, x):
    mean = torch.cat([z, x[:, :1] + z], 1)  # the second value follows the first
    pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def seen_twice(z, x):
    pyro.sample("first", dist.Normal(z.expand(-1, 2), 1.0).to_event(1), obs=x)
    pyro.sample("second", dist.Normal(z.expand(-1, 2), 1.0).to_event(1), obs=x)


def transposed(z, x):
    with pyro.plate("pixels", 2, dim=-2):
        pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x.T)


def fixed(z, x):
    offset = torch.zeros(4, 2)
    pyro.sample("x", dist.Normal(z + offset, 1.0).to_event(1), obs=x)


def plain(z, x):
    pyro.sample("x", dist.Normal(z.expand(-1, 2), 1.0).to_event(1), obs=x)


REFUSED = {
    "data used elsewhere": (looks_back, torch.zeros(4, 2), "the density at 'x' changes with them"),
    "one input, two sites": (seen_twice, torch.zeros(4, 2), "'first' and 'second' observe the same"),
    "another order": (transposed, torch.zeros(4, 2), "'x' to observe an input as it is"),
    "a fixed number": (fixed, torch.zeros(4, 2), "any number of data points, .* an error for 100: "),
    "whole numbers": (plain, torch.zeros(4, 2, dtype=torch.long), "floating-point data at 'x'"),
}


@pytest.mark.parametrize("study", [calibration, bidirectional])
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_no_data_can_be_simulated_from_are_refused(case, study):
    likelihood, x, message = REFUSED[case]
    options = FEW if study is calibration else {"num_data": 100, "num_steps": 3}
    with pytest.raises(InputError, match=message) as caught:
        study(model_of(likelihood), normal_guide, x, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_guide_with_parameters_per_datum_takes_its_own_number_of_data():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(4, 1), 1.0).to_event(1))

    model, x = model_of(plain), torch.zeros(4, 2)
    options = {"num_leapfrog_steps": 2, "start": "guide", "seed": 0}
    bounds = bidirectional(model, guide, x, num_steps=30, num_chains=4, **options)
    (drawn,) = bounds.x
    covariance = torch.eye(2) + 1
    exact = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(drawn).double()
    assert (bounds.lower < exact + 0.5).all()
    assert (bounds.upper > exact - 0.5).all()
    with pytest.raises(InputError, match="a pair that takes any number of data points"):
        calibration(model, guide, x, **FEW)


def test_data_that_the_model_sees_in_another_shape_are_simulated_in_their_own():
    def flat(z, x):
        pyro.sample("x", dist.Normal(z.expand(-1, 4), 0.01).to_event(1), obs=x.flatten(1))

    result = calibration(model_of(flat), normal_guide, torch.zeros(3, 2, 2), **FEW)
    assert result.x[0].shape == (100, 2, 2)
    spread = result.x[0].flatten(1).std(1)
    assert (spread < 0.05).all()  # a datum's values are about one latent, other data's are not
    assert result.x[0].std() > 0.5


def test_conditions_and_a_second_observed_site_are_simulated_together():
    def chained(z, x, y):
        y = pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=y)
        pyro.sample("x", dist.Normal(y, 0.1).to_event(1), obs=x)

    inputs = torch.zeros(5, 1, dtype=F64), torch.zeros(5, 1, dtype=F64)
    result = calibration(model_of(chained), normal_guide, inputs, **FEW)
    x, y = result.x
    assert (x - y).std() < 0.1 * (1 + 5 / math.sqrt(2 * 100))
    assert y.std() > 0.5
