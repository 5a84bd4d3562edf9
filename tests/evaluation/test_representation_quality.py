"""Representation measures against exact answers: quadrature, closed forms, and their identities."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.settings import assemble_vae
from pyro_vae.evaluation import Estimate, representation
from pyro_vae.evaluation.representation_quality import unit_variances

F64 = torch.float64
A = torch.tensor([[1.1, 0.4, 0.0], [0.9, -0.5, 0.5]], dtype=F64)  # encoder means A x
SCALE = torch.tensor([0.6, 0.9], dtype=F64)


def linear_pair(A=A, scale=SCALE, family=None, prior=None):
    """A linear-Gaussian encoder, and a model that its measures don't depend on but for the prior."""
    zero = torch.zeros(len(A), dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior() if prior else dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ A, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = x @ A.T
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(loc) if family else dist.Normal(loc, scale).to_event(1))

    return model, guide


def some_data(num_data=30, num_pixels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, num_pixels, dtype=F64, generator=generator)


def close(estimate, exact, *others):
    """Say whether an estimate is within five of its standard errors (and those of the others)."""
    error = math.hypot(estimate.standard_error, *(other.standard_error for other in others))
    return abs(estimate.value - exact) < 5 * error + 1e-6


def total(*estimates):
    return Estimate(
        sum(estimate.value for estimate in estimates),
        math.hypot(*(estimate.standard_error for estimate in estimates)),
    )


def exact_measures(x, scale=SCALE):
    """Information measures of the finite mixture of two-dimensional normals, by quadrature."""
    loc = x @ A.T
    step = 0.02
    grid = torch.arange(-9, 9, step, dtype=F64)
    # Log-densities on the axes, (grid, N) for each coordinate.
    axes = [dist.Normal(loc[:, d], scale[d]).log_prob(grid[:, None]) for d in range(2)]
    joint = (axes[0].exp() @ axes[1].exp().T) / len(x)
    marginals = [axis.exp().mean(1) for axis in axes]

    def entropy(density, cell):
        return -torch.special.xlogy(density, density).sum().item() * cell

    own = dist.Normal(loc, scale).entropy().sum(1).mean().item()
    joint_entropy = entropy(joint, step**2)
    marginal_entropies = [entropy(marginal, step) for marginal in marginals]
    second_moment = (loc.square() + scale.square()).mean(0).sum().item()
    cross_entropy = math.log(2 * math.pi) + 0.5 * second_moment
    return {
        "rate": cross_entropy - own,
        "mutual_information": joint_entropy - own,
        "marginal_kl": cross_entropy - joint_entropy,
        "total_correlation": sum(marginal_entropies) - joint_entropy,
        "dimension_wise_kl": cross_entropy - sum(marginal_entropies),
    }


def test_every_measure_equals_its_quadrature():
    x = some_data()
    result = representation(*linear_pair(), x, num_samples=200)
    exact = exact_measures(x)
    for name, value in exact.items():
        assert close(getattr(result, name), value), name
    assert result.rate.standard_error == 0
    assert result.rate_method == "analytic"
    assert result.unavailable == {}
    # The errors are small enough for the comparison to mean something.
    assert result.mutual_information.standard_error < 0.02
    assert exact["total_correlation"] > 0.02


@pytest.mark.slow
def test_the_standard_error_is_that_of_repeated_estimates():
    x = some_data(12)
    runs = [representation(*linear_pair(), x, num_samples=4, seed=seed) for seed in range(40)]
    for name in ("mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl"):
        values = np.array([getattr(run, name).value for run in runs])
        claimed = np.array([getattr(run, name).standard_error for run in runs])
        ratio = values.std(ddof=1) / math.sqrt((claimed**2).mean())
        # A standard deviation from 40 values is itself known to 1 part in sqrt(2 * 39).
        assert abs(ratio - 1) < 5 / math.sqrt(78), name


def test_the_parts_add_up_within_their_errors_and_the_information_is_within_the_rate():
    for seed in range(5):
        result = representation(*linear_pair(), some_data(20, seed=seed), num_samples=20, seed=seed)
        assert close(total(result.mutual_information, result.marginal_kl), result.rate.value)
        parts = total(result.total_correlation, result.dimension_wise_kl)
        assert close(parts, result.marginal_kl.value, result.marginal_kl)
        assert (
            result.rate.value
            >= result.mutual_information.value - 5 * result.mutual_information.standard_error
        )


