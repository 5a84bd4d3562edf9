"""A guide must reach wherever the prior has mass; what can't be decided passes."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms

from pyro_vae import distributions
from pyro_vae.errors import InputError
from pyro_vae.pair.contract import check_guide_support

ONE, TWO = torch.ones(()), torch.ones(2)


def normal(size=2):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def squashed():
    normals = dist.Normal(torch.zeros(2), 1.0)
    return dist.TransformedDistribution(normals, transforms.SigmoidTransform()).to_event(1)


def check(prior, guide):
    check_guide_support({"name": "z", "fn": guide}, {"name": "z", "fn": prior})


SMALLER = {
    "half line": (normal(), dist.LogNormal(torch.zeros(2), 1.0).to_event(1)),
    "half normal": (dist.Normal(0.0, 1.0), dist.HalfNormal(ONE)),
    "box": (normal(), dist.Beta(TWO, TWO).to_event(1)),
    "simplex": (normal(), dist.Dirichlet(TWO)),
    "sphere": (normal(3), distributions.VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), ONE)),
    "upper half of a box": (dist.Uniform(-2 * TWO, 2.0), dist.Uniform(0 * TWO, 2.0)),
    "one datum's box": (
        dist.Uniform(0.0, 1.0),
        dist.Uniform(torch.zeros(3), torch.tensor([1, 1, 0.9])),
    ),
    "unit interval of the half line": (dist.Gamma(TWO, 1.0), dist.Beta(TWO, TWO)),
    "transformed": (dist.Uniform(-1 * TWO, 1.0).to_event(1), squashed()),
    "fewer categories": (dist.Categorical(torch.ones(4)), dist.Categorical(torch.ones(3, 3))),
    "truncated counts": (dist.Poisson(TWO), dist.Categorical(torch.ones(2, 5))),
    "whole numbers for a line": (dist.Normal(0.0, 1.0), dist.Poisson(ONE)),
    "expanded": (normal().expand([5]), dist.Beta(TWO, TWO).to_event(1).expand([5])),
    "masked": (normal().mask(torch.tensor(True)), dist.Beta(TWO, TWO).to_event(1)),
}
WIDE_ENOUGH = {
    "the same": (normal(), normal()),
    "wider": (dist.HalfNormal(TWO), dist.Normal(TWO, 1.0)),
    "open and closed ends": (dist.Exponential(TWO), dist.LogNormal(TWO, 1.0)),
    "closed and open ends": (dist.LogNormal(TWO, 1.0), dist.Exponential(TWO)),
    "box in another's words": (dist.Uniform(0 * TWO, 1.0), dist.Beta(TWO, TWO)),
    "transformed": (dist.Beta(TWO, TWO).to_event(1), squashed()),
    "simplex": (dist.Dirichlet(TWO), dist.Dirichlet(2 * TWO)),
    "point mass": (dist.HalfNormal(TWO).to_event(1), dist.Delta(TWO, event_dim=1)),
    "mixture": (
        normal(),
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 2), 1.0).to_event(1)
        ),
    ),
    "sphere": (
        distributions.HypersphericalUniform(3),
        distributions.VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), ONE),
    ),
    "bits": (dist.Bernoulli(0.5 * TWO), dist.Categorical(torch.ones(2, 2))),
    "relaxed bits": (dist.Bernoulli(0.5 * TWO), dist.Beta(TWO, TWO)),
    "not known": (dist.LKJCholesky(3), dist.MultivariateNormal(torch.zeros(3), torch.eye(3))),
}


@pytest.mark.parametrize("case", SMALLER)
def test_a_smaller_support_is_refused(case):
    with pytest.raises(InputError, match="draws 'z' wherever the prior has mass") as caught:
        check(*SMALLER[case])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", WIDE_ENOUGH)
def test_a_support_that_holds_the_priors_passes(case):
    check(*WIDE_ENOUGH[case])


def test_stacked_supports_are_compared_one_by_one():
    class Stacked(dist.TorchDistribution):
        def __init__(self, *parts):
            super().__init__(event_shape=torch.Size([len(parts)]), validate_args=False)
            self.parts = parts

        @property
        def support(self):
            return torch.distributions.constraints.stack([part.support for part in self.parts])

    prior = Stacked(dist.Normal(0.0, 1.0), dist.Gamma(ONE, ONE))
    check(prior, Stacked(dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)))
    with pytest.raises(InputError, match="wherever the prior has mass"):
        check(prior, Stacked(dist.LogNormal(0.0, 1.0), dist.LogNormal(0.0, 1.0)))
    with pytest.raises(InputError, match="wherever the prior has mass"):
        check(prior, Stacked(dist.Normal(0.0, 1.0), dist.Beta(ONE, ONE)))
