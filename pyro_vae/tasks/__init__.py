"""What a trained pair is used for."""

from pyro_vae.tasks.baseline import AutoencoderComparison, compare_autoencoder
from pyro_vae.tasks.completion import Completion, complete
from pyro_vae.tasks.encoding import decode, encode
from pyro_vae.tasks.generation import generate, reconstruct
from pyro_vae.tasks.missing import nan_as_missing, observed_pair
from pyro_vae.tasks.traversal import Manifold, Traversal, interpolate, manifold, traverse

__all__ = [
    "AutoencoderComparison",
    "Completion",
    "Manifold",
    "Traversal",
    "compare_autoencoder",
    "complete",
    "decode",
    "encode",
    "generate",
    "interpolate",
    "manifold",
    "nan_as_missing",
    "observed_pair",
    "reconstruct",
    "traverse",
]
