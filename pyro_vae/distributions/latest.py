"""The latest draw of a distribution and its log-density, which drawing knows better than scoring."""

from __future__ import annotations

import torch
from torch import Tensor


class LatestDraw:
    """Base of distributions that remember the log-density of their latest draw.

    Going back from a draw to the noise it was made of costs time, and digits: rounding of the draw
    is multiplied by how steep the way back is. Drawing has the noise in its hands.

    What is remembered is a function of the parameters along the draw's own path, as an ELBO needs
    it. Its derivative by the draw itself is taken at a copy, ``log_prob(z.view_as(z))``.
    """

    _latest: tuple[Tensor, tuple[int | None, bool], Tensor, bool] | None = None

    def _remember(self, draw: Tensor, log_prob: Tensor) -> None:
        self._latest = (draw, _state(draw), log_prob, torch.is_grad_enabled())

    def _remembered(self, value: Tensor) -> Tensor | None:
        """Return the log-density of the latest draw if ``value`` is that very tensor, untouched."""
        if self._latest is None:
            return None
        draw, state, log_prob, has_graph = self._latest
        if value is not draw or _state(value) != state:
            return None
        # A density remembered without its graph is of no use to a caller who wants gradients.
        return log_prob if has_graph or not torch.is_grad_enabled() else None


def _state(draw: Tensor) -> tuple[int | None, bool]:
    """Return what changes where a draw is written to, detached in place or made a leaf."""
    return None if draw.is_inference() else draw._version, draw.requires_grad
