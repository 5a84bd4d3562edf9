"""Densities of data points given draws of the latents that they share: p(x_n | data), and for loo."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.estimate import LogMarginal, measure_weights, one_chain, structure
from pyro_vae.evaluation.importance_sampling import ImportanceOptions, estimate_log_prob
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.contract import Serves, why_unweighable
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import Knowledge, OpenedPair, open_pair
from pyro_vae.pair.sites import CALLING_ERRORS, Given, Latents, is_inside, latent_sites, site_log_prob


@dataclass(frozen=True)
class PredictiveLogProb:
    """Log densities of data points given draws of what they share (nats, float64, on the CPU).

    Attributes:
        log_prob: log of the mean over the draws of p(x_n | theta), ``(N,)``.
        standard_error: its Monte Carlo standard error by the delta method, ``(N,)``; the data points
            have their draws in common, so theirs are no independent errors.
        ess, pareto_k: effective number of draws and tail index of p(x_n | theta_s), ``(N,)``.
        trusted: whose Pareto k is below its limit, over the draws and, for most of these, of the
            weights inside, bool ``(N,)``.
        log_likelihood: log p(x_n | theta_s), ``(S, N)``.
        draws: the shared latents of the model, each ``(S, ...)``.
        joint: log p(x) of all these data points as one, where ``log_marginal(..., plate=None)`` has
            too many latents in one weight: theta_s is weighed by p(theta) / q(theta) and by the
            product of its p(x_n | theta_s), whose estimates leave the weight without bias. None for a
            guide without a density of theta.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    trusted: Tensor
    log_likelihood: Tensor = field(repr=False)
    draws: Latents = field(repr=False)
    joint: LogMarginal | None

    def to_arviz(self) -> Any:
        """Return the draws and, as variable ``x`` of ``log_likelihood``, log p(x_n | theta_s).

        Of the data that the guide was fitted to ``arviz.loo`` leaves one out at a time, and
        ``arviz.compare`` ranks models by that.
        """
        likelihood = one_chain({"x": self.log_likelihood}, data=range(len(self.log_prob)))
        return structure({"posterior": one_chain(self.draws), "log_likelihood": likelihood})


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
    r"""Estimate log p(x_n | data) under a model with latents that all data points share.

    .. math:: \log p(x_n | data) \approx \log \frac1S \sum_s p(x_n | \theta_s),
              \quad \theta_s \sim q(\theta)

    What stands outside the data plate is theta, and the guide's draws stand for the posterior's.
    Latents of a data point are weighed inside, p(x_n given theta_s) being the mean of
    ``num_samples`` importance weights; what the model enumerates is summed out. Runs in eval mode.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair, fitted.
        x: data ``(N, ...)``, held out or not, or a tuple of tensors passed as ``model(*x)``.
        given: the data that theta is drawn for, where the guide looks at them.
        num_draws: draws of theta, S.
        num_samples: draws of the latents of each data point for each theta.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.
        progress: called with (draws done, S).

    Raises:
        InputError: a pair that shares no latent, one whose data points can't be weighed rightly (see
            :func:`pyro_vae.log_weights`), a guide that draws theta for the data and no ``given``, or
            an option out of range.

    Warns:
        UserWarning: how many data points can't be trusted.

    Source:
        Gelman, Hwang, Vehtari 2014, "Understanding predictive information criteria for Bayesian
        models", equation 5; leave one out: Vehtari, Gelman, Gabry 2017; the joint p(x): Tran,
        Scharth, Gunawan, Kohn, Nott 2013, "Importance sampling squared for Bayesian inference".
    """
    check_counts(num_draws=num_draws, num_samples=num_samples)
    check_callables(progress=progress)
    serves = Serves.SHARED | Serves.SUMMED
    pair = open_pair(model, guide, x, plate=plate, serves=serves)
    seen = pair if given is None else open_pair(model, guide, given, plate=plate, serves=serves)
    inside, draws, ratios = [], [], []
    with pair.evaluating(seed):
        if not any(latent.is_shared for latent in pair.structure.latents.values()):
            raise InputError(
                "expected a latent outside the data plate, got none: data points that share nothing "
                "have log p(x) of their own, use log_marginal"
            )
        if given is None:
            _check_independent(pair.part())
        known, has_density = Knowledge(), why_unweighable(*seen.part().trace(), None) is None
        for index in range(num_draws):
            theta, log_proposal = _shared(guide, seen, {})
            own, log_prior = _shared(model, seen, theta)
            inside.append(_weigh_given(pair, theta, num_samples, known))
            draws.append({name: value.cpu() for name, value in own.items()})
            ratios.append((log_prior - log_proposal).cpu())
            if progress is not None:
                progress(index + 1, num_draws)
    rows, ratio = torch.stack([each.log_prob for each in inside]), torch.stack(ratios)[:, None]
    numbers = measure_weights(rows, pair.structure.precision)
    if inside[0].num_samples[0] > 1:
        numbers["trusted"] &= torch.stack([each.trusted for each in inside]).double().mean(0) > 0.5
    unknown = int((~numbers["trusted"]).sum())
    if unknown:
        warnings.warn(
            f"{unknown} of {rows.shape[1]} data points have too high a Pareto k, or too few draws to "
            "know it: neither their log p(x | data) nor its standard error can be trusted; use more "
            "draws or samples, or a better guide",
            stacklevel=2,
        )
    joint = LogMarginal(
        **measure_weights(rows.sum(1, keepdim=True) + ratio, pair.structure.precision),
        rate=-ratio.mean(0),
        distortion=-rows.sum(1).mean(0, keepdim=True),
        num_samples=torch.tensor([num_draws]),
        cost=num_draws * inside[0].cost[:1],
        method="importance, each data point weighed inside",
        pseudo_likelihood=inside[0].pseudo_likelihood,
    )
    theta = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    return PredictiveLogProb(
        **numbers, log_likelihood=rows, draws=theta, joint=joint if has_density else None
    )


