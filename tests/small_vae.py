"""The smallest VAE that learns: six pixels, two latents."""

import torch

import pyro_vae as pv

PIXELS = 6


def make_vae(seed=0):
    torch.manual_seed(seed)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((PIXELS,), (8,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (PIXELS,)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )
