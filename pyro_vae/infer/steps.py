"""Gradient steps on one pair: parameters gathered and checked, optimiser, early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.infer.objectives import (
    BetaSchedule,
    TracePair,
    draw_traces,
    elbo_terms,
    recorded_traces,
    scale_latents,
    subsample_scale,
)
from pyro_vae.infer.pair import Inputs, PairFunction, as_inputs, modules_of
from pyro_vae.infer.sites import latent_sites

__all__ = ["EarlyStopping", "Steps"]


class Steps:
    """Gradient steps on one pair: its objective, its parameters and their optimiser."""

    def __init__(
        self,
        model: PairFunction,
        guide: PairFunction,
        objective: ELBO,
        schedule: BetaSchedule,
        learning_rate: float,
        plate: str,
    ) -> None:
        self.model, self.guide, self.plate = model, guide, plate
        self.objective, self.schedule, self.learning_rate = objective, schedule, learning_rate
        self.parameters: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._store_size = -1

    def run_epoch(
        self, train: Inputs, transform: Callable[..., Any] | None, batch_size: int
    ) -> dict[str, float]:
        """Take one pass over the data; totals stay on the device until the pass is over."""
        start = time.perf_counter()
        count = len(train[0])
        totals = torch.zeros(2, dtype=torch.float64, device=train[0].device)
        for index in torch.randperm(count, device=train[0].device).split(batch_size):
            batch = tuple(value[index] for value in train)
            if transform is not None:
                batch = as_inputs(transform(*batch))
            totals += self._step(batch)
        rate, distortion = (totals / count).tolist()
        return {
            "train_elbo": -(rate + distortion),
            "train_rate": rate,
            "train_distortion": distortion,
            "beta": self.schedule.current,
            "seconds": time.perf_counter() - start,
        }

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """Return every parameter and buffer of the pair beside a copy of its value."""
        modules = modules_of(self.model, self.guide)
        buffers = [buffer for module in modules for buffer in module.buffers()]
        tensors = [*self.parameters.values(), *buffers]
        return [(tensor, tensor.detach().clone()) for tensor in tensors]

    def _step(self, batch: Inputs) -> Tensor:
        """Take one gradient step; return the sums of rate and distortion over the batch."""
        with recorded_traces(self.objective) as traces:
            if len(pyro.get_param_store()) == self._store_size:
                self._backward(batch, traces)
            else:
                self._backward_gathering_parameters(batch, traces)
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return elbo_terms(traces, self.objective.num_particles)

    def _backward_gathering_parameters(self, batch: Inputs, traces: list[TracePair]) -> None:
        """Take the backward pass and learn the pair's parameters from it.

        Done at the first step, and again whenever Pyro's store has grown.
        """
        if self._optimizer is None:
            with torch.random.fork_rng():  # the check draws, and must not shift the run's draws
                _check_latents(*draw_traces(self.model, self.guide, batch), self.plate)
        with poutine.trace(param_only=True) as capture:
            self._backward(batch, traces, check_against=capture.trace)
        found = _parameters_of(capture.trace)
        new = {name: leaf for name, leaf in found.items() if name not in self.parameters}
        self.parameters |= new
        leaves = [new[name] for name in sorted(new)]
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(leaves, lr=self.learning_rate, fused=True)
        elif leaves:
            self._optimizer.add_param_group({"params": leaves})
        self._store_size = len(pyro.get_param_store())

    def _backward(
        self, batch: Inputs, traces: list[TracePair], check_against: Trace | None = None
    ) -> None:
        """Add the gradient of the mean loss per datum to the parameters."""
        beta = self.schedule.current
        pair = (scale_latents(self.model, beta), scale_latents(self.guide, beta, is_guide=True))
        if not hasattr(self.objective, "differentiable_loss"):
            loss = self.objective.loss_and_grads(*pair, *batch)
            for part in loss if isinstance(loss, tuple) else (loss,):
                _check_finite(part)
            known = self.parameters
            if check_against is not None:
                known = known | _parameters_of(check_against)
                _check_registered(_log_probs(traces), known)
            divisor = len(batch[0]) * subsample_scale(traces, self.plate)
            for leaf in known.values():
                if leaf.grad is not None:
                    leaf.grad /= divisor
            return
        loss = self.objective.differentiable_loss(*pair, *batch)
        _check_finite(loss)
        if check_against is not None:
            if not loss.requires_grad:
                raise InputError(
                    "expected parameters to train, the pair has none: name them by pyro.module or "
                    "pyro.param"
                )
            _check_registered([loss], _parameters_of(check_against))
        (loss / (len(batch[0]) * subsample_scale(traces, self.plate))).backward()


class EarlyStopping:
    """Early stopping: remembers the parameters with the best validation ELBO after the warm-up."""

    def __init__(self, patience: int | None, warmup_epochs: int) -> None:
        self.patience, self.warmup_epochs = patience, warmup_epochs
        self.epoch, self.elbo = 0, -math.inf
        self._state: list[tuple[Tensor, Tensor]] = []

    def has_passed(self, epoch: int, elbo: float, steps: Steps) -> bool:
        """Take in an epoch's validation ELBO; say whether patience has run out."""
        if self.patience is None or epoch <= self.warmup_epochs:
            self.epoch = epoch
            return False
        if elbo > self.elbo:
            self.epoch, self.elbo, self._state = epoch, elbo, steps.state()
        return epoch - self.epoch >= self.patience

    @torch.no_grad()
    def restore(self, steps: Steps) -> None:
        """Put the best parameters and buffers back."""
        for tensor, value in self._state:
            tensor.copy_(value)


def _check_finite(loss: Tensor | float) -> None:
    value = loss.item() if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise InputError(
            f"expected a finite loss, got {value}: lower the learning rate, or look for data outside "
            "the likelihood's support"
        )


def _check_latents(model_trace: Trace, guide_trace: Trace, plate: str) -> None:
    """Refuse latents outside the data plate, and latents of the model that the guide misses."""
    for function, trace in (("model", model_trace), ("guide", guide_trace)):
        for site in latent_sites(trace):
            name = site["name"]
            if plate not in {frame.name for frame in site["cond_indep_stack"]}:
                raise InputError(
                    f"expected latent {name!r} of the {function} inside the data plate {plate!r}: "
                    "move it there, or name your plate by plate="
                )
            if name not in guide_trace.nodes:
                raise InputError(
                    f"expected a guide that draws every latent, {name!r} is missing: add "
                    "pyro.sample for it, or observe it in the model"
                )


def _parameters_of(trace: Trace) -> dict[str, Tensor]:
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items()}


def _log_probs(traces: list[TracePair]) -> list[Tensor]:
    """Return the log-probabilities that an objective computed from its traces."""
    sites = (site for pair in traces for trace in pair for site in trace.nodes.values())
    return [site["log_prob"] for site in sites if isinstance(site.get("log_prob"), Tensor)]


def _check_registered(roots: list[Tensor], parameters: dict[str, Tensor]) -> None:
    """Refuse a graph with a trainable tensor unknown to Pyro: it would stay untrained."""
    known = {id(leaf) for leaf in parameters.values()}
    seen, waiting, unknown = set(), [root.grad_fn for root in roots], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            unknown.append(tuple(leaf.shape))
        waiting += [parent for parent, _ in node.next_functions]
    if unknown:
        raise InputError(
            f"expected every trainable tensor of the pair to be known to Pyro, {len(unknown)} are "
            f"not (shapes {', '.join(map(str, sorted(unknown)[:3]))}): name their module by "
            "pyro.module under a name that is not taken, or freeze them by requires_grad_(False)"
        )
