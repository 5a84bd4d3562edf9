"""Training of the pairs of a comparison, and what is refused before the first of them is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.datasets import Dataset
from pyro_vae.errors import whole_number
from pyro_vae.evaluation.blocks import rows_of
from pyro_vae.evaluation.comparison_checks import Pair
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.pair.functions import evaluation_mode, seeded
from pyro_vae.pair.inputs import as_inputs, check_data
from pyro_vae.pair.opened import any_number_of_data
from pyro_vae.weights.particles import PairScorer

Report = Callable[[str, str, float], None]
TrainingData = Dataset | Tensor | Sequence[Tensor]


def check_training(
    pairs: Mapping[str, Pair], train: TrainingData, options: Mapping[str, Any], plate: str
) -> None:
    """Refuse training data that one of the pairs does not take.

    Raises:
        InputError: another number of tensors, values outside a likelihood's support, or parameters
            per datum for another number of data.
    """
    drawn_anew = isinstance(train, Dataset) and train.binarize == "dynamic"
    inputs = as_inputs(train.train if isinstance(train, Dataset) else train)
    batch_size = whole_number("a batch size", options.get("batch_size", 128), least=1)  # fit's own
    batch = rows_of(inputs, slice(batch_size))
    for model, guide in pairs.values():
        check_data(model, inputs)
        if drawn_anew or options.get("transform") is not None:
            continue  # the pair is shown other values than these
        shown = any_number_of_data("pair", len(batch[0]))
        with torch.no_grad(), seeded(0), evaluation_mode(model, guide), shown:
            PairScorer(model, guide, as_inputs(batch, model, guide), plate=plate)


def trained(
    pairs: Mapping[str, Pair], train: TrainingData, options: dict[str, Any], report: Report
) -> dict[str, FitResult]:
    """Train each pair once, however many names it has."""
    fits: dict[str, FitResult] = {}
    for name, pair in pairs.items():
        same = next((other for other in fits if pairs[other] == pair), None)
        if same is not None:
            fits[name] = fits[same]
            continue
        fits[name] = fit(*pair, train, **_with_report(options, name, report))
    return fits


def _with_report(options: dict[str, Any], name: str, report: Report) -> dict[str, Any]:
    """Tell the progress of a training run at each epoch, beside what the caller wants then."""
    epochs, given = options.get("epochs", 100), options.get("on_epoch")

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        report(name, "training", epoch / epochs)
        if given is not None:
            given(epoch, row)

    return {**options, "on_epoch": on_epoch}
