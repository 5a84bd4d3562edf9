"""Pairs compared on equal terms: the same data, the same draws' budget, paired differences."""

from pyro_vae.evaluation.comparison.measure import compare
from pyro_vae.evaluation.comparison.result import Comparison, Difference, Measured

__all__ = ["Comparison", "Difference", "Measured", "compare"]
