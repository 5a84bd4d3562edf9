"""Pairs as in the tutorials of Pyro, small: trained by fit, weighed where there is a density."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import constraints
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyro_vae as pv

PIXELS, CLASSES, TIMES = 6, 3, 5


def make_labelled(number=30):
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(number) % CLASSES
    p = torch.where(torch.arange(PIXELS) // 2 == y[:, None], 0.9, 0.1)
    return torch.bernoulli(p, generator=generator), nn.functional.one_hot(y, CLASSES).float()


class SemiSupervised(nn.Module):
    """p(y) p(z) p(x given y, z), with the label observed or drawn: the tutorial's second model."""

    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(PIXELS, CLASSES)
        self.encode = nn.Linear(PIXELS + CLASSES, 4)
        self.decode = nn.Linear(2 + CLASSES, PIXELS)

    def model(self, x, y=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(CLASSES) / CLASSES), obs=y)
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            y = y.expand(*torch.broadcast_shapes(y.shape[:-1], z.shape[:-1]), CLASSES)
            z = z.expand(*y.shape[:-1], 2)
            logits = self.decode(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classify(x).tanh()))
            x = x.expand(*y.shape[:-1], PIXELS)
            loc, raw = self.encode(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp() + 0.5).to_event(1))


def test_semi_supervised_vae():
    x, y = make_labelled()
    nets = SemiSupervised()
    labelled = pv.fit(nets.model, nets.guide, (x, y), epochs=20, learning_rate=0.05, seed=0)
    guide = config_enumerate(nets.guide, "parallel", expand=True)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    options = {"epochs": 20, "learning_rate": 0.05, "seed": 0, "objective": objective}
    unlabelled = pv.fit(nets.model, guide, x, **options)
    for result in (labelled, unlabelled):
        bound = result.history["train_bound"]
        assert bound[-5:].mean() > bound[:5].mean() + 0.1
    # Summed over the label by hand, each with its own estimate of log p(x given y).
    estimates = [
        pv.log_marginal(nets.model, nets.guide, (x, each.expand(len(x), -1)), num_samples=400, seed=0)
        for each in torch.eye(CLASSES)
    ]
    exact = torch.stack([estimate.log_prob for estimate in estimates]).logsumexp(0)
    found = pv.log_marginal(nets.model, nets.guide, x, num_samples=4000, seed=1)
    error = (found.standard_error**2 + sum(e.standard_error**2 for e in estimates)).sqrt()
    assert ((found.log_prob - exact).abs() < 5 * error + 1e-6).all()


def test_conditional_vae():
    x, y = make_labelled()
    prior_net, encode, decode = (
        nn.Linear(CLASSES, 4),
        nn.Linear(PIXELS + CLASSES, 4),
        nn.Linear(2, PIXELS),
    )

    def model(x, y):
        pyro.module("prior_net", prior_net)
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            loc, raw = prior_net(y).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, raw.exp() + 0.5).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            loc, raw = encode(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp() + 0.5).to_event(1))

    result = pv.fit(model, guide, (x, y), epochs=30, learning_rate=0.05, seed=0)
    bound = result.history["train_bound"]
    assert bound[-5:].mean() > bound[:5].mean() + 0.1
    found = pv.log_marginal(model, guide, (x, y), num_samples=1000, seed=0)
    # Two latents: log p(x given y) on a grid.
    loc, raw = prior_net(y).detach().chunk(2, -1)
    line = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(line, line)
    density = dist.Bernoulli(logits=decode(grid).detach())
    log_x = density.log_prob(x[:, None]).sum(-1)
    log_z = dist.Normal(loc[:, None], raw[:, None].exp() + 0.5).log_prob(grid).sum(-1)
    exact = (log_x + log_z).logsumexp(-1) + 2 * math.log(0.1)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error + 1e-4).all()


