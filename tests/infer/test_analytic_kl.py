"""The rate in closed form where there is one, and free bits."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_pairs import Gaussian, gradient, make_pair, standard_pair, standard_vae
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import AnalyticKL, FreeBits, TraceBound, scale_latents


def trained_by(objective, model, guide, modules, x):
    pyro.set_rng_seed(3)
    return objective.loss(model, guide, x), seeded_gradient(objective, model, guide, modules, x)


def seeded_gradient(objective, model, guide, modules, x, **options):
    pyro.set_rng_seed(3)
    return gradient(objective, model, guide, modules, x, **options)


# --- closed form ---


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_equals_pyros_mean_field_elbo(beta, num_particles):
    model, guide, modules = make_pair("standard")
    x = torch.rand(6, 4).bernoulli()
    functions = scale_latents(model, beta), scale_latents(guide, beta, is_guide=True)
    objective = AnalyticKL(num_particles=num_particles)
    loss, found = trained_by(objective, *functions, modules, x)
    stock = TraceMeanField_ELBO(num_particles=num_particles)
    torch.testing.assert_close(found, seeded_gradient(stock, *functions, modules, x))
    pyro.set_rng_seed(3)
    assert loss == pytest.approx(stock.loss(model, guide, x), rel=1e-6)  # beta taken out
    assert objective.exact_sites == {"z": True}


def test_rate_is_exact():
    pair, x = Gaussian(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    terms = AnalyticKL().terms(pair.model, pair.guide, (x,), {})
    torch.testing.assert_close(terms.rate, pair.rate(x).sum())
    assert terms.loss == pytest.approx((terms.rate + terms.distortion).item())


def test_latent_whose_parent_in_the_model_comes_later_in_the_guide_is_scored_at_its_draw():
    """The KL of q(z1 given x) to p(z1 given z2) at a z2 that was drawn from z1 has another mean."""
    model, guide, modules = make_pair("hierarchical")
    x = torch.rand(3, 4).bernoulli().repeat(50, 1)
    objective = AnalyticKL()
    losses = {}
    for kind in (objective, TraceBound()):
        with torch.no_grad():
            values = [kind.loss(model, guide, x) / len(x) for _ in range(30)]
        losses[type(kind)] = torch.tensor(values)
    assert objective.exact_sites == {"z1": False, "z2": True}
    noise = sum(v.var() / len(v) for v in losses.values()).sqrt()
    means = [v.mean() for v in losses.values()]
    assert abs(means[0] - means[1]) < 5 * noise + 1e-6
    assert len(list(modules.parameters())) > 0


def test_families_without_a_closed_form_are_scored_at_their_draws():
    vae = standard_vae(pv.guides.InverseAutoregressiveFlow)
    x, objective = torch.rand(6, 4).bernoulli(), AnalyticKL()
    loss, found = trained_by(objective, vae.model, vae.guide, vae, x)
    expected_loss, expected = trained_by(TraceBound(), vae.model, vae.guide, vae, x)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(found, expected)
    assert objective.exact_sites == {"z": False}


def test_full_rank_normal_is_exact_against_the_standard_normal():
    vae = standard_vae(pv.guides.FullRankNormal)
    objective = AnalyticKL()
    objective.loss(vae.model, vae.guide, torch.rand(6, 4).bernoulli())
    assert objective.exact_sites == {"z": True}


def test_masked_data_add_nothing():
    pair, x = Gaussian(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    masked = [pyro.poutine.mask(function, mask=mask) for function in (pair.model, pair.guide)]
    terms = AnalyticKL().terms(*masked, (x,), {})
    torch.testing.assert_close(terms.rate, pair.rate(x)[mask].sum())


# --- free bits ---


class Diagonal(nn.Module):
    """Three latent dimensions of KL known beforehand; the decoder reads their sum."""

    def __init__(self, full_rank=False):
        super().__init__()
        self.full_rank = full_rank
        self.loc = nn.Parameter(torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(self, x):
        pyro.module("diagonal", self)
        loc = self.loc.expand(len(x), 3)
        with pyro.plate("data", len(x)):
            if self.full_rank:
                q = dist.MultivariateNormal(loc, scale_tril=torch.eye(3).double())
            else:
                q = dist.Normal(loc, 1.0).to_event(1)
            pyro.sample("z", q)

    @property
    def divergences(self):
        """loc^2 / 2: 0.005, 0.5 and 2 nats."""
        return self.loc.detach() ** 2 / 2


def rate_gradient(objective, pair, x):
    """Gradient of the floored rate by the locations: the whole one less the distortion's."""
    functions = scale_latents(pair.model, 0.0), scale_latents(pair.guide, 0.0, is_guide=True)
    distortion = seeded_gradient(TraceBound(), *functions, pair, x)
    return seeded_gradient(objective, pair.model, pair.guide, pair, x) - distortion


@pytest.mark.parametrize(
    ("floor", "pressed"),
    [(0.0, [1, 1, 1]), (0.004, [1, 1, 1]), (0.1, [0, 1, 1]), (1.0, [0, 0, 1]), (3.0, [0, 0, 0])],
)
def test_dimensions_below_the_floor_get_no_gradient_from_the_rate(floor, pressed):
    pair, x = Diagonal(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    found = rate_gradient(FreeBits(floor), pair, x)
    expected = len(x) * pair.loc.detach() * torch.tensor(pressed)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("floor", "pressed"), [(2.5, 1), (2.51, 0)])
