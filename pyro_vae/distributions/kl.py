"""Closed-form KL divergences that torch and Pyro lack; those on the sphere in float64."""

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, kl_divergence
from torch.distributions.kl import register_kl

from pyro_vae.errors import InputError

from .sphere import HypersphericalUniform, SphereDistribution
from .von_mises_fisher import VonMisesFisher


def closed_form_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """Return KL(q || p) in nats, of the broadcast batch shape, where a closed form is registered."""
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    # Under the type of Pyro's wrapper of what was expanded nothing is registered.
    while isinstance(q, ExpandedDistribution):
        q = q.base_dist
    while isinstance(p, ExpandedDistribution):
        p = p.base_dist
    try:
        return kl_divergence(q, p).expand(shape)
    except NotImplementedError:
        return None


def _joint_batch_shape(p: SphereDistribution, q: SphereDistribution) -> torch.Size:
    if p.event_shape != q.event_shape:
        got = f"ambient dimensions {p.event_shape[0]} and {q.event_shape[0]}"
        raise InputError(f"expected two distributions on one sphere, got {got}: give both the same m")
    return torch.broadcast_shapes(p.batch_shape, q.batch_shape)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_von_mises_fisher_uniform(p: VonMisesFisher, q: HypersphericalUniform) -> Tensor:
    """Expected log density ratio k A(k) - log M(k): the areas cancel."""
    k, log_partition, mean = p.cosine_moments()
    return (k * mean - log_partition).to(p.loc.dtype).expand(_joint_batch_shape(p, q))


@register_kl(HypersphericalUniform, VonMisesFisher)
def _kl_uniform_von_mises_fisher(p: HypersphericalUniform, q: VonMisesFisher) -> Tensor:
    """Return log M(k): under the uniform law the cosine has mean zero."""
    _, log_partition, _ = q.cosine_moments()
    return log_partition.to(p.mean.dtype).expand(_joint_batch_shape(p, q))


@register_kl(HypersphericalUniform, HypersphericalUniform)
def _kl_uniform_uniform(p: HypersphericalUniform, q: HypersphericalUniform) -> Tensor:
    return p.mean.new_zeros(_joint_batch_shape(p, q))


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_von_mises_fisher_von_mises_fisher(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    """(k_p - k_q) A_p - log M_p + log M_q + k_q A_p |mu_p - mu_q|^2 / 2, which doesn't cancel."""
    shape = _joint_batch_shape(p, q)
    k_p, log_partition_p, mean = p.cosine_moments()
    k_q, log_partition_q, _ = q.cosine_moments()
    chord = (p.loc.double() - q.loc.double()).square().sum(-1)
    concentration_part = (k_p - k_q) * mean - (log_partition_p - log_partition_q)
    return (concentration_part + 0.5 * k_q * mean * chord).to(p.loc.dtype).expand(shape)


@register_kl(MultivariateNormal, Independent)
def _kl_full_normal_normal(p: MultivariateNormal, q: "Independent[Normal]") -> Tensor:
    """sum_d [(S_dd + (mu_d - m_d)^2) / s_d^2 - 1] / 2 + log s_d - log L_dd, where S = L L^T."""
    normal = q.base_dist
    if not isinstance(normal, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    squares = p.variance + (p.loc - normal.loc).square()
    log_scales = normal.scale.log() - p.scale_tril.diagonal(dim1=-2, dim2=-1).log()
    return (0.5 * (squares / normal.variance - 1) + log_scales).sum(-1)
