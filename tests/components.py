"""Every prior, likelihood and family by name, and what their tests share."""

import functools
import math

import torch
from sklearn.datasets import load_digits
from torch import nn

from pyro_vae import guides, likelihoods, priors
from pyro_vae.networks import MLPDecoder, MLPEncoder

DATA_SHAPE = (2, 3)


def encoder(data_shape=DATA_SHAPE):
    return MLPEncoder(data_shape, (8,), activation="tanh")


def vamp(family, latent_dim, data_shape=DATA_SHAPE):
    return priors.VampPrior(
        family(encoder(data_shape), latent_dim),
        data_shape,
        num_pseudo_inputs=4,
        learn_weights=True,
    )


# Name -> constructor of latent_dim. The name is the class's, with what sets a variant apart after it.
FAMILIES = {
    "MeanFieldNormal": guides.MeanFieldNormal,
    "FullRankNormal": guides.FullRankNormal,
    "InverseAutoregressiveFlow": functools.partial(
        guides.InverseAutoregressiveFlow, hidden=(8, 8), context_features=4
    ),
    "NeuralSplineFlow": functools.partial(
        guides.NeuralSplineFlow, hidden=(8,), num_bins=4, context_features=4
    ),
    "MixtureOfNormals": functools.partial(guides.MixtureOfNormals, num_components=3),
    "VonMisesFisher": guides.VonMisesFisher,
    "Beta": guides.Beta,
}
PRIORS = {
    "StandardNormal": priors.StandardNormal,
    "StandardNormal learned": functools.partial(priors.StandardNormal, scale=0.7, learn_scale=True),
    "GaussianMixture": functools.partial(priors.GaussianMixture, num_components=3),
    "GaussianMixture fixed": functools.partial(
        priors.GaussianMixture, num_components=3, learn_weights=False, learn_components=False
    ),
    "VonMisesFisher": functools.partial(
        priors.VonMisesFisher, concentration=3.0, learn_loc=True, learn_concentration=True
    ),
    "VonMisesFisher fixed": priors.VonMisesFisher,
    "HypersphericalUniform": priors.HypersphericalUniform,
    "Beta": functools.partial(priors.Beta, concentration1=2.0, learn_concentrations=True),
    "Beta fixed": priors.Beta,
    "FlowPrior": functools.partial(priors.FlowPrior, hidden=(8, 8), num_bins=4),
} | {
    f"VampPrior {name}": functools.partial(vamp, functools.partial(family))
    for name, family in FAMILIES.items()
}
LIKELIHOODS = {
    "Bernoulli": likelihoods.Bernoulli,
    "ContinuousBernoulli": likelihoods.ContinuousBernoulli,
    "Gaussian": functools.partial(likelihoods.Gaussian, sigma=0.4),
    "Gaussian learned": functools.partial(likelihoods.Gaussian, sigma="learned"),
    "Gaussian per-pixel": functools.partial(likelihoods.Gaussian, sigma="per-pixel"),
    # Draws have moments of every order that the tests take.
    "StudentT": functools.partial(likelihoods.StudentT, df=30.0, sigma=0.4),
    "StudentT learned": functools.partial(likelihoods.StudentT, sigma="per-pixel"),
    "DiscretizedLogistic": functools.partial(likelihoods.DiscretizedLogistic, levels=17),
    "DiscretizedLogistic per-pixel": functools.partial(
        likelihoods.DiscretizedLogistic, levels=17, sigma="per-pixel"
    ),
    "Categorical": functools.partial(likelihoods.Categorical, num_categories=17),
    "Poisson": likelihoods.Poisson,
    "Poisson learned": functools.partial(likelihoods.Poisson, size_factor="learned"),
    "NegativeBinomial": likelihoods.NegativeBinomial,
    "NegativeBinomial learned": functools.partial(
        likelihoods.NegativeBinomial, size_factor="learned"
    ),
}
SUPPORT = {name: make(encoder(), 2).latent_support for name, make in FAMILIES.items()}
PRIOR_SUPPORT = {name: make(2).latent_support for name, make in PRIORS.items()}


def dimensions(support):
    """The latent dimensions that a grid can cover; the sphere in one dimension is two points."""
    return [2] if support == "unit sphere" else [1, 2]


FAMILIES_AND_DIMENSIONS = [
    (name, latent_dim) for name, support in SUPPORT.items() for latent_dim in dimensions(support)
]


def make_prior(name, latent_dim=2, *, seed=0):
    torch.manual_seed(seed)
    return shaken(PRIORS[name](latent_dim))


