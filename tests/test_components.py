"""The contract of every prior, likelihood and family: all tests over all of them."""

import math

import pytest
import torch
from components import (
    DATA_SHAPE,
    FAMILIES,
    FAMILIES_AND_DIMENSIONS,
    LIKELIHOODS,
    PRIOR_SUPPORT,
    PRIORS,
    SUPPORT,
    assert_density_and_draws,
    assert_gradients,
    digits,
    dimensions,
    encoder,
    in_double,
    make_family,
    make_likelihood,
    make_prior,
    quadrature,
    some_latents,
    statistics,
)

from pyro_vae import guides, likelihoods, priors
from pyro_vae.errors import InputError
from pyro_vae.networks import MLPEncoder

# --- every public class is here ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "constructors", "base"),
    [
        (priors, PRIORS, priors.Prior),
        (likelihoods, LIKELIHOODS, likelihoods.Likelihood),
        (guides, FAMILIES, guides.VariationalFamily),
    ],
)
def test_every_public_class_has_a_constructor_here(module, constructors, base):
    public = {name for name in module.__all__ if getattr(module, name) is not base}
    assert public == {name.split()[0] for name in constructors}
    assert all(issubclass(getattr(module, name), base) for name in public)


# --- priors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_prior_shapes(name):
    prior = make_prior(name)
    p = prior()
    assert p.batch_shape == ()
    assert p.event_shape == (prior.latent_dim,) == (2,)
    for sample_shape in ((), (5,), (4, 5)):
        z = p.sample(sample_shape)
        assert z.shape == (*sample_shape, 2)
        assert z.dtype == torch.float32
        assert p.log_prob(z).shape == sample_shape
    expanded = p.expand((4, 5))
    z = expanded.sample()
    assert z.shape == (4, 5, 2)
    assert len(z.reshape(20, 2).unique(dim=0)) == 20
    torch.testing.assert_close(expanded.log_prob(z), prior().log_prob(z.clone()))


@pytest.mark.parametrize("name", PRIORS)
def test_prior_gradients(name):
    prior = make_prior(name)
    z = some_latents(prior.latent_support, (20,))
    p = prior()
    if not list(prior.parameters()):
        assert not p.log_prob(z).requires_grad
        return
    assert_gradients(prior, p.log_prob(z).sum())


@pytest.mark.parametrize(
    ("name", "latent_dim"),
    [
        pytest.param(
            name,
            latent_dim,
            # Flows on the whole grid take seconds; one of a family is in the fast part.
            marks=pytest.mark.slow if "Flow" in name and latent_dim == 2 else (),
        )
        for name, support in PRIOR_SUPPORT.items()
        for latent_dim in dimensions(support)
    ],
)
def test_prior_density_and_draws(name, latent_dim):
    support = PRIOR_SUPPORT[name]
    p = in_double(make_prior(name, latent_dim))()
    torch.manual_seed(1)
    assert_density_and_draws(p, support, latent_dim, p.sample((20000,)))


@pytest.mark.parametrize("name", PRIORS)
def test_prior_state_and_precision(name):
    prior, other = make_prior(name, seed=0), make_prior(name, seed=1)
    if hasattr(prior, "guide"):
        other.guide.load_state_dict(prior.guide.state_dict())
    other.load_state_dict(prior.state_dict())
    z = some_latents(prior.latent_support, (20,), dtype=torch.float64)
    single = prior().log_prob(z.float())
    torch.testing.assert_close(other().log_prob(z.float()), single, rtol=0, atol=0)
    double = in_double(prior)()
    assert double.sample().dtype == double.log_prob(z).dtype == torch.float64
    torch.testing.assert_close(double.log_prob(z).float(), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRIORS)
def test_prior_scores_under_vmap(name):
    prior = make_prior(name)
    z = some_latents(prior.latent_support, (3, 5))
    scored = torch.vmap(lambda value: prior().expand((5,)).log_prob(value))(z)
    torch.testing.assert_close(scored, prior().log_prob(z))