class Markov(nn.Module):
    """The deep Markov model, small: a gated transition, emissions, and a guide that looks ahead."""

    def __init__(self):
        super().__init__()
        self.gate, self.move, self.spread = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.emit, self.look = nn.Linear(2, PIXELS), nn.GRU(PIXELS, 4, batch_first=True)
        self.combine = nn.Linear(2 + 4, 4)
        self.start = nn.Parameter(torch.zeros(2))

    def model(self, x, mask):
        pyro.module("dmm", self)
        z = self.start.expand(len(x), 2)
        with pyro.plate("data", len(x)):
            for time in pyro.markov(range(TIMES)):
                on, gate = mask[:, time], self.gate(z).sigmoid()
                loc = (1 - gate) * z + gate * self.move(z)
                scale = nn.functional.softplus(self.spread(z)) + 0.1
                with pyro.poutine.mask(mask=on):
                    z = pyro.sample(f"z_{time}", dist.Normal(loc, scale).to_event(1))
                    emission = dist.Bernoulli(logits=self.emit(z)).to_event(1)
                    pyro.sample(f"x_{time}", emission, obs=x[:, time])

    def guide(self, x, mask):
        pyro.module("dmm", self)
        ahead = self.look(x.flip(1))[0].flip(1)
        self.draw(ahead, mask)

    def draw(self, ahead, mask):
        z = self.start.expand(len(mask), 2)
        with pyro.plate("data", len(mask)):
            for time in pyro.markov(range(TIMES)):
                loc, raw = self.combine(torch.cat([z, ahead[:, time]], -1)).chunk(2, -1)
                with pyro.poutine.mask(mask=mask[:, time]):
                    z = pyro.sample(f"z_{time}", dist.Normal(loc, raw.exp() + 0.5).to_event(1))

    def reversed_guide(self, x, mask):
        """The same, the recurrent network on packed sequences, each from its last value back."""
        pyro.module("dmm", self)
        lengths = mask.sum(1)
        back = (lengths[:, None] - 1 - torch.arange(TIMES)) % TIMES  # its own values, then the rest
        values = x.gather(1, back[..., None].expand_as(x))
        packed = pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False)
        seen, _ = pad_packed_sequence(self.look(packed)[0], batch_first=True, total_length=TIMES)
        ahead = seen.gather(1, back[..., None].expand_as(seen))
        self.draw(ahead, mask)

    def prior(self, x, mask):
        with pyro.poutine.block(hide=[f"x_{time}" for time in range(TIMES)]):
            self.model(x, mask)


def sequences():
    generator = torch.Generator().manual_seed(4)
    x = torch.bernoulli(torch.full((16, TIMES, PIXELS), 0.3), generator=generator)
    mask = torch.arange(TIMES) < torch.randint(2, TIMES + 1, (16, 1), generator=generator)
    return x * mask[..., None], mask


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["guide", "reversed_guide"])
def test_deep_markov_model(guide):
    x, mask = sequences()
    nets = Markov()
    pair = nets.model, getattr(nets, guide)
    options = {"epochs": 60, "learning_rate": 0.03, "seed": 0, "compile": False}
    result = pv.fit(*pair, (x, mask), **options)
    bound = result.history["train_bound"]
    assert bound[-5:].mean() > bound[:5].mean() + 0.1
    found = pv.log_marginal(*pair, (x, mask), num_samples=2000, seed=0)
    # So few values say little of the latents: the prior's own draws explain them well enough.
    known = pv.log_marginal(nets.model, nets.prior, (x, mask), num_samples=20_000, seed=1)
    assert known.trusted.all()
    assert known.standard_error.max() < 0.05
    error = torch.hypot(found.standard_error, known.standard_error)
    assert (found.trusted & ((found.log_prob - known.log_prob).abs() < 4 * error)).all()
    # What lies behind a sequence's end counts for nothing: other values there, the same weights.
    filled = torch.where(mask[..., None], x, 1 - x)
    if guide == "guide":
        with torch.no_grad():
            nets.look.weight_ih_l0.zero_()  # or the guide would look at them
    weights = []
    for each in (x, filled):
        torch.manual_seed(0)
        weights.append(pv.log_weights(*pair, (each, mask), num_samples=50))
    torch.testing.assert_close(*weights)


TOPICS, WORDS, LENGTH = 2, 4, 5


def topics(documents):
    """Latent Dirichlet allocation: a topic is summed out for every word of ``(N, LENGTH)``."""
    with pyro.plate("topics", TOPICS):
        topic = pyro.sample("topic", dist.Dirichlet(torch.ones(WORDS)))
    with pyro.plate("data", len(documents)):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(TOPICS)))
        with pyro.plate("words", LENGTH, dim=-2):
            of = pyro.sample("of", dist.Categorical(shares), infer={"enumerate": "parallel"})
            pyro.sample("word", dist.Categorical(topic[of]), obs=documents.T)