def make_family(name, latent_dim=2, *, seed=0):
    torch.manual_seed(seed)
    return shaken(FAMILIES[name](encoder(), latent_dim))


def make_likelihood(name, *, seed=0):
    torch.manual_seed(seed)
    decoder = MLPDecoder(decoder_dim(name, 2), (8,), activation="tanh")
    return shaken(LIKELIHOODS[name](decoder, DATA_SHAPE))


def decoder_dim(name, latent_dim):
    """Of counts with a learned size factor, one latent is that."""
    sized = name in ("Poisson learned", "NegativeBinomial learned")
    return latent_dim - sized


def likelihood_digits(likelihood):
    """The digits as the likelihood takes them: levels from 0 to 1, or whole numbers to 16."""
    return digits() * 16 if likelihood.step == 1 else digits()


def shaken(component):
    """Move every parameter off its start, where flows are the identity."""
    with torch.no_grad():
        for part in (component, getattr(component, "guide", None)):
            for parameter in part.parameters() if isinstance(part, nn.Module) else ():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return component


def in_double(component):
    guide = getattr(component, "guide", None)
    if guide is not None:
        guide.double()
    return component.double()


def some_latents(support, shape, latent_dim=2, dtype=torch.float32):
    z = torch.randn(*shape, latent_dim, dtype=dtype)
    if support == "unit sphere":
        return z / z.norm(dim=-1, keepdim=True)
    return z.sigmoid() if support == "unit interval" else z


def quadrature(support, latent_dim, shifts=16):
    """Return randomly shifted grids ``(shifts, points, latent_dim)`` and the log of their weights.

    Equal steps along the line (through the logit for the unit interval, along the angle for the
    circle), and their square in two dimensions. Over a uniform shift the sum is unbiased for the
    integral, so the spread over shifts is its standard error.
    """
    # Past these ends lie less than 1e-7 of every density here.
    end = {"real": 13.0, "unit interval": 34.0, "unit sphere": math.pi}[support]
    axes = 1 if support == "unit sphere" else latent_dim
    points = {1: 1000, 2: 100}[axes]
    step = 2 * end / points
    line = step * torch.arange(points, dtype=torch.float64) - end
    grid = torch.stack(torch.meshgrid(*[line] * axes, indexing="ij"), -1).reshape(-1, axes)
    nodes = grid + step * torch.rand(shifts, 1, axes, dtype=torch.float64)
    log_weights = torch.full(nodes.shape[:-1], axes * math.log(step), dtype=torch.float64)
    if support == "unit sphere":
        return torch.cat([nodes.cos(), nodes.sin()], -1), log_weights
    if support == "unit interval":
        log_slope = nn.functional.logsigmoid(nodes) + nn.functional.logsigmoid(-nodes)
        return nodes.sigmoid(), log_weights + log_slope.sum(-1)
    return nodes, log_weights


def integral(distribution, support, latent_dim):
    """Integrate 1 and the statistics under a density.

    Returns the integrals and their standard errors, each ``(*batch, 1 + statistics)``.
    """
    nodes, log_weights = quadrature(support, latent_dim)
    batch, grid = distribution.batch_shape, log_weights.shape
    with torch.no_grad():
        log_prob = distribution.log_prob(nodes.reshape(*grid, *[1] * len(batch), latent_dim))
    mass = (log_prob.reshape(*grid, -1) + log_weights[..., None]).exp()
    functions = torch.cat([torch.ones(*grid, 1, dtype=torch.float64), statistics(nodes)], -1)
    values = torch.einsum("sgb,sgf->sbf", mass, functions).reshape(len(nodes), *batch, -1)
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def statistics(z):
    """Return functions whose means tell distributions apart, ``(*batch, functions)``."""
    first, last = z[..., 0], z[..., -1]
    return torch.stack([first, last, first**2, first * last, (3 * first - last).cos()], -1)


def assert_density_and_draws(distribution, support, latent_dim, *draws):
    """Check that the density integrates to 1 and gives the means of each set of draws."""
    exact, error = integral(distribution, support, latent_dim)
    assert (error[..., 0] < 5e-3).all()
    assert ((exact[..., 0] - 1).abs() < 5 * error[..., 0] + 1e-6).all()
    for values in map(statistics, draws):
        standard_error = values.std(0) / math.sqrt(len(values))
        missing = (values.mean(0) - exact[..., 1:]).abs()
        assert (missing < 5 * (standard_error + error[..., 1:]) + 1e-6).all()


def assert_gradients(component, loss):
    loss.backward()
    for name, parameter in component.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@functools.cache
def digits():
    return torch.tensor(load_digits().data[:512] / 16, dtype=torch.float32)
