"""Calibration, posterior predictive check and aggregate posterior of right and wrong guides."""

import math
import warnings

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.errors import InputError

F64 = torch.float64


def ranks_of(exact, *, covariance_scale=1.0, shift=0.0, **options):
    problem = exact["probabilistic_pca"](
        num_latents=2, covariance_scale=covariance_scale, shift=shift
    )
    return pv.evaluation.calibration(problem.model, problem.guide, problem.x, seed=0, **options)


def test_the_posterior_has_uniform_ranks(exact):
    result = ranks_of(exact)
    assert result.ranks["z"].shape == (1000, 2)
    assert (result.counts.sum(1) == 1000).all()
    # Of two dimensions: a false alarm of 1 in 500 by chance, and the seed is fixed.
    assert (result.p_value > 1e-3).all()
    assert (result.chi_square < 45).all()
    assert result.labels == ["z[0]", "z[1]"]


def test_chi_square_is_scipys(exact):
    from scipy.stats import chisquare

    result = ranks_of(exact, covariance_scale=0.8, num_data=300)
    expected = chisquare(result.counts.numpy(), axis=1)
    torch.testing.assert_close(result.chi_square, torch.as_tensor(expected.statistic).float())
    torch.testing.assert_close(result.p_value, torch.as_tensor(expected.pvalue).to(result.p_value))


def test_wrong_guides_show_their_shape(exact):
    narrow, wide, shifted = (
        ranks_of(exact, **how)
        for how in ({"covariance_scale": 0.4}, {"covariance_scale": 2.5}, {"shift": 0.3})
    )
    for result in (narrow, wide, shifted):
        assert result.p_value.min() < 1e-10
    ends, middle = [0, -1], [9, 10]
    assert (narrow.counts[:, ends].sum(1) > 1.5 * narrow.counts[:, middle].sum(1)).all()
    assert (wide.counts[:, middle].sum(1) > 1.5 * wide.counts[:, ends].sum(1)).all()
    # A guide shifted upwards has most of its draws above the true value.
    assert (shifted.counts[:, 0] > 2 * shifted.counts[:, -1]).all()


def test_blocks_seed_and_mode():
    vae = pv.VAE(
        pv.priors.StandardNormal(1),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(1, (4,)), (3,)),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((3,), (4,)), 1),
    )
    told = []
    options = {"num_data": 1500, "num_draws": 19, "seed": 2}
    first = pv.evaluation.calibration(
        vae.model, vae.guide, torch.zeros(4, 3), progress=lambda *done: told.append(done), **options
    )
    again = pv.evaluation.calibration(vae.model, vae.guide, torch.zeros(4, 3), **options)
    assert torch.equal(first.ranks["z"], again.ranks["z"])
    assert told[-1] == (1500, 1500)
    assert len(told) == 2
    assert first.ranks["z"].shape == (1500, 1)
    assert first.labels == ["z"]
    assert vae.training
    assert first.x[0].shape == (1500, 3)


def test_numbers_that_do_not_fit_are_refused(exact):
    problem = exact["probabilistic_pca"]()
    for options, message in (
        ({"num_draws": 100}, "use e.g. num_draws=99"),
        ({"num_draws": 0}, "num_draws of at least 1"),
        ({"num_draws": 99.0}, "num_draws as a whole number, got 99.0"),
        ({"num_bins": "20"}, "num_bins as a whole number, got '20'"),
        ({"progress": True}, "progress as a function, got bool"),
        ({"num_data": 50}, "num_data of at least 100 for 20 bins"),
    ):
        with pytest.raises(InputError, match=message):
            pv.evaluation.calibration(problem.model, problem.guide, problem.x, **options)


def test_figures_and_arviz(exact):
    result = ranks_of(exact, num_data=200)
    assert isinstance(result.plot(), Figure)
    assert "200 simulated data" in str(result)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own changes as warnings
        mpl.use("Agg")
        import arviz

        values = result.to_arviz()["prior_sbc"]["z"]
        assert values.shape == (1, 200, 2)
        assert 0 < values.min() < values.max() < 1
        if hasattr(arviz, "plot_ecdf_pit"):
            arviz.plot_ecdf_pit(result.to_arviz())
        else:
            from scipy.stats import uniform

            arviz.plot_ecdf(values[0, :, 0].values, cdf=uniform.cdf, difference=True)


def one_pixel_model(noise):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 8), noise).to_event(1), obs=x)

    return model


def one_pixel_posterior(noise, widen=1.0):
    def guide(x):
        variance = 1 / (1 + 8 / noise**2)
        with pyro.plate("data", len(x)):
            mean = x.sum(1, keepdim=True) * variance / noise**2
            pyro.sample("z", dist.Normal(mean, widen * variance**0.5).to_event(1))

    return guide


def one_pixel_data(num_data=400):
    return torch.randn(num_data, 1, dtype=F64) + 0.5 * torch.randn(num_data, 8, dtype=F64)


