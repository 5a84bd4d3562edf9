"""What a type checker says to a user: `make lint` checks this file, where unused ignores fail."""

import numpy as np
import torch

import pyro_vae as pv


def use() -> pv.FitResult:
    """Any data that `fit` takes pass; names that are not there don't."""
    encoder, decoder = pv.networks.MLPEncoder((4,)), pv.networks.MLPDecoder(2)
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    vae = pv.VAE(pv.priors.StandardNormal(2), pv.likelihoods.Gaussian(decoder, (4,)), guide)
    for data in (np.zeros((10, 4)), torch.zeros(10, 4), [torch.zeros(5, 4)] * 2):
        result = pv.fit(vae.model, vae.guide, data, epochs=1)
    pv.nothing_there()  # type: ignore[attr-defined]
    pv.evaluation.nothing_there()  # type: ignore[attr-defined]
    return result
