"""Training from top to bottom: the loss of a batch, a step, an epoch, and the state between steps."""

import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.beta import beta_at, scale_pair
from pyro_vae.distributed import ALONE, Processes
from pyro_vae.errors import InputError
from pyro_vae.infer.bounds import Bound, BoundTerms, wide
from pyro_vae.infer.diagnosis import unscaled
from pyro_vae.infer.settings import FitSettings
from pyro_vae.infer.stock_bound import StockBound
from pyro_vae.infer.updates import Updates
from pyro_vae.pair.functions import PairFunction, has_batch_norm, modules_of
from pyro_vae.pair.inputs import Inputs, as_inputs, check_data, check_number, move
from pyro_vae.pair.opened import Knowledge, OpenedPair
from pyro_vae.pair.precision import multiply_in
from pyro_vae.pair.sites import SharedTerms
from pyro_vae.pair.state import accumulating_leaves

# What a step leaves behind, one number each.
SUMMARY = ("loss", "rate", "distortion", "gradient norm", "non-finite flag")

Transform = Callable[..., Any]
AfterStep = Callable[[Tensor, int], bool]


class NotFiniteError(InputError):
    """A loss or gradient that is not finite has stopped the run; the state before it is left.

    Processes that share the steps raise it together.
    """


class DataPlate(Messenger):
    """Notes how many data points the data plate stands for: without one, the rows of a batch."""

    def __init__(self, plate: str | None, num_rows: int) -> None:
        super().__init__()
        self.plate, self.full_size = plate, num_rows

    def _pyro_sample(self, message: Any) -> None:
        for frame in message["cond_indep_stack"]:
            if frame.name == self.plate and frame.full_size and frame.full_size > 0:
                self.full_size = frame.full_size


@dataclass(eq=False)
class TrainingObjective:
    """A bound's mean per data point of a batch, as one training step needs it.

    Where a batch is one process's share of it, its gradients are clipped only as a whole.

    Attributes:
        shared_by: data points whose batches share what stands outside the data plate, to count once
            in all; None where nothing does, or the plate says for how many data points it stands.
    """

    bound: Bound
    settings: FitSettings
    _: KW_ONLY
    transform: Transform | None = None
    is_share: bool = False
    shared_by: int | None = None

    def transform_batch(self, batch: Inputs) -> Inputs:
        """Return what the pair is given for a batch."""
        return batch if self.transform is None else as_inputs(self.transform(*batch))

    def terms(self, model: PairFunction, guide: PairFunction, batch: Inputs) -> BoundTerms:
        """Return loss, rate and distortion summed over the batch; the surrogate is a mean."""
        plate = self.settings.plate
        rows = 1 if plate is None else len(batch[0])
        data, outside = DataPlate(plate, rows), SharedTerms(plate, rows / (self.shared_by or rows))
        validates = poutine.is_validation_enabled()
        # Pyro's warnings of NaN wait for the device; what is not finite is flagged by ``finish``.
        poutine.enable_validation(validates and batch[0].device.type == "cpu")
        try:
            with data, outside, multiply_in(self.settings.precision):
                loss, surrogate, rate, distortion = self.bound.terms(model, guide, batch, {})
        finally:
            poutine.enable_validation(validates)
        share = rows / data.full_size
        return BoundTerms(loss * share, surrogate / data.full_size, rate * share, distortion * share)

    def finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor], *, are_summed: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summary of a step (see ``SUMMARY``) and its gradients, clipped to a norm."""
        norms = torch._foreach_norm(list(gradients))
        is_mixed = len({norm.dtype for norm in norms}) > 1
        norm = torch.linalg.vector_norm(wide(torch.stack([*map(wide, norms)] if is_mixed else norms)))
        clip = self.settings.gradient_clip
        if clip is not None and (are_summed or not self.is_share):
            # A gradient of exactly 0 divides to infinity, and is left as it is.
            factor = (clip / norm).clamp(max=1.0)
            gradients = [gradient * factor.to(gradient.dtype) for gradient in gradients]
        loss = wide(terms.loss)
        flag = wide((loss + norm) * 0 != 0)  # NaN where either is not finite
        return torch.stack([loss, wide(terms.rate), wide(terms.distortion), norm, flag]), gradients


class _Epoch:
    """A pass over the data, from 1, that can be left and taken up again between two steps."""

    def __init__(
        self, epoch: int, order: Tensor, summaries: Tensor, *, taken: int = 0, seconds: float = 0.0
    ) -> None:
        self.number, self.order, self.summaries, self.taken = epoch, order, summaries, taken
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds since the pass began, the time it was left aside not counted."""
        return max(time.perf_counter() - self._start, 1e-9)  # a clock may stand still, or be set


