"""Normals that torch lacks: scored by the noise of their draws, and mixed with a gradient."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.nn import functional as F


class LatestDraw:
    """Base of distributions that remember the log-density of their latest draw, made of its noise.

    Its derivative by the draw itself is taken at a copy, ``log_prob(z.view_as(z))``.
    """

    _latest: tuple[Tensor, tuple[int | None, bool], Tensor, bool] | None = None

    def _remember(self, draw: Tensor, log_prob: Tensor) -> None:
        self._latest = (draw, _state(draw), log_prob, torch.is_grad_enabled())

    def _remembered(self, value: Tensor) -> Tensor | None:
        """Return the log-density of the latest draw if ``value`` is that very tensor, untouched."""
        if self._latest is None:
            return None
        draw, state, log_prob, has_graph = self._latest
        if value is not draw or _state(value) != state:
            return None
        # A density remembered without its graph is of no use to a caller who wants gradients.
        return log_prob if has_graph or not torch.is_grad_enabled() else None


def _state(draw: Tensor) -> tuple[int | None, bool]:
    """Return what changes where a draw is written to, detached in place or made a leaf."""
    return None if draw.is_inference() else draw._version, draw.requires_grad


def lower_cholesky(raw: Tensor, size: int) -> Tensor:
    """Return triangular matrices from their rows ``(*batch, size * (size + 1) / 2)``, end to end."""
    # Entry (row, column) stands at row (row + 1) / 2 + column. Gathering works under vmap.
    row = torch.arange(size, device=raw.device)
    position = (row * (row + 1) // 2)[:, None] + row[None, :]
    full = raw[..., position.clamp(max=raw.shape[-1] - 1)]
    return full.tril(-1) + torch.diag_embed(F.softplus(full.diagonal(dim1=-2, dim2=-1)))


def raw_cholesky(factor: Tensor) -> Tensor:
    """Return what :func:`lower_cholesky` turns into ``factor``, ``(*batch, size, size)``."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    # The inverse of softplus.
    full = factor.tril(-1) + torch.diag_embed(diagonal + torch.log(-torch.expm1(-diagonal)))
    rows, columns = torch.tril_indices(*factor.shape[-2:], device=factor.device)
    return full[..., rows, columns]


class CholeskyNormal(LatestDraw, dist.MultivariateNormal):
    r"""Multivariate normal that scores its latest draw by the noise it was made of.

    .. math:: \log N(m + L e; m, L L^T) = -|e|^2 / 2 - \sum_d \log L_{dd} - D/2 \log 2\pi

    Solving L for e multiplies the rounding of z by L's condition number: with entries of 1/2 off and
    1/30 on the diagonal, eight dimensions leave a float32 no digit. Other points are scored so.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return ``(*sample_shape, *batch, dim)``, differentiable."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        z: Tensor = self.loc + (self.scale_tril @ noise[..., None]).squeeze(-1)
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * shape[-1] * math.log(2 * math.pi)
        self._remember(z, -0.5 * noise.square().sum(-1) - log_volume - constant)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats, ``(*sample_shape, *batch)``."""
        log_prob = self._remembered(value)
        return super().log_prob(value) if log_prob is None else log_prob


def variance_of_means(size: int) -> float:
    """Return how much of a variance of 1 a fresh mixture has between its means, not within them."""
    return 1 / (size + 1)  # two lie sqrt(2) of a component's deviations apart, at any size


