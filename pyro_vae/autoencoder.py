"""The deterministic autoencoder: the baseline a VAE is measured against."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, check_name
from pyro_vae.infer.settings import check_callables
from pyro_vae.infer.training import describe_progress, epoch_progress, fit
from pyro_vae.networks import Head, check_range, check_shape, feature_shape
from pyro_vae.pair.functions import HANDLER_LOCK
from pyro_vae.pair.inputs import as_inputs

LOSSES = ("mse", "bce")


@dataclass(frozen=True)
class AutoencoderFit:
    """The result of :meth:`Autoencoder.fit`, besides the trained weights.

    Attributes:
        history: one array ``(epochs,)`` per quantity: ``train_loss`` and ``validation_loss`` (per
            datum, summed over its values; NaN without validation data), ``seconds``.
        loss: ``"mse"`` or ``"bce"``.
        best_epoch, stopped_early: as of :class:`pyro_vae.FitResult`, by the validation loss.
        device, batch_size, learning_rate, num_parameters: as there.
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
        self, encoder: nn.Module, decoder: nn.Module, *, latent_dim: int | None = None,
        data_shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent_dim: int = _ask_size(decoder, "latent_dim", latent_dim)
        self.data_shape: tuple[int, ...] = tuple(_ask_size(encoder, "data_shape", data_shape))
        self.code = Head(feature_shape(encoder), (self.latent_dim,))
        self.output = Head(feature_shape(decoder), self.data_shape)
        # Set by training; a buffer, so that saved weights know what they mean.
        self.register_buffer("ends_in_logits", torch.tensor(False))

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes ``(*batch, latent_dim)`` of data ``(*batch, *data_shape)``."""
        check_shape(x, self.data_shape)
        return self.code(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Return the data ``(*batch, *data_shape)`` that codes ``(*batch, latent_dim)`` decode to.

        After training with cross-entropy these are probabilities.
        """
        check_shape(z, (self.latent_dim,))
        raw = self.output(self.decoder(z))
        return torch.where(self.ends_in_logits, raw.sigmoid(), raw)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode data and decode the codes, ``(*batch, *data_shape)``."""
        return self.decode(self.encode(x))

    forward = reconstruct

    def fit(
        self, data: Dataset | Tensor, *, epochs: int = 100, batch_size: int = 128,
        learning_rate: float = 1e-3, loss: str = "mse", validation: Tensor | None = None,
        patience: int | None = None, device: str | torch.device = "auto", seed: int | None = None,
        checkpoint: str | Path | None = None, checkpoint_every: int | None = None,
        checkpoint_minutes: float | None = 1.0, resume: bool = False,
        on_epoch: Callable[[int, dict[str, float]], None] | None = None,
        progress: bool | None = None,
    ) -> AutoencoderFit:  # fmt: skip
        """Train by Adam on the reconstruction loss.

        It is :func:`pyro_vae.fit` of a pair whose guide is a point mass at the code, under a flat
        prior: its negative ELBO is the loss up to a constant. Pyro's parameter store is left as it
        was.

        Options are those of :func:`pyro_vae.fit`, with the validation loss in place of the ELBO.
        ``data`` is a :class:`pyro_vae.datasets.Dataset` or a tensor ``(N, *data_shape)`` of any real
        type. ``loss`` is ``"mse"``, the squared error, or ``"bce"``, the binary cross-entropy in nats
        of data in [0, 1]; both summed over a datum's values and averaged over data. ``on_epoch`` is
        called with (epoch from 1, that epoch's row of the history).

        Returns:
            history and settings of the run.

        Raises:
            InputError: options or data out of range, a loss that is not finite, or a checkpoint of
                another run.
        """
        check_callables(on_epoch=on_epoch)
        check_name("loss", loss, LOSSES)
        for part in (data, validation):
            count = 1 if part is None or isinstance(part, Dataset) else len(as_inputs(part))
            if count != 1:
                raise InputError(f"expected one tensor of data, got {count}: pass the first alone")
        pair = _PointMassPair(self, loss)

        def note(epoch: int, row: dict[str, float]) -> None:
            losses = pair.losses(row)
            both = losses["train_loss"], losses["validation_loss"]
            bar.set_description_str(describe_progress("loss", *both, ".4g"), refresh=False)
            bar.update(epoch - bar.n)
            if on_epoch is not None:
                on_epoch(epoch, losses)

        # A store of its own: no other pair's names are in the way, and none is left there.
        with HANDLER_LOCK, pyro.get_param_store().scope(), epoch_progress(epochs, progress) as bar:
            result = fit(
                pair.model, pair.guide, data, epochs=epochs, batch_size=batch_size,
                learning_rate=learning_rate, validation=validation, patience=patience,
                compile=False, device=device, seed=seed, checkpoint=checkpoint,
                checkpoint_every=checkpoint_every, checkpoint_minutes=checkpoint_minutes,
                resume=resume, on_epoch=note, progress=False,
            )  # fmt: skip
        names = ("best_epoch", "stopped_early", "device", "batch_size", "learning_rate")
        return AutoencoderFit(
            **{name: getattr(result, name) for name in names},
            history=pair.losses(result.history),
            loss=loss,
            num_parameters=sum(parameter.numel() for parameter in self.parameters()),
        )


class _PointMassPair(nn.Module):
    """An autoencoder as a pair: a flat prior over codes, and a point mass at the encoder's output."""

    def __init__(self, autoencoder: Autoencoder, loss: str) -> None:
        super().__init__()
        self.autoencoder, self.loss = autoencoder, loss
        size = math.prod(autoencoder.data_shape)
        self.constant = 0.5 * size * math.log(math.pi) if loss == "mse" else 0.0

    def model(self, x: Tensor) -> None:
        """Decode the code and score the data under it."""
        part = self.autoencoder
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(constraints.real_vector, (), (part.latent_dim,))
            raw = part.output(part.decoder(pyro.sample("z", flat)))
            # Without validation: grey values have a cross-entropy too, and a loss that is not a
            # number is what the trainer looks for.
            likelihood: Any = dist.Normal(raw, raw.new_tensor(math.sqrt(0.5)), validate_args=False)
            if self.loss == "bce":
                likelihood = dist.Bernoulli(logits=raw, validate_args=False)
            pyro.sample("x", likelihood.to_event(len(part.data_shape)), obs=x)

    def guide(self, x: Tensor) -> None:
        """Encode the data."""
        part = self.autoencoder
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:  # of one that has none pyro.module would warn
                pyro.param(name, parameter)
        # From its first use by this loss on, the output is what the loss takes it for.
        part.ends_in_logits.fill_(self.loss == "bce")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(part.encode(x)).to_event(1))

    def losses(self, row: Any) -> dict[str, Any]:
        """Return losses and seconds of an epoch, or of many, from what :func:`fit` notes."""
        parts = ("train", "validation")
        losses = {f"{part}_loss": row[f"{part}_distortion"] - self.constant for part in parts}
        return losses | {"seconds": row["seconds"]}

    def check_data(self, x: Tensor) -> None:
        """Refuse data of another shape, not finite, or out of the loss's range."""
        check_shape(x, self.autoencoder.data_shape, batch="N")
        accepts = (0.0, 1.0) if self.loss == "bce" else (-math.inf, math.inf)
        advice = "divide by the largest possible value, or use loss='mse'"
        check_range(x, accepts, "loss 'bce'", advice)


def _ask_size(network: nn.Module, name: str, given: Any) -> Any:
    value = getattr(network, name, None) if given is None else given
    if value is None:
        kind = type(network).__name__
        raise InputError(f"expected {name}, {kind} does not state it: pass {name}= to Autoencoder")
    return value
