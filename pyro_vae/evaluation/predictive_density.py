"""Densities of data points given draws of the latents that they share: p(x_n | data), and for loo."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.estimate import LogMarginal, measure_weights, one_chain, structure
from pyro_vae.pair.contract import Serves, why_unweighable
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import BLOCK, Knowledge, OpenedPair, open_pair
from pyro_vae.pair.sites import Given, Latents, all_close, is_inside, latent_sites, site_log_prob
from pyro_vae.summary import shown
from pyro_vae.weights.particles import Particles, check_weights


@shown
class PredictiveLogProb(NamedTuple):
    """Log densities of data points given draws of what they share (nats, float64, on the CPU).

    Attributes:
        log_prob: log of the mean over the draws of p(x_n | theta), ``(N,)``.
        standard_error: its Monte Carlo error by the delta method, ``(N,)``; all have the same draws.
        ess, pareto_k: effective number of the draws and tail index over them, ``(N,)``.
        trusted: whose Pareto k is low, over the draws and of most weights inside, bool ``(N,)``.
        log_likelihood: log p(x_n | theta_s), ``(S, N)``.
        draws: the shared latents of the model, each ``(S, ...)``.
        joint: log p(x) of all data points as one, without one weight for all their latents: theta_s
            is weighed by p(theta) / q(theta) and the product of its p(x_n | theta_s), estimated
            without bias (Tran et al. 2013). None for a guide without a density of theta.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    trusted: Tensor
    log_likelihood: Tensor
    draws: Latents
    joint: LogMarginal | None

    def to_arviz(self) -> Any:
        """Return draws and ``log_likelihood`` as ``arviz.loo`` and ``arviz.compare`` take them.

        These leave one data point out at a time, of those that the guide was fitted to.
        """
        likelihood = one_chain({"x": self.log_likelihood}, data=range(len(self.log_prob)))
        return structure({"posterior": one_chain(self.draws), "log_likelihood": likelihood})


def predictive_log_prob(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    given: Tensor | Sequence[Tensor] | None = None, num_draws: int = 1000, num_samples: int = 100,
    plate: str = "data", seed: int | None = None,
) -> PredictiveLogProb:  # fmt: skip
    r"""Estimate log p(x_n | data) under a model with latents that all data points share.

    .. math:: p(x_n | data) \approx \frac1S \sum_s p(x_n | \theta_s), \quad \theta_s \sim q(\theta)

    Theta is what stands outside the data plate, and the guide's draws stand for the posterior's.
    Latents of a data point are weighed inside, p(x_n given theta_s) being the mean of
    ``num_samples`` importance weights; what the model enumerates is summed out.

    Args:
        model, plate, seed: as in :func:`pyro_vae.log_marginal`.
        guide: its variational function, fitted.
        x: data ``(N, ...)``, held out or not, or a tuple of tensors passed as ``model(*x)``.
        given: the data that theta is drawn for, where the guide looks at them.
        num_draws: draws of theta, S.
        num_samples: draws of the latents of each data point for each theta.

    Raises:
        InputError: no shared latent, data points whose weights would be wrong (see
            :func:`pyro_vae.log_weights`), a guide that looks at the data and no ``given``.

    Warns:
        UserWarning: how many data points can't be trusted.

    Source:
        Gelman, Hwang, Vehtari 2014, "Understanding predictive information criteria for Bayesian
        models", equation 5; Vehtari, Gelman, Gabry 2017, on leave-one-out; Tran, Scharth, Gunawan,
        Kohn, Nott 2013, "Importance sampling squared".
    """
    check_counts(num_draws=num_draws, num_samples=num_samples)
    serves = Serves.SHARED | Serves.SUMMED
    pair = open_pair(model, guide, x, plate=plate, serves=serves)
    seen = pair if given is None else open_pair(model, guide, given, plate=plate, serves=serves)
    rows, draws, ratios, known = [], [], [], Knowledge()
    with pair.evaluating(seed):
        if not any(latent.is_shared for latent in pair.structure.latents.values()):
            raise InputError("expected a latent outside the data plate, got none: use log_marginal")
        if given is None:
            _check_independent(pair.part())
        fitting = pair.memory() // (pair.structure.bytes_per_datum * num_samples)
        parts = [part for _, part in pair.blocks(max(1, min(BLOCK, fitting)))]
        precision, pseudo_likelihood = pair.structure.precision, pair.is_pseudo_likelihood()
        seen = seen.part()
        has_density = why_unweighable(*seen.trace(), None) is None
        for _ in range(num_draws):
            theta, log_proposal = _shared(guide, seen, {})
            own, log_prior = _shared(model, seen, theta)
            inside = [_weigh_given(part, theta, num_samples, known) for part in parts]
            rows.append(torch.cat(inside, 1).cpu())
            draws.append({name: value.cpu() for name, value in own.items()})
            ratios.append((log_prior - log_proposal).cpu())
    (likelihood, cleared), ratio = torch.stack(rows, 1), torch.stack(ratios)[:, None]
    found = measure_weights(likelihood, precision)
    found["trusted"] &= cleared.mean(0) > 0.5
    unknown = int((~found["trusted"]).sum())
    if unknown:
        what = f"{unknown} of {likelihood.shape[1]} data points have a Pareto k that is too high"
        doubt = "or too few draws to know it: their log p(x | data) can't be trusted; use more draws"
        warnings.warn(f"{what}, {doubt}", stacklevel=2)
    joint = LogMarginal(
        **measure_weights(likelihood.sum(1, keepdim=True) + ratio, precision),
        rate=-ratio.mean(0), distortion=-likelihood.sum(1).mean(0, keepdim=True),
        num_samples=torch.tensor([num_draws]), cost=torch.tensor([num_draws * num_samples]),
        method="importance, each data point weighed inside", pseudo_likelihood=pseudo_likelihood,
    )  # fmt: skip
    theta = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    joint_if_known = joint if has_density else None
    return PredictiveLogProb(**found, log_likelihood=likelihood, draws=theta, joint=joint_if_known)


