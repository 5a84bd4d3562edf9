"""The uniform distribution on the unit sphere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor

from .sphere import SphereDistribution, check_dimension, log_sphere_area, random_directions


class HypersphericalUniform(SphereDistribution):
    r"""Uniform distribution on the sphere S^(m-1) of unit vectors in R^m.

    .. math:: p(x) = \Gamma(m/2) / (2 \pi^{m/2})

    with respect to the surface measure. It is the von Mises-Fisher distribution of
    concentration 0.

    Args:
        m: dimension of the ambient space, at least 2.
        batch_shape: shape of a batch of independent copies.
        dtype: of the samples; PyTorch's default if None.
        device: of the samples; PyTorch's default if None.
        validate_args: whether to check the values given to `log_prob`; Pyro's setting if None.

    Shapes:
        batch shape ``batch_shape``, event shape ``(m,)``.

    Raises:
        InputError: if ``m`` is not a whole number of at least 2.

    Example:
        >>> HypersphericalUniform(3).log_prob(torch.tensor([0.0, 0.0, 1.0]))
        tensor(-2.5310)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        m: int,
        *,
        batch_shape: torch.Size | tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.m = check_dimension(m)
        self._origin = torch.zeros(m, dtype=dtype, device=device)
        super().__init__(torch.Size(batch_shape), torch.Size([m]), validate_args=validate_args)

    def expand(
        self, batch_shape: torch.Size | tuple[int, ...], _instance: Any = None
    ) -> HypersphericalUniform:
        """Return the same distribution with another batch shape."""
        new: HypersphericalUniform = self._get_checked_instance(HypersphericalUniform, _instance)
        new.m = self.m
        new._origin = self._origin
        super(HypersphericalUniform, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Zero, shape ``(*batch, m)``."""
        return self._origin.expand(self.shape())

    def entropy(self) -> Tensor:
        """Log of the sphere's area, shape ``batch``, nats."""
        return self._origin.new_full(self.batch_shape, log_sphere_area(self.m))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the surface measure.

        Args:
            value: unit vectors, shape ``(*sample, *batch, m)``.

        Returns:
            Shape ``(*sample, *batch)``, nats.

        Raises:
            InputError: with validation on, if ``value`` doesn't consist of unit vectors.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -log_sphere_area(self.m))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw normal vectors divided by their norm, shape ``(*sample, *batch, m)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return random_directions(shape, dtype=self._origin.dtype, device=self._origin.device)
