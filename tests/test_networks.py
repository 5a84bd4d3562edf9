"""Networks: shapes with any number of leading axes, and heads."""

import copy

import pytest
import torch

import pyro_vae as pv
from pyro_vae.app import names
from pyro_vae.networks import (
    ACTIVATIONS,
    Conditional,
    ConvDecoder,
    ConvEncoder,
    Head,
    MLPDecoder,
    MLPEncoder,
)

LEADING = [(), (5,), (2, 5)]

ENCODERS = {
    "vector": (MLPEncoder((6,), (7, 4)), (6,), (4,)),
    "image": (MLPEncoder((1, 5, 3), (7,)), (1, 5, 3), (7,)),
    "conv": (ConvEncoder((3, 9, 6), (4, 5), features=7), (3, 9, 6), (7,)),
    "conv of curves": (ConvEncoder((2, 11), (4, 5), features=7, norm="layer"), (2, 11), (7,)),
    "resnet": (
        ConvEncoder((3, 9, 6), (4, 8), features=7, norm="group", residual_blocks=2),
        (3, 9, 6),
        (7,),
    ),
    "counts": (MLPEncoder((6,), (7, 4), log1p=True), (6,), (4,)),
}
DECODERS = {
    "mlp": (MLPDecoder(3, (4, 7)), (7,)),
    "conv": (ConvDecoder(3, (1, 9, 6), (5, 4)), (4, 9, 6)),
    "conv of curves": (ConvDecoder(3, (2, 11), (5, 4), norm="layer"), (4, 11)),
    "resnet": (
        ConvDecoder(3, (1, 9, 6), (8, 4), norm="group", residual_blocks=2),
        (4, 9, 6),
    ),
    "conv of one pixel": (ConvDecoder(3, (1, 1, 1), (5, 4, 2)), (2, 1, 1)),
}


def agrees_with_single_data(network, x, event_dim):
    """Each datum's result is what it gives alone, wherever it stands in the batch.

    In float64: float32 kernels of one shape and of another differ by what no bound should hold.
    """
    network, x = copy.deepcopy(network).double(), x.double()
    together = network(x)
    batch = x.shape[: x.dim() - event_dim]
    alone = [network(datum) for datum in x.reshape(-1, *x.shape[x.dim() - event_dim :])]
    expected = torch.stack(alone).reshape(*batch, *network.out_shape)
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_any_leading_axes(name, leading):
    network, data_shape, out_shape = ENCODERS[name]
    x = torch.randn(*leading, *data_shape)
    x = x.exp() if name == "counts" else x
    assert network(x).shape == (*leading, *out_shape)
    assert network.out_shape == out_shape
    agrees_with_single_data(network, x, len(data_shape))


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_take_any_leading_axes(name, leading):
    network, out_shape = DECODERS[name]
    z = torch.randn(*leading, 3)
    assert network(z).shape == (*leading, *out_shape)
    assert network.out_shape == out_shape
    agrees_with_single_data(network, z, 1)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 13), (1, 5), (105, 105)])
def test_convolutions_fit_images_of_any_size(size):
    encoder, decoder = ConvEncoder((1, *size), (2, 3, 4)), ConvDecoder(2, (1, *size), (4, 3, 2))
    assert encoder(torch.zeros(2, 1, *size)).shape == (2, 256)
    assert decoder(torch.zeros(2, 2)).shape == (2, 2, *size)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_gradients_reach_every_weight(name):
    network, shape = (ENCODERS[name][:2]) if name in ENCODERS else (DECODERS[name][0], (3,))
    network = copy.deepcopy(network)
    for activation in network.modules():  # a dead ReLU would hide a weight that is connected
        if isinstance(activation, torch.nn.ReLU):
            activation.register_forward_hook(lambda module, inputs, output: inputs[0].sin())
    for weight in network.parameters():  # a residual block starts with a 0 that hides another weight
        torch.nn.init.normal_(weight, std=0.3)
    network(torch.rand(4, *shape)).square().sum().backward()
    for weight in network.parameters():
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(
    ("in_shape", "out_shape", "pixelwise"),
    [
        ((7,), (4,), False),
        ((7,), (3, 5, 6), False),
        ((4, 5, 6), (3, 5, 6), True),
        ((4, 5), (3, 5), True),
        ((4, 5), (3, 6), False),
        ([4, 5, 6], (3, 5, 6), True),
        ((4, 5, 6), (3, 6, 5), False),
        ((4, 5, 6), (2,), False),
    ],
)
def test_head_maps_pixel_by_pixel_where_sizes_agree(leading, in_shape, out_shape, pixelwise):
    head = Head(in_shape, out_shape)
    assert head.pixelwise == pixelwise
    features = torch.randn(*leading, *in_shape)
    got = head(features)
    assert got.shape == (*leading, *out_shape)
    weight, bias = head.map.weight.flatten(1), head.map.bias
    if pixelwise:
        pixels = features.flatten(len(leading) + 1)
        mapped = torch.einsum("oc,...cp->...op", weight, pixels) + bias[:, None]
        expected = mapped.reshape(*leading, *out_shape)
    else:
        expected = (features.flatten(len(leading)) @ weight.T + bias).reshape(*leading, *out_shape)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_features_of_deep_networks_differ_between_data_from_the_start(norm):
    torch.manual_seed(0)
    x = 0.5 + 0.1 * torch.randn(50, 3, 1, 1) + 0.02 * torch.randn(50, 3, 16, 16)
    spread = {}
    for name in (None, norm):
        encoder = ConvEncoder((3, 16, 16), (16, 32, 64, 64), norm=name, residual_blocks=1)
        features = encoder(x).detach()
        spread[name] = (features.std(0).square().mean() / features.square().mean()).sqrt()
    assert spread[norm] > 3 * spread[None]


