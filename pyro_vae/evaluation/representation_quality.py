"""What the latents tell about the data: active units, information, dependence, use for labels.

With the N given data as the whole population, the aggregate posterior is the finite mixture
``q(z) = (1/N) sum_n q(z|x_n)``, evaluated as it is: a log-sum-exp over all N data. Then

.. math:: rate = MI + KL(q(z) || p(z)), KL(q(z) || p(z)) = TC + sum_d KL(q(z_d) || p(z_d))

with MI the mutual information between z and the index n (the second holds for a prior of independent
coordinates). Nothing but the Monte Carlo error stands between these numbers and their definitions;
how they relate to the distribution the data were drawn from is said at :class:`Representation`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from pyro_vae.distributions.kl import closed_form_kl
from pyro_vae.distributions.normal import DiagonalNormalMixture
from pyro_vae.errors import InputError, check_counts, check_optional_counts
from pyro_vae.evaluation.latent_codes import Code, mean_codes
from pyro_vae.pair.contract import check_density_known
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import OpenedPair, open_function, open_pair
from pyro_vae.pair.sites import Latents, latent_sites
from pyro_vae.summary import Summary, plus_minus, shown
from pyro_vae.weights.particles import Particles

# A unit is active if its posterior mean varies more than this over the data (Burda et al. 2016,
# section 5.2, who found the variances to fall into two clearly separated groups).
ACTIVE_VARIANCE = 0.01

# Draws that a posterior mean without closed form rests on.
_MEAN_DRAWS = 1000


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


@shown
@dataclass(frozen=True)
class Representation:
    """What the latents tell about N data points; information in nats.

    The information measures are those of the N data themselves: the index n is uniform on them and
    q(z) is their mixture. As estimates for the distribution behind the data they are biased, and do
    not get better with more draws: ``mutual_information`` is at most log N and, in expectation over
    data sets, at most the population's; ``mutual_information_upper``, whose mixture leaves the
    datum's own component out, is in expectation at least the population's. What the one loses to the
    population the marginal KL gains.

    Attributes:
        sites: names of the latents.
        latent_dim: D, number of latent coordinates.
        num_data: number of data points, N.
        num_samples: draws of each datum's posterior.
        unit_variances: Var_x E[z_d given x], ``(D,)``; for means from draws less their own variance.
        means_exact: whether E[z given x] has a closed form, or comes from draws.
        kl_per_dimension: mean KL(q(z_d given x) || p(z_d)), ``(D,)``, of independent coordinates.
        kl_per_dimension_standard_error: Monte Carlo standard error of it, ``(D,)``; 0 where analytic.
        rate: mean KL(q(z given x) || p(z)).
        rate_method: "analytic" or "Monte Carlo", of ``rate`` and ``kl_per_dimension``.
        mutual_information: index-code mutual information, mean KL(q(z given x) || q(z)).
        mutual_information_upper: that of the other N - 1 data; huge if posteriors don't overlap.
        marginal_kl: KL(q(z) || p(z)).
        total_correlation: KL(q(z) || prod_d q(z_d)), where each coordinate's posterior is known.
        dimension_wise_kl: sum_d KL(q(z_d) || p(z_d)); None where the prior's are not either.
        unavailable: for each measure that is None, why.
        nearest_neighbour_accuracy: cross-validated, of labels from posterior means; None without.
        linear_accuracy: likewise by logistic regression.
        num_folds: folds of the cross-validation; None without labels.
    """

    sites: tuple[str, ...]
    latent_dim: int
    num_data: int
    num_samples: int
    unit_variances: Tensor
    means_exact: bool
    kl_per_dimension: Tensor | None
    kl_per_dimension_standard_error: Tensor | None
    rate: Estimate
    rate_method: str
    mutual_information: Estimate
    mutual_information_upper: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate | None
    dimension_wise_kl: Estimate | None
    unavailable: dict[str, str]
    nearest_neighbour_accuracy: Estimate | None = None
    linear_accuracy: Estimate | None = None
    num_folds: int | None = None

    @property
    def active(self) -> Tensor:
        """Which coordinates are active, ``(D,)``: variance of the posterior mean above 0.01."""
        return self.unit_variances > ACTIVE_VARIANCE

    @property
    def active_units(self) -> int:
        """How many coordinates are active."""
        return int(self.active.sum())

    def _summary(self) -> Summary:
        said = {
            f"rate ({self.rate_method})": self.rate,
            "mutual information": self.mutual_information,
            "marginal KL": self.marginal_kl,
            "total correlation": self.total_correlation,
            "dimension-wise KL": self.dimension_wise_kl,
            "nearest-neighbour accuracy": self.nearest_neighbour_accuracy,
            "linear-probe accuracy": self.linear_accuracy,
        }
        units = f"{self.active_units} of {self.latent_dim} units active"
        rows = {name: plus_minus(*estimate) for name, estimate in said.items() if estimate}
        return f"latents of {self.num_data} data points, {units}, nats per data point", rows


def representation(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *, labels: Any = None,
    num_samples: int = 4, num_neighbours: int = 5, num_folds: int = 5,
    max_memory: int | None = None, plate: str = "data", seed: int | None = 0,
) -> Representation:  # fmt: skip
    """Measure what the latents of a pair tell about the data; several sites are taken together.

    The cost grows with the square of N (every draw is scored under every datum's posterior); a few
    thousand data points take seconds with the amortised families here. The accuracies are those of
    5 nearest neighbours and of logistic regression on standardised posterior means, each datum
    predicted by a fit to the other folds.

    Args:
        model, guide, max_memory, plate: as in :func:`pyro_vae.log_marginal`.
        x: data ``(N, ...)``, N at least 2, or a tuple of tensors passed as ``model(*x)``.
        labels: classes ``(N,)``, for the accuracies.
        num_samples: draws of each datum's posterior, at least 2 (the errors come from their spread).
        num_neighbours: k of the nearest-neighbour classifier.
        num_folds: folds of the cross-validation, less where a class has fewer members.
        seed: seed of draws and folds; the generators' state is restored afterwards.

    Raises:
        InputError: options or labels out of range, a discrete latent, or a pair whose weights
            would be wrong (see :func:`pyro_vae.log_weights`).

    Source:
        Burda, Grosse, Salakhutdinov 2016, section 5.2 (active units); Hoffman, Johnson 2016, "ELBO
        surgery", equation 7 (index-code mutual information and marginal KL); Chen et al. 2018,
        "Isolating Sources of Disentanglement", equation 2 (total correlation, dimension-wise KL);
        Poole et al. 2019, "On Variational Bounds of Mutual Information", equations 5 and 12.
    """
    check_counts(num_samples=num_samples, least=2)
    check_optional_counts(max_memory=max_memory)
    pair = open_pair(model, guide, x, plate=plate)
    if pair.num_data < 2:
        raise InputError("expected at least 2 data points to compare, got 1")
    if labels is not None:
        labels = _check_labels(labels, pair.num_data, num_neighbours, num_folds)
    with pair.evaluating(seed):
        codes = mean_codes(pair.alone(guide), _MEAN_DRAWS)
        for name, code in codes.items():
            if code.support == "discrete":
                raise InputError(f"expected continuous latents, {name!r} is discrete")
        measures = _information(pair, num_samples, max_memory)
    variances = _variances(codes)
    if labels is not None:
        features = _side_by_side([code.mean for code in codes.values()]).cpu().numpy()
        measures |= _probe(features, labels, num_neighbours, num_folds, seed or 0)
    exact = all(code.exact for code in codes.values())
    seen: Any = {"sites": tuple(codes), "latent_dim": len(variances), "num_data": pair.num_data}
    seen |= {"num_samples": num_samples, "unit_variances": variances, "means_exact": exact}
    return Representation(**seen, **measures)


def unit_variances(
    guide: PairFunction, x: Tensor | Sequence[Tensor], *, plate: str = "data", seed: int | None = 0
) -> Tensor:
    """Return Var_x E[z_d given x] of each latent coordinate, ``(D,)``, float64, on the CPU.

    As in :func:`representation`: a coordinate is active where it is above 0.01.
    """
    opened = open_function(guide, x, plate=plate)
    with opened.evaluating(seed):
        return _variances(mean_codes(opened, _MEAN_DRAWS))


def _variances(codes: dict[str, Code]) -> Tensor:
    means = _side_by_side([code.mean for code in codes.values()])
    errors = _side_by_side([code.standard_error for code in codes.values()])
    # Means from draws vary by their own error too.
    return (means.var(0) - errors.square().mean(0)).clamp(min=0).cpu()


def _side_by_side(values: list[Tensor]) -> Tensor:
    """Return values of several sites, ``(N, ...)`` each, as one matrix ``(N, D)``, float64."""
    return torch.cat([value.reshape(len(value), -1) for value in values], 1).double()


def _check_labels(labels: Any, num_data: int, num_neighbours: int, num_folds: int) -> np.ndarray:
    """Return labels as an array ``(N,)``; refuse what no classifier can be fitted to."""
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (num_data,):
        raise InputError(f"expected labels of shape ({num_data},), got {values.shape}")
    check_counts(num_neighbours=num_neighbours)
    check_counts(num_folds=num_folds, least=2)
    classes, counts = np.unique(values, return_counts=True)
    if len(classes) < 2:
        raise InputError("expected labels of at least two classes, got one")
    if counts.min() < 2:
        wanted = "at least 2 data points of every class"
        raise InputError(f"expected {wanted}, got 1 of {classes[counts.argmin()]}: leave it out")
    folds = min(num_folds, int(counts.min()))
    if num_data - -(-num_data // folds) < num_neighbours:
        raise InputError(f"expected fewer neighbours of {num_data} data points, got {num_neighbours}")
    return values


def _probe(codes: Any, labels: Any, num_neighbours: int, num_folds: int, seed: int) -> dict[str, Any]:
    """Return both accuracies and the number of folds, which hold the classes in equal shares."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(num_folds, int(np.unique(labels, return_counts=True)[1].min()))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    found: dict[str, Any] = {"num_folds": folds}
    for name, classifier in (
        ("nearest_neighbour_accuracy", KNeighborsClassifier(num_neighbours)),
        # Enough iterations to converge on standardised codes; the solver stops when it has.
        ("linear_accuracy", LogisticRegression(max_iter=2000)),
    ):
        pipeline = make_pipeline(StandardScaler(), classifier)
        accuracy = float((cross_val_predict(pipeline, codes, labels, cv=split) == labels).mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(labels))  # binomial
        found[name] = Estimate(accuracy, error)
    return found


class _Coordinates(NamedTuple):
    """The distributions of the only latent, and of its coordinates, with batch shape ``(N, D)``."""

    posterior: Distribution | None = None
    prior: Distribution | None = None
    of_posterior: Distribution | None = None
    of_prior: Distribution | None = None
    independent: tuple[Distribution, Distribution] | None = None  # both, where both are independent


def _information(pair: OpenedPair, num_samples: int, max_memory: int | None) -> dict[str, Any]:
    """Return the information measures of :class:`Representation` by name."""
    particles = Particles(pair.part())
    model_trace, guide_trace = particles.pair.trace()
    check_density_known(latent_sites(guide_trace), "posteriors can't be compared at one latent")
    prior = posterior = None
    if len(particles.axes) == 1:
        (name,) = particles.axes
        sites = model_trace.nodes[name], guide_trace.nodes[name]
        if all(site["mask"] is None for site in sites):
            prior, posterior = (site["fn"] for site in sites)
    coordinates, unavailable = _coordinates(posterior, prior, pair.num_data)
    budget = pair.memory(max_memory)
    rows = [_one_draw(particles, coordinates, budget) for _ in range(num_samples)]
    terms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    found: dict[str, Any] = {"total_correlation": None, "dimension_wise_kl": None}
    for name in terms.keys() - {"kl_per_dimension"}:
        found[name] = Estimate(terms[name].mean().item(), _standard_error(terms[name]).item())
    return found | _rates(terms, coordinates) | {"unavailable": unavailable}


def _coordinates(
    posterior: Distribution | None, prior: Distribution | None, num_data: int
) -> tuple[_Coordinates, dict[str, str]]:
    """Return what is known of the coordinates, and of each measure that isn't why."""
    names = ("total_correlation", "dimension_wise_kl", "kl_per_dimension")
    if posterior is None or prior is None:
        return _Coordinates(), dict.fromkeys(names, "the pair has several latents, or a masked one")
    if posterior.batch_shape != (num_data,) or len(posterior.event_shape) != 1:
        reason = "the latent is not one vector per datum"
        return _Coordinates(posterior, prior), dict.fromkeys(names, reason)
    each = _coordinate_marginals(posterior)
    own, given = map(_independent_coordinates, (posterior, prior))
    dependent = "the coordinates of {} are not independent"
    unavailable = {}
    if given is None:
        unavailable = dict.fromkeys(names[1:], dependent.format(type(prior).__name__))
    if each is None:
        unknown = f"{type(posterior).__name__} gives no density of one coordinate"
        unavailable |= dict.fromkeys(names[:2], unknown)
    if own is None:
        unavailable["kl_per_dimension"] = dependent.format(type(posterior).__name__)
    both = None if own is None or given is None else (own, given)
    return _Coordinates(posterior, prior, each, given, both), unavailable


def _one_draw(particles: Particles, coordinates: _Coordinates, budget: int) -> dict[str, Tensor]:
    """Draw each datum's posterior once; return the terms whose means are the measures, ``(N,)``."""
    latents, (own,) = particles.propose(1)
    _, (log_prior,) = particles.score(latents)
    # One row of latents per datum, the data's axis first.
    rows = {name: value[0] for name, value in particles.data_first(latents).items()}
    aggregate, others, of_coordinates = _aggregate(particles, coordinates, rows, own, budget)
    terms = {"rate": own - log_prior, "mutual_information": own - aggregate}
    terms |= {"mutual_information_upper": own - others, "marginal_kl": aggregate - log_prior}
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
    """Return log q(z) of each datum's draw, without its own datum too, and log q(z_d) if known."""
    num_data = particles.num_data
    elements = sum(value[0].numel() for value in rows.values())
    # The scores, and about as many intermediate values of each latent as an affine density makes.
    size = max(1, budget // (num_data * elements * 64))
    aggregate, others, of_coordinates = [], [], []
    for start in range(0, num_data, size):
        part = slice(start, min(start + size, num_data))
        # Each draw is a particle that gives every datum the same value.
        to_all = {n: v[part, None].expand(-1, num_data, *v.shape[1:]) for n, v in rows.items()}
        shown = {name: value.movedim(1, particles.axes[name]) for name, value in to_all.items()}
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


def _rates(terms: dict[str, Tensor], coordinates: _Coordinates) -> dict[str, Any]:
    """Return the rate and its share of each coordinate, in closed form where there is one."""
    each = total = per_dimension = error = None
    if coordinates.independent is not None:
        each = closed_form_kl(*coordinates.independent)
        per_dimension = terms["kl_per_dimension"].mean((0, 1)).cpu()
        error = _standard_error(terms["kl_per_dimension"]).cpu()
    if each is not None:
        total, per_dimension = each.sum(-1), each.double().mean(0).cpu()
        error = torch.zeros_like(per_dimension)
    elif coordinates.posterior is not None and coordinates.prior is not None:
        total = closed_form_kl(coordinates.posterior, coordinates.prior)
    rates: dict[str, Any] = {"rate_method": "Monte Carlo"}
    if total is not None:
        rate = Estimate(total.double().sum().item() / terms["rate"].shape[1], 0.0)
        rates = {"rate": rate, "rate_method": "analytic"}
    return rates | {"kl_per_dimension": per_dimension, "kl_per_dimension_standard_error": error}


def _standard_error(terms: Tensor) -> Tensor:
    """Return the error of the mean over draws and data ``(num_samples, N, ...)``, the data fixed."""
    num_samples, num_data = terms.shape[:2]
    return (terms.var(0).mean(0) / (num_samples * num_data)).sqrt()


def _independent_coordinates(distribution: Distribution) -> Distribution | None:
    """Return the distribution of the coordinates, ``(*batch, D)``, if they are independent."""
    if isinstance(distribution, ExpandedDistribution):
        inner = _independent_coordinates(distribution.base_dist)
        return inner and inner.expand(distribution.batch_shape + inner.batch_shape[-1:])
    if not isinstance(distribution, Independent) or len(distribution.event_shape) != 1:
        return None
    base = distribution.base_dist
    return None if base.event_shape else base


def _coordinate_marginals(distribution: Distribution) -> Distribution | None:
    """Return the distribution of each coordinate on its own, dependent or not, else None."""
    if isinstance(distribution, TorchMultivariateNormal):
        return dist.Normal(distribution.loc, distribution.variance.sqrt(), validate_args=False)
    if isinstance(distribution, DiagonalNormalMixture):
        components = dist.Normal(distribution.loc.mT, distribution.scale.mT, validate_args=False)
        logits = distribution.log_weights[..., None, :].expand(components.batch_shape)
        weights = dist.Categorical(logits=logits, validate_args=False)
        return dist.MixtureSameFamily(weights, components, validate_args=False)
    return _independent_coordinates(distribution)
