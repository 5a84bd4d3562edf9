"""The VAE's loss is the textbook's; its names are unique; its parts must match."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.nn import functional as F

import pyro_vae as pv
from pyro_vae.infer import scale_latents

SHAPE, LATENT = (1, 4, 4), 3


def make_vae(likelihood="Bernoulli", **options):
    decoder = pv.networks.MLPDecoder(LATENT, (8,))
    return pv.VAE(
        pv.priors.StandardNormal(LATENT),
        getattr(pv.likelihoods, likelihood)(decoder, SHAPE, **options),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(SHAPE, (8,)), LATENT),
    )


def textbook_kl(vae, x):
    """1/2 sum(mu^2 + s^2 - 1 - log s^2), summed over the batch."""
    parameters = vae.variational_family.encode(x)
    loc, log_variance = parameters["loc"], parameters["log_variance"]
    return 0.5 * (loc**2 + log_variance.exp() - 1 - log_variance).sum()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_loss_is_cross_entropy_plus_beta_times_the_closed_form_kl(beta):
    vae, x = make_vae(), torch.rand(5, *SHAPE)
    model, guide = scale_latents(vae.model, beta), scale_latents(vae.guide, beta)
    # The loss is a sum over data: of a hundred copies it is that of as many draws.
    copies, calls = 100, 40
    draws = copies * calls
    with torch.no_grad():
        repeated = x.repeat(copies, 1, 1, 1)
        losses = [Trace_ELBO().loss(model, guide, repeated) / copies for _ in range(calls)]
        losses = torch.tensor(losses, dtype=torch.float64)
        family = vae.variational_family(x)
        z = family.sample((draws,))
        logits = vae.likelihood.logits(vae.likelihood.decoder(z))
        cross_entropy = (
            F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
            .flatten(1)
            .sum(1)
            .double()
        )
        exact_kl = textbook_kl(vae, x).item()
    estimate = losses.mean() - cross_entropy.mean()
    variance = losses.var() / calls + cross_entropy.var() / draws
    assert abs(estimate - beta * exact_kl) < 5 * variance.sqrt() + 1e-4


def test_gaussian_reconstruction_is_scaled_squared_error_plus_a_constant():
    sigma, x, z = 0.3, torch.rand(7, *SHAPE), torch.randn(7, LATENT)
    vae = make_vae("Gaussian", sigma=sigma)
    distribution = vae.likelihood(z)
    size = math.prod(SHAPE)
    mean_squared_error = (x - distribution.mean).square().flatten(1).mean(1)
    expected = size / (2 * sigma**2) * mean_squared_error + size * (
        math.log(sigma) + 0.5 * math.log(2 * math.pi)
    )
    torch.testing.assert_close(-distribution.log_prob(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, "learned", "per-pixel"])
def test_gradients_reach_every_parameter(sigma):
    vae, x = make_vae("Gaussian", sigma=sigma), torch.rand(5, *SHAPE)
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_stock_svi_trains_every_parameter():
    vae, x = make_vae(), torch.bernoulli(torch.rand(32, *SHAPE))
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    for name, value in vae.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_reparameterised_gradient_is_the_closed_form_in_one_dimension():
    """d/dmu and d/ds of E_q[log N(x; w z, 1) + log N(z; 0, 1) - log q] for q = N(mu, s^2)."""
    w, x, mu, scale = 1.7, torch.tensor([[0.4]]), 0.6, 0.5
    loc = torch.tensor(mu, requires_grad=True)
    log_scale = torch.tensor(math.log(scale), requires_grad=True)
    draws = 20_000

    def model(x):
        with pyro.plate("particles", draws, dim=-2), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w * z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("particles", draws, dim=-2), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(1), log_scale.exp()).to_event(1))

    trace = pyro.poutine.trace(guide).get_trace(x)
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace=trace)).get_trace(x)
    z = trace.nodes["z"]["value"]
    log_weight = (
        replayed.nodes["x"]["fn"].log_prob(x)
        + replayed.nodes["z"]["fn"].log_prob(z)
        - trace.nodes["z"]["fn"].log_prob(z)
    )
    noise = ((z - mu) / scale).detach()[:, 0, 0].double()
    # Each draw's gradient by the chain rule, for the standard error of their mean.
    residual = x.item() - w * (mu + scale * noise)
    d_z = w * residual - (mu + scale * noise)
    per_draw = {"loc": d_z, "log_scale": d_z * scale * noise + 1}
    exact = {
        "loc": w * (x.item() - w * mu) - mu,
        "log_scale": 1 - (1 + w**2) * scale**2,
    }
    gradients = torch.autograd.grad(log_weight.mean(), [loc, log_scale])
    for (name, values), gradient in zip(per_draw.items(), gradients, strict=True):
        standard_error = values.std() / math.sqrt(draws)
        assert abs(gradient.item() - values.mean()) < 1e-3, name
        assert abs(gradient.item() - exact[name]) < 5 * standard_error + 1e-6, name


def test_names_are_unique_and_a_copy_gets_its_own():
    first, second = make_vae(), make_vae()
    copied = copy.deepcopy(first)
    assert len({first.name, second.name, copied.name}) == 3
    torch.testing.assert_close(copied.state_dict(), first.state_dict())


def test_training_a_copy_leaves_the_original_alone():
    original = make_vae()
    copied = copy.deepcopy(original)
    before = copy.deepcopy(original.state_dict())
    x = torch.bernoulli(torch.rand(16, *SHAPE))
    for vae in (original, copied):  # both names must be bound for a clash to show
        Trace_ELBO().loss(vae.model, vae.guide, x)
    pv.fit(copied.model, copied.guide, x, epochs=2, device="cpu")
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)
    assert any(not torch.equal(value, before[name]) for name, value in copied.state_dict().items())


def test_latent_sizes_must_agree():
    with pytest.raises(pv.InputError, match="expected one latent dimension"):
        pv.VAE(
            pv.priors.StandardNormal(2),
            pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(3), SHAPE),
            pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(SHAPE), 3),
        )


def test_a_vamp_prior_of_another_family_is_refused():
    vae = make_vae()
    other = make_vae().variational_family
    with pytest.raises(pv.InputError, match="family of the same VAE"):
        pv.VAE(
            pv.priors.VampPrior(other, SHAPE, num_pseudo_inputs=3),
            vae.likelihood,
            vae.variational_family,
        )


def test_a_lambda_is_a_component():
    vae = make_vae()
    own = pv.VAE(
        lambda: dist.Normal(torch.zeros(LATENT), 2.0).to_event(1),
        vae.likelihood,
        vae.variational_family,
    )
    x = torch.bernoulli(torch.rand(16, *SHAPE))
    result = pv.fit(own.model, own.guide, x, epochs=2, device="cpu", seed=0)
    assert math.isfinite(result.history["train_elbo"][-1])
    estimate = pv.log_marginal(own.model, own.guide, x, num_samples=10)
    assert estimate.log_prob.isfinite().all()


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        ("Bernoulli", torch.full((2, *SHAPE), 255.0), "divide by"),
        ("Bernoulli", torch.full((2, *SHAPE), -0.1), r"in \[0, 1\]"),
        ("Gaussian", torch.full((2, *SHAPE), math.nan), "finite"),
        ("Gaussian", torch.full((2, *SHAPE), math.inf), "finite"),
        ("Gaussian", torch.zeros(2, 3), "shape"),
    ],
)
def test_data_outside_the_support_are_refused(likelihood, x, message):
    with pytest.raises(pv.InputError, match=message):
        make_vae(likelihood).check_data(x)


def test_output_bias_starts_at_the_mean():
    mean = torch.linspace(0.1, 0.9, 16).reshape(SHAPE)
    vae = make_vae()
    vae.likelihood.start_at_mean(mean)
    with torch.no_grad():
        vae.likelihood.logits.map.weight.zero_()
    torch.testing.assert_close(vae.likelihood(torch.zeros(1, LATENT)).mean[0], mean)


def test_a_prior_of_several_distributions_is_refused_in_one_line():
    whole, x = make_vae(), torch.rand(5, *SHAPE)
    prior = lambda: dist.Laplace(torch.zeros(LATENT), 1.0)  # noqa: E731
    vae = pv.VAE(prior, whole.likelihood, whole.variational_family)
    with pytest.raises(pv.InputError, match=r"got batch shape \(3,\).*add \.to_event\(1\)$"):
        pv.fit(vae.model, vae.guide, x, epochs=1)
    with pytest.raises(pv.InputError, match=r"add \.to_event\(1\)$"):
        pv.log_marginal(vae.model, vae.guide, x, num_samples=5)


def test_training_starts_at_the_data():
    x = torch.rand(50, *SHAPE)
    vae = make_vae("Gaussian", sigma=0.1)
    vae.start_at_data(x)
    torch.testing.assert_close(vae.likelihood.mean.map.bias.view(SHAPE), x.mean(0))
    guide = vae.variational_family
    prior = pv.priors.VampPrior(guide, SHAPE, num_pseudo_inputs=400, unit_interval=False)
    vae = pv.VAE(prior, vae.likelihood, guide)
    vae.start_at_data(x.double().numpy() + 3)  # of another type, as an array
    torch.testing.assert_close(vae.likelihood.mean.map.bias.view(SHAPE), x.mean(0) + 3)
    error = x.std() / 20
    assert (prior.pseudo_inputs.mean(0) - x.mean(0) - 3).abs().max() < 5 * error


def test_bits_and_bytes_have_a_mean_to_start_at():
    bits = torch.tensor([[0, 1], [1, 1]])
    likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (4,)), (2,))
    guide = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((2,), (4,)), 2)
    pv.VAE(pv.priors.StandardNormal(2), likelihood, guide).start_at_data(bits)
    expected = torch.tensor([0.5, 0.999])
    torch.testing.assert_close(likelihood.logits.map.bias.sigmoid(), expected)


class WithoutMean(pv.likelihoods.Likelihood):
    """A likelihood of the user's own that can't start anywhere."""


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (lambda z: dist.Normal(z, 1).to_event(1), torch.rand(5, 3), "got function: give it start_at"),
        (WithoutMean(torch.nn.Identity(), (3,)), torch.rand(5, 3), "got WithoutMean: give it start"),
        (make_vae().likelihood, torch.rand(5, 3), r"expected data of shape \(N, 1, 4, 4\)"),
        (make_vae().likelihood, torch.rand(5, *SHAPE) + 1, r"expected x in \[0, 1\]"),
        (make_vae().likelihood, torch.rand(0, *SHAPE), "at least one datum to start at"),
        (make_vae().likelihood, {"x": 1}, "got dict: for a Dataset pass data.train"),
    ],
)
def test_what_cannot_start_at_the_data_is_refused(likelihood, x, message):
    vae = make_vae()
    vae = pv.VAE(vae.prior, likelihood, vae.variational_family)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(pv.InputError, match=message) as caught:
        vae.start_at_data(x)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
