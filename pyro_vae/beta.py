"""Beta, the weight of the rate: the handler on the latent sites of a pair, and the warm-up."""

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.errors import InputError, real_number

Function = Callable[..., Any]
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


def scale_latents(function: Function, scale: float | Tensor, *, is_guide: bool = False) -> Function:
    """Scale the log-probabilities of the latent sites of a model or a guide, and of no other site.

    Applied to both functions of a pair it turns the ELBO into the beta-VAE's objective, distortion +
    beta * rate. Unlike ``poutine.scale`` it leaves observed sites alone, accepts 0 (a warm-up starts
    there) and is known to :func:`pyro_vae.log_weights`, which takes it out again.

    The scale is at least 0; a tensor may change between calls without a recompilation. In a guide
    (``is_guide``) every site is a part of log q: its factors are then scaled too.

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


def scale_pair(model: Any, guide: Any, scale: float | Tensor) -> tuple[Any, Any]:
    """Scale the latent terms of both functions of a pair."""
    return scale_latents(model, scale), scale_latents(guide, scale, is_guide=True)


def unscaled_function(function: Function) -> Function:
    """Return the function that :func:`scale_latents` was given, however often it was applied."""
    while _FUNCTION in getattr(function, "__dict__", ()):
        function = function.__dict__[_FUNCTION]
    return function


def beta_at(step: int, beta: float, warmup_steps: int) -> float:
    """Return beta of a step, counted from 0: a linear rise from 0 over the warm-up, then constant."""
    return beta if step >= warmup_steps else beta * step / warmup_steps


def check_beta(beta: float) -> None:
    """Refuse a beta below 0 or not finite."""
    if not 0 <= real_number("beta", beta) < float("inf"):
        raise InputError(f"expected a finite beta of at least 0, got {beta}")


def latent_scale_of(site: dict[str, Any]) -> Any:
    """Return the scale that :func:`scale_latents` gave a traced site (1 where it gave none)."""
    return site["infer"].get(_SCALE, 1.0)
