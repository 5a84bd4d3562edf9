"""The autoencoder beside a VAE: distances, the grid, and what the comparison shows."""

import math

import pytest
import torch

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.tasks import compare_autoencoder
from pyro_vae.tasks.autoencoder_comparison import _between, _fitted_normal, _nearest


def make_both(shape):
    encoder, decoder = pv.networks.MLPEncoder(shape, (8,)), pv.networks.MLPDecoder(2, (8,))
    likelihood = pv.likelihoods.Gaussian(pv.networks.MLPDecoder(2, (8,)), shape)
    guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(shape, (8,)), 2)
    vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)
    return pv.Autoencoder(encoder, decoder), vae


def compared(shape=(1, 4, 4), **options):
    autoencoder, vae = make_both(shape)
    train, held_out = torch.rand(30, *shape), torch.rand(9, *shape)
    comparison = compare_autoencoder(
        autoencoder, vae.model, vae.guide, train, held_out, num_random=20, seed=0, **options
    )
    return autoencoder, vae, train, held_out, comparison


def test_errors_and_distances_are_what_they_say():
    autoencoder, vae, train, held_out, comparison = compared(grid_size=5)
    with torch.no_grad():
        rebuilt = autoencoder.reconstruct(held_out)
        codes, held_out_codes = autoencoder.encode(train), autoencoder.encode(held_out)
        means = vae.variational_family.encode(held_out)["loc"]
        rebuilt_vae = vae.likelihood(means).mean
    side = comparison.autoencoder
    torch.testing.assert_close(side.reconstructions, rebuilt)
    torch.testing.assert_close(comparison.vae.reconstructions, rebuilt_vae)
    squared = (rebuilt - held_out).square().flatten(1)
    torch.testing.assert_close(side.error, squared.mean(1).sqrt())
    assert torch.equal(side.error, side.error_of_draws)
    assert (comparison.vae.error != comparison.vae.error_of_draws).all()
    distances = (held_out_codes[:, None] - codes).norm(dim=2).min(1).values
    torch.testing.assert_close(side.held_out_distance, distances, atol=1e-4, rtol=1e-4)
    assert side.random.shape == (20, 1, 4, 4)
    assert side.grid.shape == (5, 5, 1, 4, 4)
    assert side.grid_distance.shape == (5, 5)
    corners = side.grid[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, rebuilt[:4])
    data = (held_out[:, None] - train).flatten(2).square().mean(2).sqrt().min(1).values
    torch.testing.assert_close(comparison.held_out_data_distance, data, atol=1e-4, rtol=1e-4)
    table = comparison.table()
    assert table["reconstruction error"]["autoencoder"] == pytest.approx(squared.mean().sqrt().item())
    assert table["random / held-out"]["vae"] == comparison.vae.hole_ratio
    assert all(set(row) == {"autoencoder", "vae"} for row in table.values())


def test_the_same_seed_gives_the_same_numbers():
    torch.manual_seed(1)
    first = compared()[-1]
    torch.manual_seed(1)
    second = compared()[-1]
    assert torch.equal(first.vae.random, second.vae.random)
    assert torch.equal(first.autoencoder.random_distance, second.autoencoder.random_distance)


def test_random_codes_have_the_mean_and_covariance_of_the_codes():
    codes = torch.randn(300, 2, dtype=torch.float64) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]).double()
    drawn = _fitted_normal(codes + 3, 20_000)
    covariance = codes.T.cov()
    errors = (drawn.mean(0) - codes.mean(0) - 3).abs()
    assert (errors < 5 * (covariance.diag() / 20_000).sqrt()).all()
    variances = covariance.diag()
    error = ((variances[:, None] * variances + covariance**2) / 20_000).sqrt()
    assert ((drawn.T.cov() - covariance).abs() < 5 * error).all()


def test_holes_show_in_codes_on_a_ring():
    """A normal distribution around a ring falls into its hole; one over a disc finds neighbours."""
    angle = torch.rand(4000) * 2 * math.pi
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    blob = torch.randn(4000, 2)
    ratios = []
    for codes in (ring, blob):
        train, held_out = codes[:3000], codes[3000:]
        random = _nearest(_fitted_normal(train, 1000), train)
        ratios.append((random.median() / _nearest(held_out, train).median()).item())
    assert ratios[0] > 50
    assert 0.8 < ratios[1] < 1.25


def test_the_grid_is_bilinear():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    grid = _between(corners, 3)
    assert torch.equal(grid[..., 1][:, 0], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(grid[..., 0][0], torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (6,)])
def test_the_figure_shows_images_where_there_are_any(shape, tmp_path):
    *_, held_out, comparison = compared(shape)
    sides = [
        side._replace(**{name: value.numpy() for name, value in side._asdict().items()})
        for side in (comparison.autoencoder, comparison.vae)
    ]
    figure = plots.autoencoder_and_vae(held_out.numpy(), *sides, title="both")
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == (3 if len(shape) == 3 else 0)
    assert len(figure.axes) == len(images) + 2
    assert "ratio" in figure.axes[-1].get_title()
    figure.savefig(tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.rand(1, 6)}, "2 training data points and 4 held-out ones, got 1 and 9"),
        ({"held_out": torch.rand(3, 6)}, "4 held-out ones, got 30 and 3"),
        ({"num_random": 0}, "num_random of at least 1, got 0"),
        ({"num_random": 9.5}, "num_random as a whole number, got 9.5"),
        ({"grid_size": 1}, "grid_size of at least 2, got 1"),
    ],
)
def test_too_little_is_refused(change, message):
    autoencoder, vae = make_both((6,))
    data = {"train": torch.rand(30, 6), "held_out": torch.rand(9, 6), **change}
    with pytest.raises(pv.InputError, match=message):
        compare_autoencoder(autoencoder, vae.model, vae.guide, **data)


def test_held_out_data_that_were_trained_on_make_no_ratio():
    autoencoder, vae = make_both((4,))
    train = torch.rand(8, 4)
    comparison = compare_autoencoder(
        autoencoder, vae.model, vae.guide, train.double(), train.double(), num_random=5, seed=0
    )
    table = comparison.table()
    assert table["nearest-code distance, held-out"]["autoencoder"] == 0
    assert table["random / held-out"]["autoencoder"] == math.inf
    assert len(comparison.vae.held_out_distance) == 5