def test_identical_data_hold_no_information():
    result = representation(*linear_pair(), some_data(1).expand(10, 3), num_samples=3)
    assert result.mutual_information == pytest.approx((0, 0), abs=1e-9)
    assert result.mutual_information_upper == pytest.approx((0, 0), abs=1e-9)
    assert result.active_units == 0
    assert close(result.marginal_kl, result.rate.value)
    assert result.total_correlation == pytest.approx((0, 0), abs=1e-9)


def test_separate_groups_hold_the_logarithm_of_their_number():
    # Four groups of five equal data, a thousand deviations apart.
    x = torch.tensor([[0.0], [1], [2], [3]], dtype=F64).repeat(5, 1)
    pair = linear_pair(torch.tensor([[1000.0]], dtype=F64), torch.ones(1, dtype=F64))
    result = representation(*pair, x)
    assert result.mutual_information == pytest.approx((math.log(4), 0), abs=1e-9)
    # Of the other 19 data four are of the same group: log 19/4.
    assert result.mutual_information_upper.value == pytest.approx(math.log(19 / 4))
    assert representation(*pair, x[:4]).mutual_information_upper.value > 1e5


def test_both_sides_hold_the_information_of_the_population():
    covariance = A @ A.T + SCALE.square().diag()
    exact = 0.5 * (covariance.logdet() - SCALE.square().log().sum()).item()
    runs = [representation(*linear_pair(), some_data(100, seed=seed)) for seed in range(16)]
    for name, sign in (("mutual_information", -1), ("mutual_information_upper", 1)):
        values = np.array([getattr(run, name).value for run in runs])
        excess = sign * (values.mean() - exact)
        assert excess > -5 * values.std(ddof=1) / math.sqrt(len(values)), name
        assert excess < 0.2, name


@pytest.mark.slow
def test_many_data_come_near_the_population():
    covariance = A @ A.T + SCALE.square().diag()
    exact = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet()).item()
    runs = [representation(*linear_pair(), some_data(800, seed=seed)) for seed in range(8)]
    values = np.array([run.total_correlation.value for run in runs])
    assert abs(values.mean() - exact) < 5 * values.std(ddof=1) / math.sqrt(8) + 0.02


def test_dependent_coordinates_keep_what_is_known():
    factor = torch.tensor([[0.6, 0.0], [0.5, 0.7]], dtype=F64)
    pair = linear_pair(family=lambda loc: dist.MultivariateNormal(loc, scale_tril=factor))
    x = some_data()
    result = representation(*pair, x, num_samples=100)
    assert close(total(result.mutual_information, result.marginal_kl), result.rate.value)
    parts = total(result.total_correlation, result.dimension_wise_kl)
    assert close(parts, result.marginal_kl.value, result.marginal_kl)
    assert result.kl_per_dimension is None
    assert "MultivariateNormal" in result.unavailable["kl_per_dimension"]


def test_a_mixture_family_has_the_marginals_of_its_components():
    from pyro_vae.distributions.normal import DiagonalNormalMixture

    offsets = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=F64)
    logits = torch.tensor([0.3, 0.7], dtype=F64).log()

    def mixture(loc):
        means = loc[:, None] + offsets
        return DiagonalNormalMixture(logits.expand(len(loc), 2), means, 0.4 * torch.ones_like(means))

    result = representation(*linear_pair(family=mixture), some_data(), num_samples=50)
    parts = total(result.total_correlation, result.dimension_wise_kl)
    assert close(parts, result.marginal_kl.value, result.marginal_kl)
    assert result.rate_method == "Monte Carlo"
    rate = total(result.mutual_information, result.marginal_kl)
    assert result.rate.value == pytest.approx(rate.value)


def test_kl_per_dimension_is_exact_where_it_is_known_and_estimated_elsewhere():
    x = some_data()
    known = representation(*linear_pair(), x)
    loc = x @ A.T
    exact = (0.5 * (loc**2 + SCALE**2 - 1) - SCALE.log()).mean(0)
    torch.testing.assert_close(known.kl_per_dimension, exact)
    assert (known.kl_per_dimension_standard_error == 0).all()
    assert known.rate.value == pytest.approx(exact.sum().item())

    def student():
        return dist.StudentT(3.0, torch.zeros(2, dtype=F64), 1.0).to_event(1)

    estimated = representation(*linear_pair(prior=student), x, num_samples=100)
    grid = torch.arange(-12, 12, 0.01, dtype=F64)[:, None, None]
    q = dist.Normal(loc, SCALE).log_prob(grid)
    kl = (q.exp() * (q - dist.StudentT(3.0, 0.0, 1.0).log_prob(grid))).sum(0).mean(0) * 0.01
    error = estimated.kl_per_dimension_standard_error
    assert (error > 0).all()
    assert ((estimated.kl_per_dimension - kl).abs() < 5 * error).all()
    assert close(estimated.rate, kl.sum().item())
    assert estimated.rate_method == "Monte Carlo"