def _shared(
    function: PairFunction, pair: OpenedPair, given: Latents, inputs: Inputs | None = None
) -> tuple[Latents, Tensor]:
    """Run a function on the shared latents that it is given: which it has, and their density."""
    with Given(given):
        trace = poutine.trace(function).get_trace(*(inputs or pair.part().inputs))
    sites = [site for site in latent_sites(trace) if not is_inside(site, pair.plate)]
    log_prob = sum(site_log_prob(site).double().sum() for site in sites)
    return {site["name"]: site["value"] for site in sites}, torch.as_tensor(log_prob)


def _check_independent(pair: OpenedPair) -> None:
    """Refuse a guide whose density of what is shared is another one for other data: for zeros."""
    theta, _ = _shared(pair.guide, pair, {})
    densities = []
    for inputs in (pair.inputs, tuple(map(torch.zeros_like, pair.inputs))):
        try:
            densities.append(_shared(pair.guide, pair, theta, inputs)[1])
        except CALLING_ERRORS:  # zeros are no data to it
            densities.append(torch.tensor(torch.nan, dtype=torch.float64))
    if not torch.equal(*densities):
        raise InputError(
            f"expected the data that {min(theta)!r} of the guide depends on, got none: pass those "
            "that it was fitted to by given="
        )


def _weigh_given(pair: OpenedPair, theta: Latents, num_samples: int, known: Knowledge) -> LogMarginal:
    """Estimate log p(x_n | theta): model and guide take the shared latents and hide them."""
    model, guide = (poutine.block(Given(theta)(f), hide=[*theta]) for f in (pair.model, pair.guide))
    serves = Serves.SUMMED | Serves.NO_LATENT
    fixed = replace(pair, model=model, guide=guide, serves=serves, knowledge=known)
    count = num_samples if fixed.structure.latents else 1
    return estimate_log_prob(fixed, ImportanceOptions(count, compile=False), keep_draws=0)
