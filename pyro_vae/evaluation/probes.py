"""How well labels are read off the codes: nearest neighbours and a linear probe, cross-validated."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.options import check_counts

# Enough for the solver to converge on standardised codes; it stops when it has.
_MOST_ITERATIONS = 2000


def check_labels(labels: Any, num_data: int, num_neighbours: int, num_folds: int) -> np.ndarray:
    """Return labels as an array ``(N,)``.

    Raises:
        InputError: labels of another length, a single class, a class of one member, or options out
            of range.
    """
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


def probe_accuracies(
    features: np.ndarray, labels: np.ndarray, *, num_neighbours: int, num_folds: int, seed: int
) -> tuple[float, float, int]:
    """Return the accuracies of nearest neighbours and logistic regression, and the folds used.

    Each datum is predicted by a classifier that was fitted to the other folds, on features
    standardised there; the folds hold the classes in equal shares.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)``.
        num_neighbours: k.
        num_folds: folds, less where a class has fewer members.
        seed: seed of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(num_folds, int(np.unique(labels, return_counts=True)[1].min()))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracies = []
    for classifier in (
        KNeighborsClassifier(num_neighbours),
        LogisticRegression(max_iter=_MOST_ITERATIONS),
    ):
        pipeline = make_pipeline(StandardScaler(), classifier)
        predicted = cross_val_predict(pipeline, features, labels, cv=split)
        accuracies.append(float((predicted == labels).mean()))
    return accuracies[0], accuracies[1], folds
