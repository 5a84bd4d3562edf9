"""Walks through the latents: where they lead, and that they stay where the latents live."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import tasks
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.settings import assemble_vae
from pyro_vae.distributions import HypersphericalUniform, VonMisesFisher

F64 = torch.float64


def vae(prior="standard-normal", guide="mean-field", latent_dim=3):
    settings = TrainSettings(prior=prior, guide=guide, latent_dim=latent_dim, hidden="16")
    return assemble_vae(settings, (6,), 100)


def bits(number=4):
    return torch.bernoulli(torch.full((number, 6), 0.5))


def plain(prior, family):
    """A pair whose decoded mean is the latent itself."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(x))

    return model, guide


def flat(size=3):
    zero = torch.zeros(size, dtype=F64)
    return plain(
        lambda: dist.Normal(zero, 2.0).to_event(1), lambda x: dist.Normal(x, 0.1).to_event(1)
    )


def sphere(size=3):
    return plain(
        lambda: HypersphericalUniform(size, dtype=F64),
        lambda x: VonMisesFisher(x / x.norm(dim=-1, keepdim=True), torch.full((len(x),), 20.0).to(x)),
    )


def test_the_way_between_codes_is_straight():
    x, to = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    way = tasks.interpolate(*flat(), x, to, num_steps=5)
    assert way.shape == (5, 4, 3)
    for step in range(5):
        torch.testing.assert_close(way[step], x + step / 4 * (to - x))


def test_on_a_sphere_it_is_the_shorter_arc():
    x, to = torch.randn(20, 4, dtype=F64), torch.randn(20, 4, dtype=F64)
    way = tasks.interpolate(*sphere(4), x, to, num_steps=7)
    torch.testing.assert_close(way.norm(dim=-1), torch.ones(7, 20, dtype=F64))
    torch.testing.assert_close(way[0], x / x.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(way[-1], to / to.norm(dim=-1, keepdim=True))
    angle = (way[0] * way[-1]).sum(-1).acos()
    steps = (way[1:] * way[:-1]).sum(-1).clamp(max=1).acos()
    torch.testing.assert_close(steps, (angle / 6).expand(6, 20))


def test_equal_and_opposite_codes_are_walked_too():
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 2]], dtype=F64)
    to = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, -1]], dtype=F64)
    way = tasks.interpolate(*sphere(), x, to, num_steps=5)
    torch.testing.assert_close(way.norm(dim=-1), torch.ones(5, 3, dtype=F64))
    torch.testing.assert_close(way[:, 0], x[:1].expand(5, 3))
    # Half a circle in four equal steps: at right angles in the middle.
    right_angle = torch.zeros(2, dtype=F64)
    torch.testing.assert_close((way[2, 1:] * way[0, 1:]).sum(-1), right_angle)
    torch.testing.assert_close(way[-1], to / to.norm(dim=-1, keepdim=True))


def test_one_coordinate_moves_by_the_priors_quantiles():
    x = torch.randn(4, 3, dtype=F64)
    walk = tasks.traverse(*flat(), x, dimensions=[2, 0], num_steps=5, coverage=0.8)
    assert walk.dimensions == (2, 0)
    assert walk.data.shape == (2, 5, 4, 3)
    probabilities = torch.linspace(0.1, 0.9, 5, dtype=F64)
    exact = dist.Normal(torch.zeros((), dtype=F64), 2.0).icdf(probabilities)
    # Of a quantile from 10,000 draws: sqrt(p (1 - p) / n) / density.
    density = dist.Normal(torch.zeros((), dtype=F64), 2.0).log_prob(exact).exp()
    error = (probabilities * (1 - probabilities) / 10_000).sqrt() / density
    assert ((walk.values - exact).abs() < 5 * error).all()
    for row, dimension in enumerate(walk.dimensions):
        moved = walk.data[row]
        expected = x.expand(5, 4, 3).clone()
        expected[:, :, dimension] = walk.values[row][:, None]
        torch.testing.assert_close(moved, expected)


def test_on_a_sphere_the_others_make_room():
    x = torch.randn(6, 3, dtype=F64)
    walk = tasks.traverse(*sphere(), x, num_steps=7)
    torch.testing.assert_close(walk.data.norm(dim=-1), torch.ones(3, 7, 6, dtype=F64))
    for dimension in range(3):
        values = walk.values[dimension][:, None].expand(7, 6)
        torch.testing.assert_close(walk.data[dimension, ..., dimension], values)
        # The other coordinates keep their proportion.
        first, second = (axis for axis in range(3) if axis != dimension)
        ratio = walk.data[dimension, ..., first] / walk.data[dimension, ..., second]
        torch.testing.assert_close(ratio, (x[:, first] / x[:, second]).expand(7, 6))


def test_at_a_pole_there_is_a_meridian_too():
    x = torch.tensor([[0.0, 0, 1]], dtype=F64)
    walk = tasks.traverse(*sphere(), x, dimensions=[2], num_steps=5)
    torch.testing.assert_close(walk.data.norm(dim=-1), torch.ones(1, 5, 1, dtype=F64))


def test_the_manifold_is_a_grid_of_quantiles_about_the_mean_code():
    x = torch.randn(10, 3, dtype=F64)
    sheet = tasks.manifold(*flat(), x, dimensions=(2, 0), num_steps=4)
    assert sheet.data.shape == (4, 4, 3)
    assert not sheet.on_sphere
    torch.testing.assert_close(sheet.data[..., 2], sheet.first.expand(4, 4))
    torch.testing.assert_close(sheet.data[..., 0], sheet.second[:, None].expand(4, 4))
    torch.testing.assert_close(sheet.data[..., 1], x[:, 1].mean().expand(4, 4))
    assert (sheet.first.diff() > 0).all()


