"""Pairs and helpers for the tests of the objectives: small, fast, with parameters Pyro knows."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv


def standard_vae(family=pv.guides.MeanFieldNormal):
    """A posterior of that family under a standard normal prior."""
    posterior = family(pv.networks.MLPEncoder((4,), (5,)), 2)
    likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (5,)), (4,))
    return pv.VAE(pv.priors.StandardNormal(2), likelihood, posterior)


def standard_pair():
    vae = standard_vae()
    modules = nn.ModuleDict({"guide": vae.variational_family, "model": vae.likelihood})
    return vae.model, vae.guide, modules


def vamp_pair():
    """The encoder stands in the prior too, and has a generative gradient beside the guide's."""
    family = pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((4,), (5,)), 2)
    prior = pv.priors.VampPrior(family, (4,), num_pseudo_inputs=3)
    likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (5,)), (4,))
    vae = pv.VAE(prior, likelihood, family)
    modules = nn.ModuleDict({"guide": family, "model": nn.ModuleList([prior, likelihood])})
    return vae.model, vae.guide, modules


class Hierarchy(nn.Module):
    """q(z1 given x) q(z2 given z1, x) against p(z2) p(z1 given z2) p(x given z1)."""

    def __init__(self, concatenates=False):
        super().__init__()
        self.concatenates = concatenates
        self.guide_part = nn.ModuleDict(
            {
                "first": nn.Linear(4, 4),
                "second": nn.Linear(6, 4) if concatenates else nn.Linear(2, 4),
                "shift": nn.Linear(4, 4),
            }
        )
        self.model_part = nn.ModuleDict({"prior": nn.Linear(2, 4), "pixels": nn.Linear(2, 4)})

    @staticmethod
    def normal(parameters):
        loc, log_scale = parameters.tanh().chunk(2, -1)
        return dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)

    def model(self, x):
        pyro.module("hierarchy.model", self.model_part)
        with pyro.plate("data", len(x)):
            standard = dist.Normal(x.new_zeros(2), x.new_ones(2), validate_args=False)
            z2 = pyro.sample("z2", standard.to_event(1))
            z1 = pyro.sample("z1", self.normal(self.model_part["prior"](z2)))
            pixels = dist.Bernoulli(logits=self.model_part["pixels"](z1), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("hierarchy.guide", self.guide_part)
        part = self.guide_part
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.normal(part["first"](x)))
            if self.concatenates:
                parameters = part["second"](torch.cat([z1, x], -1))
            else:
                parameters = part["second"](z1.tanh()) + part["shift"](x)
            pyro.sample("z2", self.normal(parameters))


def hierarchical_pair(**options):
    pair = Hierarchy(**options)
    modules = nn.ModuleDict({"guide": pair.guide_part, "model": pair.model_part})
    return pair.model, pair.guide, modules


PAIRS = {"standard": standard_pair, "hierarchical": hierarchical_pair, "VampPrior": vamp_pair}


def make_pair(name):
    """A pair whose posteriors depend on the data, so that gradients are not all alike."""
    pyro.set_rng_seed(11)
    model, guide, modules = PAIRS[name]()
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model, guide, modules


def gradient(objective, model, guide, modules, *inputs, part=None):
    """Flat gradient of one evaluation, of one part of the modules or of all."""
    modules.zero_grad(set_to_none=True)
    objective.loss_and_grads(model, guide, *inputs)
    parameters = modules.get_submodule(part or "").parameters()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def gradients(objective, model, guide, modules, x, *, repeats, part=None):
    """Gradients per datum ``(repeats, parameters)``, float64, from independent draws."""
    rows = [gradient(objective, model, guide, modules, x, part=part) for _ in range(repeats)]
    return torch.stack(rows).double() / len(x)


def assert_same_mean(left, right, *, projections=8):
    """Random projections of two samples' means agree within 4 standard errors.

    With 8 projections a false alarm has a chance of 8 * 6.3e-5.
    """
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(left.shape[1], projections, generator=generator, dtype=torch.float64)
    left, right = left @ directions, right @ directions
    variance = left.var(0) / len(left) + right.var(0) / len(right)
    difference = (left.mean(0) - right.mean(0)).abs()
    assert (difference < 4 * variance.sqrt() + 1e-6).all(), difference / variance.sqrt()


def standard_error_of(values):
    return values.std() / len(values) ** 0.5


# --- one dimension, where everything is known ------------------------------------------------


class Gaussian(nn.Module):
    """x ~ N(z, noise^2), z ~ N(0, 1), with the guide N(shift + slope x, scale^2), in float64."""

    def __init__(self, noise=1.0, slope=0.5, scale=0.6):
        super().__init__()
        double = {"dtype": torch.float64}
        self.model_part = nn.ParameterDict({"noise": torch.tensor(noise, **double)})
        self.guide_part = nn.ParameterDict(
            {
                "shift": torch.tensor(0.0, **double),
                "slope": torch.tensor(slope, **double),
                "scale": torch.tensor(scale, **double),
            }
        )

    def model(self, x):
        pyro.module("gaussian.model", self.model_part)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[0]), 1.0))
            pyro.sample("x", dist.Normal(z, self.model_part["noise"]), obs=x)

    def guide(self, x):
        pyro.module("gaussian.guide", self.guide_part)
        part = self.guide_part
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(part["shift"] + part["slope"] * x, part["scale"]))

    @torch.no_grad()
    def log_marginal(self, x):
        return dist.Normal(0.0, (1 + self.model_part["noise"] ** 2).sqrt()).log_prob(x)

    @torch.no_grad()
    def rate(self, x):
        part = self.guide_part
        loc, scale = part["shift"] + part["slope"] * x, part["scale"]
        return 0.5 * (loc**2 + scale**2 - 1) - scale.log()

    @torch.no_grad()
    def distortion(self, x):
        part, noise = self.guide_part, self.model_part["noise"]
        square = (x - part["shift"] - part["slope"] * x) ** 2 + part["scale"] ** 2
        return 0.5 * square / noise**2 + noise.log() + 0.5 * math.log(2 * math.pi)
