"""Normalising flows: the layers and the distribution that the flow prior and the flow families share.

A layer maps each coordinate by a monotone function whose parameters a masked network computes from
the coordinates of lower degree and from a context (the datum). Degrees 0, 1, 2, ... give an
autoregressive layer, scored in one pass per coordinate; 0 and 1 a coupling layer, scored in two.

Sources: Germain et al. 2015, "MADE"; Kingma et al. 2016, "Improving Variational Inference with
Inverse Autoregressive Flow"; Durkan et al. 2019, "Neural Spline Flows".
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae.distributions.normal import LatestDraw

Mapped = tuple[Tensor, Tensor]  # points, and logarithms of slopes or of determinants
# (inputs, raw parameters on one axis more, inverse?) -> (outputs, log of the forward slope there).
Elementwise = Callable[[Tensor, Tensor, bool], Mapped]

# Durkan et al. 2019, section 3.1: no bin narrower than this share of the box, no slope below this.
LEAST_BIN = 1e-3
LEAST_SLOPE = 1e-3


class _MaskedLinear(nn.Module):
    """A linear layer in which the mask (out, in) rules which inputs an output sees."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.linear.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight * self.mask, self.linear.bias)


class _MaskedConditioner(nn.Module):
    """Network whose output for a coordinate sees the context and the coordinates of lower degree."""

    def __init__(
        self, degrees: Tensor, num_parameters: int, hidden: Sequence[int], context_features: int
    ) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        # A hidden unit of degree h sees inputs of degree <= h and serves outputs of degree > h. Those
        # of degree -1 see the context alone: without one they are left out where others can serve.
        lowest = -1 if context_features or degrees.max() == 0 else 0
        highest = max(int(degrees.max()) - 1, lowest)
        inside = [torch.linspace(lowest, highest, width).round() for width in hidden]
        seen = [degrees, *inside]
        masks = [later[:, None] >= earlier[None, :] for earlier, later in itertools.pairwise(seen)]
        outputs = degrees.repeat_interleave(num_parameters)
        self.layers = nn.ModuleList(_MaskedLinear(mask) for mask in masks)
        self.output = _MaskedLinear(outputs[:, None] > inside[-1][None, :])
        self.context = None
        if context_features:
            self.context = nn.Linear(context_features, hidden[0], bias=False)
        # Raw parameters near zero: training starts from nearly the base distribution.
        with torch.no_grad():
            self.output.linear.weight.mul_(0.1)
            self.output.linear.bias.zero_()

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return raw parameters ``(*batch, dim, num_parameters)`` of x ``(*batch, dim)``."""
        hidden = x
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index == 0 and self.context is not None:
                hidden = hidden + self.context(context)
            hidden = F.elu(hidden)
        return self.output(hidden).unflatten(-1, (x.shape[-1], self.num_parameters))


class FlowLayer(nn.Module):
    """A monotone map of each coordinate, conditioned on those of lower degree and on the context.

    The call and ``inverse`` take ``(*batch, dim)`` and a context ``(*batch, context_features)``, and
    return the mapped point and the log-determinant ``(*batch,)`` of the map from x to y.
    """

    degrees: Tensor

    def __init__(
        self, degrees: Tensor, elementwise: Elementwise, num_parameters: int, *,
        hidden: Sequence[int], context_features: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.elementwise = elementwise
        self.num_passes = int(degrees.max()) + 1
        self.register_buffer("degrees", degrees, persistent=False)
        self.conditioner = _MaskedConditioner(degrees, num_parameters, hidden, context_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Mapped:
        """Map x to y."""
        x = _broadcast_batch(x, context)
        y, log_slope = self.elementwise(x, self.conditioner(x, context), False)
        return y, log_slope.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Mapped:
        """Map y to x, one pass of the network per degree."""
        y = _broadcast_batch(y, context)
        x, log_slope = torch.zeros_like(y), torch.zeros_like(y)
        for degree in range(self.num_passes):
            candidate, log_slope = self.elementwise(y, self.conditioner(x, context), True)
            # Only this degree's parameters have seen nothing but coordinates that are right already.
            x = torch.where(self.degrees == degree, candidate, x)
        return x, log_slope.sum(-1)


class Shift:
    """The last or first layer of a flow: a location and a scale per datum, ``(*batch, dim)``."""

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        self.loc, self.log_scale = loc, log_scale

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Mapped:
        """Map x to ``loc + scale * x``."""
        return self.loc + self.log_scale.exp() * x, self.log_scale.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Mapped:
        """Map y to ``(y - loc) / scale``."""
        return (y - self.loc) * (-self.log_scale).exp(), self.log_scale.sum(-1)


class Inverse:
    """A layer the other way round: what was cheap to draw from becomes cheap to score."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Mapped:
        """Map x to y by the layer's inverse."""
        y, log_det = self.layer.inverse(x, context)
        return y, -log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Mapped:
        """Map y to x by the layer."""
        x, log_det = self.layer(y, context)
        return x, -log_det


