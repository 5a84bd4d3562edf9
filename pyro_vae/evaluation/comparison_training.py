"""Training of the pairs of a comparison, and what is refused before the first of them is trained."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, unknown_name, whole_number
from pyro_vae.infer.settings import check_callables
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import as_inputs, check_data
from pyro_vae.pair.opened import OpenedPair, any_number_of_data

Pair = tuple[PairFunction, PairFunction]
Report = Callable[[str, str, float], None]
TrainingData = Dataset | Tensor | Sequence[Tensor]


class Trained(NamedTuple):
    """What trains of a pair, and what of that is its guide's: parameters by their identity."""

    parameters: dict[int, Tensor]
    of_guide: dict[int, Tensor]


def as_dict(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return options as a dict; refuse what is no mapping."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"expected {name} as a mapping from names, got {type(options).__name__}")
    return dict(options or {})


def check_fit_options(fit_options: Mapping[str, Any] | None, *, trains: bool) -> dict[str, Any]:
    """Refuse names that :func:`pyro_vae.fit` does not know, and options where nothing is trained."""
    options = as_dict("fit_options", fit_options)
    known = set(inspect.signature(fit).parameters) - {"model", "guide", "data"}
    for name in options:
        if name not in known:
            raise unknown_name("fit option", name, known)
    if options and not trains:
        raise InputError("expected train with fit_options, got none: pass the training data")
    check_callables(on_epoch=options.get("on_epoch"))
    return options


def check_apart(pairs: Mapping[str, Pair], owned: Mapping[str, Trained], hold: str | None) -> None:
    """Refuse different pairs that would train the same parameters, one undoing the other."""
    for (name, pair), (other, its) in itertools.combinations(pairs.items(), 2):
        same = pair[1] == its[1] if hold == "model" else pair == its
        if not same and owned[name].parameters.keys() & owned[other].parameters.keys():
            raise InputError(
                f"expected pairs that share no parameters to train, got shared ones of {name!r} and "
                f"{other!r}: build each from networks and parameter names of its own, or train them "
                "beforehand"
            )


def check_training(
    pairs: Iterable[Pair], train: TrainingData, options: Mapping[str, Any], plate: str
) -> None:
    """Refuse training data that one of the pairs does not take: all before anything is trained."""
    drawn_anew = isinstance(train, Dataset) and train.binarize == "dynamic"
    inputs = as_inputs(train.train if isinstance(train, Dataset) else train)
    batch_size = whole_number("a batch size", options.get("batch_size", 128), least=1)  # fit's own
    batch = tuple(value[:batch_size] for value in inputs)
    for model, guide in pairs:
        check_data(model, inputs)
        if drawn_anew or options.get("transform") is not None:
            continue  # the pair is shown other values than these
        pair = OpenedPair(model, guide, as_inputs(batch, model, guide), plate=plate)
        with any_number_of_data("pair", pair.num_data), pair.evaluating(0):
            pass  # its structure has been looked at


def train_pairs(
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
