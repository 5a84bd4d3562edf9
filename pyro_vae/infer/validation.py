"""ELBO, rate and distortion of a pair on given data, and early stopping on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.distributed import ALONE, Processes
from pyro_vae.infer.bounds import elbo_terms
from pyro_vae.infer.trainer import DataPlate, Trainer
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, device_of, evaluation_mode, seeded
from pyro_vae.pair.inputs import Inputs, as_inputs
from pyro_vae.pair.sites import draw_traces

# Validation draws come from their own seed, the same in every epoch: they leave the training's random
# stream alone, and differences between epochs are not drowned in the noise of the draws.
_VALIDATION_SEED = 20_131_220
# Data points scored by one pass of the pair in validation.
_VALIDATION_BLOCK = 4096


def bound_terms(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    *,
    plate: str = "data",
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Estimate ELBO, rate and distortion from one draw per datum, in eval mode without gradients.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        x: data ``(N, ...)``, or a tuple of tensors.
        plate: name of the data plate. If it subsamples, the terms are those of the data points that
            it stands for, estimated from the ones it drew.
        processes: share the data out; all of them must call, with all the data.

    Returns:
        ``elbo``, ``rate`` and ``distortion``: means per datum, nats.
    """
    inputs = as_inputs(x, model, guide)
    device = device_of(model, guide, default=inputs[0].device)
    own = tuple(processes.share(value) for value in inputs)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # read once: a sum on the device
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide):
        for start in range(0, len(own[0]), _VALIDATION_BLOCK):
            block = tuple(value[start : start + _VALIDATION_BLOCK].to(device) for value in own)
            with DataPlate(plate) as data:
                traces = draw_traces(model, guide, block)
            for trace in traces:
                trace.compute_log_prob()
            share = len(block[0]) / data.full_size(len(block[0]))
            totals = totals + elbo_terms([traces], num_particles=1) * share
    rate, distortion = (processes.sum_(totals) / len(inputs[0])).tolist()
    return {"elbo": -(rate + distortion), "rate": rate, "distortion": distortion}


def validate(
    model: PairFunction,
    guide: PairFunction,
    inputs: Inputs | None,
    *,
    plate: str = "data",
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Return the validation columns of an epoch; NaN without validation data."""
    names = ("elbo", "rate", "distortion")
    if inputs is None:
        return {f"validation_{name}": math.nan for name in names}
    with seeded(processes.own_seed(_VALIDATION_SEED)):
        terms = bound_terms(model, guide, inputs, plate=plate, processes=processes)
    return {f"validation_{name}": terms[name] for name in names}


class EarlyStopping:
    """Early stopping: remembers the values with the best validation ELBO after the warm-up."""

    def __init__(self, patience: int | None, warmup_epochs: int) -> None:
        self.patience, self.warmup_epochs = patience, warmup_epochs
        self.epoch, self.elbo = 0, -math.inf
        self._values: dict[str, list[Tensor]] | None = None

    def take_in(self, epoch: int, elbo: float, trainer: Trainer) -> None:
        """Take in an epoch's validation ELBO, and the values if it is the best so far."""
        if self.patience is None or epoch <= self.warmup_epochs:
            self.epoch = epoch
        elif elbo > self.elbo:
            self.epoch, self.elbo, self._values = epoch, elbo, trainer.values()

    def is_over(self, epochs: int) -> bool:
        """Say whether patience has run out after so many epochs."""
        return self.patience is not None and epochs - self.epoch >= self.patience

    def restore(self, trainer: Trainer) -> None:
        """Put the best parameters and buffers back."""
        if self._values is not None:
            trainer.put_back(self._values)

    def state_dict(self) -> dict[str, Any]:
        """Best epoch, its ELBO and its values."""
        return {"epoch": self.epoch, "elbo": self.elbo, "values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`."""
        self.epoch, self.elbo, self._values = state["epoch"], state["elbo"], state["values"]
