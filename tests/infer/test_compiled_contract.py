"""What CompiledTrace_ELBO keeps of Trace_ELBO's contract, and the weight beta."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_pairs import compiled, make_constrained, make_vae
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_vae.errors import InputError
from pyro_vae.infer.compiled import CompiledTrace_ELBO

# --- beta ---


def test_beta_scales_the_latent_terms_without_recapture(x):
    model, guide = make_vae()
    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    vae = model.__self__
    for beta in (1.0, 0.25, 0.0):
        elbo.beta = beta
        vae.zero_grad(set_to_none=True)
        pyro.set_rng_seed(5)
        loss = elbo.loss_and_grads(model, guide, x)
        found = [p.grad for p in vae.parameters()]
        pyro.set_rng_seed(5)
        z = dist.Normal(vae.loc(vae.encoder(x)), vae.scale(vae.encoder(x)).exp()).to_event(1)
        value = z.rsample()
        prior = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        fit = dist.Bernoulli(logits=vae.decoder(value)).to_event(1).log_prob(x).sum()
        expected = beta * (z.log_prob(value) - prior.log_prob(value)).sum() - fit
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(expected, list(vae.parameters()), allow_unused=True)
        for gradient, own in zip(gradients, found, strict=True):
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5)
    assert elbo.num_graphs == 1


def test_beta_in_loss_and_differentiable_loss(x):
    model, guide = make_vae()
    elbo = compiled(beta=0.0)
    pyro.set_rng_seed(1)
    loss = elbo.loss(model, guide, x)
    pyro.set_rng_seed(1)
    assert elbo.differentiable_loss(model, guide, x).item() == pytest.approx(loss)
    pyro.set_rng_seed(1)
    assert elbo.loss_and_grads(model, guide, x) == pytest.approx(loss)
    pyro.set_rng_seed(1)
    assert Trace_ELBO().loss(model, guide, x) != pytest.approx(loss)


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf")])
def test_beta_must_be_a_weight(beta):
    with pytest.raises(InputError, match="beta must be finite and at least 0"):
        CompiledTrace_ELBO(beta=beta)


# --- preserved ---


def test_parameter_sites_are_emitted_each_step(x):
    model, guide = make_vae()
    with poutine.trace(param_only=True) as expected:
        Trace_ELBO().loss_and_grads(model, guide, x)
    elbo = compiled()
    for _ in range(3):
        with poutine.trace(param_only=True) as found:
            elbo.loss_and_grads(model, guide, x)
        assert set(found.trace.nodes) == set(expected.trace.nodes)
        for name, site in found.trace.nodes.items():
            other = expected.trace.nodes[name]
            assert site["value"].unconstrained() is other["value"].unconstrained()
            assert set(site) == set(other)
            assert site["type"] == "param"


def test_constrained_parameter_sites_are_emitted_with_their_value():
    model, guide = make_constrained()
    elbo = compiled()
    for _ in range(2):
        with poutine.trace(param_only=True) as found:
            elbo.loss_and_grads(model, guide, torch.tensor(1.0))
        value = found.trace.nodes["scale"]["value"]
        assert value.item() == pytest.approx(2.0)
        assert value.unconstrained() is dict(pyro.get_param_store().named_parameters())["scale"]


def test_loss_is_the_elbo_and_all_three_ways_agree(x):
    model, guide = make_vae()
    elbo, stock = compiled(), Trace_ELBO()
    elbo.loss_and_grads(model, guide, x)
    values = []
    for estimate in (stock.loss, elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        pyro.set_rng_seed(2)
        value = estimate(model, guide, x)
        values.append(value.item() if isinstance(value, torch.Tensor) else value)
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    assert isinstance(elbo.loss_and_grads(model, guide, x), float)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    assert isinstance(svi.evaluate_loss(x), float)


def test_nan_warns_or_raises_as_stock_does(x):
    model, guide = make_vae()
    elbo = compiled()
    for is_on in (False, True):
        with pyro.validation_enabled(is_on):
            elbo.loss_and_grads(model, guide, x)
    with torch.no_grad():
        model.__self__.loc.bias.fill_(float("nan"))
    with (
        pyro.validation_enabled(False),
        pytest.warns(UserWarning, match="Encountered NaN: loss"),
    ):
        elbo.loss_and_grads(model, guide, x)
    with pytest.raises(ValueError, match="Expected parameter loc"):
        elbo.loss_and_grads(model, guide, x)
    assert elbo.num_graphs == 2


def test_gradients_accumulate_over_calls(x):
    model, guide = make_vae()
    elbo = compiled()
    elbo.loss_and_grads(model, guide, x)
    gradients = []
    for seeds in ((1,), (2,), (1, 2)):
        model.__self__.zero_grad(set_to_none=True)
        for seed in seeds:
            pyro.set_rng_seed(seed)
            elbo.loss_and_grads(model, guide, x)
        gradients.append([p.grad.clone() for p in model.__self__.parameters()])
    for one, two, both in zip(*gradients, strict=True):
        torch.testing.assert_close(one + two, both)


def test_frozen_parameters_keep_no_gradient(x):
    model, guide = make_vae()
    vae = model.__self__
    vae.eval()
    vae.decoder.requires_grad_(False)
    elbo = compiled()
    for _ in range(2):
        elbo.loss_and_grads(model, guide, x)
    assert elbo.num_graphs == 1
    assert all(p.grad is None for p in vae.decoder.parameters())
    assert all(p.grad is not None for p in vae.encoder.parameters())
