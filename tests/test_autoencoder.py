"""The deterministic autoencoder: its optimum, its training loop, what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder


class Identity(nn.Module):
    """A network that returns its input: what is left of the autoencoder is linear."""

    def __init__(self, size):
        super().__init__()
        self.data_shape = self.out_shape = (size,)
        self.latent_dim = size

    def forward(self, x):
        return x


def make_autoencoder(shape=(6,)):
    return pv.Autoencoder(MLPEncoder(shape, (8,)), MLPDecoder(2, (8,)))


def test_a_linear_autoencoder_finds_the_principal_subspace():
    """Its best loss is the sum of the variances that two components leave."""
    x = torch.randn(200, 5) @ torch.diag(torch.tensor([3.0, 2.0, 0.5, 0.3, 0.2])) + 1
    autoencoder = pv.Autoencoder(Identity(5), Identity(2))
    result = autoencoder.fit(x, epochs=80, batch_size=100, learning_rate=0.05, seed=0)
    left = torch.linalg.svdvals(x - x.mean(0))[2:].square().sum().item() / len(x)
    with torch.no_grad():
        error = (autoencoder.reconstruct(x) - x).square().sum(1).mean().item()
    assert left - 1e-4 < error < 1.05 * left
    assert result.history["train_loss"][-1] > 0.9 * left


def test_cross_entropy_ends_in_probabilities():
    """Of bits without any code to tell them apart the best output is their mean."""
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]).repeat(50, 1)
    autoencoder = make_autoencoder((2,))
    nn.init.zeros_(autoencoder.code.map.weight)
    autoencoder.code.requires_grad_(False)
    result = autoencoder.fit(x, epochs=50, learning_rate=0.04, loss="bce", seed=0)
    with torch.no_grad():
        torch.testing.assert_close(
            autoencoder.reconstruct(x), torch.tensor([[0.75, 0.75]]).expand(200, 2), atol=0.05, rtol=0
        )
    entropy = -2 * (0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert result.history["train_loss"].min() > entropy - 1e-4
    assert result.history["train_loss"][-1] < entropy + 0.05


def test_saved_weights_know_their_loss():
    x = torch.rand(20, 6)
    for loss in ("bce", "mse"):
        trained, fresh = make_autoencoder(), make_autoencoder()
        trained.fit(x, epochs=1, loss=loss)
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh.reconstruct(x), trained.reconstruct(x))
    trained.fit(x, epochs=1, loss="bce")
    inside = trained.reconstruct(100 * x)
    assert ((inside >= 0) & (inside <= 1)).all()


def test_images_and_any_batch_shape():
    shape = (1, 8, 8)
    autoencoder = pv.Autoencoder(ConvEncoder(shape, (4,), features=8), ConvDecoder(3, shape, (4,)))
    x = torch.rand(2, 5, *shape)
    z = autoencoder.encode(x)
    assert z.shape == (2, 5, 3)
    assert autoencoder.decode(z).shape == autoencoder.reconstruct(x).shape == x.shape
    assert autoencoder(x).requires_grad


def test_history_validation_and_seed():
    x, held_out = torch.rand(40, 6), torch.rand(10, 6)
    rows, results = [], []
    start = make_autoencoder()
    for seed in (0, 0, 1):
        autoencoder = copy.deepcopy(start)
        results.append(
            autoencoder.fit(
                x,
                epochs=3,
                batch_size=16,
                validation=held_out,
                seed=seed,
                device="cpu",
                on_epoch=lambda epoch, row: rows.append((epoch, row)),
            )
        )
    first, same, other = (result.history for result in results)
    assert set(first) == {"train_loss", "validation_loss", "seconds"}
    assert all(values.shape == (3,) for values in first.values())
    assert (first["train_loss"] == same["train_loss"]).all()
    assert (first["train_loss"] != other["train_loss"]).any()
    assert [epoch for epoch, _ in rows] == [1, 2, 3] * 3
    assert rows[2][1]["validation_loss"] == first["validation_loss"][2]
    with torch.no_grad():
        loss = (autoencoder.reconstruct(held_out) - held_out).square().sum(1).mean().item()
    assert other["validation_loss"][2] == pytest.approx(loss, rel=1e-5)
    result = results[0]
    assert result.num_parameters == sum(p.numel() for p in autoencoder.parameters())
    assert (result.best_epoch, result.stopped_early, result.device) == (3, False, "cpu")
    assert result.seconds > 0


def test_the_generators_state_is_restored():
    autoencoder, x = make_autoencoder(), torch.rand(40, 6)
    before = torch.get_rng_state()
    autoencoder.fit(x, epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_patience_puts_the_best_weights_back():
    """Few data with noise, many weights: the validation loss turns."""
    x, held_out = torch.randn(8, 6), torch.randn(50, 6)
    autoencoder = make_autoencoder()
    result = autoencoder.fit(
        x, epochs=500, validation=held_out, patience=5, learning_rate=0.02, seed=0
    )
    curve = result.history["validation_loss"]
    assert result.stopped_early
    assert len(curve) == result.best_epoch + 5
    assert curve.argmin() + 1 == result.best_epoch
    with torch.no_grad():
        loss = (autoencoder.reconstruct(held_out) - held_out).square().sum(1).mean().item()
    assert loss == pytest.approx(curve.min(), rel=1e-5)


def test_a_dataset_brings_validation_and_fresh_bits():
    data = pv.datasets.load("digits", binarize="dynamic")
    autoencoder = make_autoencoder((1, 8, 8))
    seen = []
    autoencoder.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    result = autoencoder.fit(data, epochs=1, batch_size=1000, loss="bce", seed=0)
    assert math.isfinite(result.history["validation_loss"][0])
    assert ((seen[0] == 0) | (seen[0] == 1)).all()
    assert ((data.train > 0) & (data.train < 1)).any()


def test_the_mode_is_restored():
    autoencoder, x = make_autoencoder(), torch.rand(20, 6)
    modes = {}

    def note(module, inputs, output):
        modes.setdefault(len(output), []).append(module.training)

    autoencoder.encoder.register_forward_hook(note)
    autoencoder.eval()
    autoencoder.fit(x, epochs=1, validation=x[:5])
    assert True in modes[20]
    assert modes[5] == [False]
    assert not autoencoder.training


def test_the_bar_shows_the_loss(capsys):
    make_autoencoder().fit(torch.rand(20, 6), epochs=2, validation=torch.rand(5, 6), progress=True)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "loss " in shown
    assert "(validation " in shown


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.rand(9, 5), {}, r"shape \(N, 6\), got \(9, 5\)"),
        (torch.full((9, 6), math.nan), {}, "finite data"),
        (torch.full((9, 6), 2.0), {"loss": "bce"}, r"x in \[0, 1\] for loss 'bce', .* 2 to 2"),
        (torch.rand(9, 6), {"loss": "mae"}, "unknown loss 'mae'"),
        (torch.rand(9, 6), {"epochs": -1}, "epochs of at least 0"),
        (torch.rand(9, 6), {"batch_size": 0}, "batch size of at least 1"),
        (torch.rand(9, 6), {"learning_rate": 0.0}, "learning rate above 0"),
        (torch.rand(9, 6), {"patience": 2}, "validation data for patience"),
        (torch.rand(0, 6), {}, "at least one datum"),
        ((torch.rand(9, 6), torch.rand(9, 1)), {}, "one tensor of data, got 2"),
        (torch.rand(9, 6), {"device": "tpu"}, "device auto, cpu or cuda"),
        (torch.rand(9, 6), {"seed": -1}, "seed from 0"),
        (torch.rand(9, 6), {"on_epoch": 3}, "on_epoch as a function, got int"),
        (1e30 * torch.rand(9, 6), {}, "finite loss"),
    ],
)
def test_bad_input_is_refused(data, options, message):
    with pytest.raises(pv.InputError, match=message):
        make_autoencoder().fit(data, **{"epochs": 1, **options})


def test_a_refused_call_changes_nothing():
    autoencoder, x = make_autoencoder(), torch.rand(9, 6)
    before = copy.deepcopy(autoencoder.state_dict())
    for options in ({"seed": -1}, {"epochs": -1}, {"patience": 2}):
        with pytest.raises(pv.InputError):
            autoencoder.fit(x, loss="bce", **options)
    assert all(torch.equal(before[name], value) for name, value in autoencoder.state_dict().items())


def test_sizes_must_be_said():
    with pytest.raises(pv.InputError, match="expected latent_dim, Linear does not state it"):
        pv.Autoencoder(MLPEncoder((6,), (8,)), nn.Linear(2, 8))
    decoder = nn.Linear(2, 8)
    decoder.out_shape = (8,)
    autoencoder = pv.Autoencoder(MLPEncoder((6,), (8,)), decoder, latent_dim=2)
    assert autoencoder.decode(torch.zeros(3, 2)).shape == (3, 6)
    with pytest.raises(pv.InputError, match="got"):
        autoencoder.decode(torch.zeros(3, 4))


@pytest.mark.parametrize("kind", [torch.float64, torch.uint8, torch.bool])
def test_data_of_any_real_type_are_taken(kind):
    torch.manual_seed(0)
    bits = torch.bernoulli(torch.full((20, 6), 0.5))
    losses = []
    for x in (bits, bits.to(kind)):
        torch.manual_seed(1)
        result = make_autoencoder().fit(x, epochs=2, loss="bce", validation=x, seed=0)
        losses.append(result.history["validation_loss"][-1])
    assert losses[0] == losses[1]