def topics_guide(net):
    def guide(documents):
        pyro.module("shares_net", net)
        start = 1.0 + (torch.arange(WORDS) // 2 == torch.arange(TOPICS)[:, None])
        concentration = pyro.param("concentration", start, constraint=constraints.positive)
        with pyro.plate("topics", TOPICS):
            pyro.sample("topic", dist.Dirichlet(concentration))
        counts = nn.functional.one_hot(documents, WORDS).float().sum(1)
        with pyro.plate("data", len(documents)):
            pyro.sample("shares", dist.Dirichlet(net(counts).sigmoid() + 0.5))

    return guide


def documents_given(topic, documents):
    """log p(document | topic) over all topics of its words, exactly: ``(N,)``."""
    of = torch.cartesian_prod(*[torch.arange(TOPICS)] * LENGTH)
    words = topic[of[:, None], documents].log().sum(-1)
    counts = nn.functional.one_hot(of, TOPICS).sum(1).double()
    prior = (counts + 1).lgamma().sum(-1) - math.lgamma(LENGTH + TOPICS)
    return (words + prior[:, None]).logsumexp(0)


@pytest.mark.slow
def test_latent_dirichlet_allocation():
    kind = torch.rand(40, LENGTH) < torch.rand(40, 1)
    documents = torch.where(kind, torch.randint(2, (40, LENGTH)), torch.randint(2, 4, (40, LENGTH)))
    guide = topics_guide(nn.Linear(WORDS, TOPICS))
    options = {"batch_size": 10, "epochs": 30, "learning_rate": 0.1, "seed": 0, "compile": False}
    result = pv.fit(
        topics, guide, documents, objective=TraceEnum_ELBO(max_plate_nesting=2), **options
    )
    bound = result.history["train_bound"]
    assert bound[-5:].mean() > bound[:5].mean() + 0.1
    assert result.history["global_rate"].mean() > 0
    few = documents[:6]
    found = pv.evaluation.predictive_log_prob(
        topics, guide, few, num_draws=100, num_samples=100, seed=0
    )
    exact = torch.stack([documents_given(topic.double(), few) for topic in found.draws["topic"]])
    exact = exact.logsumexp(0) - math.log(100)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one weight of all documents is heavy-tailed
        whole = pv.log_marginal(topics, guide, few, num_samples=100, plate=None, seed=0)
    assert whole.log_prob.isfinite().all()


@pytest.mark.slow
def test_bayesian_regression():
    """Weights, a bias and the noise outside the plate; the evidence by a sum over the noise."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(30, 2, dtype=torch.float64, generator=generator)
    noise = 0.5 * torch.randn(30, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.3 + noise
    zero = torch.zeros((), dtype=torch.float64)

    def model(x, y):
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(zero, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(zero, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((weights * x).sum(-1) + bias, sigma), obs=y)

    guide = AutoMultivariateNormal(model)
    pv.fit(model, guide, (x, y), epochs=300, plate=None, learning_rate=0.02, seed=0, compile=False)
    found = pv.log_marginal(model, guide, (x, y), num_samples=2000, plate=None, seed=0)
    design = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    log_sigma = torch.linspace(-3, 2, 2001, dtype=torch.float64)
    covariance = design @ design.T + (2 * log_sigma).exp()[:, None, None] * torch.eye(30)
    given = dist.MultivariateNormal(torch.zeros(30, dtype=torch.float64), covariance).log_prob(y)
    prior = dist.Normal(zero, 0.5).log_prob(log_sigma)
    exact = (given + prior).logsumexp(0) + math.log(5 / 2000)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error).all()
    assert found.trusted.all()


@pytest.mark.slow
def test_gaussian_mixture():
    """Weights and locations outside the plate, the class of each data point summed out."""
    generator = torch.Generator().manual_seed(6)
    kind = torch.rand(12, generator=generator) < 0.3
    x = torch.where(kind, -2.0, 2.0) + 0.7 * torch.randn(12, generator=generator)

    @config_enumerate
    def model(x):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(share)).long()
            pyro.sample("x", dist.Normal(locs[..., kind], 0.7), obs=x)

    def start(site):
        return {"share": torch.tensor(0.5), "locs": torch.tensor([-1.0, 1.0])}[site["name"]]

    guide = AutoNormal(pyro.poutine.block(model, hide=["kind"]), init_loc_fn=start, init_scale=0.2)
    options = {"objective": TraceEnum_ELBO(max_plate_nesting=1), "compile": False, "seed": 0}
    result = pv.fit(model, guide, x, epochs=150, batch_size=12, learning_rate=0.05, **options)
    assert result.history["train_bound"][-20:].mean() > result.history["train_bound"][:5].mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pv.log_marginal(model, guide, x, num_samples=2000, plate=None, seed=0)
    # The guide has one of the two orders of the components, of which the evidence has both.
    share, line = (torch.arange(40) + 0.5) / 40, torch.linspace(-6, 6, 121)
    one, two = (dist.Normal(line[:, None], 0.7).log_prob(x) for _ in range(2))
    w = share[:, None, None, None]
    each = torch.logaddexp((1 - w).log() + one[:, None], w.log() + two[None]).sum(-1)
    prior = dist.Normal(0.0, 3.0).log_prob(line)
    joint = each + prior[:, None] + prior + dist.Beta(2.0, 2.0).log_prob(share)[:, None, None]
    exact = joint.logsumexp((0, 1, 2)) + math.log(1 / 40 * 0.1 * 0.1)
    error = (found.log_prob + math.log(2) - exact).abs()
    assert (error < 5 * found.standard_error + 0.02).all()
