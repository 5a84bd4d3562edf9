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

__all__ = [
    "AggregatePosterior",
    "Bidirectional",
    "Calibration",
    "Comparison",
    "Estimate",
    "InferenceGaps",
    "LogMarginal",
    "PosteriorDivergence",
    "PosteriorPredictive",
    "Representation",
    "aggregate_posterior",
    "bidirectional",
    "calibration",
    "compare",
    "inference_gaps",
    "log_marginal",
    "posterior_divergence",
    "posterior_predictive",
    "representation",
    "to_arviz",
]

if TYPE_CHECKING:
    from pyro_vae.evaluation.bidirectional_bounds import Bidirectional, bidirectional
    from pyro_vae.evaluation.comparison import compare
    from pyro_vae.evaluation.comparison_result import Comparison
    from pyro_vae.evaluation.estimate import LogMarginal, to_arviz
    from pyro_vae.evaluation.gap_decomposition import InferenceGaps, inference_gaps
    from pyro_vae.evaluation.importance_sampling import log_marginal
    from pyro_vae.evaluation.mutual_information import Estimate
    from pyro_vae.evaluation.predictive_checks import (
        AggregatePosterior,
        PosteriorPredictive,
        aggregate_posterior,
        posterior_predictive,
    )
    from pyro_vae.evaluation.quadrature import PosteriorDivergence, posterior_divergence
    from pyro_vae.evaluation.representation_quality import Representation, representation
    from pyro_vae.evaluation.simulation_based_calibration import Calibration, calibration


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"pyro_vae.evaluation.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_vae.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
