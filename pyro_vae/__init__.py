"""Variational autoencoders in Pyro: train, measure, compare and use any model/guide pair.

Submodules and names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyro_vae.version import __version__ as __version__

_NAMES = {
    "VAE": "pyro_vae.vae",
    "ConditionalVAE": "pyro_vae.vae",
    "Autoencoder": "pyro_vae.autoencoder",
    "VAETransformer": "pyro_vae.transformer",
    "InputError": "pyro_vae.errors",
    "FitResult": "pyro_vae.infer.training",
    "fit": "pyro_vae.infer.training",
    "Comparison": "pyro_vae.evaluation.comparison_result",
    "compare": "pyro_vae.evaluation.comparison",
    "LogMarginal": "pyro_vae.evaluation.estimate",
    "log_marginal": "pyro_vae.evaluation.importance_sampling",
    "log_weights": "pyro_vae.weights.particles",
    "load": "pyro_vae.runs",
    "load_pair": "pyro_vae.runs",
    "save": "pyro_vae.runs",
    "save_pair": "pyro_vae.runs",
}

__all__ = [
    "VAE",
    "Autoencoder",
    "Comparison",
    "ConditionalVAE",
    "FitResult",
    "InputError",
    "LogMarginal",
    "VAETransformer",
    "compare",
    "datasets",
    "distributions",
    "errors",
    "evaluation",
    "fit",
    "guides",
    "infer",
    "likelihoods",
    "load",
    "load_pair",
    "log_marginal",
    "log_weights",
    "networks",
    "plots",
    "priors",
    "runs",
    "save",
    "save_pair",
    "tasks",
]

if TYPE_CHECKING:
    from pyro_vae import (
        datasets,
        distributions,
        errors,
        evaluation,
        guides,
        infer,
        likelihoods,
        networks,
        plots,
        priors,
        runs,
        tasks,
    )
    from pyro_vae.autoencoder import Autoencoder
    from pyro_vae.errors import InputError
    from pyro_vae.evaluation.comparison import compare
    from pyro_vae.evaluation.comparison_result import Comparison
    from pyro_vae.evaluation.estimate import LogMarginal
    from pyro_vae.evaluation.importance_sampling import log_marginal
    from pyro_vae.infer.training import FitResult, fit
    from pyro_vae.runs import load, load_pair, save, save_pair
    from pyro_vae.transformer import VAETransformer
    from pyro_vae.vae import VAE, ConditionalVAE
    from pyro_vae.weights.particles import log_weights


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")
    if name not in _NAMES:
        return importlib.import_module(f"pyro_vae.{name}")
    value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
