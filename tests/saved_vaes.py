"""The VAEs that the tests of run folders save, and how two of them are compared."""

import torch

import pyro_vae as pv

SHAPE, LATENT = (1, 4, 4), 2


def make_vae(prior=None, likelihood="Bernoulli", guide="MeanFieldNormal", **options):
    encoder = pv.networks.MLPEncoder(SHAPE, (8,), activation="tanh")
    decoder = pv.networks.MLPDecoder(LATENT, (8,), activation="tanh")
    return pv.VAE(
        prior or pv.priors.StandardNormal(LATENT),
        getattr(pv.likelihoods, likelihood)(decoder, SHAPE, **options),
        getattr(pv.guides, guide)(encoder, LATENT),
    )


def outputs(vae, x):
    """Return everything the components say of fixed data and latents."""
    vae.eval()
    with torch.no_grad():
        q = vae.variational_family(x)
        z = q.sample()
        return [vae.prior().log_prob(z), vae.likelihood(z).log_prob(x), q.log_prob(z)]


def same_outputs(first, second, x=None):
    x = torch.rand(5, *SHAPE) if x is None else x
    results = []
    for vae in (first, second):
        torch.manual_seed(0)
        results.append(outputs(vae, x))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
