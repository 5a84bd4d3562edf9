"""Pictures: arrays in, a matplotlib Figure out; knows no model and touches no global state."""

from pyro_vae.plots.curves import training_curves, weight_diagnostics
from pyro_vae.plots.images import image_grid, is_image, reconstructions, samples

__all__ = [
    "image_grid",
    "is_image",
    "reconstructions",
    "samples",
    "training_curves",
    "weight_diagnostics",
]
