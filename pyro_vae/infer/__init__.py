"""Objectives, the compiled step and the training loop over a model/guide pair."""

from pyro_vae.beta import scale_latents
from pyro_vae.infer.analytic_kl import AnalyticKL, FreeBits
from pyro_vae.infer.bounds import Bound, BoundTerms, TraceBound
from pyro_vae.infer.callbacks import Callback
from pyro_vae.infer.checkpoint import Interrupted
from pyro_vae.infer.compiled import Compiled, CompiledTrace_ELBO
from pyro_vae.infer.iwae import IWAE
from pyro_vae.infer.optim import FusedOptim
from pyro_vae.infer.sticking_the_landing import StickingTheLanding
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.infer.validation import bound_terms
from pyro_vae.weights.particles import log_weights

__all__ = [
    "IWAE", "AnalyticKL", "Bound", "BoundTerms", "Callback", "Compiled", "CompiledTrace_ELBO",
    "FitResult", "FreeBits", "FusedOptim", "Interrupted", "StickingTheLanding", "TraceBound",
    "bound_terms", "fit", "log_weights", "scale_latents",
]  # fmt: skip
