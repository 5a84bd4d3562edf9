"""What pairs observe, and the refusal to rank likelihoods that measure different things."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.blocks import block_scorers
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import data_dim, sample_sites

# Data that share one pass of the pair.
_BLOCK = 1024


class Observed(NamedTuple):
    """One observed site of a pair.

    Attributes:
        kind: ``"density"``, ``"density on the sphere"``, ``"probability"`` (of discrete values), or
            ``"pseudo-likelihood"`` (a discrete distribution given values that it can't take).
        values: what is observed, the data first, float64, on the CPU.
    """

    kind: str
    values: Tensor


def observed_sites(
    model: PairFunction, guide: PairFunction, inputs: Inputs, plate: str
) -> dict[str, Observed]:
    """Return what the model observes of the data, by site name (factors left out).

    Raises:
        InputError: a pair that can't be weighed.
    """
    found: dict[str, list[Observed]] = {}
    for _, scorer in block_scorers(model, guide, inputs, plate, _BLOCK):
        trace, _ = scorer.traces()
        for site in sample_sites(trace):
            if site["is_observed"] and not site_is_factor(site):
                found.setdefault(site["name"], []).append(_observed(site, plate))
    return {name: _joined(parts) for name, parts in found.items()}


def check_comparable(observed: dict[str, dict[str, Observed]]) -> str:
    """Refuse pairs whose log-likelihoods can't be subtracted; return their kind.

    Args:
        observed: by pair, what :func:`observed_sites` found.

    Raises:
        InputError: observed sites that differ in number, values or kind of likelihood.
    """
    (first, reference), *others = observed.items()
    for name, sites in others:
        if len(sites) != len(reference):
            raise InputError(
                f"expected pairs that observe the same data, got {len(reference)} observed sites of "
                f"{first!r} and {len(sites)} of {name!r}: compare models of one data set"
            )
        # Names are free; where they differ the sites are taken in the order of the model.
        matched = set(sites) == set(reference)
        for index, (site, wanted) in enumerate(reference.items()):
            got = sites[site] if matched else list(sites.values())[index]
            _check_site(site, first, wanted, name, got)
    kinds = {site.kind for site in reference.values()}
    return " and ".join(sorted(kinds))


def _check_site(site: str, first: str, wanted: Observed, name: str, got: Observed) -> None:
    # The same number may have been rounded to another type by each pair.
    if wanted.values.shape != got.values.shape or not torch.allclose(
        wanted.values, got.values, rtol=1e-6, atol=1e-6, equal_nan=True
    ):
        what = (
            f"shapes {tuple(wanted.values.shape)} and {tuple(got.values.shape)}"
            if wanted.values.shape != got.values.shape
            else "other values"
        )
        raise InputError(
            f"expected pairs that observe the same values, got {what} at {site!r} of {first!r} and "
            f"{name!r}: compare models of the same data, scaled and shaped alike"
        )
    if wanted.kind != got.kind:
        raise InputError(
            f"expected pairs with one kind of likelihood, got a {wanted.kind} of {site!r} from "
            f"{first!r} and a {got.kind} from {name!r}: their log p(x) can't be subtracted, compare "
            "them in separate tables"
        )


def _observed(site: dict[str, Any], plate: str) -> Observed:
    value = site["value"].detach()
    axis = data_dim(site, plate) - site["fn"].event_dim
    return Observed(_kind(site["fn"], value), value.movedim(axis, 0).double().cpu())


def _kind(distribution: Any, value: Tensor) -> str:
    support = distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.sphere:
        return "density on the sphere"
    if not support.is_discrete:
        return "density"
    whole = not value.is_floating_point() or bool((value == value.round()).all())
    return "probability" if whole else "pseudo-likelihood"


def _joined(parts: list[Observed]) -> Observed:
    kinds = {part.kind for part in parts}
    kind = "pseudo-likelihood" if "pseudo-likelihood" in kinds else parts[0].kind
    return Observed(kind, torch.cat([part.values for part in parts]))
