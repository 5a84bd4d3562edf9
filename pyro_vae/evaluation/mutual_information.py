"""Information in the latents: the rate and its parts, through the exact aggregate posterior."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from pyro_vae.distributions.kl import closed_form_kl
from pyro_vae.distributions.normal import DiagonalNormalMixture
from pyro_vae.pair.contract import check_density_known
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.pair.sites import Latents, latent_sites
from pyro_vae.summary import plus_minus
from pyro_vae.weights.particles import Particles


class Estimate(NamedTuple):
    """A number and its Monte Carlo standard error (the data held fixed); 0 where it is exact."""

    value: float
    standard_error: float

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return plus_minus(*self)


class _Coordinates(NamedTuple):
    """What is known of the coordinates of the only latent, each with batch shape ``(N, D)``."""

    of_posterior: Distribution | None
    of_prior: Distribution | None
    independent: tuple[Distribution, Distribution] | None  # both, where both are independent
    unavailable: dict[str, str]


def information(
    pair: OpenedPair, *, num_samples: int, max_memory: int | None = None
) -> dict[str, Any]:
    """Return the information measures of :class:`pyro_vae.evaluation.Representation` by name."""
    particles = Particles(pair.part())
    model_trace, guide_trace = particles.traces()
    check_density_known(latent_sites(guide_trace), "posteriors can't be compared at one latent")
    prior = posterior = None
    if len(particles.axes) == 1:
        (name,) = particles.axes
        sites = model_trace.nodes[name], guide_trace.nodes[name]
        if all(site["mask"] is None for site in sites):
            prior, posterior = (site["fn"] for site in sites)
    coordinates = _coordinates(posterior, prior, pair.num_data)
    budget = pair.memory(max_memory)
    rows = [_one_draw(particles, coordinates, budget) for _ in range(num_samples)]
    terms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {
        "total_correlation": None,
        "dimension_wise_kl": None,
        **{name: _estimate(term) for name, term in terms.items() if name != "kl_per_dimension"},
        **_rates(terms, coordinates, posterior, prior),
        "unavailable": coordinates.unavailable,
    }


def _coordinates(
    posterior: Distribution | None, prior: Distribution | None, num_data: int
) -> _Coordinates:
    """Find out what is known of the coordinates, and say why where nothing is."""
    if posterior is None or prior is None:
        reason = "the pair has several latents, or a masked one"
    elif posterior.batch_shape != (num_data,) or len(posterior.event_shape) != 1:
        reason = "the latent is not one vector per datum"
    else:
        of_posterior = _coordinate_marginals(posterior)
        of_prior = _independent_coordinates(prior)
        unavailable = {}
        if of_prior is None:
            dependent = f"the coordinates of {type(prior).__name__} are not independent"
            unavailable = {"dimension_wise_kl": dependent, "kl_per_dimension": dependent}
        if of_posterior is None:
            unknown = f"{type(posterior).__name__} gives no density of one coordinate"
            unavailable |= {"total_correlation": unknown, "dimension_wise_kl": unknown}
        independent = _independent_coordinates(posterior)
        if independent is None:
            dependent = f"the coordinates of {type(posterior).__name__} are not independent"
            unavailable["kl_per_dimension"] = dependent
        both = None if independent is None or of_prior is None else (independent, of_prior)
        return _Coordinates(of_posterior, of_prior, both, unavailable)
    names = ("total_correlation", "dimension_wise_kl", "kl_per_dimension")
    return _Coordinates(None, None, None, dict.fromkeys(names, reason))


def _one_draw(particles: Particles, coordinates: _Coordinates, budget: int) -> dict[str, Tensor]:
    """Draw each datum's posterior once; return the terms whose means are the measures, ``(N,)``."""
    latents, proposal = particles.propose(1)
    _, log_prior = (score[0] for score in particles.score(latents))
    own = proposal[0]
    # One row of latents per datum, the data's axis first.
    rows = {name: value[0] for name, value in particles.data_first(latents).items()}
    aggregate, others, of_coordinates = _aggregate(particles, coordinates, rows, own, budget)
    terms = {
        "rate": own - log_prior,
        "mutual_information": own - aggregate,
        "mutual_information_upper": own - others,
        "marginal_kl": aggregate - log_prior,
    }
    if of_coordinates is not None:
        terms["total_correlation"] = aggregate - of_coordinates.sum(1)
        (value,) = rows.values()
        if coordinates.of_prior is not None:
            log_prior_each = coordinates.of_prior.log_prob(value).double()
            terms["dimension_wise_kl"] = (of_coordinates - log_prior_each).sum(1)
        if coordinates.independent is not None:
            log_own = coordinates.independent[0].log_prob(value).double()
            terms["kl_per_dimension"] = log_own - log_prior_each
    return terms