def test_posterior_predictive_tells_a_wrong_noise():
    x = one_pixel_data()
    right = pv.evaluation.posterior_predictive(
        one_pixel_model(0.5), one_pixel_posterior(0.5), x, seed=0
    )
    wrong = pv.evaluation.posterior_predictive(
        one_pixel_model(0.3), one_pixel_posterior(0.3), x, seed=0
    )
    assert right.replicated["mean"].shape == (100, 400)
    assert right.p_value["mean"].shape == (400,)
    assert 0.02 < right.overall_p_value["standard deviation"] < 0.98
    assert wrong.overall_p_value["standard deviation"] == 0.0
    assert isinstance(wrong.plot(), Figure)
    largest = pv.evaluation.posterior_predictive(
        one_pixel_model(0.5),
        one_pixel_posterior(0.5),
        x,
        statistics={"largest": lambda values: values.amax(1)},
        num_draws=20,
        seed=0,
    )
    torch.testing.assert_close(largest.observed["largest"], x.amax(1))


def test_aggregate_posterior_is_the_prior_for_the_exact_posterior():
    x = one_pixel_data(1000)
    right = pv.evaluation.aggregate_posterior(
        one_pixel_model(0.5), one_pixel_posterior(0.5), x, seed=0
    )
    wrong = pv.evaluation.aggregate_posterior(
        one_pixel_model(0.5), one_pixel_posterior(0.5, widen=15.0), x, seed=0
    )
    assert right.draws.shape == right.prior.shape == (1000, 1)
    assert right.p_value[0] > 1e-3
    assert wrong.p_value[0] < 1e-6
    assert wrong.statistic[0] > right.statistic[0]
    assert isinstance(right.plot(), Figure)
    with pytest.raises(InputError, match="num_draws of at least 1"):
        pv.evaluation.aggregate_posterior(
            one_pixel_model(0.5), one_pixel_posterior(0.5), x, num_draws=0
        )


def test_an_observed_site_is_chosen_by_name():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 3, 3**-0.5).to_event(1))

    data = (torch.randn(5, 1, dtype=F64), torch.full((5, 1), 2.0, dtype=F64))
    check = pv.evaluation.posterior_predictive(model, guide, data, observed="y", num_draws=3)
    assert (check.observed["mean"] == 2).all()
    with pytest.raises(InputError, match="name one with observed="):
        pv.evaluation.posterior_predictive(model, guide, data)
    with pytest.raises(InputError, match="an observed site 'w', the model has x, y"):
        pv.evaluation.posterior_predictive(model, guide, data, observed="w")


def scalar_pair(shift=0.0):
    """A latent without event dimensions, with its exact posterior or one beside it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5))

    return model, guide


def test_a_latent_may_be_a_number():
    x = torch.linspace(-1, 1, 200, dtype=F64)
    right = pv.evaluation.calibration(*scalar_pair(), x, num_data=1000, seed=0)
    wrong = pv.evaluation.calibration(*scalar_pair(0.5), x, num_data=1000, seed=0)
    assert right.ranks["z"].shape == (1000, 1)
    assert right.labels == ["z"]
    assert right.p_value[0] > 1e-3
    assert wrong.p_value[0] < 1e-6
    aggregate = pv.evaluation.aggregate_posterior(*scalar_pair(), x, num_draws=3, seed=0)
    assert aggregate.draws.shape == aggregate.prior.shape == (600, 1)


def test_the_ranks_of_a_discrete_posterior_are_uniform():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.7, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            # log p(x, z = 1) - log p(x, z = 0)
            pyro.sample("z", dist.Bernoulli(logits=x - 0.5 + math.log(0.7 / 0.3)))

    x = torch.zeros(10, dtype=F64)
    result = pv.evaluation.calibration(model, guide, x, num_data=2000, num_draws=19, seed=0)
    assert result.p_value[0] > 1e-3
    assert result.ranks["z"].max() == 19


def test_a_factor_is_no_observed_site():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.factor("penalty", -(z**2).sum(-1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 4, 0.5).to_event(1))

    x = torch.ones(5, 1, dtype=F64)
    check = pv.evaluation.posterior_predictive(model, guide, x, num_draws=3)
    assert (check.observed["mean"] == 1).all()
    with pytest.raises(InputError, match="at least one statistic"):
        pv.evaluation.posterior_predictive(model, guide, x, statistics={})


def test_data_of_one_number_each_are_checked_too():
    x = torch.randn(50, dtype=F64)
    check = pv.evaluation.posterior_predictive(*scalar_pair(), x, num_draws=3, seed=0)
    torch.testing.assert_close(check.observed["mean"], x)
    assert (check.observed["standard deviation"] == 0).all()


def test_a_statistic_of_another_shape_is_refused_by_name():
    x = one_pixel_data(5)
    pair = one_pixel_model(0.5), one_pixel_posterior(0.5)
    for statistic, got in (
        (lambda values: values.mean(), r"\(\)"),
        (lambda values: values, r"\(5, 8\)"),
        (lambda values: 1.0, "float"),
    ):
        with pytest.raises(InputError, match=rf"'mine' to give one number per datum.* got {got}"):
            pv.evaluation.posterior_predictive(*pair, x, statistics={"mine": statistic})
