"""The unit sphere: its support, area and random directions, and the uniform distribution on it."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.transforms import Normalize
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae.errors import InputError


class _UnitSphere(constraints.Constraint):
    """Vectors of unit length, up to what normalising in float32 leaves.

    Pyro's takes the eps of the value's dtype; so a float32 sample may be scored in float64. Densities
    are computed from chords and feel a norm off by d only as d^2.
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        tolerance = 10.0 * torch.finfo(torch.float32).eps * math.sqrt(value.shape[-1])
        return (torch.linalg.vector_norm(value, dim=-1) - 1.0).abs() < tolerance


unit_sphere = _UnitSphere()


@transform_to.register(unit_sphere)
def _transform_to_unit_sphere(constraint: _UnitSphere) -> Normalize:
    """Let `pyro.param(..., constraint=unit_sphere)` optimise an unconstrained vector."""
    return Normalize()


class SphereDistribution(TorchDistribution):
    """Base of the distributions on S^(m-1) in R^m: event shape ``(m,)``, unit vectors."""

    support: ClassVar[constraints.Constraint] = unit_sphere
    has_rsample = True

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of unit vectors ``(*sample, *batch, m)`` with respect to the surface measure.

        ``(*sample, *batch)``, nats. With validation on, others raise an InputError.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value)

    def _log_density(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _validate_sample(self, value: Tensor) -> None:
        try:
            super()._validate_sample(value)
        except ValueError as error:
            wanted = f"unit vectors that broadcast to shape {tuple(self.shape())}"
            advice = "check the shape and divide by the norm"
            raise InputError(f"expected {wanted}, got {_describe(value)}: {advice}") from error


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = f"shape {tuple(value.shape)}"
    return f"{shape} with {describe_norms(value)}" if value.dim() and value.numel() else shape


def describe_norms(vectors: Tensor) -> str:
    """Return between which numbers the lengths of vectors are."""
    norm = torch.linalg.vector_norm(vectors.detach().double(), dim=-1)
    return f"norms from {norm.min().item():.9g} to {norm.max().item():.9g}"


def check_dimension(m: int) -> int:
    """Return the ambient dimension ``m``; refuse what is not a whole number of at least 2."""
    if isinstance(m, bool) or not isinstance(m, int) or m < 2:
        raise InputError(f"expected an ambient dimension m >= 2, got {m!r}: a circle has m = 2")
    return m


def log_sphere_area(m: int) -> float:
    """Log of the area of S^(m-1), ``2 pi^(m/2) / Gamma(m/2)``, in nats."""
    return math.log(2.0) + 0.5 * m * math.log(math.pi) - math.lgamma(0.5 * m)


def random_directions(shape: Sequence[int], like: Tensor) -> Tensor:
    """Draw uniform unit vectors along the last dimension of ``shape``, of the type of ``like``."""
    normal = torch.randn(shape, dtype=like.dtype, device=like.device)
    norm = torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
    # The generators' grid makes all of a vector exactly zero with chance 2^-24 (float32) where it
    # is one or two numbers long. It has no direction; a fixed unit vector stands in for it.
    return torch.where(norm > 0, normal / norm, shape[-1] ** -0.5)


class HypersphericalUniform(SphereDistribution):
    r"""Uniform distribution on the sphere S^(m-1) of unit vectors in R^m.

    .. math:: p(x) = \Gamma(m/2) / (2 \pi^{m/2})

    with respect to the surface measure. It is the von Mises-Fisher distribution of
    concentration 0.

    Args:
        m: dimension of the ambient space, at least 2; the event shape is ``(m,)``.
        batch_shape: shape of a batch of independent copies.
        dtype: of the samples; PyTorch's default if None.
        device: of the samples; PyTorch's default if None.
        validate_args: whether to check the values given to `log_prob`; Pyro's setting if None.

    Raises:
        InputError: if ``m`` is not a whole number of at least 2.

    Example:
        >>> HypersphericalUniform(3).log_prob(torch.tensor([0.0, 0.0, 1.0]))
        tensor(-2.5310)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, m: int, *, batch_shape: torch.Size | tuple[int, ...] = (),
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:  # fmt: skip
        self.m = check_dimension(m)
        self._origin = torch.zeros(m, dtype=dtype, device=device)
        super().__init__(torch.Size(batch_shape), torch.Size([m]), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "HypersphericalUniform":
        """Return the same distribution with another batch shape."""
        new: HypersphericalUniform = self._get_checked_instance(HypersphericalUniform, _instance)
        new.m, new._origin = self.m, self._origin
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

    def _log_density(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -log_sphere_area(self.m))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw normal vectors divided by their norm, shape ``(*sample, *batch, m)``."""
        return random_directions(self._extended_shape(torch.Size(sample_shape)), self._origin)
