"""Whether the steps of a run are captured and compiled, and the reason in words."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_vae.infer.compiled import Compiled, CompiledTrace_ELBO
from pyro_vae.infer.engine import BoundEstimator, Engine
from pyro_vae.infer.stock_bound import StockBound

# Steps from which on a CPU run is compiled unless told otherwise. Capturing and compiling costs 16 to
# 26 seconds of one core; a step saves 4 to 7 milliseconds of it, as much for a small net (8.0 to 3.8,
# 784-64-20, batch 128) as for a larger one (20 to 13.7, 784-512-256-20): 20 s / 5 ms = 4,000 steps,
# and a margin. The choice hangs on nothing measured in the run itself, so that the same call takes
# the same steps, bit for bit.
COMPILED_FROM_STEPS = 5_000


def engine_of(
    estimator: BoundEstimator,
    objective: ELBO | None,
    compile: bool | str,
    place: torch.device,
    num_steps: int,
) -> tuple[Engine | None, str]:
    """Return what captures the steps, if anything does, and the reason of the choice.

    Args:
        estimator: what a step computes.
        objective: what the caller of ``fit`` gave; a compiled one brings its own settings.
        compile: True, False or ``auto``.
        place: where the pair computes.
        num_steps: steps of the whole run.

    Warns:
        UserWarning: compiling was asked for an objective that can't be captured.
    """
    own = objective.engine if isinstance(objective, Compiled | CompiledTrace_ELBO) else None
    asked = compile is True or (compile == "auto" and own is not None)
    if compile is False:
        return None, "eager as asked"
    if isinstance(estimator.bound, StockBound):
        name = type(estimator.bound.objective).__name__
        if asked:
            warnings.warn(f"fit runs {name} eagerly: it reads values in Python", stacklevel=3)
        return None, f"eager: {name} reads values in Python"
    if not asked and place.type == "cpu" and num_steps < COMPILED_FROM_STEPS:
        return None, f"eager: {num_steps} steps, compiling pays from {COMPILED_FROM_STEPS} on"
    choice = "compiled as asked" if asked else f"compiled: {num_steps} steps on {place.type}"
    options: dict[str, Any] = {}
    if own is not None:
        options = {"backend": own.backend, "mode": own.mode, "verify_every": own.verify_every}
    return Engine(estimator, name="fit", warn=asked, keep_outputs=False, **options), choice


def outcome_of(engine: Engine | None, choice: str) -> str:
    """Return the reason of the choice, and what became of it."""
    return choice if engine is None else engine.outcome(choice)


def own_beta(objective: ELBO | None) -> float:
    """Return the weight of the latent terms that a compiled objective has of its own."""
    return objective.beta if isinstance(objective, Compiled | CompiledTrace_ELBO) else 1.0
