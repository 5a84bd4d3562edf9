"""What a trained pair is used for."""

from pyro_vae.tasks.autoencoder_comparison import AutoencoderComparison, compare_autoencoder
from pyro_vae.tasks.completion import Completion, complete
from pyro_vae.tasks.generation import decode, encode, generate, reconstruct
from pyro_vae.tasks.interpolation import Manifold, Traversal, interpolate, manifold, traverse
from pyro_vae.tasks.missing import nan_as_missing, observed_pair

__all__ = [
    "AutoencoderComparison", "Completion", "Manifold", "Traversal", "compare_autoencoder",
    "complete", "decode", "encode", "generate", "interpolate", "manifold", "nan_as_missing",
    "observed_pair", "reconstruct", "traverse",
]  # fmt: skip
