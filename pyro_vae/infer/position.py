"""Where a pass over the data stands: the order of its data, the steps taken and their summaries."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Position:
    """A pass over the data that can be left and taken up again between two steps.

    Args:
        epoch: which pass, from 1.
        order: indices of the data in the order they are taken.
        summaries: one row per step of the pass, of those taken so far; the others are 0.
        taken: steps taken.
        seconds: spent on them.
    """

    def __init__(
        self, epoch: int, order: Tensor, summaries: Tensor, *, taken: int = 0, seconds: float = 0.0
    ) -> None:
        self.epoch, self.order, self.summaries, self.taken = epoch, order, summaries, taken
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds since the pass began, the time it was left aside not counted."""
        return time.perf_counter() - self._start

    def note(self, summary: Tensor) -> None:
        """Take in the summary of the step that was taken."""
        self.summaries[self.taken].copy_(summary)
        self.taken += 1

    def go_back_to(self, step: int) -> int:
        """Forget the steps from this one on (from 0); return how many they are."""
        forgotten, self.taken = self.taken - step, step
        self.summaries[step:] = 0
        return forgotten

    def state_dict(self) -> dict[str, Any]:
        """All of it, the start of the clock as the seconds spent."""
        return {
            "epoch": self.epoch,
            "order": self.order.clone(),
            "summaries": self.summaries.clone(),
            "taken": self.taken,
            "seconds": self.seconds,
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], device: torch.device) -> Position:
        """Return the position of a :meth:`state_dict`, its summaries on the device of the run."""
        return cls(
            state["epoch"],
            state["order"],
            state["summaries"].to(device),
            taken=state["taken"],
            seconds=state["seconds"],
        )


def means_of(summaries: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Return the means of a pass per datum, over the steps that were applied.

    Args:
        summaries: one row per step (see ``BoundPerDatum.names``), summed over the step's data.
        sizes: data of each step.

    Returns:
        bound, ELBO, rate and distortion in nats per datum; the gradient's norm per step.
    """
    applied = summaries[:, -1] == 0
    count = max(int(sizes[applied].sum()), 1)
    loss, rate, distortion, norm = summaries[applied, :-1].sum(0)
    return {
        "train_bound": -loss / count,
        "train_elbo": -(rate + distortion) / count,
        "train_rate": rate / count,
        "train_distortion": distortion / count,
        "gradient_norm": norm / max(int(applied.sum()), 1),
    }
