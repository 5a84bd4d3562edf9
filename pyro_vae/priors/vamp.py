"""The VampPrior: a mixture of the variational family at learned pseudo-inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import InputError, size
from pyro_vae.priors.base import Prior


class VampPrior(Prior):
    r"""Mixture of the posteriors of K pseudo-inputs, which are trained with the rest.

    .. math:: p(z) = \sum_k w_k q(z | u_k)

    The pseudo-inputs pass through the encoder once per call. The prior points to the family without
    owning it: its parameters, its state and its device are those of the pseudo-inputs alone, and the
    family is to be the one of the same VAE (another one is trained by nobody). It runs in whatever
    mode, training or evaluation, the family is in.

    Args:
        guide: the variational family q.
        data_shape: shape of one datum.
        num_pseudo_inputs: number of components, K.
        learn_weights: whether the weights w are trained; otherwise they are all 1/K.
        unit_interval: whether the data lie in [0, 1]; the pseudo-inputs are then kept inside (through
            a sigmoid, whose gradient, unlike a clamp's, vanishes nowhere).

    Shapes:
        the call returns batch shape ``()``, event shape ``(guide.latent_dim,)``.

    Raises:
        InputError: fewer than one pseudo-input, or a family that does not say its ``latent_dim``.

    Source:
        Tomczak, Welling 2018, "VAE with a VampPrior", equation 9.

    Example:
        >>> from pyro_vae.guides import MeanFieldNormal
        >>> from pyro_vae.networks import MLPEncoder
        >>> prior = VampPrior(MeanFieldNormal(MLPEncoder((64,)), 2), (64,), num_pseudo_inputs=20)
        >>> prior().event_shape
        torch.Size([2])
    """

    guide: Callable[[Tensor], dist.Distribution]
    logits: Tensor

    def __init__(
        self,
        guide: Callable[[Tensor], dist.Distribution],
        data_shape: Sequence[int],
        *,
        num_pseudo_inputs: int = 500,
        learn_weights: bool = False,
        unit_interval: bool = True,
    ) -> None:
        super().__init__()
        latent_dim = getattr(guide, "latent_dim", None)
        if latent_dim is None:
            raise InputError(
                f"expected a family with an attribute latent_dim, got {type(guide).__name__}: "
                "set it to the size of the latent vector"
            )
        # Past nn.Module's own __setattr__, which would register the family as a part of the prior and
        # so save it, list its parameters and hand it to Pyro a second time.
        object.__setattr__(self, "guide", guide)
        self.latent_dim = latent_dim
        self.latent_support = getattr(guide, "latent_support", "real")
        self.data_shape = tuple(int(size) for size in data_shape)
        self.num_pseudo_inputs = size("num_pseudo_inputs", num_pseudo_inputs)
        self.learn_weights = learn_weights
        self.unit_interval = unit_interval
        # Noise that fills the data's range, until start_at_data brings something better.
        raw = torch.randn(self.num_pseudo_inputs, *self.data_shape)
        self.raw_pseudo_inputs = nn.Parameter(raw)
        self.keep("logits", torch.zeros(self.num_pseudo_inputs), learn=learn_weights)

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs u, ``(num_pseudo_inputs, *data_shape)``."""
        if self.unit_interval:
            return self.raw_pseudo_inputs.sigmoid()
        return self.raw_pseudo_inputs

    @torch.no_grad()
    def start_at_data(self, x: Tensor) -> None:
        """Set the pseudo-inputs to the data's mean plus noise of the data's standard deviation.

        Args:
            x: training data ``(N, *data_shape)``.

        Raises:
            InputError: data of another shape.
        """
        if tuple(x.shape[1:]) != self.data_shape:
            raise InputError(
                f"expected data of shape (N, {', '.join(map(str, self.data_shape))}), "
                f"got {tuple(x.shape)}: build the prior with the data's own shape"
            )
        if self.unit_interval and not (x.min() >= 0 and x.max() <= 1):
            raise InputError(
                f"expected data in [0, 1], got values from {x.min():g} to {x.max():g}: build the "
                "prior with unit_interval=False"
            )
        raw = self.raw_pseudo_inputs
        mean, spread = x.mean(0).to(raw), x.std(0, correction=0).to(raw)
        start = mean + spread * torch.randn_like(raw)
        if self.unit_interval:
            # At the very ends the sigmoid would no longer move.
            start = start.clamp(0.01, 0.99).logit()
        raw.copy_(start)

    def forward(self) -> dist.Distribution:
        """Return the mixture of posteriors."""
        components = self.guide(self.pseudo_inputs)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, components, validate_args=False)
