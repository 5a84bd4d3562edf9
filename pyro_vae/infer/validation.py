"""ELBO, rate and distortion of a pair on given data, and early stopping on them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.distributed import ALONE, Processes
from pyro_vae.infer.analytic_kl import divergences
from pyro_vae.infer.bounds import elbo_terms
from pyro_vae.infer.trainer import DataPlate, Trainer
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, evaluation_mode, seeded
from pyro_vae.pair.opened import OpenedPair, open_pair
from pyro_vae.pair.precision import compute_in
from pyro_vae.pair.sites import is_delta, is_inside, share_terms

# Validation draws come from their own seed, the same in every epoch: they leave the training's random
# stream alone, and differences between epochs are not drowned in the noise of the draws.
_VALIDATION_SEED = 20_131_220
# Data points scored by one pass of the pair in validation, and those by which it is inspected.
_BLOCK, _FEW = 4096, 64
# Draws from which the rate of latents outside the data plate is estimated where no form is closed.
_RATE_DRAWS = 16


def bound_terms(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    plate: str | None = "data", processes: Processes = ALONE,
) -> dict[str, float]:  # fmt: skip
    """Estimate ELBO, rate and distortion from one draw per datum, in eval mode without gradients.

    Data are ``(N, ...)``, or a tuple of tensors. If the data plate subsamples, the terms are those of
    the data points that it stands for, estimated from the ones it drew. What stands outside it counts
    once for all the data. ``plate=None``: the whole data set is one datum. ``processes`` share the
    data out; all of them must call, with all the data.

    Returns:
        ``elbo``, ``rate`` and ``distortion``: means per datum, nats.

    Raises:
        InputError: data the likelihood is not defined for, or a pair that breaks the contract.
    """
    serves = Serves.WHOLE | Serves.SHARED | Serves.SUMMED
    pair = open_pair(model, guide, x, plate=plate, serves=serves)
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide), pair.put_back():
        few = pair.few(_FEW)
        few.inspect(few.num_data, may_subsample=True)
    return evaluate_bound(pair, processes)


def evaluate_bound(pair: OpenedPair, processes: Processes = ALONE) -> dict[str, float]:
    """Estimate the terms of :func:`bound_terms` for a pair that is known to keep the contract."""
    number, device = pair.num_data, pair.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # read once: a sum on the device
    if processes.are_several and pair.plate is not None:
        pair = pair.on(tuple(processes.share(value) for value in pair.inputs))
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(pair.model, pair.guide):
        size = pair.num_data if pair.num_data > _BLOCK and not pair.is_divisible() else _BLOCK
        for start in range(0, pair.num_data, size):
            block = pair.part(slice(start, start + size))
            with DataPlate(pair.plate, block.num_data) as data:
                traces = block.trace(sum_out=True)
            counts_all = data.full_size != block.num_data
            for trace in traces:
                trace.compute_log_prob()
                share_terms(trace, pair.plate, 1.0 if counts_all else block.num_data / number)
            share = block.num_data / data.full_size
            totals = totals + torch.stack(elbo_terms([traces], num_particles=1)) * share
    rate, distortion = (processes.sum_(totals) / number).tolist()
    return {"elbo": -(rate + distortion), "rate": rate, "distortion": distortion}


def validate(pair: OpenedPair | None, processes: Processes = ALONE) -> dict[str, float]:
    """Return the validation columns of an epoch; NaN without validation data."""
    terms = dict.fromkeys(("elbo", "rate", "distortion"), math.nan)
    if pair is not None:
        with seeded(processes.own_seed(_VALIDATION_SEED)), compute_in("float32", pair.device):
            terms = evaluate_bound(pair, processes)
    return {f"validation_{name}": value for name, value in terms.items()}


def global_rate(trainer: Trainer) -> float:
    """Return the rate of the latents outside the data plate in nats, of draws if need be, or NaN."""
    if not trainer.shares:
        return math.nan
    rates, pair = [], trainer.pair.on(trainer.shown)
    with seeded(_VALIDATION_SEED), torch.no_grad(), evaluation_mode(pair.model, pair.guide):
        for _ in range(_RATE_DRAWS):
            traces = pair.trace()
            for trace in traces:
                trace.compute_log_prob()
            found = divergences(*traces)
            outside = [row for row in found if not is_inside(row.site, pair.plate)]
            auxiliary = [row for row in found if row.site["name"] not in traces[0].nodes]
            placed = [row for row in found if row not in outside and is_delta(row.site["fn"])]
            if placed and auxiliary and all(row in outside for row in auxiliary):
                return math.nan  # one draw holds latents of both kinds
            rates.append(sum(float(row.value.sum()) for row in outside))
            if all(row.exact for row in outside):
                break
    return sum(rates) / len(rates)


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
        """Say whether patience has run out after this many epochs."""
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
