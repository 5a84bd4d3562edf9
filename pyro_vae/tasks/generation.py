"""Generate new data from a pair, and reconstruct given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.infer.pair import HANDLER_LOCK, PairFunction, as_inputs, evaluation_mode, seeded
from pyro_vae.infer.sites import sample_sites

__all__ = ["generate", "reconstruct"]


def generate(
    model: PairFunction,
    like: Tensor | Sequence[Tensor],
    *,
    mean: bool = True,
    observed: str | None = None,
    seed: int | None = None,
) -> Tensor:
    """Draw new data from the model: latents from the prior, data from the likelihood.

    Args:
        model: the generative function of a pair.
        like: inputs ``(N, ...)`` that give the number, shape and conditions of the data; the values
            of the observed site are not looked at.
        mean: return the likelihood's mean instead of a draw from it.
        observed: name of the observed site; needed where the model has several.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        ``(N, *data_shape)``.

    Raises:
        InputError: no observed site, several without a name, or one of another name.
    """
    inputs = as_inputs(like)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model), seeded(seed):
        name = _observed_site(poutine.trace(model).get_trace(*inputs), observed)
        with _Freed(name):
            trace = poutine.trace(model).get_trace(*inputs)
    return _value(trace.nodes[name], mean)


def reconstruct(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    mean: bool = True,
    observed: str | None = None,
    seed: int | None = None,
) -> Tensor:
    """Encode data and decode them again: latents from the guide, data from the likelihood.

    Args:
        model: the generative function of a pair.
        guide: its variational function.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``.
        mean: return the likelihood's mean instead of a draw from it.
        observed: name of the observed site; needed where the model has several.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        ``(N, *data_shape)``.

    Raises:
        InputError: no observed site, several without a name, or one of another name.
    """
    inputs = as_inputs(x)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide), seeded(seed):
        drawn = poutine.trace(guide).get_trace(*inputs)
        trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*inputs)
        site = trace.nodes[_observed_site(trace, observed)]
        return _value(site, mean) if mean else site["fn"].sample()


class _Freed(Messenger):
    """Draw one observed site anew; the others keep what they observed, as conditions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == self.name:
            message.update(is_observed=False, value=None, done=False)


def _observed_site(trace: Any, name: str | None) -> str:
    sites = [
        site["name"]
        for site in sample_sites(trace)
        if site["is_observed"] and not site_is_factor(site)
    ]
    if name is None and len(sites) == 1:
        return sites[0]
    if name is None or name not in sites:
        wanted = "one observed site" if name is None else f"an observed site {name!r}"
        raise InputError(f"expected {wanted}, the model has {', '.join(sites) or 'none'}: name one")
    return name


def _value(site: dict[str, Any], mean: bool) -> Tensor:
    return site["fn"].mean if mean else site["value"]
