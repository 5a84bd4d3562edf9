"""Encoders and decoders: plain networks from data to features and from latents to features.

A network knows nothing of probability. It returns features, and the likelihood or the variational
family that uses it owns the head that turns them into parameters; so one network serves any of them.

A network of your own serves here if it maps ``(*batch, *in_shape)`` to ``(*batch, *out_shape)`` and
says the latter in an attribute ``out_shape`` (a tuple of ints). Those here raise an InputError for a
size below 1, an unknown activation or norm, and data of another kind or shape.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import InputError, check_name, size, sizes

__all__ = [
    "ACTIVATIONS", "Conditional", "ConvDecoder", "ConvEncoder", "Head", "MLPDecoder", "MLPEncoder",
    "Standardized",
]  # fmt: skip

Sizes = Sequence[int]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
ACTIVATIONS |= {"silu": nn.SiLU, "elu": nn.ELU, "softplus": nn.Softplus}


def _activation(name: str) -> nn.Module:
    check_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


class _MLP(nn.Module):
    """Fully connected layers on the last axis, each followed by the activation."""

    def __init__(self, in_features: int, hidden: Sizes, activation: str) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for width_in, width_out in itertools.pairwise((in_features, *hidden)):
            self.layers.extend([nn.Linear(width_in, width_out), _activation(activation)])

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class MLPEncoder(nn.Module):
    """Fully connected encoder: data of any shape, flattened, to the features of its last layer.

    Args:
        data_shape: shape of one datum.
        hidden: widths of the hidden layers; the last one is the number of features.
        activation: one of :data:`ACTIVATIONS`, after every layer.
        log1p: whether it sees log(1 + x), which suits counts.

    Shapes:
        ``(*batch, *data_shape)`` to ``(*batch, hidden[-1])``.
    """

    def __init__(
        self, data_shape: Sizes, hidden: Sizes = (512, 256), *, activation: str = "relu",
        log1p: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.log1p = log1p
        self.data_shape = sizes("data_shape", data_shape)
        self.hidden = sizes("hidden widths", hidden)
        self.activation = activation
        self.out_shape = (self.hidden[-1],)
        self.body = _MLP(math.prod(self.data_shape), self.hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``(*batch, hidden[-1])`` of data ``(*batch, *data_shape)``."""
        check_shape(x, self.data_shape)
        x = x.log1p() if self.log1p else x
        return self.body(x.flatten(start_dim=x.dim() - len(self.data_shape)))


