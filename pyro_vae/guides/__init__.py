"""Variational families q(z given x): modules that turn data into an approximate posterior."""

from pyro_vae.guides.base import VariationalFamily
from pyro_vae.guides.beta import Beta
from pyro_vae.guides.flows import InverseAutoregressiveFlow, NeuralSplineFlow
from pyro_vae.guides.mixture import MixtureOfNormals
from pyro_vae.guides.normal import FullRankNormal, MeanFieldNormal
from pyro_vae.guides.von_mises_fisher import VonMisesFisher

__all__ = [
    "Beta",
    "FullRankNormal",
    "InverseAutoregressiveFlow",
    "MeanFieldNormal",
    "MixtureOfNormals",
    "NeuralSplineFlow",
    "VariationalFamily",
    "VonMisesFisher",
]