class FlowDistribution(LatestDraw, TorchDistribution):
    r"""A standard normal pushed through layers.

    .. math:: \log p(y) = \log N(x; 0, I) - \log |\det dy/dx|

    Pyro's own transforms keep the last point they mapped, stale after a step of the optimiser.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (Pyro's attribute)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Any, layers: Iterable[Any], context: Tensor | None = None) -> None:
        self.base, self.layers, self.context = base, list(layers), context
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        """Return independent copies; the context broadcasts from the right as it did."""
        return FlowDistribution(self.base.expand(torch.Size(batch_shape)), self.layers, self.context)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return ``(*sample_shape, *batch, dim)``, differentiable."""
        x = self.base.rsample(torch.Size(sample_shape))
        log_prob = self.base.log_prob(x)
        for layer in self.layers:
            x, log_det = layer(x, self.context)
            log_prob = log_prob - log_det
        self._remember(x, log_prob)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats, ``(*sample_shape, *batch)``."""
        if (log_prob := self._remembered(value)) is not None:
            return log_prob
        log_dets: list[Tensor] = []
        for layer in reversed(self.layers):
            value, log_det = layer.inverse(value, self.context)
            log_dets.append(log_det)
        return self.base.log_prob(value) - sum(log_dets)


def standard_normal(like: Tensor) -> dist.Distribution:
    """Return independent standard normals ``(*batch, dim)`` shaped like ``like``."""
    return dist.Normal(torch.zeros_like(like), torch.ones_like(like), validate_args=False).to_event(1)


def autoregressive_layers(dim: int, num_layers: int, **options: Any) -> nn.ModuleList:
    """Return inverse autoregressive layers (Kingma et al. 2016), their order reversed each time."""
    layer: Any = functools.partial(FlowLayer, **options)
    orders = (torch.arange(dim), torch.arange(dim).flip(0))
    return nn.ModuleList(layer(orders[index % 2], gated_affine, 2) for index in range(num_layers))


def spline_layers(
    dim: int, num_layers: int, *, num_bins: int, bound: float, **options: Any
) -> nn.ModuleList:
    """Return coupling layers of rational-quadratic splines (Durkan et al. 2019)."""
    layer: Any = functools.partial(FlowLayer, **options)
    spline = functools.partial(rational_quadratic_spline, bound=bound)
    digits, layers = max(1, math.ceil(math.log2(dim))), nn.ModuleList()
    # Split by the digits of their index, any two coordinates are on different sides in some layer.
    for index in range(num_layers):
        digit = (torch.arange(dim) >> (index // 2 % digits)) % 2
        degrees = torch.zeros_like(digit) if dim == 1 else (digit + index) % 2
        layers.append(layer(degrees, spline, 3 * num_bins - 1))
    return layers


def gated_affine(x: Tensor, raw: Tensor, inverse: bool) -> Mapped:
    """Map x to ``g x + (1 - g) m``, raw being m and the logit of g (Kingma et al. 2016, 13, 14)."""
    mean, gate = raw.unbind(-1)
    # Section 5 of the paper: a forget gate that starts at +2 passes most of x.
    log_gate = F.logsigmoid(gate + 2.0)
    shift = torch.sigmoid(-gate - 2.0) * mean
    mapped = (x - shift) * (-log_gate).exp() if inverse else log_gate.exp() * x + shift
    return mapped, log_gate


def rational_quadratic_spline(x: Tensor, raw: Tensor, inverse: bool, *, bound: float) -> Mapped:
    """Map x by a monotone spline on [-bound, bound], by the identity outside.

    Raw are K widths, K heights and K - 1 inner slopes, 0 for the identity (Durkan et al. 2019, 4-8).
    """
    num_bins = (raw.shape[-1] + 1) // 3
    raw_widths, raw_heights, raw_slopes = raw.split((num_bins, num_bins, num_bins - 1), -1)
    x_knots, y_knots = _knots(raw_widths, bound), _knots(raw_heights, bound)
    # softplus(log(exp(1 - least) - 1)) = 1 - least, so that raw = 0 gives slope 1.
    slopes = LEAST_SLOPE + F.softplus(raw_slopes + math.log(math.expm1(1 - LEAST_SLOPE)))
    slopes = F.pad(slopes, (1, 1), value=1.0)

    inside = (x > -bound) & (x < bound)
    point = torch.where(inside, x, 0.0)  # what is outside must not make NaN gradients inside
    index = (point[..., None] >= (y_knots if inverse else x_knots)[..., 1:-1]).sum(-1, keepdim=True)

    def at(values: Tensor, offset: int) -> Tensor:
        return values.gather(-1, index + offset).squeeze(-1)

    left, bottom = at(x_knots, 0), at(y_knots, 0)
    width, height = at(x_knots, 1) - left, at(y_knots, 1) - bottom
    slope_left, slope_right = at(slopes, 0), at(slopes, 1)
    mean_slope = height / width
    curvature = slope_left + slope_right - 2 * mean_slope

    if inverse:
        rise = point - bottom
        a = height * (mean_slope - slope_left) + rise * curvature
        b = height * slope_left - rise * curvature
        c = -mean_slope * rise
        # Positive in exact arithmetic; the floor keeps the square root's gradient finite.
        discriminant = (b.square() - 4 * a * c).clamp(min=torch.finfo(x.dtype).tiny)
        share = (2 * c / (-b - discriminant.sqrt())).clamp(0.0, 1.0)
        mapped = left + width * share
    else:
        share = (point - left) / width
    across = share * (1 - share)
    denominator = mean_slope + curvature * across
    if not inverse:
        mapped = bottom + height * (mean_slope * share.square() + slope_left * across) / denominator
    ends = slope_right * share.square() + 2 * mean_slope * across + slope_left * (1 - share).square()
    log_slope = 2 * mean_slope.log() + ends.log() - 2 * denominator.log()
    return torch.where(inside, mapped, x), torch.where(inside, log_slope, 0.0)


def _knots(raw: Tensor, bound: float) -> Tensor:
    """Return K + 1 rising knots from -bound to bound for K raw bin sizes."""
    shares = LEAST_BIN + (1 - LEAST_BIN * raw.shape[-1]) * raw.softmax(-1)
    inner = bound * (2 * shares.cumsum(-1)[..., :-1] - 1)
    return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


def _broadcast_batch(x: Tensor, context: Tensor | None) -> Tensor:
    if context is None:
        return x
    return x.expand(*torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]), x.shape[-1])
