"""Importance weights, objectives, the compiled step and the training loop over a model/guide pair."""

from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound
from pyro_vae.infer.compiled import Compiled, CompiledTrace_ELBO
from pyro_vae.infer.divergences import AnalyticKL, FreeBits
from pyro_vae.infer.importance_weighted import IWAE
from pyro_vae.infer.log_weights import log_weights
from pyro_vae.infer.objectives import scale_latents
from pyro_vae.infer.optim import FusedOptim
from pyro_vae.infer.pathwise import StickingTheLanding
from pyro_vae.infer.training import FitResult, bound_terms, fit

__all__ = [
    "IWAE",
    "AnalyticKL",
    "Bound",
    "BoundTerms",
    "Compiled",
    "CompiledTrace_ELBO",
    "FitResult",
    "FreeBits",
    "FusedOptim",
    "StickingTheLanding",
    "TraceBound",
    "bound_terms",
    "fit",
    "log_weights",
    "scale_latents",
]
