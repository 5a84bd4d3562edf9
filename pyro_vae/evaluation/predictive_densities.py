"""Densities of data given draws of the latents that all data share: p(x | data), and ArviZ's loo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.estimate import log_mean_weights, structure
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs, as_inputs
from pyro_vae.pair.opened import Knowledge, OpenedPair, Progress, open_pair
from pyro_vae.pair.sites import Given, Latents, is_inside, latent_sites, sample_sites, site_log_prob
from pyro_vae.weights.particles import Particles, check_weights


@dataclass(frozen=True)
class PredictiveLogProb:
    """Log densities of data given draws of the shared latents (nats, float64, on the CPU).

    Attributes:
        log_prob: log of the mean over the draws of p(x_n | theta), ``(N,)``.
        standard_error: Monte Carlo standard error of ``log_prob`` by the delta method, ``(N,)``.
        log_likelihood: log p(x_n | theta_s), ``(S, N)``: what ``arviz.loo`` takes where these are
            the data that the guide was fitted to.
        draws: the shared latents of the model, each ``(S, ...)``.
    """

    log_prob: Tensor
    standard_error: Tensor
    log_likelihood: Tensor = field(repr=False)
    draws: Latents = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean of :attr:`log_prob` over the data."""
        return self.log_prob.mean().item()

    def to_arviz(self) -> Any:
        """Return the draws and their densities in ArviZ's data structure.

        ``posterior`` has the shared latents, ``log_likelihood`` the variable ``x`` (chain, draw,
        data). For data that the guide was fitted to ``arviz.loo`` of it leaves one out at a time,
        and ``arviz.compare`` ranks models by that.
        """
        import xarray

        posterior: dict[str, Any] = {}
        for name, value in self.draws.items():
            dims = [f"{name}_dim_{index}" for index in range(value.dim() - 1)]
            posterior[name] = (("chain", "draw", *dims), value[None].numpy())
        likelihood = {"x": (("chain", "draw", "data"), self.log_likelihood[None].numpy())}
        groups: dict[str, Any] = {"posterior": posterior, "log_likelihood": likelihood}
        coordinates = {"chain": [0], "draw": range(len(self.log_likelihood))}
        return structure(
            {name: xarray.Dataset(group, coords=coordinates) for name, group in groups.items()}
        )


def predictive_log_prob(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    given: Tensor | Sequence[Tensor] | None = None,
    num_draws: int = 1000,
    num_samples: int = 100,
    plate: str = "data",
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PredictiveLogProb:
    r"""Estimate log p(x_n | data) for a model with latents that all data points share.

    .. math:: \log p(x_n \mid data) \approx \log \frac1S \sum_s p(x_n \mid \theta_s),
              \quad \theta_s \sim q(\theta)

    What stands outside the data plate is theta; the guide's draws of it stand for the posterior's.
    Latents of a data point are weighed inside, :math:`p(x_n | \theta_s)` being the mean of
    ``num_samples`` importance weights, and what the model enumerates is summed out. Runs in eval
    mode, without gradients.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair, fitted.
        x: data ``(N, ...)``, held out or not, or a tuple of tensors passed as ``model(*x)``.
        given: the data that the guide draws theta for, where it looks at them; None for a guide
            whose theta depends on none.
        num_draws: draws of theta, S.
        num_samples: draws of the latents of each data point for each theta.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.
        progress: called with (draws done, S).

    Raises:
        InputError: a pair without latents outside the data plate, one whose data points can't be
            weighed rightly (see :func:`pyro_vae.log_weights`), a guide whose theta depends on the
            data and no ``given``, or an option out of range.

    Source:
        Gelman, Hwang, Vehtari 2014, "Understanding predictive information criteria for Bayesian
        models", equation 5; leave one out: Vehtari, Gelman, Gabry 2017, "Practical Bayesian model
        evaluation using leave-one-out cross-validation and WAIC".
    """
    check_counts(num_draws=num_draws, num_samples=num_samples)
    check_callables(progress=progress)
    serves = Serves.SHARED | Serves.SUMMED
    pair = open_pair(model, guide, x, plate=plate, serves=serves)
    seen = pair.inputs if given is None else as_inputs(given, model, guide)
    with pair.evaluating(seed):
        if not pair.structure.shares:
            raise InputError(
                "expected latents outside the data plate, got none: held-out data have log p(x) of "
                "their own, use log_marginal"
            )
        if given is None:
            _check_independent(pair)
        rows, draws = _weigh_draws(pair, seen, num_draws, num_samples, progress)
    summary = log_mean_weights(rows)
    return PredictiveLogProb(summary["log_prob"], summary["standard_error"], rows, draws)


def _weigh_draws(
    pair: OpenedPair, seen: Inputs, num_draws: int, num_samples: int, progress: Progress | None
) -> tuple[Tensor, Latents]:
    """Return log p(x_n | theta_s) ``(S, N)`` and the model's theta, each ``(S, ...)``."""
    rows, draws, known = [], [], Knowledge()
    in_model = {s["name"] for s in sample_sites(pair.trace()[0]) if not is_inside(s, pair.plate)}
    for index in range(num_draws):
        theta = _draw_shared(pair, seen)
        fixed = replace(
            pair,
            model=partial(_run_fixed, pair.model, theta),
            guide=partial(_run_fixed, pair.guide, theta),
            serves=Serves.SUMMED | Serves.OBSERVED,
            knowledge=known,
        )
        blocks = []
        for _, part in fixed.blocks():
            particles = Particles(part)
            densities = particles.draw(num_samples if part.structure.latents else 1)
            check_weights(densities)
            blocks.append(log_mean_weights(densities.log_weights)["log_prob"].cpu())
        rows.append(torch.cat(blocks))
        draws.append({name: value.cpu() for name, value in theta.items() if name in in_model})
        if progress is not None:
            progress(index + 1, num_draws)
    return torch.stack(rows), {n: torch.stack([each[n] for each in draws]) for n in draws[0]}


def _draw_shared(pair: OpenedPair, inputs: Inputs) -> Latents:
    sites = latent_sites(poutine.trace(pair.guide).get_trace(*pair.on(inputs).part().inputs))
    return {site["name"]: site["value"] for site in sites if not is_inside(site, pair.plate)}


def _check_independent(pair: OpenedPair) -> None:
    """Refuse a guide whose shared latents have another density for a part of the data."""
    theta = _draw_shared(pair, pair.inputs)
    densities = []
    for some in (pair, pair.part(slice(1))):
        with Given(theta):
            sites = sample_sites(some.alone(pair.guide).trace())
        outside = [site for site in sites if not is_inside(site, pair.plate)]
        densities.append(torch.stack([site_log_prob(site).sum() for site in outside]).sum())
    if not torch.allclose(densities[0], densities[1], equal_nan=True):
        raise InputError(
            f"expected the data that {min(theta)!r} of the guide depends on, got none: pass those "
            "that it was fitted to by given="
        )


class _Fix(Messenger):
    """Give sites values and take them out of the densities."""

    def __init__(self, values: Latents) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.values:
            message["value"], message["done"] = self.values[message["name"]], True
            message["infer"] = {**message["infer"], "_deterministic": True}


def _run_fixed(function: PairFunction, theta: Latents, *inputs: Tensor) -> Any:
    with _Fix(theta):
        return function(*inputs)
