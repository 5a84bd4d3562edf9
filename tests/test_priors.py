"""What each prior promises beyond the common contract."""

import copy
import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae import guides, likelihoods, priors
from pyro_vae.distributions.normal import lower_cholesky, raw_cholesky
from pyro_vae.distributions.values import StableBeta
from pyro_vae.errors import InputError
from pyro_vae.networks import MLPDecoder, MLPEncoder
from pyro_vae.vae import VAE

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[0.0, 1.0], [-2.0, 0.5], [3.0, 3.0]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[1.0, 0.5], [0.5, 2.0]], [[0.3, -0.1], [-0.1, 0.2]], [[2.0, 0.0], [0.0, 0.01]]],
    dtype=torch.float64,
)


def exact_mixture_log_density(z):
    terms = [
        weight * scipy.stats.multivariate_normal(mean, covariance).pdf(z)
        for weight, mean, covariance in zip(
            WEIGHTS.numpy(), MEANS.numpy(), COVARIANCES.numpy(), strict=True
        )
    ]
    return np.log(sum(terms))


# --- Gaussian mixture -------------------------------------------------------------------------------


def test_gaussian_mixture_has_the_density_of_its_parameters():
    prior = priors.GaussianMixture.from_parameters(WEIGHTS, MEANS, COVARIANCES)
    z = torch.randn(50, 2, dtype=torch.float64)
    np.testing.assert_allclose(prior().log_prob(z), exact_mixture_log_density(z.numpy()))
    assert not list(prior.parameters())
    learned = priors.GaussianMixture.from_parameters(
        WEIGHTS, MEANS, COVARIANCES, learn_weights=True, learn_components=True
    )
    assert {name for name, _ in learned.named_parameters()} == {"logits", "means", "raw_cholesky"}
    torch.testing.assert_close(learned().log_prob(z).detach(), prior().log_prob(z))


