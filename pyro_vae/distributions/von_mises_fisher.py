"""The von Mises-Fisher distribution: exact sampling, exact log density, pathwise gradients."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn import functional as F

from pyro_vae.errors import InputError

from . import sphere
from .special_functions import CosineCumulants, angle_derivative, cosine_cumulants

# Wood's proposal is accepted with a probability that falls with k, at m = 2 to sqrt(e/(2 pi)) =
# 0.6577, less far for larger m. The first round misses with chance at most 0.3423^4 < 0.0138, the
# second with 0.3423^32 < 1.4e-15: under 2e-17 per draw that none of the 36 is accepted.
_FIRST_ROUND = 4
_SECOND_ROUND = 32
_FIRST_ROUND_MISS = 0.0138
# Up to this many draws a second round costs more in calls than it saves in proposals.
_SINGLE_ROUND_COUNT = 128


class VonMisesFisher(sphere.SphereDistribution):
    r"""Von Mises-Fisher distribution on the sphere S^(m-1) of unit vectors in R^m.

    .. math::
        p(x) = C_m(\kappa) e^{\kappa \mu \cdot x}, \quad
        C_m(\kappa) = \frac{\kappa^{m/2-1}}{(2\pi)^{m/2} I_{m/2-1}(\kappa)}

    with respect to the surface measure. Concentration 0 is the uniform distribution. Samples are
    exact (Wood 1994, the rejection step in fixed shapes, no loop) and carry unbiased pathwise
    gradients in both parameters (implicit reparameterisation of the polar angle).

    In the concentration, `log_prob` can be differentiated twice and all else once; a further
    derivative raises NotImplementedError. In ``loc`` and in the argument of `log_prob` only the
    part of a gradient along the sphere has a meaning; it is the one left by a normalisation
    ``v / |v|``. The parameters must not be changed in place once the distribution has been used.

    Args:
        loc: mean direction mu, unit vectors, shape ``(*batch, m)``, m >= 2, float32 or float64.
        concentration: kappa >= 0, shape ``(*batch,)`` or a number.
        validate_args: whether to check parameters and samples; Pyro's setting if None.

    Raises:
        InputError: shapes or dtypes that don't fit; with validation on, values out of range.

    References:
        Wood, Simulation of the von Mises Fisher distribution, Communications in Statistics, 1994.
        Davidson et al., Hyperspherical variational auto-encoders, UAI 2018.
        Figurnov, Mohamed & Mnih, Implicit reparameterization gradients, NeurIPS 2018.

    Example:
        >>> q = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 10.0)
        >>> q.mean
        tensor([0.0000, 0.0000, 0.9000])
    """

    arg_constraints = {"loc": sphere.unit_sphere, "concentration": constraints.nonnegative}  # noqa: RUF012

    def __init__(
        self, loc: Tensor, concentration: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.concentration = _match_parameters(loc, concentration)
        self._cumulants: CosineCumulants | None = None
        batch_shape, event_shape = self.concentration.shape, self.loc.shape[-1:]
        try:
            super().__init__(batch_shape, event_shape, validate_args=validate_args)
        except ValueError as error:
            least = self.concentration.min().item()
            text = f"expected concentration >= 0, got minimum {least:.6g}: map it through softplus"
            if least >= 0:
                norms = sphere.describe_norms(self.loc)
                text = f"expected loc of unit length, got {norms}: divide it by its norm"
            raise InputError(text) from error

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "VonMisesFisher":
        """Return the same distribution with its parameters expanded to another batch shape."""
        new: VonMisesFisher = self._get_checked_instance(VonMisesFisher, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.concentration = self.concentration.expand(batch_shape)
        new._cumulants = None
        if self._cumulants is not None:
            new._cumulants = CosineCumulants(*(c.expand(batch_shape) for c in self._cumulants))
        super(VonMisesFisher, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def m(self) -> int:
        """Dimension of the ambient space."""
        return int(self.loc.shape[-1])

    def _cosine_cumulants(self) -> CosineCumulants:
        """Return values without gradients, computed once for density, gradients, divergences."""
        if self._cumulants is None:
            with torch.no_grad():
                self._cumulants = cosine_cumulants(self.concentration, self.m)
        return self._cumulants

    def cosine_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what densities, entropies and divergences are made of, each of shape ``batch``.

        The concentration k; log E[e^(k mu.x)] under the uniform law, nats; its derivative in k, which
        is the mean E[mu.x] = I_(m/2)(k) / I_(m/2-1)(k). Float64, because sums of them cancel.
        """
        # One upcast for all three: their gradients then also cancel in float64.
        k = self.concentration.double()
        return k, *_CosineMoments.apply(k, *self._cosine_cumulants())

    @property
    def mean(self) -> Tensor:
        """``A(kappa) mu``, shape ``(*batch, m)``: inside the sphere."""
        _, _, mean_cosine = self.cosine_moments()
        return mean_cosine.to(self.loc.dtype).unsqueeze(-1) * self.loc

    @property
    def mode(self) -> Tensor:
        """``loc``; at concentration 0 every point is as good."""
        return self.loc

    @property
    def log_normalizing_constant(self) -> Tensor:
        """``log C_m(kappa)``, shape ``batch``, nats: the log density less ``kappa mu.x``."""
        _, log_partition, _ = self.cosine_moments()
        return (-log_partition - sphere.log_sphere_area(self.m)).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy with respect to the surface measure, shape ``batch``, nats."""
        k, log_partition, mean = self.cosine_moments()
        return (sphere.log_sphere_area(self.m) + log_partition - k * mean).to(self.loc.dtype)

    def _log_density(self, value: Tensor) -> Tensor:
        # k mu.x = k - k |x - mu|^2 / 2 on the sphere. A float32 mu.x near 1 is off by 6e-8, which
        # k = 10^5 turns into 6e-3 nats; the chord keeps its relative accuracy there.
        k, log_partition, _ = self.cosine_moments()
        log_density_at_mode = (k - log_partition - sphere.log_sphere_area(self.m)).to(self.loc.dtype)
        return log_density_at_mode - 0.5 * self.concentration * (value - self.loc).square().sum(-1)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw unit vectors ``(*sample, *batch, m)``, reparameterised.

        A draw whose every proposal is rejected is NaN; the chance is below 1e-16.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        concentration = self.concentration.expand(shape[:-1])
        mean_cosine = self._cosine_cumulants().mean.expand(shape[:-1])
        with torch.no_grad():
            angle = sample_angle(concentration.reshape(-1), self.m).reshape(shape[:-1])
            directions = sphere.random_directions((*shape[:-1], self.m - 1), self.loc)
        angle = _ImplicitAngle.apply(angle, concentration, mean_cosine, self.m).unsqueeze(-1)
        return angle.cos() * self.loc + angle.sin() * tangent(self.loc, directions)


def _match_parameters(loc: Tensor, concentration: Tensor | float) -> tuple[Tensor, Tensor]:
    """Bring both parameters to one dtype and one batch shape, or say why they don't fit."""
    if not isinstance(loc, Tensor) or loc.dim() == 0:
        raise InputError(f"expected loc of shape (*batch, m), got {loc!r}: pass unit vectors")
    sphere.check_dimension(int(loc.shape[-1]))
    if not isinstance(concentration, Tensor):
        concentration = torch.full((), concentration, dtype=loc.dtype, device=loc.device)
    dtype = torch.result_type(loc, concentration)
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"expected float32 or float64 parameters, got {dtype}: convert them")
    try:
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
    except RuntimeError as error:
        wanted = f"concentration of shape {tuple(loc.shape[:-1])} for loc of shape {tuple(loc.shape)}"
        advice = "one number for each vector"
        raise InputError(f"expected {wanted}, got {tuple(concentration.shape)}: {advice}") from error
    loc = loc.to(dtype).expand(batch_shape + loc.shape[-1:])
    return loc, concentration.to(dtype).expand(batch_shape)