class MLPDecoder(nn.Module):
    """Fully connected decoder: a latent vector to the features of the last hidden layer.

    Args:
        latent_dim: size of the latent vector.
        hidden, activation: as in :class:`MLPEncoder`, from the latent side to the data side.

    Shapes:
        ``(*batch, latent_dim)`` to ``(*batch, hidden[-1])``.
    """

    def __init__(
        self, latent_dim: int, hidden: Sizes = (256, 512), *, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.latent_dim = size("latent_dim", latent_dim)
        self.hidden = sizes("hidden widths", hidden)
        self.activation = activation
        self.out_shape = (self.hidden[-1],)
        self.body = _MLP(self.latent_dim, self.hidden, activation)

    def forward(self, z: Tensor) -> Tensor:
        """Return the features ``(*batch, hidden[-1])`` of latents ``(*batch, latent_dim)``."""
        return self.body(z)


class _ResidualBlock(nn.Module):
    """Two convolutions whose output is added to their input; it starts as the identity."""

    def __init__(self, dims: int, width: int, activation: str, norm: str | None) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for _ in range(2):
            convolution = _CONVOLUTIONS[dims](width, width, kernel_size=3, padding=1)
            self.body.extend([*_norm(norm, width), _activation(activation), convolution])
        for parameter in convolution.parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.body(maps)


class _Convolutional(nn.Module):
    """What the convolutional networks share: their options, and what follows each convolution."""

    def __init__(
        self, data_shape: Sizes, channels: Sizes, activation: str, norm: str | None,
        residual_blocks: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.data_shape = sizes("data_shape", data_shape)
        self.dims = len(self.data_shape) - 1
        if self.dims not in _CONVOLUTIONS:
            wanted = "curves of shape (channels, length) or images of shape (channels, height, width)"
            raise InputError(f"expected {wanted}, got {self.data_shape}: use an MLP for other data")
        self.channels = sizes("channels", channels)
        self.activation, self.norm = activation, norm
        self.residual_blocks = size("residual_blocks", residual_blocks, least=0)

    def after(self, width: int) -> list[nn.Module]:
        """Return what follows a convolution to this many channels."""
        how = self.dims, width, self.activation, self.norm
        blocks = [_ResidualBlock(*how) for _ in range(self.residual_blocks)]
        return [*_norm(self.norm, width), _activation(self.activation), *blocks]


_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


def _norm(name: str | None, width: int) -> list[nn.Module]:
    if name is not None:
        check_name("norm", name, ("group", "layer"))
    # At least 4 channels a group: one channel of one pixel would be normalised away.
    fit = (groups for groups in (8, 4, 2) if width % groups == 0 and width >= 4 * groups)
    groups = next(fit, 1) if name == "group" else 1
    return [] if name is None else [nn.GroupNorm(groups, width)]


class ConvEncoder(_Convolutional):
    """Convolutional encoder of curves and images: strided convolutions, then one dense layer.

    Every convolution halves each length (rounded up). There is no batch normalisation: it would
    tie the data of a batch together, and each datum's ELBO must depend on that datum alone.

    Args:
        data_shape: ``(channels, length)`` or ``(channels, height, width)`` of one datum.
        channels: output channels of the convolutions.
        features: width of the fully connected layer.
        activation: one of :data:`ACTIVATIONS`.
        norm: after each convolution, of one datum: ``"group"`` (Wu, He 2018, 8 groups), ``"layer"``
            or None. Deep networks without one start with features that hardly differ between data,
            and colour images can then end with no latent in use.
        residual_blocks: blocks of two convolutions after each (He et al. 2016, "Identity Mappings
            in Deep Residual Networks").

    Shapes:
        ``(*batch, *data_shape)`` to ``(*batch, features)``, any number of batch axes.
    """

    def __init__(
        self, data_shape: Sizes, channels: Sizes = (32, 64), *, features: int = 256,
        activation: str = "relu", norm: str | None = None, residual_blocks: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(data_shape, channels, activation, norm, residual_blocks)
        self.features = size("features", features)
        self.out_shape = (self.features,)
        in_channels, *extent = self.data_shape
        self.convolutions = nn.Sequential()
        for width_in, width_out in itertools.pairwise((in_channels, *self.channels)):
            kind = _CONVOLUTIONS[self.dims]
            convolution = kind(width_in, width_out, kernel_size=3, stride=2, padding=1)
            self.convolutions.extend([convolution, *self.after(width_out)])
            extent = [-(-length // 2) for length in extent]
        self.body = _MLP(self.channels[-1] * math.prod(extent), (self.features,), activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``(*batch, features)`` of data ``(*batch, *data_shape)``."""
        check_shape(x, self.data_shape)
        batch = x.shape[: x.dim() - len(self.data_shape)]
        maps = self.convolutions(x.reshape(-1, *self.data_shape))
        return self.body(maps.flatten(1)).reshape(*batch, self.features)


class ConvDecoder(_Convolutional):
    """Convolutional decoder of curves and images: one dense layer, then upsampled convolutions.

    Each stage doubles each length by nearest-neighbour interpolation and convolves (which leaves
    no checkerboard, unlike a strided transposed convolution; Odena, Dumoulin, Olah 2016).

    Args:
        latent_dim: size of the latent vector.
        data_shape: ``(channels, length)`` or ``(channels, height, width)`` of one datum.
        channels: channels of the maps, from the latent side to the data side.
        activation, norm, residual_blocks: as in :class:`ConvEncoder`.

    Shapes:
        ``(*batch, latent_dim)`` to ``(*batch, channels[-1], *data_shape[1:])``.
    """

    def __init__(
        self, latent_dim: int, data_shape: Sizes, channels: Sizes = (64, 32), *,
        activation: str = "relu", norm: str | None = None, residual_blocks: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(data_shape, channels, activation, norm, residual_blocks)
        self.latent_dim = size("latent_dim", latent_dim)
        extents = [self.data_shape[1:]]
        self.out_shape = (self.channels[-1], *extents[0])
        for _ in self.channels:
            extents.insert(0, tuple(-(-length // 2) for length in extents[0]))
        self.extents = extents
        self.body = _MLP(self.latent_dim, (self.channels[0] * math.prod(extents[0]),), activation)
        widths = itertools.pairwise((self.channels[0], *self.channels))
        self.stages = nn.ModuleList()
        for (width_in, width_out), extent in zip(widths, extents[1:], strict=True):
            convolution = _CONVOLUTIONS[self.dims](width_in, width_out, kernel_size=3, padding=1)
            upsample = nn.Upsample(size=extent, mode="nearest")
            self.stages.append(nn.Sequential(upsample, convolution, *self.after(width_out)))

    def forward(self, z: Tensor) -> Tensor:
        """Return feature maps ``(*batch, *out_shape)`` of latents."""
        maps = self.body(z).reshape(-1, self.channels[0], *self.extents[0])
        for stage in self.stages:
            maps = stage(maps)
        return maps.reshape(*z.shape[:-1], *self.out_shape)


class Standardized(nn.Module):
    """An encoder that sees ``(x - loc) / scale`` of data x; both are buffers, saved with it.

    Args:
        encoder: network from data to features.
        data_shape: shape of one datum, of ``loc`` and of ``scale``, which start as 0 and 1.

    Shapes:
        those of the encoder, which says its ``out_shape``.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.Module, data_shape: Sizes) -> None:
        super().__init__()
        self.encoder, self.data_shape = encoder, sizes("data_shape", data_shape)
        self.out_shape = feature_shape(encoder)
        self.register_buffer("loc", torch.zeros(self.data_shape))
        self.register_buffer("scale", torch.ones(self.data_shape))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        """Return the features ``(*batch, *out_shape)`` of data ``(*batch, *data_shape)``."""
        check_shape(x, self.data_shape)
        return self.encoder((x - self.loc) / self.scale, *given)


class Conditional(nn.Module):
    """A network with a condition: a decoder takes it as further latents, an encoder at its end.

    Args:
        network: a decoder of ``latent_dim + condition_dim`` latents, or an encoder, whose features
            and the condition then pass one more layer.
        condition_dim: size of a condition.
        activation: of that layer, one of :data:`ACTIVATIONS`.

    Attributes:
        loc, scale: buffers ``(condition_dim,)``; networks get ``(condition - loc) / scale``.

    Shapes:
        ``(*batch, latent_dim)`` or ``(*batch, *data_shape)``, and ``(*batch, condition_dim)``, to the
        features, an encoder's flat.

    Raises:
        InputError: a decoder that leaves no latents, or a network without ``out_shape``.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, condition_dim: int, *, activation: str = "relu") -> None:
        super().__init__()
        self.network, self.activation = network, activation
        self.condition_dim = size("condition_dim", condition_dim)
        self.out_shape = feature_shape(network)
        self.decodes = hasattr(network, "latent_dim")
        self.register_buffer("loc", torch.zeros(self.condition_dim))
        self.register_buffer("scale", torch.ones(self.condition_dim))
        if self.decodes:
            whole: Any = network.latent_dim
            self.latent_dim = size("latent_dim beside the condition", whole - condition_dim)
        else:
            self.out_shape = (math.prod(self.out_shape),)
            self.body = _MLP(self.out_shape[0] + self.condition_dim, self.out_shape, activation)

    def forward(self, inputs: Tensor, condition: Tensor) -> Tensor:
        """Return the features of latents or data, and of conditions, which particles share."""
        if not self.decodes:
            inputs = self.network(inputs).flatten(start_dim=-len(feature_shape(self.network)))
        condition = (condition - self.loc) / self.scale
        shared = condition.expand(*inputs.shape[:-1], self.condition_dim)
        joined = torch.cat([inputs, shared.to(inputs.dtype)], -1)
        return self.network(joined) if self.decodes else self.body(joined)


class Head(nn.Module):
    """The affine map from a network's features to one parameter of a distribution.

    Feature maps as large as the wanted curve or image are mapped pixel by pixel (a convolution with
    kernel size 1); anything else is flattened and mapped by one linear layer.

    Args:
        in_shape: shape of the features of one datum.
        out_shape: shape of the parameter of one datum.

    Shapes:
        ``(*batch, *in_shape)`` to ``(*batch, *out_shape)``.
    """

    def __init__(self, in_shape: Sizes, out_shape: Sizes) -> None:
        super().__init__()
        self.in_shape = sizes("in_shape", in_shape)
        self.out_shape = sizes("out_shape", out_shape)
        dims = len(self.in_shape) - 1
        self.pixelwise = dims in _CONVOLUTIONS and self.in_shape[1:] == self.out_shape[1:]
        self.map: nn.Conv1d | nn.Conv2d | nn.Linear
        if self.pixelwise:
            self.map = _CONVOLUTIONS[dims](self.in_shape[0], self.out_shape[0], kernel_size=1)
        else:
            self.map = nn.Linear(math.prod(self.in_shape), math.prod(self.out_shape))

    def forward(self, features: Tensor) -> Tensor:
        """Return the parameter ``(*batch, *out_shape)`` of features ``(*batch, *in_shape)``."""
        batch = features.shape[: features.dim() - len(self.in_shape)]
        flat = features.flatten(start_dim=len(batch))
        maps = features.reshape(-1, *self.in_shape) if self.pixelwise else flat
        return self.map(maps).reshape(*batch, *self.out_shape)

    @torch.no_grad()
    def start_at(self, weight_scale: float = 1.0, bias: Tensor | float = 0.0) -> None:
        """Scale the initial weights and set the bias (a number or a tensor of ``out_shape``)."""
        assert self.map.bias is not None
        self.map.weight.mul_(weight_scale)
        start = torch.as_tensor(bias).to(self.map.bias).expand(self.out_shape)
        if self.pixelwise:  # one bias per channel serves every pixel
            start = start.mean(dim=tuple(range(1, start.dim())))
        self.map.bias.copy_(start.flatten())


def check_shape(
    x: Tensor, data_shape: tuple[int, ...], owner: str = "networks", *, batch: str = "*batch"
) -> None:
    """Refuse data that are not ``(*batch, *data_shape)``, or ``(N, *data_shape)`` with batch N."""
    axes = 1 if batch == "N" else x.dim() - len(data_shape)
    if axes < 0 or tuple(x.shape[axes:]) != data_shape:
        advice = f"build the {owner} with the data's own shape"
        if tuple(x.shape) == data_shape:
            advice = "of one datum pass x[None]"
        wanted = f"data of shape ({batch}, {', '.join(map(str, data_shape))})"
        raise InputError(f"expected {wanted}, got {tuple(x.shape)}: {advice}")


def check_range(x: Tensor, accepts: tuple[float, float], owner: str, advice: str) -> None:
    """Refuse data that are not finite, or not in the closed interval that the owner accepts."""
    (low, high), (smallest, largest) = accepts, (value.item() for value in x.aminmax())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise InputError("expected finite data, got NaN or infinity: remove or fill them")
    if smallest < low or largest > high:
        wanted = f"x in [{low:g}, {high:g}] for {owner}"
        raise InputError(f"expected {wanted}, got values from {smallest:g} to {largest:g}: {advice}")


def feature_shape(network: nn.Module) -> tuple[int, ...]:
    """Return the shape of a network's features of one datum; refuse one that does not say it."""
    shape = getattr(network, "out_shape", None)
    if shape is None:
        wanted = "a network with an attribute out_shape"
        advice = "set it to the shape of its features for one datum, e.g. network.out_shape = (256,)"
        raise InputError(f"expected {wanted}, got {type(network).__name__}: {advice}")
    return tuple(shape)
