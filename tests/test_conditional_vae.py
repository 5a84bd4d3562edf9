"""The VAE with a condition: against an exact model, in every use, on disk, and what is refused."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.networks import Conditional, MLPDecoder, MLPEncoder

NUM_CLASSES = 3


def make_vae(prior=None, family=pv.guides.MeanFieldNormal, **options):
    torch.manual_seed(0)
    encoder = Conditional(MLPEncoder((6,), (8,)), NUM_CLASSES)
    decoder = Conditional(MLPDecoder(2 + NUM_CLASSES, (8,)), NUM_CLASSES)
    prior = pv.priors.StandardNormal(2) if prior is None else prior
    likelihood = pv.likelihoods.Bernoulli(decoder, (6,))
    return pv.ConditionalVAE(prior, likelihood, family(encoder, 2), num_classes=NUM_CLASSES)


def prior_of_condition():
    return pv.guides.MeanFieldNormal(MLPEncoder((NUM_CLASSES,), (8,)), 2)


def data(number=30):
    torch.manual_seed(1)
    labels = torch.arange(number) % NUM_CLASSES
    return torch.bernoulli(torch.rand(NUM_CLASSES, 6)[labels]), labels


class Line(nn.Module):
    """A normal around a mean that is linear in everything given."""

    def __init__(self, *slopes, scale):
        super().__init__()
        self.slopes, self.scale = slopes, scale
        self.offset = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, *given):
        loc = self.offset + sum(s * value for s, value in zip(self.slopes, given, strict=True))
        return dist.Normal(loc, torch.full_like(loc, self.scale)).to_event(1)


def test_covariates_enter_prior_likelihood_and_family_exactly():
    # z ~ N(c, 1), x ~ N(2 z + 3 c, 1/2^2): x ~ N(5 c, 4 + 1/4), and the posterior is linear in x, c.
    variance = 1 / (1 + 4 / 0.25)
    prior, likelihood = Line(1.0, scale=1.0), Line(2.0, 3.0, scale=0.5)
    guide = Line(variance * 8, variance * (1 - 24), scale=math.sqrt(variance))
    vae = pv.ConditionalVAE(prior, likelihood, guide)
    x, c = torch.randn(20, 1, dtype=torch.float64) * 3, torch.randn(20, dtype=torch.float64)
    exact = dist.Normal(5 * c, math.sqrt(4.25)).log_prob(x[:, 0])
    estimate = pv.log_marginal(vae.model, vae.guide, (x, c), num_samples=30, seed=0)
    torch.testing.assert_close(estimate.log_prob, exact)
    torch.testing.assert_close(estimate.pareto_k, torch.zeros_like(exact))


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of a pair that is hardly trained
@pytest.mark.parametrize("make_prior", [pv.priors.StandardNormal, lambda _: prior_of_condition()])
def test_labels_in_training_estimates_tasks_and_on_disk(tmp_path, monkeypatch, make_prior):
    monkeypatch.setattr("pyro_vae.evaluation.gap_decomposition._WINDOW", 5)
    vae, (x, labels) = make_vae(make_prior(2)), data()
    vae.start_at_data((x, labels))
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    result = pv.fit(
        vae.model, vae.guide, (x, labels), epochs=2, batch_size=10, seed=0,
        validation=(x, labels), objective=pv.infer.AnalyticKL(),
    )  # fmt: skip
    assert math.isfinite(result.history["validation_elbo"][-1])
    assert all(not torch.equal(value, before[name]) for name, value in vae.named_parameters())
    estimate = pv.log_marginal(vae.model, vae.guide, (x, labels), num_samples=200, seed=0)
    pv.save(vae, tmp_path / "run")
    loaded = pv.load(tmp_path / "run")
    assert (type(loaded), loaded.num_classes) == (pv.ConditionalVAE, NUM_CLASSES)
    again = pv.log_marginal(loaded.model, loaded.guide, (x, labels), num_samples=200, seed=0)
    torch.testing.assert_close(again.log_prob, estimate.log_prob, rtol=0, atol=0)
    gaps = pv.evaluation.inference_gaps(
        vae.model, vae.guide, (x, labels), seed=0,
        max_steps=5, num_samples=50, num_importance_samples=200,
    )  # fmt: skip
    assert gaps.elbo.isfinite().all()
    hidden = torch.zeros(30, 6, dtype=torch.bool)
    hidden[:, 3:] = True
    filled = pv.tasks.complete(
        vae.model, vae.guide, (x, labels), hidden, num_draws=4, num_steps=3, seed=0
    )
    torch.testing.assert_close(filled.mean[:, :3], x[:, :3])


def test_draws_follow_their_condition():
    vae, (x, labels) = make_vae(), data(150)
    vae.start_at_data((x, labels))
    pv.fit(vae.model, vae.guide, (x, labels), epochs=25, batch_size=50, learning_rate=0.06, seed=0)
    for label in range(NUM_CLASSES):
        like = torch.zeros(400, 6), torch.full((400,), label)
        drawn = pv.tasks.generate(vae.model, like, seed=0).mean(0)
        own = x[labels == label].mean(0)
        other = x[labels != label].mean(0)
        assert (drawn - own).norm() < 0.5 * (drawn - other).norm()


@pytest.mark.parametrize("kind", ["labels", "labels as numbers", "covariates"])
def test_conditions_reach_components_as_vectors(kind):
    vae = make_vae()
    if kind == "covariates":
        vae.num_classes = None
        c = torch.randn(5)
        torch.testing.assert_close(vae.as_vectors(c), c[:, None])
        torch.testing.assert_close(vae.as_vectors(c[:, None]), c[:, None])
        return
    labels = torch.tensor([0, 2, 1])
    labels = labels.float() if kind == "labels as numbers" else labels
    torch.testing.assert_close(vae.as_vectors(labels), torch.eye(3)[[0, 2, 1]])


def test_what_is_no_condition_is_refused():
    vae, (x, labels) = make_vae(), data()
    for given, message in (
        (x, "expected as many tensors as model"),
        ((x, labels, labels), "expected as many tensors as model"),
        (
            (x, labels + 1),
            r"expected labels \(N,\) from 0 to 2 as conditions, got shape \(30,\) and ",
        ),
        ((x, labels + 0.5), "values from 0.5 to 2.5"),
        ((x, torch.zeros(30, 2)), r"got shape \(30, 2\)"),
    ):
        with pytest.raises(pv.InputError, match=message):
            pv.log_marginal(vae.model, vae.guide, given)
    vae.num_classes = None
    with pytest.raises(pv.InputError, match="expected conditions as finite numbers"):
        vae.check_data(x, torch.full((30,), math.nan))
    with pytest.raises(pv.InputError, match="num_classes of at least 1, got 0"):
        pv.ConditionalVAE(vae.prior, vae.likelihood, vae.variational_family, num_classes=0)


def test_a_size_factor_beside_a_condition():
    torch.manual_seed(0)
    decoder = Conditional(MLPDecoder(2 + NUM_CLASSES, (8,)), NUM_CLASSES)
    likelihood = pv.likelihoods.Poisson(decoder, (6,), size_factor="observed")
    encoder = Conditional(MLPEncoder((6,), (8,), log1p=True), NUM_CLASSES)
    guide = pv.guides.FullRankNormal(encoder, 2)
    vae = pv.ConditionalVAE(pv.priors.StandardNormal(2), likelihood, guide, num_classes=NUM_CLASSES)
    x, labels = data()
    given = (x, labels, torch.linspace(1, 3, 30))
    vae.start_at_data(given)
    pv.fit(vae.model, vae.guide, given, epochs=1, batch_size=10, seed=0)
    like = torch.zeros(2, 6), torch.tensor([1, 1]), torch.tensor([1.0, 50.0])
    drawn = pv.tasks.generate(vae.model, like, seed=0)
    assert (drawn[1] > 5 * drawn[0]).all()


def test_covariates_and_data_keep_their_own_scales():
    torch.manual_seed(0)
    encoder = Conditional(MLPEncoder((2,), (8,)), 1)
    decoder = Conditional(MLPDecoder(2 + 1, (8,)), 1)
    likelihood = pv.likelihoods.Gaussian(decoder, (2,), sigma="learned")
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    vae = pv.ConditionalVAE(pv.priors.StandardNormal(2), likelihood, guide)
    year = torch.linspace(1990, 2020, 61)
    x = torch.stack([100 * year, torch.randn(61)], 1)
    x[::4, 1] = math.nan
    vae.standardize((x, year))
    for network in (encoder, decoder):
        torch.testing.assert_close(network.loc, torch.tensor([2005.0]))
        torch.testing.assert_close(network.scale, year.std(correction=0)[None])
    torch.testing.assert_close(likelihood.loc[0], x[:, 0].mean())
    column = x[:, 1][x[:, 1].isfinite()]
    torch.testing.assert_close(likelihood.scale[1], column.std(correction=0))
    # One unit of a covariate moves what the networks are given by one part of its deviation.
    with torch.no_grad():
        near = decoder(torch.zeros(1, 2), torch.tensor([[2005.0]]))
        torch.testing.assert_close(near, decoder.network(torch.zeros(1, 3)))


def test_pseudo_inputs_have_no_condition():
    encoder = Conditional(MLPEncoder((6,), (8,)), NUM_CLASSES)
    family = pv.guides.MeanFieldNormal(encoder, 2)
    with pytest.raises(pv.InputError, match="without pseudo-inputs, got VampPrior"):
        pv.ConditionalVAE(
            pv.priors.VampPrior(family, (6,)), make_vae().likelihood, family, num_classes=NUM_CLASSES
        )