class _CosineMoments(torch.autograd.Function):
    """Log partition function and mean cosine, joined to the concentration by their derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(concentration: Tensor, log_partition: Tensor, mean: Tensor, variance: Tensor) -> Any:
        return log_partition.clone(), mean.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, log_partition_gradient: Tensor | None, mean_gradient: Tensor | None
    ) -> Any:
        concentration, log_partition, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            _, mean = _CosineMoments.apply(concentration, log_partition, mean, variance)
            variance = _EndOfDerivatives.apply(concentration, variance)
        both = ((log_partition_gradient, mean), (mean_gradient, variance))
        through = [gradient * slope for gradient, slope in both if gradient is not None]
        return sum(through[1:], through[0]) if through else None, None, None, None


class _ImplicitAngle(torch.autograd.Function):
    """A drawn polar angle, joined to the concentration by implicit differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(angle: Tensor, concentration: Tensor, mean_cosine: Tensor, m: int) -> Tensor:
        return angle.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        angle, concentration, mean_cosine, ctx.m = inputs
        ctx.save_for_backward(angle, concentration, mean_cosine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        angle, concentration, mean_cosine = ctx.saved_tensors
        with torch.no_grad():
            derivative = angle_derivative(angle, concentration, mean_cosine, ctx.m).to(gradient.dtype)
        if torch.is_grad_enabled():  # to be differentiated again
            derivative = _EndOfDerivatives.apply(concentration, derivative)
        return None, gradient * derivative, None, None


class _EndOfDerivatives(torch.autograd.Function):
    """A number known without its derivative: says so instead of passing for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(argument: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise NotImplementedError(
            "expected at most two derivatives of log_prob and one of samples, entropy or KL in the "
            "concentration of a VonMisesFisher, got one more: hold the concentration fixed"
        )


def sample_angle(concentration: Tensor, m: int) -> Tensor:
    """Draw the polar angle for a vector of concentrations, shape ``(N,)``, by rejection.

    All shapes are fixed, so nothing waits for the device: what a first round of few proposals misses
    gets many more in a buffer of fixed size. What both miss, or the buffer can't hold, is NaN.
    """
    count = len(concentration)
    if count <= _SINGLE_ROUND_COUNT:
        return _first_accepted(concentration, _FIRST_ROUND + _SECOND_ROUND, m)
    angle = _first_accepted(concentration, _FIRST_ROUND, m)
    # The number of misses is at most binomial with mean mu = 0.0138 N; Bernstein's inequality at
    # mu + x, x = 10 sqrt(mu) + 30, bounds the chance of an overflow by
    # exp(-x^2 / (2 mu + 2 x / 3)) <= exp(-45) < 1e-19, at every mu.
    expected = _FIRST_ROUND_MISS * count
    buffer_size = min(count, math.ceil(expected + 10.0 * math.sqrt(expected) + 30.0))
    missed = angle.isnan()
    rank = missed.cumsum(0)  # the i-th missed draw has rank i, from 1
    places = torch.arange(1, buffer_size + 1, device=angle.device)
    source = torch.searchsorted(rank, places).clamp(max=count - 1)
    refill = _first_accepted(concentration[source], _SECOND_ROUND, m)
    place = (rank - 1).clamp(0, max(buffer_size - 1, 0))
    return torch.where(missed & (rank <= buffer_size), refill[place], angle)


def _first_accepted(concentration: Tensor, num_proposals: int, m: int) -> Tensor:
    """Return one accepted of ``num_proposals`` angles for each concentration, NaN if none is.

    Wood's proposal (1994, algorithm VM*) maps a uniform point of polar angle theta_0 by
    tan(theta/2) = sqrt(b) tan(theta_0/2). With 2h = asinh(2k/(m-1)), b = e^(-2h) and x_0 = tanh(h) do
    not cancel; with xi = x_0 cos(theta_0) his test reads (m-1) (xi/(1+xi) - log(1+xi)) >= log U.
    """
    h = 0.5 * torch.asinh(concentration.unsqueeze(-1) * (2.0 / (m - 1)))
    shape = (3, len(concentration), num_proposals)
    uniform, turn, level = torch.rand(shape, dtype=h.dtype, device=h.device)

    # A uniform point, projected on a plane through the pole, has squared radius 1 - U^(2/(m-2))
    # and a uniform direction psi; its height is cos(theta_0) = radius cos(psi) (Ulrich 1984). The
    # distances 1 -+ cos(theta_0) are sums of positive terms: small angles keep their digits.
    log_outside = uniform.log() * (2.0 / (m - 2)) if m > 2 else torch.full_like(uniform, -math.inf)
    radius = (-torch.expm1(log_outside)).sqrt()
    gap, half_psi = log_outside.exp() / (1.0 + radius), math.pi * turn
    near = gap + 2.0 * radius * half_psi.sin().square()
    far = gap + 2.0 * radius * half_psi.cos().square()

    xi = torch.tanh(h) * (1.0 - near)
    log_acceptance = (m - 1) * (xi / (1.0 + xi) - torch.log1p(xi))
    # Any accepted proposal will do as long as its value has no say in the choice.
    found, chosen = (level < log_acceptance.exp()).max(-1, keepdim=True)
    half_tangent = ((near / far).gather(-1, chosen).sqrt() * torch.exp(-h)).squeeze(-1)
    return torch.where(found.squeeze(-1), 2.0 * half_tangent.atan(), math.nan)


def tangent(loc: Tensor, directions: Tensor) -> Tensor:
    """Carry unit vectors of R^(m-1) into the tangent space at ``loc``, isometrically.

    It is the Householder reflection along u = mu + s e, with e the first axis and s the sign of mu's
    first coordinate: |u| >= sqrt(2). Where s flips the map jumps, but both sides yield the same law
    of samples and are smooth across the flip: gradients of expectations stay unbiased.
    """
    sign = torch.where(loc.detach()[..., :1] >= 0, 1.0, -1.0).to(loc.dtype)
    u, y = loc + F.pad(sign, (0, loc.shape[-1] - 1)), F.pad(directions, (1, 0))
    return y - 2.0 * (u * y).sum(-1, keepdim=True) / u.square().sum(-1, keepdim=True) * u
