"""Training: stochastic variational inference over any model/guide pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.infer.compiled import CompiledTrace_ELBO
from pyro_vae.infer.objectives import BetaSchedule, check_beta, draw_traces, elbo_terms
from pyro_vae.infer.pair import (
    HANDLER_LOCK,
    Inputs,
    PairFunction,
    as_inputs,
    check_support,
    device_of,
    evaluation_mode,
    owned_modules,
    seeded,
    training_mode,
)
from pyro_vae.infer.progress import EpochProgress
from pyro_vae.infer.steps import EarlyStopping, Steps

__all__ = ["HISTORY", "FitResult", "bound_terms", "check_options", "fit", "resolve_device"]

# Validation draws come from their own seed, the same in every epoch: they leave the training's random
# stream alone, and differences between epochs are not drowned in the noise of the draws.
_VALIDATION_SEED = 20_131_220
# Data scored by one pass of the pair in validation.
_VALIDATION_BLOCK = 4096

HISTORY = (
    "train_elbo",
    "train_rate",
    "train_distortion",
    "validation_elbo",
    "validation_rate",
    "validation_distortion",
    "beta",
    "seconds",
)


@dataclass(frozen=True)
class FitResult:
    """What a run of :func:`fit` left behind besides the trained parameters.

    Attributes:
        history: one array ``(epochs,)`` per quantity, per datum and in nats where it is a bound:
            ``train_elbo``, ``train_rate``, ``train_distortion``, ``validation_elbo``,
            ``validation_rate``, ``validation_distortion`` (NaN without validation data), ``beta``,
            ``seconds``. The ELBO is minus rate minus distortion whatever the beta.
        best_epoch: epoch (from 1) whose parameters were kept; the last one without early stopping.
        stopped_early: whether the validation ELBO stopped improving before the last epoch.
        device: where it was trained.
        batch_size, learning_rate, num_parameters: the settings that shaped the run.
    """

    history: dict[str, np.ndarray]
    best_epoch: int
    stopped_early: bool
    device: str
    batch_size: int
    learning_rate: float
    num_parameters: int

    @property
    def seconds(self) -> float:
        """Seconds spent in training epochs (validation not counted)."""
        return float(self.history["seconds"].sum())


def fit(
    model: PairFunction,
    guide: PairFunction,
    data: Dataset | Tensor | Sequence[Tensor],
    *,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    objective: ELBO | None = None,
    beta: float = 1.0,
    warmup_epochs: int = 0,
    validation: Tensor | Sequence[Tensor] | None = None,
    patience: int | None = None,
    transform: Callable[..., Tensor | Sequence[Tensor]] | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    plate: str = "data",
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Train a model/guide pair by stochastic variational inference with Adam.

    The loss of a batch is the objective's, divided by the number of data in the batch: an unbiased
    estimate of the mean loss per datum whatever the size of the last batch. With beta, distortion +
    beta * rate is minimised.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        data: a :class:`pyro_vae.datasets.Dataset` (its validation part is used), a tensor
            ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``.
        epochs: passes over the training data.
        batch_size: data per step; the last batch of an epoch may be smaller.
        learning_rate: Adam's step size.
        objective: any Pyro ELBO; by default ``Trace_ELBO()``.
        beta: weight of the latent terms, at least 0.
        warmup_epochs: epochs over which the weight rises linearly from 0 to ``beta``, step by step.
            Without it a pair on few data can settle on ignoring its latents (posterior collapse).
        validation: data to evaluate after every epoch, as the model sees them.
        patience: stop after this many epochs without a better validation ELBO (after the warm-up) and
            put the best parameters back. None trains to the end and keeps the last ones.
        transform: called with the tensors of every training batch, on the device; returns what the
            pair is given. A dynamically binarised Dataset brings its own.
        device: ``auto`` takes CUDA where there is one. Modules and methods of modules are moved
            there; plain functions stay where their parameters are.
        seed: seed of everything random in the run; the generators' state is restored afterwards.
            None draws from the global state.
        plate: name of the data plate.
        on_epoch: called with (epoch from 1, that epoch's metrics).
        progress: show a progress bar on standard error; by default only on a terminal.

    Returns:
        history and settings of the run.

    Raises:
        InputError: options or data out of range, a pair that breaks the contract (a latent outside
            the data plate, or missing from the guide), parameters that Pyro does not know, or a loss
            that is not finite.

    Source:
        Kingma, Welling 2014, algorithm 1; beta: Higgins et al. 2017; warm-up: Bowman et al. 2016,
        Sonderby et al. 2016; Adam: Kingma, Ba 2015.

    Example:
        >>> import torch, pyro_vae as pv
        >>> prior, encoder = pv.priors.StandardNormal(2), pv.networks.MLPEncoder((4,), (8,))
        >>> likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (4,))
        >>> vae = pv.VAE(prior, likelihood, pv.guides.MeanFieldNormal(encoder, 2))
        >>> result = pv.fit(vae.model, vae.guide, torch.ones(16, 4), epochs=2, seed=0)
        >>> result.history["train_elbo"].shape
        (2,)
    """
    check_options(epochs, batch_size, learning_rate, beta, warmup_epochs, patience)
    train, validation_inputs, transform = _prepare(data, validation, transform)
    if isinstance(objective, CompiledTrace_ELBO):
        raise InputError(
            "expected an objective that draws traces, got CompiledTrace_ELBO: use it with Pyro's own "
            "SVI, as SVI(model, guide, FusedOptim(...), CompiledTrace_ELBO())"
        )
    if patience is not None and validation_inputs is None:
        raise InputError("expected validation data for patience, got none: pass validation=")
    for part in (train, validation_inputs):
        if part is not None:
            check_support(model, part)
    place = _place(model, guide, device, train[0].device)
    train = tuple(value.to(place) for value in train)
    if validation_inputs is not None:
        validation_inputs = tuple(value.to(place) for value in validation_inputs)
    with (
        HANDLER_LOCK,
        seeded(seed),
        training_mode(model, guide),
        EpochProgress(epochs, progress) as bar,
    ):
        schedule = BetaSchedule(beta, warmup_epochs * -(-len(train[0]) // batch_size))
        steps = Steps(model, guide, objective or Trace_ELBO(), schedule, learning_rate, plate)
        rows: list[dict[str, float]] = []
        best = EarlyStopping(patience, warmup_epochs)
        for epoch in range(1, epochs + 1):
            row = steps.run_epoch(train, transform, batch_size)
            row |= _validated(model, guide, validation_inputs)
            rows.append(row)
            bar.show(epoch, row)
            if on_epoch is not None:
                on_epoch(epoch, row)
            if best.has_passed(epoch, row["validation_elbo"], steps):
                break
        best.restore(steps)
    return FitResult(
        history={name: np.array([row[name] for row in rows]) for name in HISTORY},
        best_epoch=best.epoch,
        stopped_early=len(rows) < epochs,
        device=str(place),
        batch_size=batch_size,
        learning_rate=learning_rate,
        num_parameters=sum(parameter.numel() for parameter in steps.parameters.values()),
    )


def bound_terms(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor]
) -> dict[str, float]:
    """Estimate ELBO, rate and distortion from one draw per datum, in eval mode without gradients.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        x: data on the pair's device.

    Returns:
        ``elbo``, ``rate`` and ``distortion``: means per datum, nats.
    """
    inputs = as_inputs(x)
    rate = distortion = 0.0
    with HANDLER_LOCK, torch.no_grad(), evaluation_mode(model, guide):
        for start in range(0, len(inputs[0]), _VALIDATION_BLOCK):
            block = tuple(value[start : start + _VALIDATION_BLOCK] for value in inputs)
            traces = draw_traces(model, guide, block)
            for trace in traces:
                trace.compute_log_prob()
            block_rate, block_distortion = elbo_terms([traces], num_particles=1).tolist()
            rate, distortion = rate + block_rate, distortion + block_distortion
    count = len(inputs[0])
    return {
        "elbo": -(rate + distortion) / count,
        "rate": rate / count,
        "distortion": distortion / count,
    }


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant by ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; refuse an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"expected a device auto, cpu or cuda, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"expected a device auto, cpu or cuda, got {device!r}")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise InputError(
            f"expected a device that is here, got {device!r}: {count} CUDA devices found"
        )
    return chosen


