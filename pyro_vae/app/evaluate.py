"""The estimate of log p(x) that the commands share."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from pyro_vae import likelihoods
from pyro_vae.app.names import EvaluateSettings
from pyro_vae.datasets import Dataset
from pyro_vae.distributed import Processes
from pyro_vae.evaluation.estimate import Convergence, LogMarginal, warn_if_unreliable
from pyro_vae.evaluation.importance_sampling import log_marginal
from pyro_vae.evaluation.representation_quality import ACTIVE_VARIANCE, unit_variances
from pyro_vae.vae import VAE


def estimated(vae: VAE, x: Tensor, how: EvaluateSettings) -> LogMarginal:
    """Return the estimate of log p(x); a terminal shows the data done and the running mean.

    Several processes share the data out, and each returns the whole estimate, without draws.
    """
    processes = Processes.current()
    if not processes.are_several or not len(x):
        return _estimated(vae, x, how, show=True)
    own = processes.share(x)
    part = None
    if len(own):
        with warnings.catch_warnings():
            # Told below, once and of all the data.
            warnings.filterwarnings("ignore", r"\d+ of \d+ data have Pareto")
            how = replace(how, seed=processes.own_seed(how.seed))
            part = replace(_estimated(vae, own, how, show=processes.is_first), draws=None)
    whole = _side_by_side([part for part in processes.gather(part) if part is not None])
    warn_if_unreliable(whole, stacklevel=2)
    return whole


def _side_by_side(parts: list[LogMarginal]) -> LogMarginal:
    """Return the estimate of all the data from the estimates of their parts, in order."""
    whole: dict[str, Any] = {}
    for each in fields(LogMarginal):
        values = [getattr(part, each.name) for part in parts]
        if isinstance(values[0], Tensor):
            whole[each.name] = torch.cat(values)
    curves = [part.convergence for part in parts if part.convergence is not None]
    if len(curves) == len(parts):
        log_prob = torch.cat([curve.log_prob for curve in curves], dim=1)
        whole["convergence"] = Convergence(curves[0].num_samples, log_prob)
    return LogMarginal(**whole, method=parts[0].method)


def _estimated(vae: VAE, x: Tensor, how: EvaluateSettings, *, show: bool) -> LogMarginal:
    console = Console(stderr=True)
    hidden = not (show and console.is_terminal)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
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
        # None: unknown, for fewer than 21 weights per datum have no tail to speak of.
        "num_unreliable": None if estimate.pareto_k.isnan().all() else estimate.num_unreliable,
        "median_ess": estimate.ess.median().item(),
        "acceptance": None if estimate.acceptance is None else estimate.acceptance.mean().item(),
        "method": estimate.method,
    }


def data_standard_errors(estimate: LogMarginal) -> dict[str, float]:
    """Return the standard errors over data of the estimate's means, nats; NaN for a single datum."""
    count = len(estimate.log_prob)
    return {
        name: values.std().item() / math.sqrt(count) if count > 1 else math.nan
        for name, values in (
            ("elbo", estimate.elbo),
            ("rate", estimate.rate),
            ("distortion", estimate.distortion),
        )
    }


def active_units(vae: VAE, x: Tensor) -> int:
    """Count the latent coordinates whose posterior mean has a variance over the data above 0.01."""
    return int((unit_variances(vae.guide, x) > ACTIVE_VARIANCE).sum())


def is_pseudo(vae: VAE, dataset: Dataset) -> bool:
    """Say whether a Bernoulli scores grey values, which is no density."""
    grey = bool(((dataset.test > 0) & (dataset.test < 1)).any())
    return grey and isinstance(vae.likelihood, likelihoods.Bernoulli)
