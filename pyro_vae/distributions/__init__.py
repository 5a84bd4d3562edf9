"""Distributions that Pyro lacks, whoever returns them, with their closed-form KL divergences."""

from . import kl  # noqa: F401  (registers the divergences with torch.distributions)
from .sphere import HypersphericalUniform, unit_sphere
from .von_mises_fisher import VonMisesFisher

__all__ = ["HypersphericalUniform", "VonMisesFisher", "unit_sphere"]
