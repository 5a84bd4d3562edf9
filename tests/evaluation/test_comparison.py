"""Pairs compared on equal terms: exact answers, ties, refusals, frozen models, tables."""

import copy
import io
import json
import math
import warnings

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation.comparison import Comparison, Measured
from pyro_vae.evaluation.elbo import PerDatum

F64 = torch.float64
QUICK = {"num_samples": 500, "num_elbo_samples": 200, "seed": 0}


def small_vae(likelihood="Bernoulli", family="MeanFieldNormal", prior=None, data_shape=(6,)):
    guide = getattr(pv.guides, family)(pv.networks.MLPEncoder(data_shape, (8,)), 2)
    prior = pv.priors.StandardNormal(2) if prior is None else prior(guide)
    decoder = pv.networks.MLPDecoder(2, (8,))
    return pv.VAE(prior, getattr(pv.likelihoods, likelihood)(decoder, data_shape), guide)


def pair_of(vae):
    return vae.model, vae.guide


def bits(num_data=24, size=6):
    return (torch.rand(num_data, size) < 0.5).float()


def values_of(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def unchanged(vae, before):
    return all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


# Against exact answers.


def test_bounds_and_log_prob_are_the_exact_ones(exact):
    problem = exact["probabilistic_pca"](num_data=10, num_latents=2)
    q = problem.guide.__closure__[0].cell_contents(problem.x)
    prior = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    rate = torch.distributions.kl_divergence(q, prior)
    comparison = pv.compare(
        {"a": (problem.model, problem.guide)},
        problem.x,
        num_samples=3000,
        num_elbo_samples=2000,
        posterior="quadrature",
        methods=("importance", "annealed"),
        annealing_options={"num_steps": 15, "num_chains": 200, "num_leapfrog_steps": 2},
        seed=0,
    )
    pair = comparison.pairs["a"]
    for name in ("log_prob", "annealed"):
        estimate = comparison.per_datum("a", name)
        assert ((estimate.value - problem.log_prob).abs() < 5 * estimate.standard_error + 1e-6).all()
    # E[log q - log p(z|x)] is known, so the bound is.
    elbo = problem.log_prob - pair.posterior_divergence.value
    assert ((pair.elbo.value - elbo).abs() < 5 * pair.elbo.standard_error + 1e-6).all()
    torch.testing.assert_close(pair.elbo.value, -pair.rate.value - pair.distortion.value)
    assert (pair.iwae.value > pair.elbo.value).all()
    assert (pair.iwae.value < problem.log_prob + 5 * pair.iwae.standard_error).all()
    assert pair.exact_kl
    torch.testing.assert_close(pair.rate.value, rate)
    assert comparison.verdict("a") == "best"
    assert comparison.ranked_by == "annealed"
    assert comparison.likelihood == "density"


def test_exact_kl_of_the_components(exact):
    vae = small_vae()
    x = bits()
    pair = pv.compare({"a": pair_of(vae)}, x, **QUICK).pairs["a"]
    with torch.no_grad():
        q = vae.variational_family(x)
        expected = torch.distributions.kl_divergence(q, vae.prior().expand((len(x),)))
    assert pair.exact_kl
    torch.testing.assert_close(pair.rate.value, expected.double())
    assert pair.rate.mean_standard_error == 0
    assert pair.num_guide_parameters == sum(p.numel() for p in vae.variational_family.parameters())
    assert pair.num_parameters == sum(p.numel() for p in vae.parameters())
    assert pair.seconds_per_1000 > 0
    assert math.isnan(pair.seconds_per_epoch)


def test_a_rate_without_closed_form_is_monte_carlo():
    vae, x = small_vae(family="MixtureOfNormals"), bits()
    comparison = pv.compare({"a": pair_of(vae)}, x, **QUICK)
    pair = comparison.pairs["a"]
    assert not pair.exact_kl
    assert (pair.rate.standard_error > 0).all()
    line = next(line for line in str(comparison).splitlines() if "  KL" in line)
    assert "Monte Carlo" in line
    weights = pv.log_weights(vae.model, vae.guide, x, num_samples=4000).detach()
    error = (pair.elbo.standard_error.square() + weights.var(0) / 4000).sqrt()
    assert ((pair.elbo.value - weights.mean(0)).abs() < 5 * error + 1e-6).all()


def line_pair(penalty):
    """One latent seen through one Gaussian pixel, times a known factor per datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 3.0).to_event(1), obs=x)
            pyro.factor("penalty", penalty(x[:, 0]))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 10, 1.0).to_event(1))

    return model, guide


def test_a_real_difference_is_found_with_its_error():
    def loss_of(x):
        return -0.05 * (1 + x.tanh())

    x = math.sqrt(10) * torch.randn(200, 1, dtype=F64)
    comparison = pv.compare(
        {"good": line_pair(torch.zeros_like), "worse": line_pair(loss_of)},
        x,
        num_samples=1000,
        num_elbo_samples=100,
        seed=0,
    )
    assert comparison.best() == comparison.best("elbo") == "good"
    assert comparison.verdict("good") == "best"
    assert comparison.verdict("worse") == "behind"
    loss = loss_of(x[:, 0])
    for quantity in comparison.quantities:
        difference = comparison.difference("worse", quantity)
        assert abs(difference.mean - loss.mean()) < 5 * difference.standard_error
        # Unpaired, the spread of log p(x) itself would drown it.
        spread = comparison.per_datum("worse", quantity).data_standard_error
        assert difference.standard_error < 0.2 * spread
        opposite = comparison.difference("good", quantity, to="worse")
        assert opposite.mean == -difference.mean
        assert opposite.standard_error == difference.standard_error


def measured(value, error):
    quantity = PerDatum(value, error)
    estimate = pv.LogMarginal(*[value] * 6, *[torch.ones(len(value), dtype=torch.long)] * 2)
    return Measured(
        *[quantity] * 3,
        None,
        *[quantity] * 2,
        True,
        None,
        estimate,
        1,
        1,
        seconds_per_1000=1.0,
        fit=None,
    )


def comparison_of(pairs):
    return Comparison(pairs, "density", 50, 100, None, 0)


def test_the_error_of_a_difference_covers_both_spreads():
    # Repeats of two pairs whose true mean difference over the data's distribution is 0.3.
    scores = []
    for _ in range(400):
        base = 5 * torch.randn(40, dtype=F64)
        true = [base, base + 0.3 + 0.5 * torch.randn(40, dtype=F64)]
        error = torch.full((40,), 0.4, dtype=F64)
        seen = [value + error * torch.randn(40, dtype=F64) for value in true]
        pairs = {name: measured(value, error) for name, value in zip("ab", seen, strict=True)}
        difference = comparison_of(pairs).difference("b", to="a")
        scores.append((difference.mean - 0.3) / difference.standard_error)
    scores = torch.tensor(scores)
    # Student's t with 39 degrees of freedom has standard deviation 1.027.
    assert abs(scores.std() - 1.027) < 5 * 1.027 / math.sqrt(2 * 400)
    assert abs(scores.mean()) < 5 / math.sqrt(400)


def test_what_is_unknown_is_a_tie():
    one = comparison_of(
        {
            "a": measured(torch.tensor([-1.0]), torch.tensor([0.01])),
            "b": measured(torch.tensor([-9.0]), torch.tensor([0.01])),
        }
    )
    assert math.isnan(one.difference("b").standard_error)
    assert one.verdict("a") == one.verdict("b") == "tied"
    impossible = comparison_of(
        {
            "a": measured(torch.tensor([-1.0, -2.0]), torch.tensor([0.0, 0.0])),
            "b": measured(torch.tensor([-1.0, -math.inf]), torch.tensor([0.0, math.inf])),
        }
    )
    assert impossible.best() == "a"
    plain = impossible.to_dict()
    assert plain["pairs"]["b"]["log_prob"] is None
    json.dumps(plain, allow_nan=False)


# One family under two names.


def test_one_family_under_two_names_is_a_tie():
    vae = small_vae()
    x = bits()
    # Once the very pair, and once another VAE with the same weights.
    pairs = {"one": pair_of(vae), "two": pair_of(vae), "three": pair_of(copy.deepcopy(vae))}
    comparison = pv.compare(pairs, x, **QUICK)
    for name in pairs:
        assert comparison.verdict(name) == "tied"
        for quantity in comparison.quantities:
            difference = comparison.difference(name, quantity)
            assert abs(difference.mean) <= 2 * difference.standard_error + 1e-12
    assert "behind" not in str(comparison)
    assert "best " not in str(comparison).split("verdict")[1].splitlines()[0]


def test_a_pair_under_two_names_is_trained_once():
    vae, x = small_vae(), bits()
    comparison = pv.compare(
        {"one": pair_of(vae), "two": pair_of(vae)}, x, train=x, fit_options={"epochs": 2}, **QUICK
    )
    assert comparison.pairs["one"].fit is comparison.pairs["two"].fit
    assert len(comparison.pairs["one"].fit.history["seconds"]) == 2
    assert comparison.pairs["one"].seconds_per_epoch > 0


# What can't be compared.


def test_pairs_that_would_train_the_same_parameters_are_refused():
    x, options = bits(), {"fit_options": {"epochs": 1}, **QUICK}
    vae = small_vae()
    other = pv.VAE(pv.priors.StandardNormal(2), vae.likelihood, small_vae().variational_family)
    pairs = {"a": pair_of(vae), "b": pair_of(other)}
    before = values_of(vae)
    with pytest.raises(InputError, match="share no parameters to train, got shared ones of 'a' and"):
        pv.compare(pairs, x, train=x, **options)
    assert unchanged(vae, before)
    # Nothing is shared of what trains where the model is held, nor where nothing trains.
    pv.compare(pairs, x, train=x, hold="model", **options)
    pv.compare(pairs, x, **QUICK)


def test_likelihoods_that_differ_in_kind_are_refused():
    grey = torch.rand(8, 6)
    density = pair_of(small_vae("ContinuousBernoulli"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pseudo = pair_of(small_vae("Bernoulli"))
        with pytest.raises(
            InputError, match=r"a density of 'x' from 'a' and a pseudo-likelihood from"
        ):
            pv.compare({"a": density, "b": pseudo}, grey, **QUICK)
        alone = pv.compare({"a": pseudo, "b": pseudo}, grey, **QUICK)
    assert alone.likelihood == "pseudo-likelihood"
    assert "pseudo-likelihood" in str(alone)
    with pytest.raises(InputError, match=r"a density of 'x' from 'a' and a probability from 'b'"):
        pv.compare({"a": density, "b": pseudo}, bits(), **QUICK)


def gaussian_pair(change=lambda x: x, name="x", twice=False):
    def model(x):
        x = change(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample(name, dist.Normal(z.expand_as(x), 1.0).to_event(1), obs=x)
            if twice:
                pyro.sample("again", dist.Normal(z.expand_as(x), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))

    return model, guide


def test_other_data_are_refused():
    x = 0.1 * torch.randn(30, 4)
    plain = gaussian_pair()
    for other, message in (
        (gaussian_pair(lambda x: 2 * x), "observe the same values, got other values at 'x'"),
        (gaussian_pair(lambda x: x[:, :2]), r"got shapes \(30, 4\) and \(30, 2\)"),
        (gaussian_pair(twice=True), "got 1 observed sites of 'a' and 2 of 'b'"),
    ):
        with pytest.raises(InputError, match=message):
            pv.compare({"a": plain, "b": other}, x, **QUICK)
    renamed = pv.compare({"a": plain, "b": gaussian_pair(name="y")}, x, **QUICK)
    assert renamed.verdict("b") == "tied"


def test_options_out_of_range_are_refused():
    vae, x = small_vae(), bits()
    pair = pair_of(vae)
    for pairs, options, message in (
        ({}, {}, "at least one pair"),
        ({"a": vae}, {}, r"expected \(model, guide\) for 'a', got VAE"),
        ([pair], {}, r"one pair \{name: \(model, guide\)\}, got list"),
        ({"a": pair}, {"methods": "importance"}, "expected methods .* got 'importance'"),
        ({"a": pair}, {"num_samples": 0, "train": x}, "num_samples of at least 1"),
        ({"a": pair}, {"fit_options": {"epoch": 1}}, "unknown fit option 'epoch': .* 'epochs'"),
        ({"a": pair}, {"methods": ("annealed",)}, "expected methods"),
        ({"a": pair}, {"methods": ("nested",)}, "expected methods"),
        ({"a": pair}, {"hold": "guide"}, "hold None or 'model', got 'guide'"),
        ({"a": pair}, {"posterior": "grid"}, "posterior None or 'quadrature', got 'grid'"),
        ({"a": pair}, {"num_elbo_samples": 0}, "num_elbo_samples of at least 1"),
        ({"a": pair}, {"annealing_options": {"steps": 3}}, "annealing_options among .* got 'steps'"),
        ({"a": pair}, {"annealing_options": {"num_steps": 0}}, "num_steps of at least 1"),
        ({"a": pair}, {"num_importance": 0}, "num_importance of at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            pv.compare(pairs, x, **options)
    comparison = pv.compare({"mean-field": pair}, x, **QUICK)
    assert comparison.verdict("mean-field") == "best"
    with pytest.raises(InputError, match="unknown pair 'mean-feild': did you mean 'mean-field'"):
        comparison.difference("mean-feild")
    with pytest.raises(InputError, match="unknown quantity 'annealed'"):
        comparison.per_datum("mean-field", "annealed")


# One side frozen.


def vamp(guide):
    return pv.priors.VampPrior(guide, (6,), num_pseudo_inputs=4)


def test_a_held_model_keeps_every_bit_while_guides_train():
    first = small_vae(prior=vamp)
    second = small_vae(family="FullRankNormal")
    first.likelihood.decoder.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in first.named_parameters()}
    before = [values_of(vae) for vae in (first, second)]
    x = bits(40)
    comparison = pv.compare(
        {"vamp": pair_of(first), "full-rank": pair_of(second)},
        x,
        train=x,
        hold="model",
        fit_options={"epochs": 3, "batch_size": 10, "learning_rate": 1e-2},
        **QUICK,
    )
    for vae, kept in zip((first, second), before, strict=True):
        for name, value in vae.state_dict().items():
            assert torch.equal(kept[name], value) != name.startswith("variational_family."), name
    assert flags == {name: p.requires_grad for name, p in first.named_parameters()}
    assert first.training
    # One posterior: both estimates of log p(x) are of the same number.
    assert comparison.hold == "model"
    difference = comparison.difference("vamp", to="full-rank")
    assert abs(difference.mean) < 5 * difference.monte_carlo_standard_error + 1e-6
    pair = comparison.pairs["vamp"]
    assert pair.num_parameters == pair.num_guide_parameters
    assert "one frozen model" in str(comparison)


def plain_pair(size, shared=False):
    decoder, encoder = nn.Linear(2, 6), nn.Linear(6, 2 * size)
    scale = torch.tensor(1.0)

    def model(x):
        pyro.module(f"decoder{size}", decoder)
        noise = pyro.param(f"noise{size}", scale, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            mean = encoder(x)[:, :2] if shared else torch.zeros(2)
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def guide(x):
        pyro.module(f"encoder{size}", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[:, :2], 1.0).to_event(1))

    return model, guide, decoder, encoder


def test_a_plain_function_is_frozen_in_place_and_given_back():
    model, guide, decoder, encoder = plain_pair(1)
    other = plain_pair(2)
    x = 0.1 * torch.randn(30, 6)
    pv.fit(model, guide, x, epochs=1, progress=False)
    kept = [copy.deepcopy(decoder.state_dict()), copy.deepcopy(encoder.state_dict())]
    noise = pyro.param("noise1").clone()
    pairs = {"a": (model, guide), "b": other[:2]}
    pv.compare(pairs, x, train=x, hold="model", fit_options={"epochs": 2, "device": "cpu"}, **QUICK)
    assert torch.equal(decoder.weight, kept[0]["weight"])
    assert torch.equal(pyro.param("noise1"), noise)
    assert not torch.equal(encoder.weight, kept[1]["weight"])
    assert decoder.weight.requires_grad
    assert pyro.param("noise1").unconstrained().requires_grad
    # Free again, it trains again.
    pv.fit(model, guide, x, epochs=1, progress=False)
    assert not torch.equal(decoder.weight, kept[0]["weight"])


def test_a_model_that_leans_on_the_guide_is_not_frozen():
    model, guide, decoder, _ = plain_pair(1, shared=True)
    x = 0.1 * torch.randn(30, 6)
    with pytest.raises(InputError, match="shares no parameters with the guide of 'a'"):
        pv.compare({"a": (model, guide)}, x, train=x, hold="model", **QUICK)
    assert decoder.weight.requires_grad


# What comes out.


@pytest.fixture(scope="module")
def two():
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        first, second = small_vae(), small_vae(family="FullRankNormal")
        x = bits()
        pairs = {"mean-field": pair_of(first), "full-rank": pair_of(second)}
        return pv.compare(
            pairs, x, train=x, fit_options={"epochs": 2}, posterior="quadrature", **QUICK
        )


def test_tables(two):
    text = str(two)
    for wanted in (
        "mean-field",
        "full-rank",
        "IWAE-50",
        "exact",
        "Monte Carlo",
        "quadrature",
        "epoch",
    ):
        assert wanted in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(two)
    assert "log p(x)" in console.export_text()
    frame = two.to_dataframe()
    assert list(frame.index) == ["mean-field", "full-rank"]
    assert frame.loc["full-rank", "log_prob"] == two.per_datum("full-rank").mean
    plain = json.loads(json.dumps(two.to_dict(per_datum=True), allow_nan=False))
    assert plain["pairs"]["mean-field"]["elbo"] == two.per_datum("mean-field", "elbo").mean
    assert len(plain["pairs"]["mean-field"]["per_datum"]["log_prob"]) == 24
    assert plain["num_data"] == 24
    assert "per_datum" not in two.to_dict()["pairs"]["mean-field"]


def test_figures(two):
    assert isinstance(two.plot(), Figure)
    assert isinstance(two.plot("elbo"), Figure)
    figure = two.scatter("mean-field", "full-rank")
    points = figure.axes[0].collections[0].get_offsets()
    assert points.shape == (24, 2)
    assert points[3, 1] == two.per_datum("full-rank").value[3]


def test_arviz_compares_them_as_they_are(two):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own changes as warnings
        mpl.use("Agg")
        import arviz

        kept = {} if hasattr(arviz, "from_pystan") else {"round_to": "none"}
        table = arviz.compare(two.to_arviz(), **kept)
        arviz.plot_compare(table)
    worst = next(name for name in two.pairs if name != two.best())
    difference = two.difference(worst)
    assert table.index[0] == two.best()
    assert abs(table.loc[worst, "elpd_diff"]) == pytest.approx(-24 * difference.mean, rel=1e-6)
    paired = two.per_datum(worst).value - two.per_datum(two.best()).value
    assert table.loc[worst, "dse"] == pytest.approx(
        math.sqrt(24) * paired.std(correction=0).item(), rel=1e-6
    )


def test_annealing_is_left_out_where_it_does_not_apply():
    guide = pv.guides.VonMisesFisher(pv.networks.MLPEncoder((6,), (8,)), 2)
    sphere = pv.VAE(
        pv.priors.HypersphericalUniform(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (6,)),
        guide,
    )
    told = []
    comparison = pv.compare(
        {"sphere": pair_of(sphere), "normal": pair_of(small_vae())},
        bits(5),
        methods=("importance", "annealed"),
        annealing_options={"num_steps": 5, "num_chains": 2},
        progress=lambda *what: told.append(what),
        **QUICK,
    )
    assert comparison.pairs["sphere"].annealed is None
    assert comparison.pairs["normal"].annealed is not None
    assert comparison.ranked_by == "log_prob"
    assert "does not apply" in str(comparison)
    assert ("normal", "log p(x), annealed", 1.0) in told


def test_several_inputs(exact):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 2, 0.8).to_event(1))

    x, y = torch.randn(10, 1, dtype=F64), torch.randn(10, 1, dtype=F64)
    comparison = pv.compare({"a": (model, guide)}, (x, y), **QUICK)
    estimate = comparison.per_datum("a")
    expected = dist.Normal(y, math.sqrt(2)).log_prob(x)[:, 0]
    assert ((estimate.value - expected).abs() < 5 * estimate.standard_error + 1e-6).all()


def test_seed_and_state_are_kept():
    vae, x = small_vae(), bits(10)
    state = torch.get_rng_state()
    before = values_of(vae)
    first = pv.compare({"a": pair_of(vae)}, x, **QUICK)
    again = pv.compare({"a": pair_of(vae)}, x, **QUICK)
    assert torch.equal(first.per_datum("a").value, again.per_datum("a").value)
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(vae, before)
    assert vae.training
