"""Data in their own units: moments over what is there, standardised networks, densities."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import data_scale
from pyro_vae.data_scale import describe_scale, location_and_scale, moments, without_missing

SIGMAS = ["learned", "per-column", "per-pixel"]


def table(number=60):
    """Columns of different units, one of which never varies."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(number, 2, generator=generator) @ torch.randn(2, 4, generator=generator)
    columns = columns + 0.1 * torch.randn(number, 4, generator=generator)
    columns[:, 3] = 0.0
    return columns * torch.tensor([2000.0, 3e-3, 1.0, 1.0]) + torch.tensor([9e3, 0.0, -7.0, 4.0])


def make_vae(sigma="learned", data_shape=(4,), prior=None, **options):
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (16,)), pv.networks.MLPEncoder(data_shape, (16,))
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    likelihood = pv.likelihoods.Gaussian(decoder, data_shape, sigma=sigma, **options)
    prior = pv.priors.StandardNormal(2) if prior is None else prior(guide, data_shape)
    return pv.VAE(prior, likelihood, guide)


def test_moments_are_those_of_all_rows_whatever_the_blocks(monkeypatch):
    x = torch.randn(37, 2, 3) * 5 + 1000
    x[:, 1, 1] = 4.0
    monkeypatch.setattr(data_scale, "_BLOCK", 24)  # four rows
    mean, deviation = moments(x)
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(deviation, x.double().std(0, correction=0))
    x[::3, 0, 0], x[:, 1, 2] = torch.nan, torch.nan
    mean, deviation = moments(x)
    there = x[:, 0, 0][~x[:, 0, 0].isnan()].double()
    torch.testing.assert_close(mean[0, 0], there.mean())
    torch.testing.assert_close(deviation[0, 0], there.std(correction=0))
    assert mean[1, 2] == deviation[1, 2] == 0


def test_what_is_missing_is_filled_block_by_block(monkeypatch):
    """A large file passes through memory in parts, and whole data are not copied."""
    monkeypatch.setattr(data_scale, "_BLOCK", 24)  # four rows
    x = torch.rand(37, 2, 3) + 1
    (whole,) = without_missing(x)
    assert whole is x
    x[:9] = torch.nan  # two blocks without any value
    x[10::3, 0, 0] = torch.nan
    blocks = list(without_missing(x))
    assert max(map(len, blocks)) == 4
    filled = torch.cat(blocks)
    assert torch.equal(filled[~x.isnan()], x[~x.isnan()])
    assert torch.isin(filled, x[~x.isnan()]).all()
    assert all(block.isnan().all() for block in without_missing(x[:9]))


def test_pseudo_inputs_start_at_what_was_observed():
    x = torch.randn(4000, 5) * 3 + 50
    x[::2, 1], x[:, 2] = torch.nan, torch.nan
    vae = make_vae(
        data_shape=(5,),
        prior=lambda guide, shape: pv.priors.VampPrior(
            guide, shape, unit_interval=False, num_pseudo_inputs=2000
        ),
    )
    vae.start_at_data(x)
    found = vae.prior.pseudo_inputs
    error = 3 / math.sqrt(2000)
    assert (found.mean(0)[[0, 1, 3, 4]] - x.nanmean(0)[[0, 1, 3, 4]]).abs().max() < 4 * error
    assert (found.std(0)[[0, 1, 3, 4]] - 3).abs().max() < 4 * error
    assert not found[:, 2].any()  # of a value that is always missing nothing is known