@pytest.mark.parametrize("latent_dim", [1, 3, 40])
def test_gaussian_mixture_starts_with_the_moments_of_the_standard_normal(latent_dim):
    torch.manual_seed(0)
    prior = priors.GaussianMixture(latent_dim, 2000)
    means, factors = prior.means.detach(), lower_cholesky(prior.raw_cholesky.detach(), latent_dim)
    covariance = factors[0] @ factors[0].T
    torch.testing.assert_close(factors @ factors.mT, covariance.expand(2000, -1, -1))
    second = means.square()
    standard_error = second.std(0) / math.sqrt(2000)
    assert ((second.mean(0) + covariance.diagonal() - 1).abs() < 5 * standard_error).all()
    # Two means lie sqrt(2) standard deviations apart, whatever the dimension.
    squared = (means[::2] - means[1::2]).square().sum(-1) / covariance[0, 0]
    assert (squared.mean() - 2).abs() < 5 * squared.std() / math.sqrt(1000)
    torch.manual_seed(0)
    assert torch.equal(priors.GaussianMixture(latent_dim, 2000).means, prior.means)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (WEIGHTS[:2], MEANS, COVARIANCES, r"weights \(3,\) and covariances \(3, 2, 2\)"),
        (WEIGHTS, MEANS, COVARIANCES[:, :1], r"got \(3,\) and \(3, 1, 2\)"),
        (WEIGHTS * 2, MEANS, COVARIANCES, "positive weights summing to 1"),
        (torch.tensor([0.5, 0.5, 0.0]), MEANS, COVARIANCES, "positive weights summing to 1"),
        (WEIGHTS, MEANS, -COVARIANCES, "positive definite"),
    ],
)
def test_gaussian_mixture_refuses_what_is_no_mixture(weights, means, covariances, message):
    with pytest.raises(InputError, match=message):
        priors.GaussianMixture.from_parameters(weights, means, covariances)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_cholesky_factors_and_raw_numbers_are_inverse(size):
    raw = torch.randn(4, 3, size * (size + 1) // 2, dtype=torch.float64)
    factor = lower_cholesky(raw, size)
    assert factor.shape == (4, 3, size, size)
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(factor, factor.tril())
    torch.testing.assert_close(raw_cholesky(factor), raw)
    torch.testing.assert_close(torch.vmap(lambda row: lower_cholesky(row, size))(raw), factor)


# --- the sphere and the cube ------------------------------------------------------------------------


def test_von_mises_fisher_prior_starts_at_the_first_axis():
    z = torch.randn(20, 4, dtype=torch.float64)
    z = z / z.norm(dim=-1, keepdim=True)
    exact = scipy.stats.vonmises_fisher(np.eye(4)[0], 6.0).logpdf(z.numpy())
    p = priors.VonMisesFisher(4, concentration=6.0).double()()
    # The concentration passed through a float32 logarithm.
    np.testing.assert_allclose(p.log_prob(z), exact, rtol=1e-5)


def test_beta_prior_has_the_density_of_its_concentrations():
    z = torch.rand(20, 3, dtype=torch.float64)
    p = priors.Beta(3, concentration1=2.0, concentration0=0.5).double()()
    exact = scipy.stats.beta(2.0, 0.5).logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(p.log_prob(z), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentrations", [(1e-3, 1e-3), (0.003, 0.001), (0.02, 0.5), (2.0, 5.0)])
def test_beta_draws_follow_their_distribution(concentrations, dtype):
    one, zero = concentrations
    prior = priors.Beta(1, concentration1=one, concentration0=zero).to(dtype)
    torch.manual_seed(0)
    z = prior().sample((40000,)).double()
    exact = scipy.stats.beta(one, zero)
    for point in (0.01, 0.4, 0.6, 0.99):
        share = exact.cdf(point)
        error = math.sqrt(share * (1 - share) / len(z))
        assert abs((z <= point).double().mean() - share) < 5 * error + 1e-6


@pytest.mark.parametrize("concentration", [0.05, 0.7, 3.0])
def test_beta_draws_carry_the_gradient_of_their_mean(concentration):
    one = torch.tensor(concentration).double().requires_grad_()
    zero = torch.tensor(0.5).double().requires_grad_()
    torch.manual_seed(0)
    rows = [
        torch.stack(torch.autograd.grad(StableBeta(one, zero).rsample((1000,)).mean(), (one, zero)))
        for _ in range(100)
    ]
    found = torch.stack(rows)
    total = one + zero
    wanted = torch.stack(torch.autograd.grad(one / total, (one, zero)))
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - wanted).abs() < 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentration1", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("concentration0", [0.01, 1.0, 1e4])
def test_beta_draws_stay_inside_where_the_density_is_finite(concentration1, concentration0, dtype):
    prior = priors.Beta(
        5,
        concentration1=concentration1,
        concentration0=concentration0,
        learn_concentrations=True,
    ).to(dtype)
    p = prior()
    torch.manual_seed(0)
    z = p.rsample((2000,))
    assert ((z > 0) & (z < 1)).all()
    log_prob = p.log_prob(z)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in prior.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.StandardNormal(2, scale=0.0), "scale above 0"),
        (lambda: priors.Beta(2, concentration1=-1.0), "concentration1 above 0"),
        (lambda: priors.VonMisesFisher(2, concentration=math.inf), "concentration above 0"),
        (lambda: priors.GaussianMixture(2, 0), "num_components of at least 1"),
        (lambda: priors.FlowPrior(2, hidden=()), "hidden widths as whole numbers of at least 1"),
        (lambda: priors.FlowPrior(2, bound=0.0), "bound above 0"),
        (lambda: priors.VampPrior(nn.Identity(), (3,)), "family with an attribute latent_dim"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- VampPrior --------------------------------------------------------------------------------------


def make_vamp(**settings):
    torch.manual_seed(0)
    guide = guides.MeanFieldNormal(MLPEncoder((6,), (8,)), 2)
    return priors.VampPrior(guide, (6,), num_pseudo_inputs=4, **settings)


def make_vae(prior):
    return VAE(prior, likelihoods.Bernoulli(MLPDecoder(2, (8,)), (6,)), prior.guide)


def test_vamp_prior_is_the_mixture_of_the_posteriors_of_its_pseudo_inputs():
    prior = make_vamp(learn_weights=True)
    with torch.no_grad():
        prior.logits.copy_(torch.randn(4))
    z = torch.randn(10, 2)
    components = torch.stack([prior.guide(u).log_prob(z) for u in prior.pseudo_inputs], -1)
    expected = (prior.logits.log_softmax(-1) + components).logsumexp(-1)
    torch.testing.assert_close(prior().log_prob(z), expected)


@pytest.mark.parametrize("family", [guides.InverseAutoregressiveFlow, guides.FullRankNormal])
def test_vamp_prior_encodes_its_pseudo_inputs_once_per_call(family):
    torch.manual_seed(0)
    guide = family(MLPEncoder((6,), (8,)), 2)
    prior = priors.VampPrior(guide, (6,), num_pseudo_inputs=4)
    calls = []
    guide.encoder.register_forward_hook(lambda *_: calls.append(1))
    prior().expand((7, 3)).log_prob(torch.randn(7, 3, 2))
    assert len(calls) == 1


def test_vamp_prior_owns_its_pseudo_inputs_alone():
    prior = make_vamp(learn_weights=True)
    assert set(prior.state_dict()) == {"raw_pseudo_inputs", "logits"}
    assert {name for name, _ in prior.named_parameters()} == {"raw_pseudo_inputs", "logits"}
    vae = make_vae(prior)
    pointers = [tensor.data_ptr() for tensor in vae.state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_copy_of_a_vae_with_a_vamp_prior_points_to_its_own_family():
    vae = make_vae(make_vamp())
    for again in (copy.deepcopy(vae), copy.deepcopy(copy.deepcopy(vae))):
        assert again.prior.guide is again.variational_family
        assert again.variational_family is not vae.variational_family
    vae.double()
    assert vae.prior().sample().dtype == torch.float64


def test_training_moves_pseudo_inputs_and_family():
    vae = make_vae(make_vamp())
    before = copy.deepcopy(vae.state_dict())
    pyro.clear_param_store()
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(torch.rand(5, 6))
    names = list(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert len(names) == len(list(vae.parameters()))
    for name, value in vae.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_pseudo_inputs_start_at_the_data():
    torch.manual_seed(0)
    x = torch.rand(500, 6) * torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    prior = priors.VampPrior(
        guides.MeanFieldNormal(MLPEncoder((6,), (8,)), 2),
        (6,),
        num_pseudo_inputs=4000,
        unit_interval=False,
    )
    prior.start_at_data(x)
    start = prior.pseudo_inputs
    assert ((start.mean(0) - x.mean(0)).abs() <= 5 * x.std(0) / math.sqrt(4000)).all()
    assert ((start.std(0) - x.std(0)).abs() <= 5 * x.std(0) / math.sqrt(2 * 4000)).all()
    inside = make_vamp()
    inside.start_at_data(x)
    assert ((inside.pseudo_inputs > 0) & (inside.pseudo_inputs < 1)).all()
    torch.testing.assert_close(inside.pseudo_inputs[:, 0], torch.full((4,), 0.01))
    with pytest.raises(InputError, match=r"shape \(N, 6\), got \(5, 7\)"):
        inside.start_at_data(torch.rand(5, 7))


def test_vamp_prior_runs_in_the_mode_of_its_family():
    torch.manual_seed(0)
    encoder = nn.Sequential(MLPEncoder((6,), (8,)), nn.Dropout(0.5))
    encoder.out_shape = (8,)
    prior = priors.VampPrior(guides.MeanFieldNormal(encoder, 2), (6,), num_pseudo_inputs=4)
    vae, z = make_vae(prior), torch.randn(3, 2)
    assert not torch.equal(prior().log_prob(z), prior().log_prob(z))
    vae.eval()
    torch.testing.assert_close(prior().log_prob(z), prior().log_prob(z), rtol=0, atol=0)


# --- flow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 5])
def test_flow_prior_starts_near_the_standard_normal(latent_dim):
    torch.manual_seed(0)
    prior = priors.FlowPrior(latent_dim)
    z = torch.randn(1000, latent_dim)
    divergence = (priors.StandardNormal(latent_dim)().log_prob(z) - prior().log_prob(z)).mean()
    assert divergence.abs() < 0.1 * latent_dim


def test_flow_prior_is_right_after_an_optimiser_step():
    torch.manual_seed(0)
    prior = priors.FlowPrior(2, hidden=(8,))
    optimiser = torch.optim.SGD(prior.parameters(), lr=0.05)
    z = prior().sample((50,))
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = -prior().log_prob(z).mean()
        loss.backward()
        fresh = copy.deepcopy(prior)
        fresh.zero_grad()
        (-fresh().log_prob(z.clone()).mean()).backward()
        for mine, other in zip(prior.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("latent_dim", [2, 3, 5, 8])
def test_every_coordinate_of_the_flow_depends_on_every_other(latent_dim):
    torch.manual_seed(0)
    layers = 4 * math.ceil(math.log2(latent_dim))
    prior = priors.FlowPrior(latent_dim, num_layers=layers, hidden=(16,)).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    p = prior()

    def push(e):
        for layer in p.layers:
            e = layer(e[None], None)[0][0]
        return e

    e = torch.randn(latent_dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(push, e)
    assert (jacobian != 0).all()
    expected = p.base.log_prob(e) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(p.log_prob(push(e)), expected)