def test_residual_blocks_start_as_the_identity():
    torch.manual_seed(0)
    plain = ConvDecoder(3, (1, 8, 8), (8, 8), norm="group")
    deep = ConvDecoder(3, (1, 8, 8), (8, 8), norm="group", residual_blocks=3)
    assert len(deep.state_dict()) > len(plain.state_dict())
    deep.load_state_dict(plain.state_dict(), strict=False)
    z = torch.randn(5, 3)
    torch.testing.assert_close(deep(z), plain(z))


def test_networks_with_a_condition_see_it():
    encoder = Conditional(ConvEncoder((1, 8), (4,), features=6), 2)
    decoder = Conditional(MLPDecoder(5, (7,)), 2)
    assert (encoder.out_shape, decoder.latent_dim, decoder.out_shape) == ((6,), 3, (7,))
    x, z, c = torch.randn(4, 5, 1, 8), torch.randn(4, 5, 3), torch.randn(5, 2)
    for network, given in ((encoder, x), (decoder, z)):
        both = network(given, c)
        assert both.shape == (4, 5, *network.out_shape)
        torch.testing.assert_close(both[1], network(given[1], c))
        assert not torch.allclose(both, network(given, c + 1))
    with pytest.raises(pv.InputError, match="latent_dim beside the condition of at least 1, got 0"):
        Conditional(MLPDecoder(5, (7,)), 5)


def test_unknown_norms_and_data_without_a_grid_are_refused():
    with pytest.raises(pv.InputError, match="unknown norm 'batch'"):
        ConvEncoder((1, 8, 8), norm="batch")
    with pytest.raises(
        pv.InputError, match=r"expected curves .* or images .* got \(8,\): use an MLP"
    ):
        ConvDecoder(2, (8,))


def test_head_starts_where_told():
    start = torch.randn(3, 5, 6)
    flat = Head((7,), (3, 5, 6))
    flat.start_at(weight_scale=0.0, bias=start)
    torch.testing.assert_close(flat(torch.randn(2, 7)), start.expand(2, 3, 5, 6))
    pixelwise = Head((4, 5, 6), (3, 5, 6))
    pixelwise.start_at(weight_scale=0.0, bias=start)
    expected = start.mean((1, 2), keepdim=True).expand(2, 3, 5, 6)
    torch.testing.assert_close(pixelwise(torch.randn(2, 4, 5, 6)), expected)
    flat.start_at(bias=-1.5)
    assert (flat(torch.zeros(7)) == -1.5).all()


def test_every_activation_is_known_to_the_command_line():
    assert tuple(ACTIVATIONS) == names.ACTIVATIONS
    for name, kind in ACTIVATIONS.items():
        network = MLPEncoder((3,), (4,), activation=name)
        assert any(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("network", [MLPEncoder, MLPDecoder])
@pytest.mark.parametrize("hidden", [(), (0,), (5, -1), (2.5,)])
def test_widths_are_positive_whole_numbers(network, hidden):
    with pytest.raises(pv.InputError, match="hidden widths as whole numbers of at least 1"):
        network(*(((4,),) if network is MLPEncoder else (4,)), hidden)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLPDecoder(0),
        lambda: MLPEncoder((3, 0)),
        lambda: ConvEncoder((1, 8, 8), (0,)),
        lambda: ConvEncoder((1, 8, 8), features=0),
        lambda: ConvEncoder((64,)),
        lambda: ConvDecoder(2, (1, 8, 8, 8)),
        lambda: ConvDecoder(-1, (1, 8, 8)),
        lambda: Head((), (3,)),
    ],
)
def test_sizes_out_of_range_are_refused(build):
    with pytest.raises(pv.InputError, match="expected"):
        build()


def test_an_unknown_activation_comes_with_the_nearest():
    with pytest.raises(pv.InputError, match="did you mean 'relu'"):
        MLPEncoder((3,), activation="rely")


@pytest.mark.parametrize("name", ENCODERS)
def test_data_of_another_shape_are_refused(name):
    network, data_shape, _ = ENCODERS[name]
    for wrong in (torch.zeros(5, *data_shape[:-1], data_shape[-1] + 1), torch.zeros(())):
        with pytest.raises(pv.InputError, match=r"expected data of shape \(\*batch, "):
            network(wrong)


def test_a_network_must_say_its_out_shape():
    with pytest.raises(pv.InputError, match="attribute out_shape"):
        pv.likelihoods.Bernoulli(torch.nn.Linear(2, 4), (3,))
