"""Pairs that have no importance weight per datum are refused, with the site's name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from weight_pairs import N, auxiliary, hierarchical, normal

import pyro_vae as pv
from pyro_vae.errors import InputError


def test_auxiliary_variable_that_is_mixed_over_is_refused():
    model, _, inputs = auxiliary()

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", normal(torch.zeros(2)), infer={"is_auxiliary": True})
            pyro.sample("z", normal(noise))

    with pytest.raises(InputError, match="'noise'"):
        pv.log_weights(model, guide, inputs, num_samples=2)


def test_point_mass_is_refused():
    model, _, inputs = auxiliary()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    with pytest.raises(InputError, match="'z'"):
        pv.log_weights(model, guide, inputs, num_samples=2)


@pytest.mark.parametrize("scale", [0.5, torch.linspace(0.5, 1.0, N)], ids=["number", "per datum"])
def test_a_scale_of_the_users_own_is_refused(scale):
    model, guide, inputs = hierarchical()

    def scaled(x):
        with poutine.scale(scale=scale):
            model(x)

    with pytest.raises(InputError, match=r"scale on site '(top|low|x)'.*poutine.scale"):
        pv.log_weights(scaled, guide, inputs, num_samples=2)


def test_sites_the_data_share_are_refused():
    model, guide, inputs = hierarchical()

    def shared_latent(x):
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        model(x)

    def shared_guide(x):
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        guide(x)

    def factor(x):
        model(x)
        pyro.factor("penalty", torch.tensor(1.0))

    def loop(x):
        for index in pyro.plate("data", len(x)):
            pyro.sample(f"z{index}", normal(torch.zeros(2)))

    with pytest.raises(InputError, match="latent 'shared'"):
        pv.log_weights(shared_latent, shared_guide, inputs, num_samples=2)
    with pytest.raises(InputError, match="observed site 'penalty'"):
        pv.log_weights(factor, guide, inputs, num_samples=2)
    with pytest.raises(InputError, match="latent 'z0'"):
        pv.log_weights(loop, loop, inputs, num_samples=2)


def test_latents_of_one_side_only_are_refused():
    model, guide, inputs = hierarchical()

    def surplus(x):
        guide(x)
        with pyro.plate("more", 3, dim=-2), pyro.plate("data_", len(x), dim=-1):
            pyro.sample("extra", dist.Normal(0.0, 1.0))

    def too_few(x):
        with pyro.plate("data", len(x)):
            pyro.sample("low", normal(x[:, :3]))

    with pytest.raises(InputError, match="'top' is missing"):
        pv.log_weights(model, too_few, inputs, num_samples=2)
    with pytest.raises(InputError, match="'extra' is not"):
        pv.log_weights(model, surplus, inputs, num_samples=2)
    with pytest.raises(InputError, match="draws a latent"):
        pv.log_weights(lambda x: None, lambda x: None, inputs, num_samples=2)


def test_a_plate_that_subsamples_the_batch_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", normal(x[index]))

    with pytest.raises(InputError, match=r"'z'.*7 data.*got 3"):
        pv.log_weights(model, guide, torch.randn(N, 2), num_samples=2)


def test_a_site_that_broadcast_over_the_data_twice_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)  # z is (N, 1): the log-density is (N, N)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, None], 0.7).to_event(1))

    with pyro.validation_enabled(False), pytest.raises(pv.InputError, match="squeeze"):
        pv.log_weights(model, guide, torch.randn(6), num_samples=2)


def test_a_model_that_observes_nothing_is_refused():
    def function(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))

    with pytest.raises(pv.InputError, match="observes data"):
        pv.log_weights(function, function, torch.randn(6), num_samples=2)


def test_a_latent_of_other_event_dimensions_in_model_and_guide_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            # Event shape (1, 2): the plate's data would be summed over.
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x))

    with pytest.raises(InputError, match="event dimensions for 'z', got 2 in the model and 1 in"):
        pv.log_weights(model, guide, torch.zeros(5, 2), num_samples=2)
