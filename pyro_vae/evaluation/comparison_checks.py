"""What a comparison refuses before anything is trained or measured."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pyro_vae.errors import InputError, first_line, unknown_name
from pyro_vae.evaluation.ais import AnnealingOptions
from pyro_vae.infer.settings import check_callables
from pyro_vae.infer.training import fit
from pyro_vae.pair.functions import PairFunction

Pair = tuple[PairFunction, PairFunction]


class Trained(NamedTuple):
    """What trains of a pair: numbers of elements by the parameters' identity.

    Attributes:
        parameters: all that train.
        of_guide: those of the guide.
    """

    parameters: dict[int, int]
    of_guide: dict[int, int]


def check_pairs(pairs: Mapping[str, Pair]) -> None:
    """Refuse what is no mapping from names (a table's headings) to pairs."""
    if not isinstance(pairs, Mapping) or not pairs:
        got = type(pairs).__name__ if pairs else "none"
        raise InputError(f"expected at least one pair {{name: (model, guide)}}, got {got}")
    for name, pair in pairs.items():
        if not isinstance(name, str):
            raise InputError(f"expected names of pairs as text, got {first_line(repr(name))}")
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(map(callable, pair))):
            raise InputError(
                f"expected (model, guide) for {name!r}, got {type(pair).__name__}: of a VAE pass "
                "(vae.model, vae.guide)"
            )


def check_options(
    methods: Sequence[str],
    annealing_options: Mapping[str, Any] | None,
    posterior: str | None,
    hold: str | None,
) -> dict[str, Any]:
    """Refuse options out of range or without effect; return annealing's as given."""
    named = isinstance(methods, Iterable) and not isinstance(methods, str)
    if not named or set(methods) not in ({"importance"}, {"importance", "annealed"}):
        raise InputError(
            f"expected methods ('importance',) or ('importance', 'annealed'), got {methods!r}"
        )
    if posterior not in (None, "quadrature"):
        raise InputError(f"expected posterior None or 'quadrature', got {posterior!r}")
    if hold not in (None, "model"):
        raise InputError(f"expected hold None or 'model', got {hold!r}")
    options = _as_dict("annealing_options", annealing_options)
    known = set(AnnealingOptions.__dataclass_fields__)
    for name in set(options) - known:
        raise InputError(f"expected annealing_options among {', '.join(sorted(known))}, got {name!r}")
    AnnealingOptions(**options)
    if options and "annealed" not in methods:
        raise InputError(
            f"expected methods=('importance', 'annealed') with annealing_options, got {methods!r}: "
            "leave them out, or ask for annealing"
        )
    return options


def check_fit_options(fit_options: Mapping[str, Any] | None, *, trains: bool) -> dict[str, Any]:
    """Refuse names that :func:`pyro_vae.fit` does not know, and options where nothing is trained."""
    options = _as_dict("fit_options", fit_options)
    known = set(inspect.signature(fit).parameters) - {"model", "guide", "data"}
    for name in options:
        if name not in known:
            raise unknown_name("fit option", name, known)
    if options and not trains:
        raise InputError("expected train with fit_options, got none: pass the training data")
    check_callables(on_epoch=options.get("on_epoch"))
    return options


def _as_dict(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"expected {name} as a mapping from names, got {type(options).__name__}")
    return dict(options or {})


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