def _aggregate(
    particles: Particles, coordinates: _Coordinates, rows: Latents, own: Tensor, budget: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Score one draw per datum under the mixture of all data's posteriors.

    Returns log q(z) ``(N,)``, the same without the draw's own datum, and log q(z_d) ``(N, D)`` if
    known.
    """
    num_data = particles.num_data
    elements = sum(value[0].numel() for value in rows.values())
    # The scores, and about as many intermediate values of each latent as an affine density makes.
    size = max(1, budget // (num_data * elements * 64))
    aggregate, others, of_coordinates = [], [], []
    for start in range(0, num_data, size):
        part = slice(start, min(start + size, num_data))
        shown = {}  # each draw is a particle that gives every datum the same value
        for name, value in rows.items():
            to_all = value[part, None].expand(-1, num_data, *value.shape[1:])
            shown[name] = to_all.movedim(1, particles.axes[name])
        scores = particles.score_proposal(shown)
        positions = torch.arange(part.start, part.stop, device=scores.device)
        diagonal = positions - part.start, positions
        scores[diagonal] = own[part]  # scored as it was drawn, which rounds least
        aggregate.append(scores.logsumexp(1) - math.log(num_data))
        scores[diagonal] = -math.inf
        others.append(scores.logsumexp(1) - math.log(num_data - 1))
        if coordinates.of_posterior is not None:
            (value,) = rows.values()
            each = coordinates.of_posterior.log_prob(value[part, None]).double()
            of_coordinates.append(each.logsumexp(1) - math.log(num_data))
    together = torch.cat(of_coordinates) if of_coordinates else None
    return torch.cat(aggregate), torch.cat(others), together


def _rates(
    terms: dict[str, Tensor],
    coordinates: _Coordinates,
    posterior: Distribution | None,
    prior: Distribution | None,
) -> dict[str, Any]:
    """Return the rate and its share of each coordinate, in closed form where there is one."""
    each = total = per_dimension = error = None
    if coordinates.independent is not None:
        each = closed_form_kl(*coordinates.independent)
        per_dimension = terms["kl_per_dimension"].mean((0, 1)).cpu()
        error = _standard_error(terms["kl_per_dimension"]).cpu()
    if each is not None:
        total, per_dimension = each.sum(-1), each.double().mean(0).cpu()
        error = torch.zeros_like(per_dimension)
    elif posterior is not None and prior is not None:
        total = closed_form_kl(posterior, prior)
    rate = _estimate(terms["rate"])
    if total is not None:
        rate = Estimate(total.double().sum().item() / terms["rate"].shape[1], 0.0)
    return {
        "rate": rate,
        "rate_method": "Monte Carlo" if total is None else "analytic",
        "kl_per_dimension": per_dimension,
        "kl_per_dimension_standard_error": error,
    }


def _estimate(terms: Tensor) -> Estimate:
    """Average terms ``(num_samples, N)``."""
    return Estimate(terms.mean().item(), _standard_error(terms).item())


def _standard_error(terms: Tensor) -> Tensor:
    """Return the error of the mean over draws and data ``(num_samples, N, ...)``, the data fixed.

    Draws of one datum vary about that datum's own mean, which a spread over all would overstate.
    """
    num_samples, num_data = terms.shape[:2]
    return (terms.var(0).mean(0) / (num_samples * num_data)).sqrt()


def _independent_coordinates(distribution: Distribution) -> Distribution | None:
    """Return the distribution of the coordinates, ``(*batch, D)``, if they are independent."""
    if isinstance(distribution, ExpandedDistribution):
        inner = _independent_coordinates(distribution.base_dist)
        if inner is None:
            return None
        return inner.expand(distribution.batch_shape + inner.batch_shape[-1:])
    if not isinstance(distribution, Independent) or len(distribution.event_shape) != 1:
        return None
    base = distribution.base_dist
    return None if base.event_shape else base


def _coordinate_marginals(distribution: Distribution) -> Distribution | None:
    """Return the distribution of each coordinate on its own, dependent or not, else None."""
    if isinstance(distribution, TorchMultivariateNormal):
        scale = distribution.variance.sqrt()
        return dist.Normal(distribution.loc, scale, validate_args=False)
    if isinstance(distribution, DiagonalNormalMixture):
        components = dist.Normal(distribution.loc.mT, distribution.scale.mT, validate_args=False)
        logits = distribution.log_weights[..., None, :].expand(components.batch_shape)
        weights = dist.Categorical(logits=logits, validate_args=False)
        return dist.MixtureSameFamily(weights, components, validate_args=False)
    return _independent_coordinates(distribution)
