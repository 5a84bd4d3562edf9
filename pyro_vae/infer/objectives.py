"""Objectives over a pair: the beta handler, and rate and distortion read from an ELBO's traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.errors import InputError, real_number

__all__ = [
    "BetaSchedule",
    "TracePair",
    "check_beta",
    "draw_traces",
    "elbo_terms",
    "latent_scale_of",
    "plate_scale",
    "recorded_traces",
    "scale_latents",
    "unscaled_function",
    "wide",
]

TracePair = tuple[Any, Any]  # a model trace and the guide trace it was replayed against

_SCALE = "pyro_vae_latent_scale"
_FUNCTION = "pyro_vae_unscaled_function"


class _ScaleLatents(Messenger):
    """Multiply the scale of latent sites and remember by how much."""

    def __init__(self, scale: float | Tensor, is_guide: bool) -> None:
        super().__init__()
        self.scale, self.is_guide = scale, is_guide

    def _pyro_sample(self, message: Any) -> None:
        if (message["is_observed"] and not self.is_guide) or site_is_subsample(message):
            return
        message["scale"] = message["scale"] * self.scale
        known = message["infer"].get(_SCALE, 1.0)
        message["infer"] = {**message["infer"], _SCALE: known * self.scale}


def scale_latents(
    function: Callable[..., Any], scale: float | Tensor, *, is_guide: bool = False
) -> Callable[..., Any]:
    """Scale the log-probabilities of the latent sites of a model or a guide, and of no other site.

    Applied to both functions of a pair it turns the ELBO into the beta-VAE's objective, distortion +
    beta * rate. Unlike ``poutine.scale`` it leaves observed sites alone, accepts 0 (a warm-up starts
    there) and is known to :func:`pyro_vae.log_weights`, which takes it out again.

    Args:
        function: a model or a guide.
        scale: beta, at least 0; a tensor may change between calls without a recompilation.
        is_guide: whether the function is a guide, where every site is a part of log q: its factors
            are then scaled too.

    Raises:
        InputError: a number below 0 or not finite.

    Source:
        Higgins et al. 2017, "beta-VAE", equation 4.
    """
    if not isinstance(scale, Tensor):
        check_beta(scale)
        if scale == 1:
            return function

    def scaled(*args: Any, **kwargs: Any) -> Any:
        with _ScaleLatents(scale, is_guide):
            return function(*args, **kwargs)

    scaled.__dict__[_FUNCTION] = function
    return scaled


def unscaled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that :func:`scale_latents` was given, however often it was applied."""
    while _FUNCTION in getattr(function, "__dict__", ()):
        function = function.__dict__[_FUNCTION]
    return function


class BetaSchedule:
    """Beta over the steps of a run: a linear rise from 0 over the warm-up, then constant.

    Args:
        beta: the final value.
        warmup_steps: steps before it is reached; 0 starts there.
    """

    def __init__(self, beta: float, warmup_steps: int) -> None:
        self.beta, self.warmup_steps, self.steps = beta, warmup_steps, 0

    @property
    def current(self) -> float:
        """Beta of the coming step."""
        if self.steps >= self.warmup_steps:
            return self.beta
        return self.beta * self.steps / self.warmup_steps

    def step(self) -> None:
        """Go on to the next step."""
        self.steps += 1


def check_beta(beta: float) -> None:
    """Refuse a beta below 0 or not finite."""
    if not 0 <= real_number("beta", beta) < float("inf"):
        raise InputError(f"expected a finite beta of at least 0, got {beta}")


def latent_scale_of(site: dict[str, Any]) -> Any:
    """Return the scale that :func:`scale_latents` gave a traced site (1 where it gave none)."""
    return site["infer"].get(_SCALE, 1.0)


@contextmanager
def recorded_traces(objective: ELBO) -> Iterator[list[TracePair]]:
    """Collect the (model, guide) traces that a Pyro ELBO draws, so that nothing is run twice.

    Every ELBO of Pyro draws its traces in ``_get_trace``; the method is wrapped on this one object
    and put back afterwards.
    """
    traces: list[TracePair] = []
    draw = objective._get_trace

    def recording(*args: Any, **kwargs: Any) -> TracePair:
        pair = draw(*args, **kwargs)
        traces.append(pair)
        return pair

    objective._get_trace = recording
    try:
        yield traces
    finally:
        del objective._get_trace


def draw_traces(
    model: Callable[..., Any], guide: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> TracePair:
    """Trace the guide, then the model with the guide's draws."""
    guide_trace = poutine.trace(guide).get_trace(*inputs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*inputs)
    return model_trace, guide_trace


def elbo_terms(traces: list[TracePair], num_particles: int, *, subsampling: bool = False) -> Tensor:
    """Return rate and distortion of the traces an ELBO has drawn, ``(2,)``, sums over the batch.

    Scales (beta, subsampling) are taken out and masks kept, so minus their sum is the ELBO whatever
    was optimised. With ``subsampling`` the scales of the plates stay in: minus the sum then estimates
    the ELBO of all the data. NaN for an ELBO that sums over enumerated values, whose traces hold no
    single draw.
    """
    signs = []
    for model_trace, guide_trace in traces:
        for trace, of_guide in ((model_trace, False), (guide_trace, True)):
            for site in trace.nodes.values():
                if site["type"] == "sample" and not site_is_subsample(site):
                    signs.append((site, 0 if of_guide or not site["is_observed"] else 1, of_guide))
    if any(site["infer"].get("_enumerate_dim") is not None for site, _, _ in signs):
        return torch.full((2,), torch.nan, device=signs[0][0]["value"].device)
    terms: list[list[Tensor]] = [[], []]
    for site, index, of_guide in signs:
        log_prob = wide(site["unscaled_log_prob"].detach())
        scale = plate_scale(site) if subsampling else 1.0
        total = scale_and_mask(log_prob, scale=scale, mask=site["mask"]).sum()
        terms[index].append(total if of_guide else -total)
    return torch.stack([torch.stack(term).sum() for term in terms]) / num_particles


def plate_scale(site: dict[str, Any]) -> float:
    """Return by how much the plates around a site scale it because they subsample."""
    frames = (frame for frame in site["cond_indep_stack"] if frame.full_size and frame.full_size > 0)
    return math.prod(frame.full_size / frame.size for frame in frames)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, or as it is where the device has no float64."""
    return tensor if tensor.device.type == "mps" else tensor.double()
