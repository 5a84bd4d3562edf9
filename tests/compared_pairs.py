"""Small pairs that comparisons are made of, and how they are compared quickly."""

import torch

import pyro_vae as pv
from pyro_vae.evaluation.comparison_result import Measured
from pyro_vae.evaluation.elbo import PerDatum

QUICK = {"num_samples": 500, "num_elbo_samples": 200, "seed": 0}


def small_vae(likelihood="Bernoulli", family="MeanFieldNormal", prior=None, data_shape=(6,)):
    guide = getattr(pv.guides, family)(pv.networks.MLPEncoder(data_shape, (8,)), 2)
    prior = pv.priors.StandardNormal(2) if prior is None else prior(guide)
    decoder = pv.networks.MLPDecoder(2, (8,))
    return pv.VAE(prior, getattr(pv.likelihoods, likelihood)(decoder, data_shape), guide)


def pair_of(vae):
    return vae.model, vae.guide


def bits(num_data=24, size=6):
    return (torch.rand(num_data, size) < 0.5).float()


def values_of(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def unchanged(vae, before):
    return all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def measured(value, error=0.01):
    """Make up what was measured of one run from its log p(x) per datum."""
    value = torch.as_tensor(value, dtype=torch.float64)
    error = torch.as_tensor(error, dtype=torch.float64).expand_as(value)
    quantity, zero = PerDatum(value, error), torch.zeros_like(value)
    estimate = pv.LogMarginal(value, error, zero + 5, zero, zero, -value, zero + 10, zero)
    return Measured(
        quantity, quantity, quantity, None, PerDatum(zero, zero), quantity, True, None, estimate,
        10, 5, 0.1, None,
    )  # fmt: skip


def comparison_of(**runs):
    """Put made-up runs together."""
    return pv.Comparison(runs, "probability", 50, 10, None, 0)
