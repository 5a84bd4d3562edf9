"""Gradient steps on one pair: parameters gathered and checked, one optimiser, eager or captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.beta import BetaSchedule
from pyro_vae.distributed import ALONE, Processes
from pyro_vae.errors import InputError
from pyro_vae.infer.bounds import BoundTerms
from pyro_vae.infer.contract import check_latents, check_trainable
from pyro_vae.infer.engine import Engine, Replay, scaled
from pyro_vae.infer.position import Position, means_of
from pyro_vae.infer.program import Call
from pyro_vae.infer.settings import LearningRate
from pyro_vae.infer.training_objective import BoundPerDatum, finished
from pyro_vae.pair.functions import PairFunction, modules_of
from pyro_vae.pair.inputs import Inputs, check_data, check_number
from pyro_vae.pair.sites import draw_traces
from pyro_vae.pair.state import Snapshot, with_submodules


class NotFiniteError(InputError):
    """A loss or gradient that is not finite has stopped the run; the state before it is left.

    Processes that share the steps raise it together.
    """


class Steps:
    """Gradient steps on one pair, by Adam over all its parameters at once.

    A step whose loss or gradient is not finite is not applied. Nothing is read from the device
    before an epoch is over.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        estimator: what a step computes.
        engine: captures steps and replays them; None runs every step eagerly.
        beta: weight of the latent terms, step by step.
        learning_rate: Adam's step size, step by step.
        device: where the pair computes.
        skip_limit: how many steps that are not finite may be left out; None stops at the first one.
        processes: who shares the batches; each takes the steps, on the sum of all gradients.

    Attributes:
        parameters: the pair's unconstrained parameters by their name in Pyro's store.
        optimizer: Adam over them, in the order of their names; None before the first step.
        shown: the first batch as the pair was given it.
        count: steps taken.
        skipped: steps left out.
    """

    def __init__(
        self,
        model: PairFunction,
        guide: PairFunction,
        estimator: BoundPerDatum,
        engine: Engine | None,
        *,
        beta: BetaSchedule,
        learning_rate: LearningRate,
        device: torch.device,
        skip_limit: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.guide, self.processes = model, guide, processes
        self.estimator, self.engine = estimator, engine
        self.beta, self.learning_rate = beta, learning_rate
        self.device, self.skip_limit = device, skip_limit
        self.parameters: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.shown: Inputs = ()
        self.count = self.skipped = 0
        self._store_size = -1
        self._stopped = torch.zeros((), dtype=torch.float32, device=device)
        self._waiting: dict[str, Any] | None = None
        self._position: Position | None = None
        self._seen_buffers: list[Tensor] = []

    # --- an epoch ---

    def run_epoch(
        self,
        train: Inputs,
        batch_size: int,
        epoch: int,
        *,
        after_step: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Take one pass over the data, or what is left of it, and return the epoch's metrics.

        Args:
            train: the data.
            batch_size: data per step.
            epoch: which pass, from 1; one that a resumed state was in the middle of goes on there.
            after_step: called between two steps, when :meth:`state_dict` is whole.

        Raises:
            NotFiniteError: a step that is not finite, or more of them than may be skipped.
        """
        position = self._position
        if position is None or position.epoch != epoch:
            position = self._position = self._begin(train, batch_size, epoch)
        self._seen_buffers = self._buffers()
        batches = position.order.to(train[0].device).split(batch_size)
        for index in batches[position.taken :]:
            own = self.processes.share(index)
            # A process that gets nothing of a small batch takes part in the step and counts nothing.
            rows = own if len(own) else index[:1]
            batch = tuple(value[rows].to(self.device, non_blocking=True) for value in train)
            summary = self._step(batch, len(own) / len(index))
            position.note(summary)
            if self.device.type == "cpu" and self.skip_limit is None and summary[-1]:
                break
            if after_step is not None:
                after_step()
        summaries = position.summaries.clone()
        self.processes.sum_(summaries[:, :3])  # norm and flag are those of the whole batch already
        self.processes.take_first(self._buffers())
        table = summaries.cpu().numpy()
        seconds = position.seconds
        self._refuse_not_finite(table, position)
        return {
            **means_of(table, np.array([len(index) for index in batches])),
            "beta": self.beta.current,
            "seconds": seconds,
            "data_per_second": len(train[0]) / seconds,
        }

    def _begin(self, train: Inputs, batch_size: int, epoch: int) -> Position:
        order = torch.randperm(len(train[0]), device=train[0].device)
        self.processes.take_first([order])
        shape = -(-len(order) // batch_size), len(self.estimator.names)
        summaries = torch.zeros(shape, dtype=torch.float64, device=self.device)
        return Position(epoch, order, summaries)

    def _refuse_not_finite(self, table: np.ndarray, position: Position) -> None:
        bad = np.flatnonzero(table[:, -1])
        self.skipped += len(bad)
        if self.skipped <= (self.skip_limit or 0):
            return
        loss, norm = table[bad[0], 0], table[bad[0], -2]
        what, value = ("gradient norm", norm) if np.isfinite(loss) else ("loss", loss)
        skips = "" if self.skip_limit is None else f" ({self.skipped} steps were skipped)"
        if self.skip_limit is None:  # nothing was applied since: back to the last good state
            self.count -= position.go_back_to(int(bad[0]))
            self.skipped, self.beta.steps = 0, self.count
            self._stopped.zero_()
        raise NotFiniteError(
            f"expected a finite {what}, got {value} in epoch {position.epoch}, batch {bad[0] + 1}"
            f"{skips}: lower the learning rate, clip the gradient, or look for data outside the "
            "likelihood's support"
        )

    # --- a step ---

    def _step(self, batch: Inputs, share: float) -> Tensor:
        """Take one step on a share of the batch and return its summary."""
        before = [buffer.clone() for buffer in self._seen_buffers]
        if self.engine is None:
            summary = self._eager(batch)
        else:
            self.engine.beta = self.beta.current
            summary = self._captured(self.engine, batch)
        if self.processes.are_several:
            summary = self._summed(summary, share)
        flag = self._apply(summary)
        with torch.no_grad():  # a batch norm has seen the batch too
            for buffer, value in zip(self._seen_buffers, before, strict=True):
                buffer.copy_(torch.where(flag > 0, value, buffer))
        return summary

    def _captured(self, engine: Engine, batch: Inputs) -> Tensor:
        call = Call(self.model, self.guide, batch, {})
        fresh = engine.num_graphs == 0 and not engine.reasons
        before = Snapshot(with_submodules(modules_of(self.model, self.guide))) if fresh else None
        result = engine.step(call, lambda: self._eager(batch))
        if before is not None and engine.num_graphs:
            # The step that led to the capture is taken again by the graph, so that a run that is
            # resumed here takes the very steps of one that was never interrupted.
            before.restore()
            result = engine.step(call, lambda: self._eager(batch))
        if not isinstance(result, Replay):
            return result
        for leaf, gradient in zip(result.leaves, result.gradients, strict=True):
            leaf.grad = gradient
        return result.summary

    def _eager(self, batch: Inputs) -> Tensor:
        """Run the pair, leave the gradients with the parameters, and return the summary."""
        batch = self.estimator.transformed(batch)
        call = scaled(Call(self.model, self.guide, batch, {}), self.beta.current)
        if len(pyro.get_param_store()) == self._store_size:
            terms = self.estimator.of_batch(call)
        else:
            if self.optimizer is None:
                self._inspect(batch)
            with poutine.trace(param_only=True) as seen:
                terms = self.estimator.of_batch(call)
            named = _parameters_of(seen.trace)
            check_trainable(terms.surrogate, self.parameters | named)
            self._learn(named)
        for leaf in self.parameters.values():
            leaf.grad = None
        terms.surrogate.backward()
        with torch.no_grad():
            leaves = [leaf for leaf in self.parameters.values() if leaf.grad is not None]
            found = [leaf.grad for leaf in leaves if leaf.grad is not None]
            summary, gradients = self.estimator.finish(terms, found)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        return summary

    def _summed(self, summary: Tensor, share: float) -> Tensor:
        """Sum the gradients over the processes and finish the step: all come to the same decision.

        The share's loss, rate and distortion are summed later, once in an epoch.
        """
        leaves = self._leaves()
        own = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in own), summary[-1:].float()])
        if share:
            flat[:-1] *= share  # from the mean over the share to its part of the batch's mean
        else:
            flat.zero_()
            summary = torch.zeros_like(summary)
        *pieces, failed = self.processes.sum_(flat).split([*(leaf.numel() for leaf in leaves), 1])
        terms = BoundTerms(summary[0], summary[0], summary[1], summary[2])
        clip = self.estimator.gradient_clip
        whole, gradients = finished(terms, pieces, clip)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.view(leaf.shape).to(leaf.dtype)
        whole[-1].clamp_(min=(failed[0] > 0).to(whole.dtype))
        return whole

    def _inspect(self, batch: Inputs) -> None:
        """Check the pair and what its transform returns, and learn its parameters.

        The draws of the run are not shifted.
        """
        self.shown = batch
        if self.estimator.transform is not None:  # data that stay as they are were checked whole
            self.processes.check_together(lambda: self._check_transformed(batch))
        # Every device is named, for torch warns of several that are not.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            with poutine.trace(param_only=True) as seen:
                traces = draw_traces(self.model, self.guide, batch)
            check_latents(*traces, self.estimator.plate)
        self._learn(_parameters_of(seen.trace))

    def _check_transformed(self, batch: Inputs) -> None:
        check_number(batch, self.model, self.guide)
        check_data(self.model, batch)

    def _learn(self, found: dict[str, Tensor]) -> None:
        """Take in the pair's parameters: at the first step, and whenever Pyro's store has grown."""
        new = {name: found[name] for name in sorted(found) if name not in self.parameters}
        self.parameters |= new
        if new:
            # Before a state is taken up, in which each process has buffers of its own.
            self.processes.take_first([*new.values(), *self._buffers()])
        if self.optimizer is None and new:
            self.optimizer = torch.optim.Adam(list(new.values()), lr=self._rate(), fused=True)
            self._take_up()
        elif self.optimizer is not None and new:
            self.optimizer.add_param_group({"params": list(new.values())})
        self._store_size = len(pyro.get_param_store())

    def _apply(self, summary: Tensor) -> Tensor:
        """Let Adam take the gradients, unless something is not finite, and return whether it is."""
        assert self.optimizer is not None
        flag = summary[-1].float()
        if self.skip_limit is None:  # nothing after the step that stops the run is applied either
            flag = self._stopped = torch.maximum(self._stopped, flag)
        # Read on the device by the fused kernels, on CPU and CUDA alike: at 1 parameters, moments and
        # step counts stay as they are. It is torch's contract with its gradient scaler.
        vars(self.optimizer)["found_inf"] = flag
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        self.beta.step()
        return flag

    def _rate(self) -> float:
        return self.learning_rate.at(self.count)

    # --- state ---

    def values(self) -> dict[str, list[Tensor]]:
        """Copies of the parameters in the order of their names, and of the modules' buffers."""
        return {
            "parameters": [leaf.detach().clone() for leaf in self._leaves()],
            "buffers": [buffer.detach().clone() for buffer in self._buffers()],
        }

    @torch.no_grad()
    def put_back(self, values: dict[str, list[Tensor]]) -> None:
        """Put values of :meth:`values` back in place."""
        for tensor, value in zip(
            [*self._leaves(), *self._buffers()],
            [*values["parameters"], *values["buffers"]],
            strict=True,
        ):
            tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """All that the coming steps depend on, random generators aside.

        Parameters stand in the order of their names: a module's name in Pyro's store may count its
        instances, and so differ from process to process. Under ``own`` stands what differs between
        the processes that share the steps, on the CPU.
        """
        adam = {} if self.optimizer is None else self.optimizer.state
        moments = [adam.get(leaf, {}) for leaf in self._leaves()]
        values, position = self.values(), None
        own: dict[str, Any] = {"buffers": [buffer.cpu() for buffer in values["buffers"]]}
        if self._position is not None:
            position = self._position.state_dict()
            own["summaries"] = position.pop("summaries").cpu()
        return {
            "parameters": values["parameters"],
            "adam": [{k: v.clone() for k, v in moment.items()} for moment in moments],
            "count": self.count,
            "skipped": self.skipped,
            "position": position,
            "own": own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`; before the first step it waits for the parameters.

        Raises:
            InputError: a state of another pair.
        """
        self.count, self.skipped = state["count"], state["skipped"]
        self.beta.steps = self.count
        if state["position"] is not None:
            position = {**state["position"], "summaries": state["own"]["summaries"]}
            self._position = Position.of_state(position, self.device)
        self._waiting = state
        self._take_up()

    def resume(self, state: dict[str, Any], batch: Inputs) -> None:
        """Take up a state of :meth:`state_dict` at once, although no step may be left to take.

        Args:
            state: the state.
            batch: data on which the pair may be run to find its parameters.

        Raises:
            InputError: a state of another pair.
        """
        self.load_state_dict(state)
        if self._waiting is not None:
            self._inspect(self.estimator.transformed(batch))

    def _take_up(self) -> None:
        if self.optimizer is None or self._waiting is None:
            return
        state, self._waiting = self._waiting, None
        kept = [tuple(value.shape) for value in state["parameters"]]
        own = [tuple(leaf.shape) for leaf in self._leaves()]
        if kept != own:
            raise InputError(
                f"expected the state of a run of this pair, got {len(kept)} parameters for its "
                f"{len(own)}, or others in shape: build the pair as it was built then"
            )
        self.put_back({"parameters": state["parameters"], "buffers": state["own"]["buffers"]})
        for leaf, moment in zip(self._leaves(), state["adam"], strict=True):
            if moment:
                # As the optimiser keeps them: fused ones count steps on the device of the parameter.
                self.optimizer.state[leaf] = {k: v.to(leaf.device).clone() for k, v in moment.items()}

    def _leaves(self) -> list[Tensor]:
        return [self.parameters[name] for name in sorted(self.parameters)]

    def _buffers(self) -> list[Tensor]:
        modules = modules_of(self.model, self.guide)
        return [buffer for module in modules for buffer in module.buffers()]


def _parameters_of(trace: Trace) -> dict[str, Tensor]:
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items()}
