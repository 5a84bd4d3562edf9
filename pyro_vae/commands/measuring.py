"""The estimate of log p(x) that the commands share."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from pyro_vae import likelihoods
from pyro_vae.datasets import Dataset
from pyro_vae.evaluation.importance import LogMarginal, log_marginal
from pyro_vae.names import EvaluateSettings
from pyro_vae.vae import VAE


def estimated(vae: VAE, x: Tensor, how: EvaluateSettings) -> LogMarginal:
    """Return the estimate of log p(x); a terminal shows the data done and the running mean."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("log p(x)", total=len(x))
        return log_marginal(
            vae.model,
            vae.guide,
            x,
            num_samples=how.num_samples,
            method=how.method,
            target_standard_error=how.target_standard_error,
            num_chains=how.num_chains,
            num_steps=how.num_steps,
            seed=how.seed,
            progress=lambda done, _: bar.update(task, completed=done),
            running_mean=lambda mean: bar.update(task, description=f"log p(x) {mean:.2f}"),
        )


def as_dict(estimate: LogMarginal) -> dict[str, Any]:
    """Return the estimate's means per datum, in nats, as ``evaluate`` reports them."""
    return {
        "log_marginal": estimate.mean,
        "standard_error": estimate.mean_standard_error,
        "data_standard_error": estimate.data_standard_error,
        "elbo": estimate.elbo.mean().item(),
        "rate": estimate.rate.mean().item(),
        "distortion": estimate.distortion.mean().item(),
        "num_samples": int(estimate.num_samples.max()),
        "num_data": len(estimate.log_prob),
        "num_unreliable": estimate.num_unreliable,
        "median_ess": estimate.ess.median().item(),
        "acceptance": None if estimate.acceptance is None else estimate.acceptance.mean().item(),
        "method": estimate.method,
    }


def is_pseudo(vae: VAE, dataset: Dataset) -> bool:
    """Say whether a Bernoulli scores grey values, which is no density."""
    grey = bool(((dataset.test > 0) & (dataset.test < 1)).any())
    return grey and isinstance(vae.likelihood, likelihoods.Bernoulli)