# --- families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (5,), (4, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_shapes(name, batch):
    family = make_family(name, 3)
    x = torch.rand(*batch, *DATA_SHAPE)
    parameters = family.encode(x)
    assert all(value.shape[: len(batch)] == batch for value in parameters.values())
    q = family(x)
    assert q.batch_shape == batch
    assert q.event_shape == (3,) == (family.latent_dim,)
    for sample_shape in ((), (6,), (2, 6)):
        z = q.rsample(sample_shape)
        assert z.shape == (*sample_shape, *batch, 3)
        assert q.log_prob(z).shape == (*sample_shape, *batch)
    value = q.sample()
    torch.testing.assert_close(q.log_prob(value), family.distribution(parameters).log_prob(value))


@pytest.mark.parametrize("name", FAMILIES)
def test_family_accepts_any_parameters(name):
    family = make_family(name, 3)
    torch.manual_seed(1)
    for scale in (0.1, 3.0, 10.0):
        parameters = {
            key: (scale * torch.randn_like(value)).requires_grad_()
            for key, value in family.encode(torch.rand(50, *DATA_SHAPE)).items()
        }
        q = family.distribution(parameters)
        z = q.rsample()
        log_prob = q.log_prob(z)
        assert z.isfinite().all()
        assert log_prob.isfinite().all()
        (log_prob.sum() + z.square().sum()).backward()
        assert all(value.grad.isfinite().all() for value in parameters.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_family_starts_near_the_prior(name):
    torch.manual_seed(0)
    family = FAMILIES[name](MLPEncoder((64,), (64,)), 8)
    z = family(digits()).rsample((20,))
    assert z.isfinite().all()
    # Within a factor of 2 of the root mean square of N(0, I), the uniform sphere, the uniform cube.
    wanted = {"real": 1.0, "unit sphere": 8**-0.5, "unit interval": 3**-0.5}[SUPPORT[name]]
    assert wanted / 2 < z.square().mean().sqrt() < 2 * wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_family_expands_to_independent_particles(name):
    family = in_double(make_family(name, 3))
    x = torch.rand(5, *DATA_SHAPE, dtype=torch.float64)
    q = family(x)
    particles = q.expand((7, 5))
    assert particles.batch_shape == (7, 5)
    z = particles.rsample()
    assert z.shape == (7, 5, 3)
    assert len(z.reshape(35, 3).unique(dim=0)) == 35
    torch.testing.assert_close(particles.log_prob(z), q.log_prob(z.clone()))
    one_by_one = torch.stack([family(row).log_prob(z[:, i]) for i, row in enumerate(x)], -1)
    torch.testing.assert_close(particles.log_prob(z), one_by_one)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_gradients(name):
    family = make_family(name)
    q = family(torch.rand(10, *DATA_SHAPE))
    z = q.rsample()
    assert_gradients(family, (q.log_prob(z) + z.square().sum(-1) + z[..., 0]).sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_family_scores_draws_and_foreign_points_alike(name):
    family = in_double(make_family(name, 3))
    x = torch.rand(10, *DATA_SHAPE, dtype=torch.float64)
    q = family(x)
    fixed = q.sample()
    # A point drawn without a graph must still give the parameters their gradients.
    with_graph = torch.autograd.grad(q.log_prob(fixed).sum(), family.parameters())
    fresh = torch.autograd.grad(family(x).log_prob(fixed.clone()).sum(), family.parameters())
    for left, right in zip(with_graph, fresh, strict=True):
        torch.testing.assert_close(left, right)
    # And the gradient with respect to the point must not pass through how it was drawn.
    z = fixed.clone().requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(z).sum(), z)
    assert slope.isfinite().all()
    drawn = q.rsample()
    torch.testing.assert_close(q.log_prob(drawn), q.log_prob(drawn.clone()))


@pytest.mark.parametrize(("name", "latent_dim"), FAMILIES_AND_DIMENSIONS)
def test_family_density_and_draws(name, latent_dim):
    support = SUPPORT[name]
    family = in_double(make_family(name, latent_dim))
    q = family(torch.rand(2, *DATA_SHAPE, dtype=torch.float64))
    torch.manual_seed(1)
    draws, particles = q.sample((20000,)), q.expand((20000, 2)).sample()
    assert_density_and_draws(q, support, latent_dim, draws, particles)


@pytest.mark.parametrize(("name", "latent_dim"), FAMILIES_AND_DIMENSIONS)
def test_family_gradient_through_draws_is_unbiased(name, latent_dim):
    support = SUPPORT[name]
    torch.manual_seed(3)
    family = in_double(make_family(name, latent_dim))
    with torch.no_grad():
        parameters = family.encode(torch.rand(DATA_SHAPE, dtype=torch.float64))
        # Parameters of some size: mixtures with unequal weights, flows that bend.
        parameters = {key: value + torch.randn_like(value) / 2 for key, value in parameters.items()}
    weights = torch.tensor([1.0, 0.5, 0.3, 0.7, 2.0], dtype=torch.float64)

    def copies(number):
        """One leaf per draw or grid, so that each has its own gradient."""
        return {
            key: value.expand(number, *value.shape).clone().requires_grad_()
            for key, value in parameters.items()
        }

    drawn = copies(3000)
    z = family.distribution(drawn).rsample()
    (statistics(z) @ weights).sum().backward()

    nodes, log_weights = (part.transpose(0, 1) for part in quadrature(support, latent_dim, 6))
    exact = copies(nodes.shape[1])
    mass = (family.distribution(exact).log_prob(nodes) + log_weights).exp()
    (mass * (statistics(nodes) @ weights)).sum().backward()

    for key in parameters:
        estimate, wanted = drawn[key].grad, exact[key].grad
        variance = estimate.var(0) / len(estimate) + wanted.var(0) / len(wanted)
        assert ((estimate.mean(0) - wanted.mean(0)).abs() < 5 * variance.sqrt() + 1e-6).all(), key
        assert (wanted.mean(0).abs() > 1e-4).any(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_family_state_and_precision(name):
    family, other = make_family(name, seed=0), make_family(name, seed=1)
    other.load_state_dict(family.state_dict())
    x = torch.rand(20, *DATA_SHAPE, dtype=torch.float64)
    z = family(x.float()).sample()
    single = family(x.float()).log_prob(z)
    torch.testing.assert_close(other(x.float()).log_prob(z), single, rtol=0, atol=0)
    q = in_double(family)(x)
    assert q.rsample().dtype == q.log_prob(z.double()).dtype == torch.float64
    torch.testing.assert_close(q.log_prob(z.double()).float(), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_scores_under_vmap(name):
    family = make_family(name)
    q = family(torch.rand(5, *DATA_SHAPE))
    z = q.sample((3,))
    scored = torch.vmap(q.log_prob)(z)
    torch.testing.assert_close(scored, q.log_prob(z))


@pytest.mark.parametrize("make", [*PRIORS.values(), *FAMILIES.values()])
def test_latent_dimension_must_be_a_whole_number_large_enough(make):
    inputs = (encoder(),) if make in FAMILIES.values() else ()
    smallest = 2 if make(*inputs, 2).latent_support == "unit sphere" else 1
    for wrong, message in (
        (smallest - 1, f"latent_dim of at least {smallest}"),
        (2.5, "latent_dim as a whole number"),
        ("two", "latent_dim as a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            make(*inputs, wrong)


# --- likelihoods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (5,), (4, 5)])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_shapes(name, batch):
    likelihood = make_likelihood(name)
    p = likelihood(torch.randn(*batch, 2))
    assert p.batch_shape == batch
    assert p.event_shape == DATA_SHAPE
    x = p.sample()
    assert x.shape == (*batch, *DATA_SHAPE) == p.mean.shape
    assert p.log_prob(x).shape == batch
    expanded = p.expand((7, *batch))
    assert expanded.sample().shape == (7, *batch, *DATA_SHAPE)
    torch.testing.assert_close(expanded.log_prob(x), p.log_prob(x).expand(7, *batch))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_gradients(name):
    likelihood = make_likelihood(name)
    p = likelihood(torch.randn(9, 2))
    assert_gradients(likelihood, p.log_prob(p.sample()).sum())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_density_and_draws(name):
    likelihood = make_likelihood(name).double()
    torch.manual_seed(1)
    pixels = likelihood(torch.randn(2, dtype=torch.float64)).base_dist
    step = 1.0 if name == "Bernoulli" else likelihood.step
    if step is not None:
        high = min(likelihood.accepts[1], 400.0)  # past it lies nothing of the counts here
        nodes = torch.linspace(0, high, round(high / step) + 1, dtype=torch.float64)
        weights = torch.ones_like(nodes)
    else:
        low, high = (0.0, 1.0) if likelihood.accepts[0] == 0 else (-16.0, 16.0)
        nodes = torch.linspace(low, high, 20001, dtype=torch.float64)
        weights = torch.full_like(nodes, (high - low) / 20000)
        weights[[0, -1]] /= 2
        if low < 0:  # the whole line, heavy tails and all: a grid of equal steps is bent by sinh
            nodes, weights = nodes.sinh(), weights * nodes.cosh()
    mass = (pixels.log_prob(nodes.reshape(-1, 1, 1)).exp() * weights.reshape(-1, 1, 1)).detach()
    # The trapezoid rule with this step is right to 1e-7 for slopes of the size met here.
    torch.testing.assert_close(
        mass.sum(0), torch.ones(DATA_SHAPE, dtype=torch.float64), rtol=0, atol=1e-6
    )
    draws = pixels.sample((20000,))
    for power in (1, 2):
        exact = (mass * nodes.reshape(-1, 1, 1) ** power).sum(0)
        values = draws**power
        standard_error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - exact).abs() < 5 * standard_error + 1e-6).all()
    exact_mean = (mass * nodes.reshape(-1, 1, 1)).sum(0)
    torch.testing.assert_close(pixels.mean.detach(), exact_mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihood_state_precision_and_vmap(name):
    likelihood, other = make_likelihood(name, seed=0), make_likelihood(name, seed=1)
    other.load_state_dict(likelihood.state_dict())
    z = torch.randn(6, 2)
    x = likelihood(z).sample()
    single = likelihood(z).log_prob(x)
    torch.testing.assert_close(other(z).log_prob(x), single, rtol=0, atol=0)
    over_z = torch.vmap(lambda row, datum: likelihood(row).log_prob(datum))(z, x)
    torch.testing.assert_close(over_z, single)
    p = likelihood.double()(z.double())
    assert p.sample().dtype == p.log_prob(x.double()).dtype == torch.float64
    torch.testing.assert_close(p.log_prob(x.double()).float(), single, rtol=1e-4, atol=1e-4)


# --- devices ----------------------------------------------------------------------------------------

# "meta" computes no numbers but refuses, as a GPU does, to mix its tensors with those of the CPU.
DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((make_prior, name) for name in PRIORS),
        *((make_family, name) for name in FAMILIES),
        *((make_likelihood, name) for name in LIKELIHOODS),
    ],
)
def test_component_moves_to_another_device(make, name, device):
    component = make(name)
    if hasattr(component, "guide"):
        component.guide.to(device)
    component.to(device)
    inputs = {
        make_prior: (),
        make_family: (torch.rand(5, *DATA_SHAPE, device=device),),
        make_likelihood: (torch.randn(5, 2, device=device),),
    }[make]
    distribution = component(*inputs)
    value = torch.rand(distribution.shape(), device=device)
    assert distribution.log_prob(value).device.type == device
    # torch's Dirichlet and gamma samplers, on which these rest, do not exist on "meta".
    lacking = ("Beta", "StudentT", "NegativeBinomial")
    if device != "meta" or not any(kind in name for kind in lacking):
        assert distribution.sample().device.type == device
