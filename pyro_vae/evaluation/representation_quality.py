"""What the latents hold of the data: active units, information, dependence, and use for labels.

With the N given data as the whole population, the aggregate posterior is the finite mixture
``q(z) = (1/N) sum_n q(z|x_n)``, evaluated as it is: a log-sum-exp over all N data. Then

.. math:: rate = MI + KL(q(z) || p(z)), KL(q(z) || p(z)) = TC + sum_d KL(q(z_d) || p(z_d))

with MI the mutual information between z and the index n (the second holds for a prior of independent
coordinates). Nothing but the Monte Carlo error stands between these numbers and their definitions;
how they relate to the distribution the data were drawn from is said at :class:`Representation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts, check_optional_counts
from pyro_vae.evaluation.latent_codes import Code, mean_codes
from pyro_vae.evaluation.mutual_information import Estimate, information
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import open_function, open_pair
from pyro_vae.summary import Summary, plus_minus, shown

# A unit is active if its posterior mean varies more than this over the data (Burda et al. 2016,
# section 5.2, who found the variances to fall into two clearly separated groups).
ACTIVE_VARIANCE = 0.01

# Draws that a posterior mean without closed form rests on.
_MEAN_DRAWS = 1000


@shown
@dataclass(frozen=True)
class Representation:
    """What the latents hold of N data; information in nats.

    The information measures are those of the N data themselves: the index n is uniform on them and
    q(z) is their mixture. As estimates for the distribution behind the data they are biased, and do
    not get better with more draws: ``mutual_information`` is at most log N and, in expectation over
    data sets, at most the population's; ``mutual_information_upper``, whose mixture leaves the
    datum's own component out, is in expectation at least the population's. What the one loses to the
    population the marginal KL gains.

    Attributes:
        sites: names of the latents.
        latent_dim: D, number of latent coordinates.
        num_data: number of data, N.
        num_samples: draws of each datum's posterior.
        unit_variances: Var_x E[z_d given x], ``(D,)``; for means from draws less their own variance.
        means_exact: whether E[z given x] has a closed form, or comes from draws.
        kl_per_dimension: mean over data of KL(q(z_d given x) || p(z_d)), ``(D,)``; None unless both
            have independent coordinates.
        kl_per_dimension_standard_error: Monte Carlo standard error of it, ``(D,)``; 0 where analytic.
        rate: mean KL(q(z given x) || p(z)).
        rate_method: "analytic" or "Monte Carlo", of ``rate`` and ``kl_per_dimension``.
        mutual_information: index-code mutual information, mean KL(q(z given x) || q(z)).
        mutual_information_upper: the same with a mixture of the other N - 1 data; infinite or huge
            where posteriors of different data don't overlap.
        marginal_kl: KL(q(z) || p(z)).
        total_correlation: KL(q(z) || prod_d q(z_d)); None where the coordinates' posteriors are not
            known one by one.
        dimension_wise_kl: sum_d KL(q(z_d) || p(z_d)); None where the prior's are not either.
        unavailable: for each measure that is None, why.
        nearest_neighbour_accuracy: cross-validated accuracy of labels from the posterior means, with
            its binomial standard error; None without labels.
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
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    labels: Any = None,
    num_samples: int = 4,
    num_neighbours: int = 5,
    num_folds: int = 5,
    max_memory: int | None = None,
    plate: str = "data",
    seed: int | None = 0,
) -> Representation:
    """Measure what the latents of a pair hold of the data; several latent sites are taken together.

    The cost grows with the square of N (every draw is scored under every datum's posterior); a few
    thousand data are taken in seconds by the amortised families here. The accuracies are those of
    5 nearest neighbours and of logistic regression on standardised posterior means, each datum
    predicted by a fit to the other folds.

    Args:
        model: the generative function of a pair.
        guide: its variational function.
        x: data ``(N, ...)``, N at least 2, or a tuple of tensors passed as ``model(*x)``.
        labels: classes ``(N,)``, for the accuracies.
        num_samples: draws of each datum's posterior, at least 2 (the errors come from their spread).
        num_neighbours: k of the nearest-neighbour classifier.
        num_folds: folds of the cross-validation, less where a class has fewer members.
        max_memory: bytes that a block of scores may need; by default as in
            :func:`pyro_vae.log_marginal`.
        plate: name of the data plate.
        seed: seed of draws and folds; the generators' state is restored afterwards.

    Raises:
        InputError: options or labels out of range, a discrete latent, or a pair that can't be weighed
            rightly (see :func:`pyro_vae.log_weights`).

    Source:
        Burda, Grosse, Salakhutdinov 2016, section 5.2 (active units); Hoffman, Johnson 2016, "ELBO
        surgery", equation 7 (index-code mutual information and marginal KL); Chen et al. 2018,
        "Isolating Sources of Disentanglement", equation 2 (total correlation, dimension-wise KL);
        Poole et al. 2019, "On Variational Bounds of Mutual Information", equations 5 and 12 (the
        two sides of the population's mutual information).
    """
    check_counts(num_samples=num_samples, least=2)
    check_optional_counts(max_memory=max_memory)
    pair = open_pair(model, guide, x, plate=plate)
    if pair.num_data < 2:
        raise InputError("expected at least 2 data to compare, got 1")
    if labels is not None:
        labels = _check_labels(labels, pair.num_data, num_neighbours, num_folds)
    with pair.evaluating(seed):
        codes = mean_codes(pair.alone(guide), _MEAN_DRAWS)
        for name, code in codes.items():
            if code.support == "discrete":
                raise InputError(f"expected continuous latents, {name!r} is discrete")
        measures = information(pair, num_samples=num_samples, max_memory=max_memory)
    variances = _variances(codes)
    if labels is not None:
        features = _side_by_side([code.mean for code in codes.values()]).cpu().numpy()
        measures |= _probe(features, labels, num_neighbours, num_folds, seed=seed or 0)
    return Representation(
        sites=tuple(codes),
        latent_dim=len(variances),
        num_data=pair.num_data,
        num_samples=num_samples,
        unit_variances=variances,
        means_exact=all(code.exact for code in codes.values()),
        **measures,
    )


def unit_variances(
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    plate: str = "data",
    seed: int | None = 0,
) -> Tensor:
    """Return Var_x E[z_d given x] of each latent coordinate, ``(D,)``, float64, on the CPU.

    As in :func:`representation`, without the rest of its measures: a coordinate is active where it is
    above 0.01.
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
        raise InputError(
            f"expected at least two data of every class, got one of {classes[counts.argmin()]}: "
            "leave it out"
        )
    folds = min(num_folds, int(counts.min()))
    if num_data - -(-num_data // folds) < num_neighbours:
        raise InputError(f"expected more data than {num_neighbours} neighbours, got {num_data}")
    return values


def _probe(
    features: np.ndarray, labels: np.ndarray, num_neighbours: int, num_folds: int, *, seed: int
) -> dict[str, Any]:
    """Return the accuracies of nearest neighbours and logistic regression, and the folds used.

    Each datum is predicted by a classifier that was fitted to the other folds, on features
    standardised there; the folds hold the classes in equal shares.
    """
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
        accuracy = float((cross_val_predict(pipeline, features, labels, cv=split) == labels).mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(labels))  # binomial
        found[name] = Estimate(accuracy, error)
    return found
