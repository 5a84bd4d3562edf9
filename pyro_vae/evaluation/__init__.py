"""Estimates of log p(x) and what they rest on. Names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "AggregatePosterior": "predictive_checks",
    "Bidirectional": "bidirectional_bounds",
    "Calibration": "simulation_based_calibration",
    "Comparison": "comparison_result",
    "Estimate": "mutual_information",
    "InferenceGaps": "gap_decomposition",
    "LogMarginal": "estimate",
    "PosteriorDivergence": "quadrature",
    "PosteriorPredictive": "predictive_checks",
    "Representation": "representation_quality",
    "aggregate_posterior": "predictive_checks",
    "bidirectional": "bidirectional_bounds",
    "calibration": "simulation_based_calibration",
    "compare": "comparison",
    "inference_gaps": "gap_decomposition",
    "log_marginal": "importance_sampling",
    "posterior_divergence": "quadrature",
    "posterior_predictive": "predictive_checks",
    "representation": "representation_quality",
    "to_arviz": "estimate",
}

__all__ = list(_NAMES)

if TYPE_CHECKING:
    from pyro_vae.evaluation.bidirectional_bounds import Bidirectional as Bidirectional
    from pyro_vae.evaluation.bidirectional_bounds import bidirectional as bidirectional
    from pyro_vae.evaluation.comparison import compare as compare
    from pyro_vae.evaluation.comparison_result import Comparison as Comparison
    from pyro_vae.evaluation.estimate import LogMarginal as LogMarginal
    from pyro_vae.evaluation.estimate import to_arviz as to_arviz
    from pyro_vae.evaluation.gap_decomposition import InferenceGaps as InferenceGaps
    from pyro_vae.evaluation.gap_decomposition import inference_gaps as inference_gaps
    from pyro_vae.evaluation.importance_sampling import log_marginal as log_marginal
    from pyro_vae.evaluation.mutual_information import Estimate as Estimate
    from pyro_vae.evaluation.predictive_checks import AggregatePosterior as AggregatePosterior
    from pyro_vae.evaluation.predictive_checks import PosteriorPredictive as PosteriorPredictive
    from pyro_vae.evaluation.predictive_checks import aggregate_posterior as aggregate_posterior
    from pyro_vae.evaluation.predictive_checks import posterior_predictive as posterior_predictive
    from pyro_vae.evaluation.quadrature import PosteriorDivergence as PosteriorDivergence
    from pyro_vae.evaluation.quadrature import posterior_divergence as posterior_divergence
    from pyro_vae.evaluation.representation_quality import Representation as Representation
    from pyro_vae.evaluation.representation_quality import representation as representation
    from pyro_vae.evaluation.simulation_based_calibration import Calibration as Calibration
    from pyro_vae.evaluation.simulation_based_calibration import calibration as calibration


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"pyro_vae.evaluation.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_vae.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
