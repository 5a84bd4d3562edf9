"""Gradients that reach the guide through its draws alone, and the ELBO that uses nothing else."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.infer.bounds import Bound, BoundTerms, refuse_score_function
from pyro_vae.infer.objectives import TracePair, elbo_terms
from pyro_vae.infer.sites import is_delta, sample_sites

__all__ = ["PathwiseDraws", "StickingTheLanding"]


class PathwiseDraws(Messenger):
    """Around a guide: keep its draws apart from what is computed of them.

    Every random draw z passes a gate, and guide, density and model are given what comes out of it.
    Open, the gate is the identity. Closed, it lets no gradient back to z, so that the derivative of
    log q with respect to one latent holds the others and the parameters still: of a guide
    q(z1) q(z2 given z1) the derivative by z1 then has no part that runs through the draw of z2.
    Point masses pass through: they have no density to be held still.

    Attributes:
        drawn: each draw before its gate, by site name.
        passed: what came out, by site name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.drawn: dict[str, Tensor] = {}
        self.passed: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if message["done"] or message["is_observed"] or message["value"] is not None:
            return
        if site_is_subsample(message) or is_delta(message["fn"]):
            return
        value = message["fn"](*message["args"], **message["kwargs"])
        if value.requires_grad:
            self.drawn[message["name"]] = value
            value = self.passed[message["name"]] = _Gate.apply(value, self)
        message["value"], message["done"] = value, True

    def slopes(self, log_proposal: Tensor) -> dict[str, Tensor]:
        """Return the derivative of ``log_proposal`` by each draw, parameters held still."""
        names = list(self.passed)
        if not names or not log_proposal.requires_grad:
            return {}
        self.closed = True
        try:
            slopes = torch.autograd.grad(
                log_proposal,
                [self.passed[name] for name in names],
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            self.closed = False
        return {name: slope for name, slope in zip(names, slopes, strict=True) if slope is not None}


class _Gate(torch.autograd.Function):
    """The identity; its gradient stops while the gate is closed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: PathwiseDraws) -> Tensor:
        ctx.gate = gate
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.gate.closed else gradients[0]), None


class StickingTheLanding(Bound):
    r"""The ELBO with the path derivative alone as the guide's gradient.

    .. math:: \nabla_\phi L = E_e[\nabla_z (\log p(x, z) - \log q(z|x)) \nabla_\phi z(e, \phi)]

    The total derivative has one more term, the score :math:`-\nabla_\phi \log q(z|x)` at a fixed z.
    Its mean is 0, its variance is not: without it the gradient is still unbiased, and it is exactly 0
    in every draw where q is the posterior. The model's gradient is the ELBO's.

    A density that a guide gives by the Jacobian of a point mass (Pyro's autoguides) or by
    ``pyro.factor`` is no score, and keeps its whole gradient. With beta the latent terms of the
    gradient are scaled; the loss is the ELBO without it.

    Args:
        num_particles: draws per datum.
        max_plate_nesting: as in Pyro's ``ELBO``.
        vectorize_particles: draw the particles in one outer plate instead of one after the other.
        options: the other options of Pyro's ``ELBO``.

    Raises:
        InputError: at the first use, for a latent that is not reparameterised or is enumerated.

    Source:
        Roeder, Wu, Duvenaud 2017, "Sticking the Landing", equation 8.

    Example:
        >>> import pyro
        >>> from pyro_vae.infer import StickingTheLanding
        >>> objective = StickingTheLanding(num_particles=2)
        >>> # pyro.infer.SVI(vae.model, vae.guide, optimizer, objective).step(x)
    """

    def terms(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundTerms:
        """Draw once and return loss, surrogate, rate and distortion."""
        surrogate: Any = 0.0
        traces: list[TracePair] = []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            traces.append((model_trace, guide_trace))
            surrogate = surrogate - sum(s["log_prob_sum"] for s in sample_sites(model_trace))
            surrogate = surrogate + self._path_term(sample_sites(guide_trace))
        loss = elbo_terms(traces, self.num_particles, subsampling=True).sum()
        rate, distortion = elbo_terms(traces, self.num_particles)
        return BoundTerms(loss, surrogate / self.num_particles, rate, distortion)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> TracePair:
        self._draws = PathwiseDraws()
        pair = super()._get_trace(model, gated(guide, self._draws), args, kwargs)
        refuse_score_function(sample_sites(pair[1]), "StickingTheLanding")
        return pair

    def _path_term(self, sites: list[dict[str, Any]]) -> Any:
        """Return what has log q's value of no interest and its gradient through the draws alone."""
        term: Any = sum(site["log_prob_sum"] for site in sites if not has_score(site))
        random = [site["log_prob_sum"] for site in sites if has_score(site)]
        if random:
            slopes = self._draws.slopes(torch.stack(random).sum())
            for name, slope in slopes.items():
                term = term + (slope * self._draws.drawn[name]).sum()
        return term


def gated(guide: Any, draws: PathwiseDraws) -> Any:
    """Return the guide with its draws gated; refuse one that is a handler of the model."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise InputError(
            "expected a guide that is a function of its own, got a handler of the model: use "
            "TraceBound"
        )

    def function(*args: Any, **kwargs: Any) -> Any:
        with draws:
            return guide(*args, **kwargs)

    return function


def has_score(site: dict[str, Any]) -> bool:
    """Tell whether a guide's site is random: no given factor, and no point mass's Jacobian."""
    return not site["is_observed"] and not is_delta(site["fn"])