def test_active_units_are_those_whose_mean_moves():
    matrix = torch.tensor([[1.0, 0, 0], [0, 0.05, 0], [0, 0, 0.3]], dtype=F64)
    x = some_data(2000)
    result = representation(*linear_pair(matrix, torch.ones(3, dtype=F64)), x[:50])
    assert result.active.tolist() == [True, False, True]
    assert result.active_units == 2
    torch.testing.assert_close(result.unit_variances, (x[:50] @ matrix.T).var(0))
    assert result.means_exact


def test_means_from_draws_do_not_add_their_own_noise():
    class NoMean(dist.Normal):
        @property
        def mean(self):
            raise NotImplementedError

    # The means don't move; the draws' means do, by 10 / sqrt(1000), a variance of 0.1.
    pair = linear_pair(
        torch.zeros(2, 3, dtype=F64),
        family=lambda loc: NoMean(loc, torch.full_like(loc, 10.0)).to_event(1),
    )
    result = representation(*pair, some_data(400), num_samples=2)
    assert not result.means_exact
    assert (result.unit_variances < 5 * 0.1 * math.sqrt(2 / 400)).all()


def hierarchical():
    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.sample("z", dist.Normal(top[:, None].expand(-1, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(top[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x[:, 0], 0.5))
            pyro.sample("z", dist.Normal(x[:, :2] + top[:, None], 0.5).to_event(1))

    return model, guide


def test_several_latents_are_taken_together():
    x = some_data(20)
    result = representation(*hierarchical(), x, num_samples=40)
    assert result.sites == ("top", "z")
    assert result.latent_dim == 3
    assert result.total_correlation is None
    assert "several latents" in result.unavailable["total_correlation"]
    assert close(total(result.mutual_information, result.marginal_kl), result.rate.value)
    # Jointly normal given x: mean (x0, 2 x0, x1 + x0), with the noise of top shared by z.
    loc = torch.stack([x[:, 0], 2 * x[:, 0], x[:, 1] + x[:, 0]], 1)
    mixing = 0.5 * torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=F64)
    joint = dist.MultivariateNormal(loc, scale_tril=mixing)
    z = joint.sample((1000,))
    scores = joint.log_prob(z[:, :, None])
    terms = joint.log_prob(z) - (scores.logsumexp(-1) - math.log(20))
    exact = Estimate(terms.mean().item(), (terms.var(0).mean() / terms.numel()).sqrt().item())
    assert close(result.mutual_information, exact.value, exact)


@pytest.mark.parametrize(
    "guide",
    [
        *("mean-field", "full-rank", "mixture", "iaf", "von-mises-fisher", "beta"),
        pytest.param("spline", marks=pytest.mark.slow),
    ],
)
def test_every_family_is_measured_within_its_identities(guide):
    prior = {"von-mises-fisher": "hypersphere-uniform", "beta": "beta"}.get(guide, "vamp")
    settings = TrainSettings(prior=prior, guide=guide, latent_dim=3, hidden="16")
    vae = assemble_vae(settings, (6,), 100)
    x = torch.bernoulli(torch.full((40, 6), 0.5))
    result = representation(vae.model, vae.guide, x, num_samples=20)
    assert close(total(result.mutual_information, result.marginal_kl), result.rate.value, result.rate)
    assert -1e-4 < result.mutual_information.value < math.log(40)
    assert (result.total_correlation is None) is (guide in ("iaf", "spline", "von-mises-fisher"))
    assert (result.dimension_wise_kl is None) is (guide != "beta")
    assert result.means_exact is (guide not in ("iaf", "spline"))
    for name in ("total_correlation", "dimension_wise_kl", "kl_per_dimension"):
        assert (getattr(result, name) is None) is (name in result.unavailable)


def test_memory_changes_nothing():
    x = some_data(30)
    whole = representation(*linear_pair(), x)
    parts = representation(*linear_pair(), x, max_memory=30 * 2 * 64 * 7)
    for name in ("mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name))


def test_labels_are_read_off_separated_codes_and_not_off_noise():
    x = some_data(200)
    labels = (x[:, 0] > 0).long()
    x[:, 0] += torch.where(labels == 1, 5.0, -5.0)
    pair = linear_pair(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64))
    result = representation(*pair, x, labels=labels, num_samples=2)
    assert result.nearest_neighbour_accuracy == (1.0, 0.0)
    assert result.linear_accuracy == (1.0, 0.0)
    assert result.num_folds == 5
    noise = torch.arange(200) % 2
    result = representation(*pair, x, labels=noise, num_samples=2)
    assert result.linear_accuracy.standard_error == pytest.approx(math.sqrt(0.25 / 200), rel=0.1)
    for accuracy in (result.nearest_neighbour_accuracy, result.linear_accuracy):
        assert close(accuracy, 0.5)


def test_a_nearest_neighbour_sees_what_a_plane_does_not():
    angle = torch.linspace(0, 2 * math.pi, 201, dtype=F64)[:-1]
    labels = np.array(["inner", "outer"])[np.arange(200) % 2]
    radius = 1.0 + torch.arange(200, dtype=F64) % 2
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    pair = linear_pair(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64))
    result = representation(*pair, x, labels=labels, num_samples=2)
    assert result.nearest_neighbour_accuracy.value > 0.95
    assert result.linear_accuracy.value < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples of at least 2"),
        ({"num_samples": 2.0}, "num_samples as a whole number, got 2.0"),
        ({"max_memory": 0}, "max_memory of at least 1, got 0"),
        ({"labels": [0, 1]}, r"labels of shape \(10,\)"),
        ({"labels": [0] * 10}, "at least two classes"),
        ({"labels": [0] * 9 + [1]}, "2 data points of every class, got 1 of 1"),
        ({"labels": [0, 1] * 5, "num_neighbours": 0}, "num_neighbours of at least 1"),
        ({"labels": [0, 1] * 5, "num_neighbours": 9}, "fewer neighbours of 10 data points, got 9"),
        ({"labels": [0, 1] * 5, "num_folds": 1}, "num_folds of at least 2"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(pv.InputError, match=message):
        representation(*linear_pair(), some_data(10), **options)


def test_a_single_datum_is_refused():
    with pytest.raises(pv.InputError, match="at least 2 data"):
        representation(*linear_pair(), some_data(1))


def test_a_seed_repeats_the_result_and_leaves_the_generators_alone():
    x = some_data(10)
    state = torch.get_rng_state()
    first, second = (representation(*linear_pair(), x, seed=3) for _ in range(2))
    assert first.mutual_information == second.mutual_information
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("guide", ["mean-field", "iaf"])
def test_unit_variances_alone_are_those_of_the_representation(guide):
    pair = assemble_vae(TrainSettings(guide=guide, latent_dim=3, hidden="8"), (6,), 100)
    x = torch.bernoulli(torch.full((40, 6), 0.5))
    alone = unit_variances(pair.guide, x, seed=3)
    whole = pv.evaluation.representation(pair.model, pair.guide, x, num_samples=2, seed=3)
    torch.testing.assert_close(alone, whole.unit_variances, rtol=0.2, atol=1e-3)
    if guide == "mean-field":
        means = pair.variational_family(x).mean.detach().double()
        torch.testing.assert_close(alone, means.var(0))


def test_it_prints_what_it_knows_and_leaves_out_the_rest():
    model, guide = linear_pair()
    text = str(representation(model, guide, some_data()))
    assert "30 data points, 2 of 2 units active" in text
    assert "total correlation" in text
    assert "accuracy" not in text


def test_a_guide_with_parameters_per_datum_has_a_representation():
    x, labels = some_data(10), [0, 1] * 5
    model, _ = linear_pair()

    def guide(x):
        loc = pyro.param("loc", 3 * torch.eye(2, dtype=x.dtype)[torch.arange(10) % 2])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    result = representation(model, guide, x, labels=labels, num_neighbours=1)
    assert result.nearest_neighbour_accuracy.value == 1
    assert result.active_units == 2


def test_a_guide_of_point_masses_is_refused():
    model, _ = linear_pair()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.zeros(len(x), 2, dtype=x.dtype)
            u = pyro.sample("u", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u, log_density=torch.zeros(len(x)), event_dim=1))

    with pytest.raises(pv.InputError, match="'z' is a point mass: posteriors can't be compared"):
        representation(model, guide, some_data(10))