def test_a_site_as_one_group_has_one_floor(floor, pressed):
    """The three dimensions have 2.505 nats together."""
    pair, x = Diagonal(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    found = rate_gradient(FreeBits(floor, per="site"), pair, x)
    torch.testing.assert_close(found, len(x) * pressed * pair.loc.detach(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("floor", "pressed"), [(0.83, 1), (0.84, 0)])
def test_correlated_dimensions_are_one_unit_with_the_floor_of_all(floor, pressed):
    """2.505 / 3 = 0.835 nats per dimension."""
    pair, x = Diagonal(full_rank=True), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    found = rate_gradient(FreeBits(floor), pair, x)
    torch.testing.assert_close(found, len(x) * pressed * pair.loc.detach(), atol=1e-12, rtol=1e-9)


def test_floor_binds_the_mean_over_the_batch():
    """Data on either side of the floor: the batch's mean decides for all of them."""
    pair, x = Gaussian(), torch.tensor([0.0, 3.0], dtype=torch.float64)
    low, high = pair.rate(x).tolist()
    between = (low + high) / 2
    for floor, pressed in ((between - 0.01, True), (between + 0.01, False)):
        found = rate_gradient(FreeBits(floor), pair, x)
        assert bool(found.abs().max() > 0.1) is pressed


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_are_averaged_before_the_floor(vectorize):
    """At its draws a KL of 1 nat scatters around the floor; the mean of 150 particles does not."""
    loc = nn.ParameterList([nn.Parameter(torch.tensor(2**0.5, dtype=torch.float64))])

    class Scored(dist.Normal):
        """A normal that no closed form is registered for."""

        def expand(self, batch_shape, _instance=None):
            return Scored(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    @torch.distributions.kl.register_kl(Scored, Scored)
    def none(p, q):
        raise NotImplementedError

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Scored(torch.zeros_like(x), torch.ones_like(x)))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        pyro.module("loc", loc)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Scored(loc[0].expand(len(x)), torch.ones_like(x)))

    x = torch.zeros(2, dtype=torch.float64)
    options = {"num_particles": 150, "vectorize_particles": vectorize, "max_plate_nesting": 2}
    below, above = FreeBits(0.7, **options), FreeBits(1.3, **options)
    assert seeded_gradient(below, model, guide, loc, x).abs() > 1
    assert seeded_gradient(above, model, guide, loc, x) == 0
    assert below.exact_sites == {"z": False}


def test_loss_is_the_true_bound_and_beta_scales_the_floored_rate():
    pair, x = Diagonal(), torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    functions = scale_latents(pair.model, 0.25), scale_latents(pair.guide, 0.25, is_guide=True)
    pyro.set_rng_seed(3)
    terms = FreeBits(0.6).terms(*functions, (x,), {})
    pyro.set_rng_seed(3)
    plain = AnalyticKL().terms(pair.model, pair.guide, (x,), {})
    assert terms.loss.item() == pytest.approx(plain.loss.item())
    assert terms.rate.item() == pytest.approx(len(x) * pair.divergences.sum().item())
    floored = len(x) * pair.divergences.clamp(min=0.6).sum()
    assert (terms.surrogate - terms.distortion).item() == pytest.approx(0.25 * floored.item())


def test_elements_of_other_plates_are_units_of_their_own():
    loc = nn.ParameterList([nn.Parameter(torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64))])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(3, len(x)).double(), 1.0))
            pyro.sample("x", dist.Normal(0 * z.sum(-2), 1.0), obs=x)

    def guide(x):
        pyro.module("loc", loc)
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", dist.Normal(loc[0][:, None].expand(3, len(x)), 1.0))

    x = torch.zeros(4, dtype=torch.float64)
    found = gradient(FreeBits(0.1), model, guide, loc, x)
    expected = 4 * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_bad_options_and_point_masses_are_refused():
    with pytest.raises(pv.InputError, match="floor"):
        FreeBits(-0.1)
    with pytest.raises(pv.InputError, match="floor"):
        FreeBits(math.inf)
    with pytest.raises(pv.InputError, match="'group'"):
        FreeBits(0.1, per="group")
    pair, x = Gaussian(), torch.zeros(3, dtype=torch.float64)

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    with pytest.raises(pv.InputError, match="'z' of the guide is a point mass"):
        FreeBits(0.1).loss(pair.model, point, x)


@pytest.mark.slow
def test_floor_keeps_a_standard_pair_away_from_collapse():
    """With a decoder that ignores z the plain ELBO presses the rate to 0, free bits to the floor."""
    pyro.set_rng_seed(0)
    x, rates = torch.rand(32, 4).bernoulli(), {}
    for floor in (0.0, 0.2):
        model, guide, modules = standard_pair()
        objective = FreeBits(floor)
        optimizer = torch.optim.Adam(modules.parameters(), lr=2e-2)
        for _ in range(100):
            optimizer.zero_grad()
            objective.loss_and_grads(model, guide, x)
            optimizer.step()
        rates[floor] = objective.terms(model, guide, (x,), {}).rate.item() / len(x)
    assert rates[0.2] > 0.9 * 2 * 0.2 > rates[0.0]
