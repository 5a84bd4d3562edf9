"""The seam between training and captured steps: whether they are captured, and one of them taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.infer.bounds import BoundTerms, TraceBound
from pyro_vae.infer.compiled import Compiled, CompiledTrace_ELBO
from pyro_vae.infer.engine import BoundEstimator, Engine, Replay
from pyro_vae.infer.program import Call
from pyro_vae.infer.settings import FitSettings
from pyro_vae.infer.stock_bound import StockBound
from pyro_vae.infer.trainer import SUMMARY, TrainingObjective
from pyro_vae.pair.functions import PairFunction, modules_of
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.state import Snapshot, with_submodules

# Steps from which on a CPU run is compiled unless told otherwise. Capturing and compiling costs 16 to
# 26 seconds of one core; a step saves 4 to 7 milliseconds of it, as much for a small net (8.0 to 3.8,
# 784-64-20, batch 128) as for a larger one (20 to 13.7, 784-512-256-20): 20 s / 5 ms = 4,000 steps,
# and a margin. The choice hangs on nothing measured in the run itself, so that the same call takes
# the same steps, bit for bit.
COMPILED_FROM_STEPS = 5_000

# What layers multiply in besides float32, and round differently from kernel to kernel: TF32 has the
# mantissa of float16.
_ROUNDING = {"tf32": (torch.float16,), "bfloat16": (torch.bfloat16,)}


def uncompiled(objective: ELBO | None) -> tuple[ELBO | None, float]:
    """Return the objective behind a compiled one, and the beta that it has of its own."""
    if isinstance(objective, Compiled):
        return objective.objective, objective.beta
    if isinstance(objective, CompiledTrace_ELBO):
        options = ("num_particles", "max_plate_nesting", "vectorize_particles")
        bound = TraceBound(**{name: getattr(objective, name) for name in options})
        return bound, objective.beta
    return objective, 1.0


class StepCapture:
    """Takes the steps of a run by captured graphs, where that is chosen and can be done.

    Args:
        objective: what a step minimises.
        settings: whether to compile, and the objective that the caller of ``fit`` gave.
        device: where the pair computes.
        num_steps: steps of the whole run.

    Attributes:
        is_chosen: whether steps are to be captured.

    Warns:
        UserWarning: compiling was asked for an objective that can't be captured.
    """

    def __init__(
        self,
        objective: TrainingObjective,
        settings: FitSettings,
        *,
        device: torch.device,
        num_steps: int,
    ) -> None:
        given, compile = settings.objective, settings.compile
        own = given.engine if isinstance(given, Compiled | CompiledTrace_ELBO) else None
        is_asked = compile is True or (compile == "auto" and own is not None)
        self._choice, self.is_chosen = _choose(objective, settings, is_asked, device, num_steps)
        self._engine: Engine | None = None
        if self.is_chosen:
            names = ("backend", "mode", "verify_every")
            options = {} if own is None else {name: getattr(own, name) for name in names}
            self._engine = Engine(
                _StepEstimator(objective), name="fit", warn=is_asked, keep_outputs=False, **options
            )

    @property
    def is_compiled(self) -> bool:
        """Whether steps were captured."""
        return self._engine is not None and self._engine.num_graphs > 0

    @property
    def outcome(self) -> str:
        """The reason of the choice, and what became of it."""
        return self._choice if self._engine is None else self._engine.outcome(self._choice)

    def step(
        self,
        model: PairFunction,
        guide: PairFunction,
        batch: Inputs,
        beta: float,
        eager: Callable[[], Tensor],
    ) -> Tensor:
        """Leave the gradients of a batch with the parameters and return the summary.

        Args:
            model: the generative function of the pair.
            guide: the variational function of the pair.
            batch: the data of the step.
            beta: weight of the latent terms.
            eager: does the same without a graph.
        """
        engine = self._engine
        assert engine is not None
        engine.beta = beta
        call = Call(model, guide, batch, {})
        fresh = engine.num_graphs == 0 and not engine.reasons
        before = Snapshot(with_submodules(modules_of(model, guide))) if fresh else None
        result = engine.step(call, eager)
        if before is not None and engine.num_graphs:
            # The step that led to the capture is taken again by the graph, so that a run that is
            # resumed here takes the very steps of one that was never interrupted.
            before.restore()
            result = engine.step(call, eager)
        if not isinstance(result, Replay):
            return result
        for leaf, gradient in zip(result.leaves, result.gradients, strict=True):
            leaf.grad = gradient
        return result.summary


def _choose(
    objective: TrainingObjective,
    settings: FitSettings,
    is_asked: bool,
    device: torch.device,
    num_steps: int,
) -> tuple[str, bool]:
    """Return in words whether the steps are to be captured, and why; and the same as a flag."""
    if settings.compile is False:
        return "eager as asked", False
    if isinstance(objective.bound, StockBound):
        name = type(objective.bound.objective).__name__
        if is_asked:
            text = f"fit runs {name} eagerly: it reads values in Python"
            warnings.warn(text, stacklevel=5)  # the caller of fit
        return f"eager: {name} reads values in Python", False
    if is_asked:
        return "compiled as asked", True
    if device.type == "cpu" and num_steps < COMPILED_FROM_STEPS:
        return f"eager: {num_steps} steps, compiling pays from {COMPILED_FROM_STEPS} on", False
    return f"compiled: {num_steps} steps on {device.type}", True


class _StepEstimator(BoundEstimator):
    """A training step's objective as the engine captures it."""

    names: tuple[str, ...] = SUMMARY

    def __init__(self, objective: TrainingObjective) -> None:
        super().__init__(objective.bound)
        self.objective = objective
        self.rounding = _ROUNDING.get(objective.settings.precision, ())

    def key(self) -> Hashable:
        """Nothing changes within a run."""
        return None

    def terms(self, call: Call) -> BoundTerms:
        """Transform the batch and return its terms."""
        batch = self.objective.transform_batch(call.args)
        return self.objective.terms(call.model, call.guide, batch)

    def finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the step's summary and its gradients, clipped if asked for."""
        return self.objective.finish(terms, gradients)
