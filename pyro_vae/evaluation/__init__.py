"""Estimates of log p(x), comparisons of pairs, and checks of a trained one."""

from pyro_vae.evaluation.bidirectional_bounds import Bidirectional, bidirectional
from pyro_vae.evaluation.comparison import compare
from pyro_vae.evaluation.comparison_result import Comparison
from pyro_vae.evaluation.estimate import LogMarginal, to_arviz
from pyro_vae.evaluation.gap_decomposition import InferenceGaps, inference_gaps
from pyro_vae.evaluation.methods import log_marginal
from pyro_vae.evaluation.predictive_density import PredictiveLogProb, predictive_log_prob
from pyro_vae.evaluation.quadrature import PosteriorDivergence, posterior_divergence
from pyro_vae.evaluation.representation_quality import Estimate, Representation, representation
from pyro_vae.evaluation.simulation_checks import (
    AggregatePosterior,
    Calibration,
    PosteriorPredictive,
    aggregate_posterior,
    calibration,
    posterior_predictive,
)

__all__ = [
    "AggregatePosterior", "Bidirectional", "Calibration", "Comparison", "Estimate", "InferenceGaps",
    "LogMarginal", "PosteriorDivergence", "PosteriorPredictive", "PredictiveLogProb",
    "Representation", "aggregate_posterior", "bidirectional", "calibration", "compare",
    "inference_gaps", "log_marginal", "posterior_divergence", "posterior_predictive",
    "predictive_log_prob", "representation", "to_arviz",
]  # fmt: skip
