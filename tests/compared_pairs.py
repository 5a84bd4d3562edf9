"""Small pairs that comparisons are made of, and how they are compared quickly."""

import torch

import pyro_vae as pv

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