class DiagonalNormalMixture(TorchDistribution):
    r"""Mixture of normals with diagonal covariances, reparameterised.

    .. math:: q(z) = \sum_k \pi_k \prod_d N(z_d; m_{kd}, s_{kd}^2)

    A draw z moves with the parameters at a velocity v with dq/dphi + div(q v) = 0, any of which gives
    an unbiased gradient E[df/dz v]. For m_k and s_k it is component k's, weighted by its posterior
    probability at z. For pi the draw stays at the same quantile of each conditional: with F_d the
    distribution function of z_d given the coordinates before, v = -(dF/dz)^-1 dF/dpi.

    Pyro's ``MixtureOfDiagNormals`` is not made for a single coordinate and mixes up the axes when
    asked for several draws from a batch. Logits are ``(*batch, K)``, the others ``(*batch, K, dim)``.

    Source:
        Figurnov, Mohamed, Mnih 2018, "Implicit Reparameterization Gradients", section 4.1; Jankowiak,
        Karaletsos 2019, "Pathwise Derivatives for Multivariate Distributions", section 3.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (Pyro's attribute)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.log_weights, self.loc, self.scale = logits.log_softmax(-1), loc, scale
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "DiagonalNormalMixture":
        """Return independent copies."""
        batch = torch.Size(batch_shape)
        parts = (self.log_weights, 1), (self.loc, 2), (self.scale, 2)
        return DiagonalNormalMixture(*(v.expand(batch + v.shape[-k:]) for v, k in parts))

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*batch, dim)``."""
        return (self.log_weights.exp()[..., None] * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, ``(*batch, dim)``."""
        centred = self.loc - self.mean[..., None, :]
        return (self.log_weights.exp()[..., None] * (self.scale**2 + centred**2)).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats, ``(*sample_shape, *batch)``."""
        standardised = (value[..., None, :] - self.loc) / self.scale
        return (self.log_weights + _log_normal(standardised, self.scale).sum(-1)).logsumexp(-1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return ``(*sample_shape, *batch, dim)``, differentiable."""
        z = self._draw(torch.Size(sample_shape) + self.batch_shape)
        if not torch.is_grad_enabled():
            return z
        return z + self._component_motion(z) - self._weight_motion(z)

    @torch.no_grad()
    def _draw(self, shape: torch.Size) -> Tensor:
        loc = self.loc.expand(shape + self.loc.shape[-2:])
        scale = self.scale.expand(loc.shape)
        uniform = torch.rand((*shape, 1), dtype=loc.dtype, device=loc.device)
        component = (uniform > self.log_weights.exp().cumsum(-1)[..., :-1]).sum(-1)
        index = component[..., None, None].expand(*shape, 1, loc.shape[-1])
        chosen_loc, chosen_scale = (part.gather(-2, index).squeeze(-2) for part in (loc, scale))
        return chosen_loc + chosen_scale * torch.randn_like(chosen_loc)

    def _component_motion(self, z: Tensor) -> Tensor:
        """Return zero, whose derivative is the velocity for the means and scales."""
        standardised = ((z[..., None, :] - self.loc) / self.scale).detach()
        log_components = _log_normal(standardised, self.scale.detach()).sum(-1)
        posterior = (self.log_weights.detach() + log_components).softmax(-1)
        moved = self.loc + self.scale * standardised
        return (posterior[..., None] * (moved - moved.detach())).sum(-2)

    def _weight_motion(self, z: Tensor) -> Tensor:
        """Return zero, whose derivative is minus the velocity for the weights."""
        scale = self.scale.detach()
        standardised = (z[..., None, :] - self.loc.detach()) / scale
        log_density = _log_normal(standardised, scale)
        # Given the coordinates before d, the weight of component k is pi_k times its density there,
        # never added and taken off again: that difference has no digits far from the component.
        log_before = F.pad(log_density[..., :-1].cumsum(-1), (1, 0))
        weights = (self.log_weights[..., None] + log_before).softmax(-2)
        fixed_weights = weights.detach()
        # In the upper tail 1 - F keeps the digits that F loses; F - 1 has the same derivatives.
        upper = (fixed_weights * standardised).sum(-2, keepdim=True) > 0
        tail = torch.special.ndtr(torch.where(upper, -standardised, standardised))
        component_cdf = torch.where(upper, -tail, tail)
        cdf = (weights * component_cdf).sum(-2)
        slope = (fixed_weights * log_density.exp()).sum(-2).clamp(min=torch.finfo(z.dtype).tiny)
        # dF_d/dz_j for j < d acts through the weights: d log weight_k / dz_j = -standardised / scale.
        towards = fixed_weights * (component_cdf - cdf.detach()[..., None, :])
        jacobian = towards.mT @ (-standardised / scale)
        motion = (cdf - cdf.detach()) / slope
        how: Any = {"upper": False, "unitriangular": True}
        lower = (jacobian / slope[..., None]).tril(-1)
        return torch.linalg.solve_triangular(lower, motion[..., None], **how).squeeze(-1)


def _log_normal(standardised: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * standardised**2 - scale.log() - 0.5 * math.log(2 * math.pi)
