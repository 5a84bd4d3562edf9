"""The latest draw of a distribution and its log-density, which drawing knows better than scoring."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LatestDraw"]


class LatestDraw:
    """Base of distributions that remember the log-density of their latest draw.

    Going back from a draw to the noise it was made of costs time, and digits: rounding of the draw
    is multiplied by how steep the way back is. Drawing has the noise in its hands.
    """

    _latest: tuple[Tensor, Tensor, bool] | None = None

    def _remember(self, draw: Tensor, log_prob: Tensor) -> None:
        self._latest = (draw, log_prob, torch.is_grad_enabled())

    def _remembered(self, value: Tensor) -> Tensor | None:
        """Return the log-density of the latest draw if ``value`` is that very tensor."""
        if self._latest is None:
            return None
        draw, log_prob, has_graph = self._latest
        # A density remembered without its graph is of no use to a caller who wants gradients.
        return log_prob if value is draw and (has_graph or not torch.is_grad_enabled()) else None
