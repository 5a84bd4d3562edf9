"""The deterministic autoencoder: the baseline a VAE is measured against."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.infer.progress import EpochProgress
from pyro_vae.infer.settings import check_callables, check_options
from pyro_vae.networks import Head, check_shape, feature_shape
from pyro_vae.pair.functions import evaluation_mode, resolve_device, seeded, training_mode
from pyro_vae.pair.inputs import as_inputs

LOSSES = ("mse", "bce")

# Data scored by one pass in validation.
_VALIDATION_BLOCK = 4096


@dataclass(frozen=True)
class AutoencoderFit:
    """What a run of :meth:`Autoencoder.fit` left behind besides the trained weights.

    Attributes:
        history: one array ``(epochs,)`` per quantity: ``train_loss`` and ``validation_loss`` (per
            datum, summed over its values; NaN without validation data), ``seconds``.
        best_epoch: epoch (from 1) whose weights were kept; the last one without early stopping.
        stopped_early: whether the validation loss stopped improving before the last epoch.
        device: where it was trained.
        loss: ``"mse"`` or ``"bce"``.
        batch_size: data per step.
        learning_rate: Adam's step size.
        num_parameters: how many numbers were trained.
    """

    history: dict[str, np.ndarray]
    best_epoch: int
    stopped_early: bool
    device: str
    loss: str
    batch_size: int
    learning_rate: float
    num_parameters: int

    @property
    def seconds(self) -> float:
        """Seconds spent in training epochs (validation not counted)."""
        return float(self.history["seconds"].sum())


class Autoencoder(nn.Module):
    r"""Deterministic encoder and decoder, trained to reproduce its input.

    .. math:: \min_{f, g} \frac{1}{N} \sum_n L(x_n, g(f(x_n)))

    The networks are those of a VAE; the autoencoder owns the heads, a linear map of the encoder's
    features to the code and one of the decoder's features to the data. It has no distribution over
    codes: nothing keeps them together, and there is no likelihood of new data.

    Args:
        encoder: network from data to features.
        decoder: network from codes to features.
        latent_dim: size of the code; by default what the decoder says.
        data_shape: shape of one datum; by default what the encoder says.

    Shapes:
        data ``(*batch, *data_shape)``, codes ``(*batch, latent_dim)``.

    Raises:
        InputError: networks that don't say the sizes that are left out, or their features' shape.

    Source:
        Hinton, Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks".

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLPDecoder, MLPEncoder
        >>> autoencoder = Autoencoder(MLPEncoder((4,), (8,)), MLPDecoder(2, (8,)))
        >>> result = autoencoder.fit(torch.rand(16, 4), epochs=2, seed=0)
        >>> autoencoder.encode(torch.rand(5, 4)).shape
        torch.Size([5, 2])
    """

    ends_in_logits: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_dim: int | None = None,
        data_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent_dim: int = _said(decoder, "latent_dim", latent_dim)
        self.data_shape: tuple[int, ...] = tuple(_said(encoder, "data_shape", data_shape))
        self.code = Head(feature_shape(encoder), (self.latent_dim,))
        self.output = Head(feature_shape(decoder), self.data_shape)
        # Set by training; a buffer, so that saved weights know what they mean.
        self.register_buffer("ends_in_logits", torch.tensor(False))

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes ``(*batch, latent_dim)`` of data ``(*batch, *data_shape)``."""
        check_shape(x, self.data_shape)
        return self.code(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Return the data ``(*batch, *data_shape)`` that codes ``(*batch, latent_dim)`` stand for.

        After training with cross-entropy these are probabilities.
        """
        check_shape(z, (self.latent_dim,))
        raw = self.output(self.decoder(z))
        return torch.where(self.ends_in_logits, raw.sigmoid(), raw)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return data after a way through the code, ``(*batch, *data_shape)``."""
        return self.decode(self.encode(x))

    forward = reconstruct

    def fit(
        self,
        data: Dataset | Tensor,
        *,
        epochs: int = 100,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        loss: str = "mse",
        validation: Tensor | None = None,
        patience: int | None = None,
        device: str | torch.device = "auto",
        seed: int | None = None,
        on_epoch: Callable[[int, dict[str, float]], None] | None = None,
        progress: bool | None = None,
    ) -> AutoencoderFit:
        """Train by Adam on the reconstruction loss.

        Args:
            data: a :class:`pyro_vae.datasets.Dataset` (its validation part is used, and bits drawn
                afresh for every batch if it is dynamic), or a tensor ``(N, *data_shape)`` of any
                real type.
            epochs: passes over the training data.
            batch_size: data per step; the last batch of an epoch may be smaller.
            learning_rate: Adam's step size.
            loss: ``"mse"``, the squared error, or ``"bce"``, the binary cross-entropy in nats of data
                in [0, 1]; both summed over a datum's values and averaged over data.
            validation: data to evaluate after every epoch.
            patience: stop after this many epochs without a better validation loss and put the best
                weights back. None trains to the end and keeps the last ones.
            device: ``auto`` takes CUDA where there is one.
            seed: seed of everything random in the run; the generators' state is restored afterwards.
            on_epoch: called with (epoch from 1, that epoch's metrics).
            progress: show a progress bar on standard error; by default only on a terminal.

        Returns:
            history and settings of the run.

        Raises:
            InputError: options or data out of range, or a loss that is not finite.
        """
        check_options(epochs, batch_size, learning_rate, 1.0, 0, patience)
        check_callables(on_epoch=on_epoch)
        if loss not in LOSSES:
            raise unknown_name("loss", loss, LOSSES)
        train, held_out, draw = _parts(data, validation)
        if patience is not None and held_out is None:
            raise InputError("expected validation data for patience, got none: pass validation=")
        for part in (train, held_out):
            if part is not None:
                self._check_data(part, loss)
        place = resolve_device(device)
        self.to(place)
        kind = next(self.parameters()).dtype
        train = train.to(place, kind)
        held_out = None if held_out is None else held_out.to(place, kind)
        rows: list[dict[str, float]] = []
        best = _Best(patience)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, fused=True)
        with seeded(seed), training_mode(self), _LossProgress(epochs, progress) as bar:
            self.ends_in_logits.fill_(loss == "bce")
            for epoch in range(1, epochs + 1):
                row = self._run_epoch(train, draw, batch_size, loss, optimizer)
                row["validation_loss"] = self._validated(held_out, loss)
                rows.append(row)
                bar.show(epoch, row)
                if on_epoch is not None:
                    on_epoch(epoch, row)
                if best.has_passed(epoch, row["validation_loss"], self):
                    break
            best.restore(self)
        names = ("train_loss", "validation_loss", "seconds")
        return AutoencoderFit(
            history={name: np.array([row[name] for row in rows]) for name in names},
            best_epoch=best.epoch,
            stopped_early=len(rows) < epochs,
            device=str(place),
            loss=loss,
            batch_size=batch_size,
            learning_rate=learning_rate,
            num_parameters=sum(parameter.numel() for parameter in self.parameters()),
        )

    def _run_epoch(
        self,
        train: Tensor,
        draw: Callable[[Tensor], Tensor] | None,
        batch_size: int,
        loss: str,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, float]:
        start = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64, device=train.device)
        for index in torch.randperm(len(train), device=train.device).split(batch_size):
            batch = train[index] if draw is None else draw(train[index])
            value = self._loss(batch, loss)
            optimizer.zero_grad(set_to_none=True)
            (value / len(batch)).backward()
            optimizer.step()
            total += value.detach()
        mean = total.item() / len(train)
        if not math.isfinite(mean):
            raise InputError(f"expected a finite loss, got {mean}: lower the learning rate")
        return {"train_loss": mean, "seconds": time.perf_counter() - start}

    def _loss(self, x: Tensor, loss: str) -> Tensor:
        """Return the loss summed over the batch."""
        raw = self.output(self.decoder(self.encode(x)))
        if loss == "bce":
            return F.binary_cross_entropy_with_logits(raw, x, reduction="sum")
        return F.mse_loss(raw, x, reduction="sum")

    @torch.no_grad()
    def _validated(self, x: Tensor | None, loss: str) -> float:
        if x is None:
            return math.nan
        with evaluation_mode(self):
            losses = [self._loss(block, loss).double() for block in x.split(_VALIDATION_BLOCK)]
        return (torch.stack(losses).sum() / len(x)).item()

    def _check_data(self, x: Tensor, loss: str) -> None:
        if tuple(x.shape[1:]) != self.data_shape:
            raise InputError(
                f"expected data of shape (N, {', '.join(map(str, self.data_shape))}), got "
                f"{tuple(x.shape)}: build the networks with the data's own shape"
            )
        low, high = (value.item() for value in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("expected finite data, got NaN or infinity: remove or fill them")
        if loss == "bce" and not (low >= 0 and high <= 1):
            raise InputError(
                f"expected x in [0, 1] for loss 'bce', got values from {low:g} to {high:g}: divide "
                "by the largest possible value, or use loss='mse'"
            )


class _LossProgress(EpochProgress):
    """The bar of a training run, with the loss of both parts."""

    def described(self, row: dict[str, float]) -> str:
        text = f"loss {row['train_loss']:.4g}"
        if not math.isnan(row["validation_loss"]):
            text += f" (validation {row['validation_loss']:.4g})"
        return text


class _Best:
    """Early stopping: remembers the weights with the best validation loss."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.epoch, self.loss = 0, math.inf
        self._state: dict[str, Any] | None = None

    def has_passed(self, epoch: int, loss: float, module: nn.Module) -> bool:
        """Take in an epoch's validation loss; say whether patience has run out."""
        if self.patience is None:
            self.epoch = epoch
            return False
        if loss < self.loss:
            self.epoch, self.loss = epoch, loss
            self._state = copy.deepcopy(module.state_dict())
        return epoch - self.epoch >= self.patience

    def restore(self, module: nn.Module) -> None:
        """Put the best weights back."""
        if self._state is not None:
            module.load_state_dict(self._state)


def _parts(
    data: Dataset | Tensor, validation: Tensor | None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor] | None]:
    """Return training data, validation data, and what draws a batch's bits."""
    draw = None
    if isinstance(data, Dataset):
        if validation is None and len(data.validation):
            validation = data.validation
        draw = data.draw if data.binarize == "dynamic" else None
        data = data.train
    return _one_tensor(data), None if validation is None else _one_tensor(validation), draw


def _one_tensor(data: Any) -> Tensor:
    inputs = as_inputs(data)
    if len(inputs) != 1:
        raise InputError(
            f"expected one tensor of data, got {len(inputs)}: an autoencoder has no more"
        )
    return inputs[0].detach()


def _said(network: nn.Module, name: str, given: Any) -> Any:
    value = getattr(network, name, None) if given is None else given
    if value is None:
        raise InputError(
            f"expected {name}, {type(network).__name__} does not say it: pass {name}= to Autoencoder"
        )
    return value
