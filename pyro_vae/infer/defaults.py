"""Defaults of a training run that depend on its size, decided in one place for every interface."""

from __future__ import annotations

# Steps of the shortest warm-up: eight epochs of the digits give up their latents without one, and use
# them after one of 84 steps.
_WARMUP_STEPS = 120


def default_warmup_epochs(epochs: int, num_steps_per_epoch: int) -> int:
    """Return a warm-up that keeps the latents in use: over so many epochs beta rises from 0.

    That is a tenth of the run, and in a short one as many epochs as make enough steps, but no more
    than half of it.

    Args:
        epochs: epochs of the whole run.
        num_steps_per_epoch: steps of each, at least 1.
    """
    enough = -(-_WARMUP_STEPS // num_steps_per_epoch)
    return max(epochs // 10, min(epochs // 2, enough))