def test_the_manifold_of_a_sphere_is_its_globe():
    x = torch.randn(50, 4, dtype=F64)
    globe = tasks.manifold(*sphere(4), x, num_steps=6)
    assert globe.on_sphere
    torch.testing.assert_close(globe.data.norm(dim=-1), torch.ones(6, 6, dtype=F64))
    longitude = torch.atan2(globe.data[..., 1], globe.data[..., 0]).rad2deg()
    torch.testing.assert_close(longitude, globe.first.expand(6, 6))
    plane = globe.data[..., :2].norm(dim=-1)
    torch.testing.assert_close(plane, globe.second.deg2rad().cos()[:, None].expand(6, 6))
    others = globe.data[..., 2:]
    # Above and below the plane lies the data's mean direction, and nothing else.
    flat_others = others.flatten(0, 1)
    assert torch.linalg.matrix_rank(flat_others, rtol=1e-8) == 1


def test_a_circle_has_one_row():
    circle = tasks.manifold(*sphere(2), torch.randn(5, 2, dtype=F64), num_steps=8)
    assert circle.data.shape == (1, 8, 2)
    torch.testing.assert_close(circle.data[0, :, 0], circle.first.deg2rad().cos())


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        ("vamp", "mean-field"),
        pytest.param("flow", "iaf", marks=pytest.mark.slow),
        ("gaussian-mixture", "spline"),
        ("hypersphere-uniform", "von-mises-fisher"),
        ("beta", "beta"),
    ],
)
def test_every_pair_can_be_walked(prior, guide):
    pair, x = vae(prior, guide), bits()
    way = tasks.interpolate(pair.model, pair.guide, x, x.flip(0), num_steps=3)
    assert way.shape == (3, 4, 6)
    walk = tasks.traverse(pair.model, pair.guide, x, num_steps=3)
    assert walk.data.shape == (3, 3, 4, 6)
    sheet = tasks.manifold(pair.model, pair.guide, x, num_steps=3)
    assert sheet.data.shape == (3, 3, 6)
    for values in (way, walk.data, sheet.data):
        assert ((values >= 0) & (values <= 1)).all()
    if prior == "beta":
        assert ((walk.values > 0) & (walk.values < 1)).all()
    again = tasks.traverse(pair.model, pair.guide, x, num_steps=3)
    assert again.data.equal(walk.data)


def test_every_site_walks_its_own_way():
    def model(x):
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(len(x)), 1.0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(scale[:, None] * z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.LogNormal(x[:, 0], 0.1))
            pyro.sample("z", dist.Normal(x, 0.1).to_event(1))

    x, to = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64)
    way = tasks.interpolate(model, guide, x, to, num_steps=3)
    scales = [(value[:, 0] + 0.005).exp()[:, None] for value in (x, to)]
    torch.testing.assert_close(way[1], (scales[0] + scales[1]) / 2 * (x + to) / 2)
    walk = tasks.traverse(model, guide, x, site="scale", num_steps=3)
    assert walk.data.shape == (1, 3, 3, 2)
    torch.testing.assert_close(walk.data[0], walk.values[0][:, None, None] * x)
    with pytest.raises(pv.InputError, match="name one with site="):
        tasks.traverse(model, guide, x)


def test_mistakes_are_refused():
    x = torch.randn(4, 3, dtype=F64)
    with pytest.raises(pv.InputError, match="num_steps of at least 2"):
        tasks.traverse(*flat(), x, num_steps=1)
    with pytest.raises(pv.InputError, match="dimensions from 0 to 2 of latent 'z', got 3"):
        tasks.traverse(*flat(), x, dimensions=[3])
    with pytest.raises(pv.InputError, match="two different dimensions"):
        tasks.manifold(*flat(), x, dimensions=(1, 1))
    with pytest.raises(pv.InputError, match="coverage between 0 and 1"):
        tasks.traverse(*flat(), x, coverage=1.0)
    with pytest.raises(pv.InputError, match="as many data points to end at"):
        tasks.interpolate(*flat(), x, x[:2])
    with pytest.raises(pv.InputError, match="'z' is discrete"):
        tasks.traverse(
            *plain(lambda: dist.Poisson(1.0).expand([3]).to_event(1),
                   lambda x: dist.Poisson(x.abs()).to_event(1)), x,
        )  # fmt: skip


def test_no_dimension_is_refused():
    likelihood = pv.likelihoods.Gaussian(pv.networks.MLPDecoder(2, (8,)), (3,))
    guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((3,), (8,)), 2)
    vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)
    with pytest.raises(pv.InputError, match="at least one of the latent's dimensions"):
        tasks.traverse(vae.model, vae.guide, torch.randn(2, 3), dimensions=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3.0}, "num_steps as a whole number, got 3.0"),
        ({"dimensions": 1}, "dimensions as whole numbers, e.g. .* got 1"),
        ({"dimensions": [0.5]}, "each of the dimensions as a whole number, got 0.5"),
        ({"dimensions": [-1]}, "each of the dimensions of at least 0, got -1"),
        ({"coverage": "0.9"}, "coverage as a number, got '0.9'"),
    ],
)
def test_options_of_another_kind_are_refused(options, message):
    with pytest.raises(pv.InputError, match=message):
        tasks.traverse(*flat(), torch.randn(2, 3), **options)
