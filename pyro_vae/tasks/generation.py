"""Generate new data from a pair, and reconstruct given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.blocks import can_be_split
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, evaluation_mode, seeded
from pyro_vae.pair.inputs import Inputs, as_inputs, check_data
from pyro_vae.pair.sites import Given, Latents, Site, is_inside, latent_sites, observed_site
from pyro_vae.tasks.encoding import mean_of
from pyro_vae.tasks.temperature import AtTemperature, check_temperature
from pyro_vae.weights.particles import PairScorer


def generate(
    model: PairFunction,
    like: Tensor | Sequence[Tensor],
    *,
    guide: PairFunction | None = None,
    data: Tensor | Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    mean: bool = True,
    observed: str | None = None,
    plate: str = "data",
    seed: int | None = None,
) -> Tensor:
    r"""Draw new data: latents from the prior or the aggregate posterior, data from the likelihood.

    .. math:: z \sim p(z) \quad\text{or}\quad z \sim \frac{1}{M} \sum_m q(z | x_m),
        \qquad x \sim p(x | z)

    Args:
        model: the generative function of a pair.
        like: inputs ``(N, ...)`` that give the number, shape and conditions of the new data; the
            values of the observed site are not looked at.
        guide: the variational function. With it latents come from the aggregate posterior: for each
            new datum one of ``data`` is picked at random, with replacement, and its posterior drawn
            from. The conditions are those of ``like`` all the same: where p(z) depends on them, give
            ``data`` that share them.
        data: inputs ``(M, ...)`` whose posteriors are mixed; by default ``like``.
        temperature: factor of the spread (standard deviation) of the distributions that latents are
            drawn from: normal and other location-scale families, mixtures (each component's) and
            flows (the base's).
        mean: return the likelihood's mean instead of a draw from it.
        observed: name of the observed site; needed where the model has several.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        ``(N, *data_shape)``.

    Raises:
        InputError: no observed site, several without a name, one of another name or without a mean;
            a plate that subsamples the data; data without a guide; a temperature not above 0, or with
            latents that have no scale.

    Source:
        Aggregate posterior: Makhzani et al. 2016, "Adversarial Autoencoders", equation 1.
    """
    inputs = as_inputs(like, model)
    check_temperature(temperature)
    if data is not None and guide is None:
        raise InputError("expected a guide with data, got none: pass guide=, or leave out data=")
    given = inputs if data is None else as_inputs(data, model)
    functions = (model,) if guide is None else (model, guide)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(*functions), seeded(seed):
        name = observed_site(poutine.trace(model).get_trace(*inputs), observed)
        latents: Latents = {}
        if guide is not None:
            latents = _from_aggregate_posterior(
                model, guide, given, len(inputs[0]), temperature, plate
            )
        with _Freed(name), AtTemperature(temperature), Given(latents):
            trace = poutine.trace(model).get_trace(*inputs)
    site = trace.nodes[name]
    _check_size(site, plate, len(inputs[0]))
    return mean_of(site) if mean else site["value"]


def reconstruct(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    mean: bool = True,
    observed: str | None = None,
    plate: str = "data",
    seed: int | None = None,
) -> Tensor:
    """Encode data and decode them again: latents from the guide, data from the likelihood.

    Args:
        model: the generative function of a pair.
        guide: its variational function.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``.
        mean: return the likelihood's mean instead of a draw from it.
        observed: name of the observed site; needed where the model has several.
        plate: name of the data plate.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        ``(N, *data_shape)``.

    Raises:
        InputError: no observed site, several without a name, one of another name or without a mean,
            a latent that the guide misses, or a plate that subsamples the data.
    """
    inputs = as_inputs(x, model, guide)
    check_data(model, inputs)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide), seeded(seed):
        drawn = poutine.trace(guide).get_trace(*inputs)
        trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*inputs)
        missing = sorted({each["name"] for each in latent_sites(trace)} - set(drawn.nodes))
        if missing:
            raise InputError(
                f"expected a guide that draws every latent, {missing[0]!r} is missing: add "
                "pyro.sample for it"
            )
        site = trace.nodes[observed_site(trace, observed)]
        _check_size(site, plate, len(inputs[0]))
        return mean_of(site) if mean else site["fn"].sample()


class _Freed(Messenger):
    """Draw one observed site anew; the others keep what they observed, as conditions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == self.name:
            message.update(is_observed=False, value=None, done=False)


def _from_aggregate_posterior(
    model: PairFunction,
    guide: PairFunction,
    data: Inputs,
    number: int,
    temperature: float,
    plate: str,
) -> Latents:
    """Draw latents of so many data, each from the posterior of a datum picked at random."""
    picked = torch.randint(len(data[0]), (number,), device=data[0].device)
    if can_be_split(model, guide, data, plate):
        rows = tuple(value[picked] for value in data)
        scorer = PairScorer(model, guide, rows, plate=plate)
        with AtTemperature(temperature):
            trace = poutine.trace(guide).get_trace(*rows)
        return {name: trace.nodes[name]["value"] for name in scorer.data_axes}
    # A guide with parameters per datum takes all its data at once: a datum picked for the k-th time
    # gets the k-th draw.
    scorer = PairScorer(model, guide, data, plate=plate)
    turn = _occurrence(picked)
    draws = []
    for _ in range(int(turn.max()) + 1):
        with AtTemperature(temperature):
            trace = poutine.trace(guide).get_trace(*data)
        draws.append({name: trace.nodes[name]["value"] for name in scorer.data_axes})
    return {
        name: torch.stack([draw[name].movedim(axis, 0) for draw in draws])[turn, picked].movedim(
            0, axis
        )
        for name, axis in scorer.data_axes.items()
    }


def _occurrence(picked: Tensor) -> Tensor:
    """Return how often each entry's value has come before it."""
    values, order = picked.sort(stable=True)
    position = torch.arange(len(picked), device=picked.device)
    occurrence = torch.empty_like(picked)
    occurrence[order] = position - torch.searchsorted(values, values)
    return occurrence


def _check_size(site: Site, plate: str, num_data: int) -> None:
    """Refuse a site that subsamples its data: which of them were drawn is not known afterwards."""
    if is_inside(site, plate):
        check_rows("model", site, plate, num_data)
