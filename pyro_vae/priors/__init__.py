"""Priors p(z): modules whose call returns the distribution of one datum's latent vector."""

from pyro_vae.priors.base import Prior
from pyro_vae.priors.beta import Beta
from pyro_vae.priors.flow import FlowPrior
from pyro_vae.priors.gaussian_mixture import GaussianMixture
from pyro_vae.priors.normal import StandardNormal
from pyro_vae.priors.sphere import HypersphericalUniform, VonMisesFisher
from pyro_vae.priors.vamp import VampPrior

__all__ = [
    "Beta",
    "FlowPrior",
    "GaussianMixture",
    "HypersphericalUniform",
    "Prior",
    "StandardNormal",
    "VampPrior",
    "VonMisesFisher",
]
