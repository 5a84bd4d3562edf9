"""The seam between training and captured steps: which steps are captured, and one of them taken."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.infer.bounds import BoundTerms, TraceBound
from pyro_vae.infer.compile_choice import engine_of, outcome_of, own_beta
from pyro_vae.infer.compiled import Compiled, CompiledTrace_ELBO
from pyro_vae.infer.engine import BoundEstimator, Replay
from pyro_vae.infer.program import Call
from pyro_vae.infer.settings import FitSettings
from pyro_vae.infer.trainer import SUMMARY, TrainingObjective
from pyro_vae.pair.functions import PairFunction, modules_of
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.state import Snapshot, with_submodules

# What layers multiply in besides float32, and round differently from kernel to kernel: TF32 has the
# mantissa of float16.
_ROUNDING = {"tf32": (torch.float16,), "bfloat16": (torch.bfloat16,)}


def uncompiled(objective: ELBO | None) -> tuple[ELBO | None, float]:
    """Return the objective behind a compiled one, and the beta that it has of its own."""
    beta = own_beta(objective)
    if isinstance(objective, Compiled):
        return objective.objective, beta
    if isinstance(objective, CompiledTrace_ELBO):
        options = ("num_particles", "max_plate_nesting", "vectorize_particles")
        return TraceBound(**{name: getattr(objective, name) for name in options}), beta
    return objective, beta


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
        self._engine, self._choice = engine_of(
            _StepEstimator(objective), settings.objective, settings.compile, device, num_steps
        )
        self.is_chosen = self._engine is not None

    @property
    def is_compiled(self) -> bool:
        """Whether steps were captured."""
        return self._engine is not None and self._engine.num_graphs > 0

    @property
    def outcome(self) -> str:
        """The reason of the choice, and what became of it."""
        return outcome_of(self._engine, self._choice)

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


class _StepEstimator(BoundEstimator):
    """A training step's objective as the engine captures it."""

    names = SUMMARY

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
