"""What pairs observe, and the refusal to rank likelihoods that measure different things."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.pair.sites import TracePair, data_dim, sample_sites


class Observed(NamedTuple):
    """One observed site: the kind of its likelihood, and its values, data first, float64, on the CPU.

    It is a ``"density"``, a ``"density on the sphere"``, a ``"probability"`` (of discrete values), or
    a ``"pseudo-likelihood"`` (a discrete distribution given values that it can't take).
    """

    kind: str
    values: Tensor


def observed_sites(pair: OpenedPair) -> tuple[dict[str, Observed], TracePair]:
    """Return what an open pair observes by site (factors left out), and its first block's traces."""
    found: dict[str, list[Observed]] = {}
    first: TracePair | None = None
    for _, part in pair.blocks():
        traces = part.trace()
        first = first or traces
        for site in sample_sites(traces[0]):
            if site["is_observed"] and not site_is_factor(site):
                found.setdefault(site["name"], []).append(_observe(site, pair.plate))
    assert first is not None  # data are never empty
    return {name: _join(parts) for name, parts in found.items()}, first


def check_comparable(observed: dict[str, dict[str, Observed]]) -> str:
    """Refuse pairs, by name, whose log-likelihoods can't be subtracted; return their kind."""
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


def _observe(site: dict[str, Any], plate: str) -> Observed:
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


def _join(parts: list[Observed]) -> Observed:
    kinds = {part.kind for part in parts}
    kind = "pseudo-likelihood" if "pseudo-likelihood" in kinds else parts[0].kind
    return Observed(kind, torch.cat([part.values for part in parts]))
