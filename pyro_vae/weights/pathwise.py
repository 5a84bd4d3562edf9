"""Gates on a guide's draws: the slope of its log density along each draw, parameters held still."""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.pair.sites import is_delta


class PathwiseDraws(Messenger):
    """Around a guide: keep its draws apart from what is computed of them.

    Every random draw z passes a gate, and guide, density and model are given what comes out of it.
    Closed, it lets no gradient back to z: of a guide q(z1) q(z2 given z1) the derivative of log q by
    z1 then has no part through the draw of z2. Point masses have no density to be held still.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.drawn: dict[str, Tensor] = {}  # each draw before its gate, by site name
        self.passed: dict[str, Tensor] = {}  # what came out

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
        if not self.passed or not log_proposal.requires_grad:
            return {}
        self.closed = True
        try:
            passed = list(self.passed.values())
            slopes = torch.autograd.grad(log_proposal, passed, retain_graph=True, allow_unused=True)
        finally:
            self.closed = False
        return {n: s for n, s in zip(self.passed, slopes, strict=True) if s is not None}


class _Gate(torch.autograd.Function):
    """The identity; its gradient stops while the gate is closed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: PathwiseDraws) -> Tensor:
        ctx.gate = gate
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.gate.closed else gradients[0]), None


def refuse_handler(guide: Any) -> None:
    """Refuse a guide that is a handler of the model: its draws can't be told from the model's."""
    if isinstance(poutine.unwrap(guide), Messenger):
        wanted = "a guide that is a function of its own"
        raise InputError(f"expected {wanted}, got a handler of the model: use TraceBound")


def gated(guide: Any, draws: PathwiseDraws) -> Any:
    """Return the guide with its draws gated."""
    refuse_handler(guide)
    return draws(guide)


def has_score(site: dict[str, Any]) -> bool:
    """Tell whether a guide's site is random: no given factor, and no point mass's Jacobian."""
    return not site["is_observed"] and not is_delta(site["fn"])
