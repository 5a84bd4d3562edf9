"""Any model of the components on any data: it trains and evaluates, or is refused in one line."""

import functools
import math
import shutil
import warnings

import hypothesis
import pyro
import pytest
import torch
from hypothesis import strategies as st

import pyro_vae as pv
from pyro_vae.app import names

EXAMPLES = 15
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
SMALL = st.integers(1, 4)
# What a likelihood can't be made without, besides its decoder and the shape of the data.
NEEDED = {"categorical": {"num_categories": 2}}


@pytest.fixture
def settings(request):
    """Return how many cases to draw; the same ones each time."""
    return hypothesis.settings(
        max_examples=request.config.getoption("--cases") or EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def often(value, other):
    """Draw one value mostly, and now and then from the rest: bad input alone tests little else."""
    return st.integers(0, 9).flatmap(lambda number: other if number == 9 else st.just(value))


@st.composite
def networks(draw, shape, latent_dim):
    widths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    activation = draw(often("tanh", st.sampled_from([*names.ACTIVATIONS, "rely"])))
    if len(shape) == 3 and draw(st.booleans()):
        features = draw(st.integers(1, 5))
        return (
            pv.networks.ConvEncoder(shape, widths, features=features, activation=activation),
            pv.networks.ConvDecoder(latent_dim, shape, widths, activation=activation),
        )
    return (
        pv.networks.MLPEncoder(shape, widths, activation=activation),
        pv.networks.MLPDecoder(latent_dim, widths, activation=activation),
    )


@st.composite
def priors(draw, name, family, shape, latent_dim, bounded):
    kind = getattr(pv.priors, names.PRIORS[name])
    if name == "vamp":
        number = draw(often(3, st.integers(-1, 3)))
        unit_interval = draw(often(bounded, st.booleans()))
        return kind(family, shape, num_pseudo_inputs=number, unit_interval=unit_interval)
    options = {}
    if name == "gaussian-mixture":
        options["num_components"] = draw(SMALL)
        options["learn_weights"] = draw(st.booleans())
    if name == "standard-normal":
        options["scale"] = draw(often(1.0, st.sampled_from([1e-3, 30.0, 0.0, -1.0, math.nan])))
        options["learn_scale"] = draw(st.booleans())
    if name == "von-mises-fisher":
        options["concentration"] = draw(often(1.0, st.sampled_from([1e-3, 50.0, 1e4, 0.0])))
    if name == "beta":
        options["concentration1"] = draw(often(1.0, st.sampled_from([0.5, 20.0, 0.0])))
    return kind(latent_dim, **options)


# Which priors have latents of a family's support; the others are drawn too, and must be refused.
MATCHING = {
    "von-mises-fisher": ["von-mises-fisher", "hypersphere-uniform"],
    "beta": ["beta"],
}
REAL = ["standard-normal", "gaussian-mixture", "flow"]


@st.composite
def models(draw):
    """Build a VAE of any of the components; the drawn data shape comes with it."""
    shape = tuple(draw(st.lists(SMALL, min_size=1, max_size=3)))
    latent_dim = draw(often(2, st.integers(0, 5)))
    encoder, decoder = draw(networks(shape, draw(often(latent_dim, SMALL))))
    name = draw(st.sampled_from(sorted(names.FAMILIES)))
    family = getattr(pv.guides, names.FAMILIES[name])(encoder, latent_dim)
    kind = draw(st.sampled_from(sorted(names.LIKELIHOODS)))
    options = dict(NEEDED.get(kind, {}))
    if kind == "gaussian":
        odd = st.sampled_from([1e-3, 0.0, -1.0, math.inf, math.nan, "lerned"])
        options["sigma"] = draw(often(draw(st.sampled_from([0.3, "learned", "per-pixel"])), odd))
    likelihood = getattr(pv.likelihoods, names.LIKELIHOODS[kind])(decoder, shape, **options)
    suitable = st.sampled_from([*MATCHING.get(name, REAL), "vamp"])
    prior = draw(suitable | often("vamp", st.sampled_from(sorted(names.PRIORS))))
    vae = pv.VAE(
        draw(priors(prior, family, shape, latent_dim, kind != "gaussian")), likelihood, family
    )
    return vae.to(draw(often(torch.float32, st.just(torch.float64)))), shape


@st.composite
def data(draw, shape):
    number = draw(often(5, st.integers(0, 3)))
    shape = draw(often(shape, st.lists(SMALL, max_size=3).map(tuple)))
    kind = draw(st.sampled_from(["bits", "grey", "zeros", "ones", "constant"]))
    x = torch.rand(number, *shape, generator=torch.Generator().manual_seed(0))
    x = {
        "bits": x.round(),
        "grey": x,
        "zeros": torch.zeros_like(x),
        "ones": torch.ones_like(x),
        "constant": torch.full_like(x, 0.5),
    }[kind]
    x = draw(often(1, st.sampled_from([-1, 255, 1e4, 1e30, 1e38, math.nan, math.inf]))) * x
    x = x.to(draw(often(torch.float32, st.sampled_from(DTYPES))))
    if draw(st.booleans()):
        x = x.flip(0) if draw(st.booleans()) else x.repeat_interleave(2, 0)[::2]
    return x.numpy() if x.dtype != torch.bfloat16 and draw(st.booleans()) else x


@st.composite
def options(draw):
    chosen = {
        "epochs": draw(often(2, st.integers(-1, 3))),
        "batch_size": draw(often(3, st.integers(-1, 9))),
        "learning_rate": draw(often(1e-3, st.sampled_from([0.0, -1.0, 1e-12, 0.1, math.nan]))),
        "beta": draw(often(1.0, st.sampled_from([0.0, 0.5, 4.0, -1.0, math.inf]))),
        "warmup_epochs": draw(often(0, st.integers(-1, 3))),
        "device": draw(often("cpu", st.sampled_from(["auto", "gpu", "cuda:9", ""]))),
        "seed": draw(often(0, st.sampled_from([None, 2**32 - 1, 2**32, -1]))),
    }
    if draw(st.booleans()):
        chosen["objective"] = pyro.infer.TraceMeanField_ELBO(num_particles=draw(st.integers(1, 2)))
    return chosen


def check_finite(what, *values):
    for value in values:
        assert torch.as_tensor(value).isfinite().all(), f"{what} is not finite"


def use(vae, x, how, folder):
    """Train two epochs, evaluate, generate, save and load; every number must be finite."""
    result = pv.fit(vae.model, vae.guide, x, progress=False, **how)
    for name in ("train_elbo", "train_rate", "train_distortion"):
        check_finite(name, result.history[name])
    check_finite("a weight", *vae.state_dict().values())
    check_finite("a log weight", pv.log_weights(vae.model, vae.guide, x, num_samples=2))
    estimate = pv.log_marginal(vae.model, vae.guide, x, num_samples=4, seed=0)
    check_finite("log p(x)", estimate.log_prob)
    check_finite("its error", estimate.standard_error, estimate.ess)
    check_finite("the bound", estimate.rate, estimate.distortion)
    for mean in (True, False):
        made = pv.tasks.generate(vae.model, x, mean=mean, seed=0)
        check_finite("what is generated", made)
        assert made.shape == x.shape
    check_finite("what is rebuilt", pv.tasks.reconstruct(vae.model, vae.guide, x, seed=0))
    shutil.rmtree(folder, ignore_errors=True)
    loaded = pv.load(pv.save(vae, folder))
    again = pv.log_marginal(loaded.model, loaded.guide, x, num_samples=4, seed=0)
    assert torch.equal(again.log_prob, estimate.log_prob)


@pytest.mark.slow
def test_any_model_on_any_data_works_or_is_refused_in_one_line(settings, tmp_path):
    outcomes = {"served": 0, "refused": 0}

    @settings
    @hypothesis.given(st.data())
    def run(case):
        torch.manual_seed(0)
        with warnings.catch_warnings(), pyro.get_param_store().scope():
            warnings.filterwarnings("ignore", message=".* data points have Pareto k")
            # A spline grown steep is inverted to fewer digits than batched draws are checked to.
            warnings.filterwarnings("ignore", message="the guide of this pair gives other values")
            try:
                vae, shape = case.draw(models())
                use(vae, case.draw(data(shape)), case.draw(options()), tmp_path / "run")
            except pv.InputError as error:
                refusal = str(error)
                outcomes["refused"] += 1
            else:
                refusal = ""
                outcomes["served"] += 1
        assert "\n" not in refusal
        assert len(refusal) < 1000

    run()
    assert min(outcomes.values()) > 0.1 * sum(outcomes.values())


# In turn, so that each prior and each family has half of its cases in the fast part.
@pytest.mark.parametrize(
    ("prior", "family"),
    [
        pytest.param(prior, family, marks=pytest.mark.slow if (i + j) % 2 else ())
        for i, prior in enumerate(names.PRIORS)
        for j, family in enumerate(names.FAMILIES)
    ],
)
def test_every_prior_with_every_family_trains_or_is_refused(tmp_path, prior, family):
    shape = (1, 3, 3)
    # Each with one likelihood, in turn: the density of the data doesn't meet that of the latents.
    number = [*names.PRIORS].index(prior) + [*names.FAMILIES].index(family)
    likelihood = [*names.LIKELIHOODS][number % len(names.LIKELIHOODS)]
    encoder, decoder = pv.networks.MLPEncoder(shape, (6,)), pv.networks.MLPDecoder(2, (6,))
    guide = getattr(pv.guides, names.FAMILIES[family])(encoder, 2)
    first = (guide, shape) if prior == "vamp" else (2,)
    kind = functools.partial(
        getattr(pv.likelihoods, names.LIKELIHOODS[likelihood]), **NEEDED.get(likelihood, {})
    )
    matching = MATCHING.get(family, REAL)
    parts = (getattr(pv.priors, names.PRIORS[prior])(*first), kind(decoder, shape), guide)
    if prior not in (*matching, "vamp"):
        with pytest.raises(pv.InputError, match="expected a family with latents on the"):
            pv.VAE(*parts)
        return
    how = {"epochs": 2, "batch_size": 3, "device": "cpu", "seed": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* data points have Pareto k")
        use(pv.VAE(*parts), torch.rand(6, *shape).round(), how, tmp_path / "run")
