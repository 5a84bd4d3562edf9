"""Estimates of log p(x) and what they rest on. Names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "AggregatePosterior": "checks",
    "Bidirectional": "bracket",
    "Calibration": "simulation",
    "Comparison": "comparison",
    "Estimate": "information",
    "InferenceGaps": "gaps",
    "LogMarginal": "estimate",
    "PosteriorDivergence": "quadrature",
    "PosteriorPredictive": "checks",
    "Representation": "codes",
    "aggregate_posterior": "checks",
    "bidirectional": "bracket",
    "calibration": "simulation",
    "compare": "comparison",
    "inference_gaps": "gaps",
    "log_marginal": "importance",
    "posterior_divergence": "quadrature",
    "posterior_predictive": "checks",
    "representation": "codes",
    "to_arviz": "diagnostics",
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
    from pyro_vae.evaluation.bracket import Bidirectional, bidirectional
    from pyro_vae.evaluation.checks import (
        AggregatePosterior,
        PosteriorPredictive,
        aggregate_posterior,
        posterior_predictive,
    )
    from pyro_vae.evaluation.codes import Representation, representation
    from pyro_vae.evaluation.comparison import Comparison, compare
    from pyro_vae.evaluation.diagnostics import to_arviz
    from pyro_vae.evaluation.estimate import LogMarginal
    from pyro_vae.evaluation.gaps import InferenceGaps, inference_gaps
    from pyro_vae.evaluation.importance import log_marginal
    from pyro_vae.evaluation.information import Estimate
    from pyro_vae.evaluation.quadrature import PosteriorDivergence, posterior_divergence
    from pyro_vae.evaluation.simulation import Calibration, calibration


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"pyro_vae.evaluation.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_vae.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
