"""Variational autoencoders in Pyro: train, measure, compare and use any model/guide pair.

Submodules and names are loaded on first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyro_vae.version import __version__ as __version__

_NAMES = {
    **dict.fromkeys(("VAE", "ConditionalVAE"), "vae"),
    **dict.fromkeys(("FitResult", "fit"), "infer.training"),
    **dict.fromkeys(("load", "load_pair", "save", "save_pair"), "runs"),
    **{"Autoencoder": "autoencoder", "VAETransformer": "transformer", "InputError": "errors"},
    **{"Comparison": "evaluation.comparison_result", "compare": "evaluation.comparison"},
    **{"LogMarginal": "evaluation.estimate", "log_marginal": "evaluation.methods"},
    "log_weights": "weights.particles",
}

_MODULES = (
    *("datasets", "distributions", "errors", "evaluation", "guides", "infer", "likelihoods"),
    *("networks", "plots", "priors", "runs", "tasks"),
)
__all__ = sorted((*_NAMES, *_MODULES))

if TYPE_CHECKING:
    from pyro_vae import datasets as datasets
    from pyro_vae import distributions as distributions
    from pyro_vae import errors as errors
    from pyro_vae import evaluation as evaluation
    from pyro_vae import guides as guides
    from pyro_vae import infer as infer
    from pyro_vae import likelihoods as likelihoods
    from pyro_vae import networks as networks
    from pyro_vae import plots as plots
    from pyro_vae import priors as priors
    from pyro_vae import runs as runs
    from pyro_vae import tasks as tasks
    from pyro_vae.autoencoder import Autoencoder as Autoencoder
    from pyro_vae.errors import InputError as InputError
    from pyro_vae.evaluation.comparison import compare as compare
    from pyro_vae.evaluation.comparison_result import Comparison as Comparison
    from pyro_vae.evaluation.estimate import LogMarginal as LogMarginal
    from pyro_vae.evaluation.methods import log_marginal as log_marginal
    from pyro_vae.infer.training import FitResult as FitResult
    from pyro_vae.infer.training import fit as fit
    from pyro_vae.runs import load as load
    from pyro_vae.runs import load_pair as load_pair
    from pyro_vae.runs import save as save
    from pyro_vae.runs import save_pair as save_pair
    from pyro_vae.transformer import VAETransformer as VAETransformer
    from pyro_vae.vae import VAE as VAE
    from pyro_vae.vae import ConditionalVAE as ConditionalVAE
    from pyro_vae.weights.particles import log_weights as log_weights

if not TYPE_CHECKING:  # or every name would pass a type checker

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")
        if name not in _NAMES:
            return importlib.import_module(f"pyro_vae.{name}")
        value = globals()[name] = getattr(importlib.import_module(f"pyro_vae.{_NAMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