def _validated(model: PairFunction, guide: PairFunction, inputs: Inputs | None) -> dict[str, float]:
    names = ("elbo", "rate", "distortion")
    if inputs is None:
        return {f"validation_{name}": math.nan for name in names}
    with seeded(_VALIDATION_SEED):
        terms = bound_terms(model, guide, inputs)
    return {f"validation_{name}": terms[name] for name in names}


def _prepare(
    data: Dataset | Tensor | Sequence[Tensor],
    validation: Tensor | Sequence[Tensor] | None,
    transform: Callable[..., Any] | None,
) -> tuple[Inputs, Inputs | None, Callable[..., Any] | None]:
    """Bring a Dataset, tensors or arrays to training inputs, validation inputs and transform."""
    if isinstance(data, Dataset):
        if validation is None and len(data.validation):
            validation = data.validation
        if data.binarize == "dynamic":
            transform = _after_drawing(data, transform)
        data = data.train
    return _tensors(data), None if validation is None else _tensors(validation), transform


def _after_drawing(data: Dataset, transform: Callable[..., Any] | None) -> Callable[..., Any]:
    """Draw the bits of a batch, then apply the user's own transform."""
    if transform is None:
        return data.draw
    return lambda batch: transform(data.draw(batch))


def _tensors(data: Any) -> Inputs:
    return tuple(value.detach() for value in as_inputs(data))


def _place(
    model: PairFunction, guide: PairFunction, device: str | torch.device, given: torch.device
) -> torch.device:
    """Move what may be moved and return the device the pair computes on."""
    owned = owned_modules(model, guide)
    if owned:
        place = resolve_device(device)
        for module in owned:
            module.to(place)
        return place
    default = given if device == "auto" else resolve_device(device)
    place = device_of(model, guide, default=default)
    if device != "auto" and place.type != default.type:
        raise InputError(
            f"expected the parameters of plain functions on {device}, they are on {place}: move "
            "their modules there, plain functions are never moved"
        )
    return place


def check_options(
    epochs: int,
    batch_size: int,
    learning_rate: float,
    beta: float,
    warmup_epochs: int,
    patience: int | None,
) -> None:
    """Refuse options of :func:`fit` that are out of range."""
    if epochs < 0:
        raise InputError(f"expected epochs of at least 0, got {epochs}")
    if not 1 <= batch_size < 2**31:
        raise InputError(f"expected a batch size of at least 1, got {batch_size}")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"expected a finite learning rate above 0, got {learning_rate}")
    if warmup_epochs < 0:
        raise InputError(f"expected warm-up epochs of at least 0, got {warmup_epochs}")
    if patience is not None and patience < 1:
        raise InputError(f"expected a patience of at least 1 epoch, got {patience}")
    check_beta(beta)