class Trainer:
    """Gradient steps on one pair, by one optimiser over all its parameters at once."""

    def __init__(
        self, pair: OpenedPair, objective: TrainingObjective, settings: FitSettings, *,
        device: torch.device, shuffle: bool = True,
        captured_step: Callable[..., Tensor] | None = None, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self.model, self.guide, self.train = pair.model, pair.guide, pair.inputs
        self.pair, self.num_data = pair, pair.num_data
        self.objective, self.settings, self.device = objective, settings, device
        self.shuffle, self.captured_step, self.processes = shuffle, captured_step, processes
        self.batch_sizes = _batch_sizes(pair, settings)
        steps_per_epoch = len(self.batch_sizes)
        self.warmup_steps = settings.warmup_epochs * steps_per_epoch
        self.updates = Updates(settings, settings.epochs * steps_per_epoch)
        self.shown: Inputs = ()
        self.count = self.skipped = 0
        self.shares = False  # whether sites stand outside the data plate; seen at the first step
        self._store_size = -1
        self._stopped = torch.zeros((), dtype=torch.float32, device=device)
        self._epoch: _Epoch | None = None
        self._seen_buffers: list[Tensor] = []

    @property
    def beta(self) -> float:
        """Beta of the coming step."""
        return beta_at(self.count, self.settings.beta, self.warmup_steps)

    def run_epoch(self, number: int, after_step: AfterStep | None = None) -> dict[str, float]:
        """Take pass ``number``, from 1, or what a state left of it, and return its metrics.

        ``after_step`` is given the summary of a step and the size of its batch; True ends the pass.
        """
        if self._epoch is None or self._epoch.number != number:
            # On the device wherever the data are: a seed gives the same order.
            draw = torch.randperm if self.shuffle else torch.arange
            order = draw(self.num_data, device=self.device)
            self.processes.take_first([order])
            shape: Any = len(self.batch_sizes), len(SUMMARY)
            nothing = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self._epoch = _Epoch(number, order, nothing)
        epoch = self._epoch
        self._seen_buffers = self._buffers()
        batches = epoch.order.to(self.train[0].device).split(self.batch_sizes)
        for index in batches[epoch.taken :]:
            own = self.processes.share(index)
            # A process that gets nothing of a small batch takes part in the step and counts nothing.
            summary = self._step(self._take(own if len(own) else index[:1]), len(own) / len(index))
            epoch.summaries[epoch.taken].copy_(summary)
            epoch.taken += 1
            if self.device.type == "cpu" and self.settings.skip_limit is None and summary[-1]:
                break
            if after_step is not None and after_step(summary, len(index)):
                break
        summaries = epoch.summaries[: epoch.taken].clone()
        self.processes.sum_(summaries[:, :3])  # norm and flag are those of the whole batch already
        self.processes.take_first(self._buffers())
        table, seconds = summaries.cpu().numpy(), epoch.seconds
        self._refuse_not_finite(table, epoch)
        sizes = np.array([len(index) for index in batches[: epoch.taken]])
        pace = {"seconds": seconds, "data_per_second": int(sizes.sum()) / seconds}
        return {**_means(table, sizes), "beta": self.beta, **pace}

    def _take(self, rows: slice | Tensor) -> Inputs:
        """Return some data points on the device; where all are one datum, that."""
        some = self.train if self.pair.plate is None else [value[rows] for value in self.train]
        return tuple(move(value, self.device) for value in some)

    def metrics_of(self, summary: Tensor, num_data: int) -> dict[str, float]:
        """Return the metrics of a step on so many data points, one that was left out included."""
        values = summary.detach().clone()
        self.processes.sum_(values[:3])
        values[-1] = 0
        means = _means(values[None].cpu().numpy(), np.array([num_data]))
        return means | {"beta": self.beta, "learning_rate": float(self.updates.learning_rate)}

    def _refuse_not_finite(self, table: np.ndarray, epoch: _Epoch) -> None:
        bad, limit = np.flatnonzero(table[:, -1]), self.settings.skip_limit
        self.skipped += len(bad)
        nothing_left = 0 < len(table) == len(bad)
        if self.skipped <= (limit or 0) and not nothing_left:
            return
        loss, norm = table[bad[0], 0], table[bad[0], -2]
        what, value = ("gradient norm", norm) if np.isfinite(loss) else ("loss", loss)
        skips = "" if limit is None else f" ({self.skipped} steps were skipped)"
        if limit is None:  # nothing was applied since: back to the last good state
            self.count -= epoch.taken - int(bad[0])
            epoch.taken = int(bad[0])
            epoch.summaries[epoch.taken :] = 0
            self.skipped = 0
            self._stopped.zero_()
        if nothing_left and limit is not None:
            skips = f" (no step of the epoch was left, {self.skipped} were skipped)"
        first = f"{scale}; or " if (scale := unscaled(self.model, self.train[0])) else ""
        raise NotFiniteError(
            f"expected a finite {what}, got {value} in epoch {epoch.number}, batch {bad[0] + 1}"
            f"{skips}: {first}lower the learning rate, clip the gradient, or look for data outside "
            "the likelihood's support"
        )

    def _step(self, batch: Inputs, share: float) -> Tensor:
        """Take one step on a share of the batch and return its summary."""
        before = [buffer.clone() for buffer in self._seen_buffers]
        if self.captured_step is None:
            summary = self._differentiate(batch)
        else:
            pair, eager = (self.model, self.guide), partial(self._differentiate, batch)
            summary = self.captured_step(*pair, batch, self.beta, eager)
        if self.processes.are_several:
            summary = self._sum_shares(summary, share)
        flag = summary[-1].float()
        if self.settings.skip_limit is None:  # nothing after the step that stops the run is applied
            flag = self._stopped = torch.maximum(self._stopped, flag)
        self.updates.apply(self.count, flag)
        self.count += 1
        with torch.no_grad():  # a batch norm has seen the batch too
            for buffer, value in zip(self._seen_buffers, before, strict=True):
                buffer.copy_(torch.where(flag > 0, value, buffer))
        return summary

    def _differentiate(self, batch: Inputs) -> Tensor:
        """Run the pair, leave the gradients with the parameters, and return the summary."""
        batch, beta = self.objective.transform_batch(batch), self.beta
        model, guide = scale_pair(self.model, self.guide, beta)
        if len(pyro.get_param_store()) == self._store_size:
            terms = self.objective.terms(model, guide, batch)
        else:
            if self.updates.optimizer is None:
                self._inspect(batch)
            with poutine.trace(param_only=True) as seen:
                terms = self.objective.terms(model, guide, batch)
            named = _parameters_of(seen.trace)
            _check_trainable(terms.surrogate, self.updates.parameters | named)
            self._learn(named)
        leaves = self.updates.parameters.values()
        for leaf in leaves:
            leaf.grad = None
        terms.surrogate.backward()
        with torch.no_grad():
            found = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]
            summary, gradients = self.objective.finish(terms, [gradient for _, gradient in found])
        for (leaf, _), gradient in zip(found, gradients, strict=True):
            leaf.grad = gradient
        return summary

    def _sum_shares(self, summary: Tensor, share: float) -> Tensor:
        """Sum the gradients over the processes and finish the step: all come to the same decision."""
        leaves = self.updates.leaves
        own = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in own), summary[-1:].float()])
        if share:
            flat[:-1] *= share  # from the mean over the share to its part of the batch's mean
        else:
            flat.zero_()
            summary = torch.zeros_like(summary)
        *pieces, failed = self.processes.sum_(flat).split([*(leaf.numel() for leaf in leaves), 1])
        terms = BoundTerms(summary[0], summary[0], summary[1], summary[2])
        whole, gradients = self.objective.finish(terms, pieces, are_summed=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.view(leaf.shape).to(leaf.dtype)
        whole[-1].clamp_(min=(failed[0] > 0).to(whole.dtype))
        return whole

    def _inspect(self, batch: Inputs) -> None:
        """Check the pair and what its transform returns, and learn its parameters."""
        self.shown = batch
        pair = replace(self.pair, arguments=batch, knowledge=Knowledge(whole=self.num_data))
        if self.objective.transform is not None:  # data that stay as they are were checked whole
            self.processes.check_together(lambda: _check_transformed(pair))
        # Every device is named, for torch warns of several that are not.
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices), poutine.trace(param_only=True) as seen:
            structure = pair.inspect(pair.num_data, may_subsample=True)
        weighed = self.settings.beta != 1 or self.settings.warmup_epochs
        if structure.summed and weighed and isinstance(self.objective.bound, StockBound):
            raise InputError(
                f"expected beta 1 and no warm-up where {min(structure.summed)!r} is summed out, got "
                f"beta {self.settings.beta:g} and {self.settings.warmup_epochs} epochs: one weight "
                "goes through the whole sum; leave them out, or use IWAE"
            )
        self.shares = structure.shares and pair.plate is not None
        if self.shares and structure.full_size == pair.num_data:
            self.objective.shared_by = self.num_data
        self._learn(_parameters_of(seen.trace))

    def _learn(self, found: dict[str, Tensor]) -> None:
        """Take in the pair's parameters: at the first step, and whenever Pyro's store has grown."""
        new = {name: found[name] for name in sorted(found) if name not in self.updates.parameters}
        if new:
            # A state that is taken up later has buffers of its own for each process.
            self.processes.take_first([*new.values(), *self._buffers()])
            self.updates.add(new)
        self._store_size = len(pyro.get_param_store())

    def _buffers(self) -> list[Tensor]:
        modules = modules_of(self.model, self.guide)
        return [buffer for module in modules for buffer in module.buffers()]

    def values(self) -> dict[str, list[Tensor]]:
        """Copies of the parameters in the order of their names, and of the modules' buffers."""
        found = {"parameters": self.updates.leaves, "buffers": self._buffers()}
        return {kind: [each.detach().clone() for each in some] for kind, some in found.items()}

    @torch.no_grad()
    def put_back(self, values: dict[str, list[Tensor]]) -> None:
        """Put values of :meth:`values` back in place."""
        kept = [*values["parameters"], *values["buffers"]]
        for tensor, value in zip([*self.updates.leaves, *self._buffers()], kept, strict=True):
            tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """All that the coming steps depend on, random generators aside.

        Parameters stand in the order of their names, which may count instances of a module and so
        differ between runs. Under ``own`` stands what differs between processes, on the CPU.
        """
        values = self.values()
        position: dict[str, Any] | None = None
        own: dict[str, Any] = {"buffers": [buffer.cpu() for buffer in values["buffers"]]}
        if (epoch := self._epoch) is not None:
            place = epoch.number, epoch.order.clone(), epoch.taken, epoch.seconds
            position = dict(zip(("epoch", "order", "taken", "seconds"), place, strict=True))
            own["summaries"] = epoch.summaries.cpu().clone()
        numbers = {"count": self.count, "skipped": self.skipped, "position": position, "own": own}
        return {**numbers, "parameters": values["parameters"], "updates": self.updates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`; the pair is run once to find its parameters."""
        self.count, self.skipped, position = state["count"], state["skipped"], state["position"]
        if position is not None:
            self._epoch = _Epoch(**position, summaries=state["own"]["summaries"].to(self.device))
        if self.updates.optimizer is None:
            self._inspect(self.objective.transform_batch(self._take(slice(self.settings.batch_size))))
        kept = [tuple(value.shape) for value in state["parameters"]]
        own = [tuple(leaf.shape) for leaf in self.updates.leaves]
        if kept != own or self.updates.optimizer is None:
            wanted = "the state of a run of this pair"
            got = f"{len(kept)} parameters for its {len(own)}, or others in shape"
            raise InputError(f"expected {wanted}, got {got}: build the pair as it was built then")
        self.put_back({"parameters": state["parameters"], "buffers": state["own"]["buffers"]})
        if "adam" in state:  # of 0.1.0, which had no other optimiser
            self.updates.load_states(state["adam"])
        else:
            self.updates.load_state_dict(state["updates"], self.count)


def _batch_sizes(pair: OpenedPair, settings: FitSettings) -> list[int]:
    """Return how many data points each batch of a pass takes; the last one has the rest.

    A batch norm knows no variance of one data point: a rest of one goes with the batch before it.
    """
    full, rest = divmod(pair.num_data, settings.batch_size)
    sizes = [settings.batch_size] * full + [rest] * (rest > 0)
    if sizes[-1] == 1 and has_batch_norm(pair.model, pair.guide):
        if len(sizes) == 1 or settings.batch_size == 1:
            wanted = "at least 2 data points in each batch for a batch norm"
            advice = "take a larger batch_size, more data, or another norm"
            raise InputError(f"expected {wanted}, got a batch of 1: {advice}")
        sizes[-2:] = [settings.batch_size + 1]
    return sizes


def _means(summaries: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Return the means of a pass per data point, over the steps (of so many) that were applied."""
    applied = summaries[:, -1] == 0
    count = int(sizes[applied].sum())
    loss, rate, distortion, norm = summaries[applied, :-1].sum(0)
    sums = {"bound": -loss, "elbo": -(rate + distortion), "rate": rate, "distortion": distortion}
    means = {f"train_{name}": total / count for name, total in sums.items()}
    return means | {"gradient_norm": norm / max(int(applied.sum()), 1)}


def _parameters_of(trace: Trace) -> dict[str, Tensor]:
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items()}


def _check_transformed(pair: OpenedPair) -> None:
    """Refuse what a transform returned, and a pair that would not be given its data in order."""
    check_number(pair.inputs, pair.model, pair.guide)
    check_data(pair.model, pair.inputs)
    if pair.num_data >= 3 and not pair.takes_any_batch():
        raise InputError(
            "expected a pair without parameters of its own for each data point under a transform, "
            "got one that takes only all its data in their order: transform them before, and train "
            "by batch_size=len(x)"
        )


def _check_trainable(surrogate: Tensor, parameters: dict[str, Tensor]) -> None:
    """Refuse a pair without parameters, or with a trainable tensor that Pyro does not know."""
    if not surrogate.requires_grad:
        advice = "register them with pyro.module or pyro.param"
        raise InputError(f"expected parameters to train, the pair has none: {advice}")
    known = {id(leaf) for leaf in parameters.values()}
    unknown = [leaf for leaf in accumulating_leaves(surrogate) if id(leaf) not in known]
    if unknown:
        shapes = sorted(tuple(leaf.shape) for leaf in unknown)
        raise InputError(
            f"expected every trainable tensor of the pair to be known to Pyro, {len(unknown)} are "
            f"not (shapes {', '.join(map(str, shapes[:3]))}): register their module with pyro.module "
            "under a name that is not taken (pyro.clear_param_store() frees those of earlier runs), "
            "or freeze them by requires_grad_(False)"
        )
