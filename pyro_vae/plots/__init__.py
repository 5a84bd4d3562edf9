"""Pictures: arrays in, a matplotlib Figure out; knows no model and touches no global state.

``limits`` are everywhere the values shown as white and as black.
"""

from pyro_vae.plots.comparison import (
    autoencoder_and_vae,
    datum_against_datum,
    families_and_runs,
    observed_and_replicated,
    paired_differences,
    prior_and_aggregate,
    rank_histograms,
)
from pyro_vae.plots.curves import rate_distortion, training_curves, weight_diagnostics
from pyro_vae.plots.images import completions, image_grid, is_image, reconstructions, samples
from pyro_vae.plots.latent import interpolations, latent_scatter, manifold, traversals

__all__ = [
    "autoencoder_and_vae", "completions", "datum_against_datum", "families_and_runs", "image_grid",
    "interpolations", "is_image", "latent_scatter", "manifold", "observed_and_replicated",
    "paired_differences", "prior_and_aggregate", "rank_histograms", "rate_distortion",
    "reconstructions", "samples", "training_curves", "traversals", "weight_diagnostics",
]  # fmt: skip
