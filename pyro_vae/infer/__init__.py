"""Importance weights, objectives, the compiled step and the training loop over a model/guide pair."""

from pyro_vae.infer.compiled import CompiledTrace_ELBO
from pyro_vae.infer.log_weights import log_weights
from pyro_vae.infer.objectives import scale_latents
from pyro_vae.infer.optim import FusedOptim
from pyro_vae.infer.training import FitResult, bound_terms, fit

__all__ = [
    "CompiledTrace_ELBO",
    "FitResult",
    "FusedOptim",
    "bound_terms",
    "fit",
    "log_weights",
    "scale_latents",
]