def test_columns_have_a_scale_each_and_images_one():
    x = table()
    _, found = location_and_scale(x)
    torch.testing.assert_close(found[:3], x.double().std(0, correction=0)[:3])
    assert found[3] == 1
    images = torch.randn(50, 1, 4, 4) * torch.linspace(1, 3, 16).view(4, 4)
    loc, found = location_and_scale(images)
    torch.testing.assert_close(loc, images.double().mean(0))
    torch.testing.assert_close(found, (images.double() - loc).square().mean().sqrt().expand(1, 4, 4))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_raw_table_is_trained_as_its_standardised_columns_are(sigma):
    x = table()
    raw, standard = make_vae(sigma), make_vae(sigma)
    raw.standardize(x)
    loc, unit = raw.likelihood.loc, raw.likelihood.scale
    y = (x - loc) / unit
    standard.start_at_data(y)
    estimates = []
    for vae, data in ((raw, x), (standard, y)):
        result = pv.fit(vae.model, vae.guide, data, epochs=3, learning_rate=0.01, seed=0)
        assert result.warnings == ()
        estimates.append(pv.log_marginal(vae.model, vae.guide, data, num_samples=20, seed=0))
    # log p(x) of the data themselves: what the change of units takes is log|dx/dy|, exactly.
    expected = estimates[1].log_prob - unit.double().log().sum()
    torch.testing.assert_close(estimates[0].log_prob, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        pv.tasks.reconstruct(raw.model, raw.guide, x, seed=0),
        loc + unit * pv.tasks.reconstruct(standard.model, standard.guide, y, seed=0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_fixed_sigma_stays_in_the_units_of_the_data():
    x = table()
    vae = make_vae(sigma=0.25)
    vae.standardize(x)
    assert vae.likelihood(torch.zeros(1, 2)).base_dist.scale.unique().tolist() == [0.25]


def test_images_larger_than_a_byte_keep_one_scale_and_start_at_their_mean_image():
    x = 128 + 40 * torch.randn(64, 1, 3, 3)
    vae = make_vae(data_shape=(1, 3, 3))
    vae.standardize(x)
    with torch.no_grad():
        likelihood = vae.likelihood(torch.zeros(2))
    assert vae.likelihood.scale.unique().numel() == 1
    assert (likelihood.mean - x.mean(0)).abs().max() < 40  # 1 in the units of the networks
    assert likelihood.base_dist.scale.mean() == pytest.approx(40, rel=0.1)


def test_standardised_vae_is_saved_copied_and_placed_with_its_units(tmp_path):
    vae = make_vae("per-column")
    vae.standardize(table())
    vae.standardize(table())  # again: the same, wrapped once
    assert not isinstance(vae.variational_family.encoder.encoder, pv.networks.Standardized)
    pv.save(vae, tmp_path / "saved")
    x = table()[:5]
    expected = pv.log_marginal(vae.model, vae.guide, x, num_samples=10, seed=0).log_prob
    for other in (pv.load(tmp_path / "saved"), copy.deepcopy(vae)):
        found = pv.log_marginal(other.model, other.guide, x, num_samples=10, seed=0).log_prob
        assert torch.equal(found, expected)
    assert vae.double().likelihood.loc.dtype == torch.float64


def test_pseudo_inputs_lie_among_the_data_and_train_in_the_networks_units():
    vae = make_vae(prior=lambda guide, shape: pv.priors.VampPrior(guide, shape, unit_interval=False))
    x = table()
    vae.standardize(x)
    torch.testing.assert_close(vae.prior.pseudo_inputs.mean(0), x.mean(0), rtol=0.1, atol=0.5)
    assert vae.prior.raw_pseudo_inputs.abs().max() < 6


def test_sigma_starts_at_the_deviation_of_the_data_once():
    x = 0.5 + 0.12 * torch.randn(4000, 4)
    for sigma in SIGMAS:
        vae = make_vae(sigma)
        pv.fit(vae.model, vae.guide, x, epochs=0)
        found = vae.likelihood(torch.zeros(2)).base_dist.scale
        # A second head's weights spread what it starts at.
        assert found.mean().item() == pytest.approx(0.12, rel=0.15 if sigma == "per-pixel" else 0.02)
        pv.fit(vae.model, vae.guide, x * 9, epochs=0)
        assert torch.equal(vae.likelihood(torch.zeros(2)).base_dist.scale, found)


def test_columns_that_do_not_vary_do_not_start_at_the_floor():
    vae = make_vae("per-column")
    vae.standardize(table())
    assert vae.likelihood(torch.zeros(2)).base_dist.scale[3] > 0.5


def test_missing_values_are_left_out_of_the_units():
    x = table()
    holed = x.clone()
    holed[::2, 0] = torch.nan
    vae = make_vae()
    vae.standardize(holed)
    assert vae.likelihood.loc[0].item() == pytest.approx(x[1::2, 0].mean().item())
    assert vae.likelihood(torch.zeros(2)).mean.isfinite().all()


def test_what_can_not_be_standardised_says_what_to_do():
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((4,), (8,))
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    bits = pv.VAE(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(decoder, (4,)), guide)
    with pytest.raises(
        pv.InputError, match="likelihood of real values to standardise, got Bernoulli"
    ):
        bits.standardize(torch.rand(10, 4))
    assert bits.variational_family.encoder is encoder
    own = pv.VAE(pv.priors.StandardNormal(2), nn.Linear(2, 4), guide)
    with pytest.raises(pv.InputError, match=r"\(x - mean\) / deviation, and subtract the sum of log"):
        own.standardize(torch.rand(10, 4))
    with pytest.raises(pv.InputError, match=r"shape \(N, 4\)"):
        make_vae().standardize(torch.full((10, 3), torch.nan))


def test_numbers_near_1_are_not_talked_about_and_others_are():
    x = np.random.default_rng(0).normal(size=(100, 3))
    assert describe_scale(torch.as_tensor(x)) is None
    assert "run from" in describe_scale(torch.as_tensor(x + 500))
    assert "deviations from 0.00" in describe_scale(torch.as_tensor(x / 1000))
    assert "run from" in describe_scale(torch.as_tensor(np.where(x > 2, np.nan, x * 1e4)))


@pytest.mark.filterwarnings("ignore:Encountered")
def test_advice_for_numbers_gone_wrong_begins_with_the_scale_of_the_data():
    x = 1e4 * torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    vae = make_vae(data_shape=(8,))
    with pytest.raises(pv.InputError, match=r"batch 1: the data run from .*: standardise them"):
        pv.fit(vae.model, vae.guide, x, epochs=1, seed=0)
    vae = make_vae(data_shape=(8,))
    (text,) = pv.fit(vae.model, vae.guide, x / 100, epochs=1, seed=0).warnings
    assert text.startswith("scale: the data run from ")
    vae = make_vae(data_shape=(8,))
    vae.standardize(x)
    assert pv.fit(vae.model, vae.guide, x, epochs=1, seed=0).warnings == ()