def _shared(function: PairFunction, pair: OpenedPair, given: Latents) -> tuple[Latents, Tensor]:
    """Run a function, given shared latents or none: return those that it has, and their density."""
    with Given(given):
        sites = latent_sites(poutine.trace(function).get_trace(*pair.inputs))
    sites = [site for site in sites if not is_inside(site, pair.plate)]
    log_prob = torch.stack([site_log_prob(site).double().sum() for site in sites]).sum()
    return {site["name"]: site["value"] for site in sites}, log_prob


def _check_independent(pair: OpenedPair) -> None:
    """Refuse a guide whose density of what is shared is another one for other data."""
    theta, _ = _shared(pair.guide, pair, {})
    # Again and again the first one, or where it is alone zeros.
    first = torch.zeros(pair.num_data, dtype=torch.long)
    others = pair.part(first).inputs if pair.num_data > 1 else map(torch.zeros_like, pair.inputs)
    both = [(_shared(pair.guide, each, theta)[1],) for each in (pair, pair.on(tuple(others)))]
    if not all_close(*both):
        wanted = f"the data that {min(theta)!r} of the guide depends on"
        raise InputError(f"expected {wanted}, got none: pass those that it was fitted to as given=")


def _weigh_given(pair: OpenedPair, theta: Latents, num_samples: int, known: Knowledge) -> Tensor:
    """Return log p(x_n | theta) and whether to trust it, ``(2, N)``; the functions hide theta."""
    model, guide = (poutine.block(Given(theta)(f), hide=[*theta]) for f in (pair.model, pair.guide))
    serves = Serves.SUMMED | Serves.NO_LATENT
    particles = Particles(replace(pair, model=model, guide=guide, serves=serves, knowledge=known))
    densities = particles.draw(num_samples if particles.latent_shapes else 1)
    check_weights(densities)
    found = measure_weights(densities.log_weights, particles.pair.structure.precision)
    trusted = found["trusted"] if particles.latent_shapes else torch.ones_like(found["log_prob"])
    return torch.stack([found["log_prob"], trusted.double()])
