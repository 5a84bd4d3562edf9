"""One contract: a pair that breaks it is refused in the same words by whatever function it meets."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import evaluation, infer, tasks

N = 6


def data():
    return torch.linspace(-1.0, 1.5, N)


class NormalFamily:
    """q(z given x) = Normal(loc(x), scale), split as ``inference_gaps`` needs it."""

    def encode(self, x):
        return {"loc": 0.5 * x.reshape(len(x)), "log_scale": torch.full((len(x),), -0.4)}

    def distribution(self, parameters):
        return dist.Normal(parameters["loc"], parameters["log_scale"].exp())


FAMILY = NormalFamily()
SHIFT = "a number that trains"


def standard_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def standard_guide(x):
    shift = pyro.param(SHIFT, torch.zeros(()))
    with pyro.plate("data", len(x)):
        parameters = FAMILY.encode(x)
        z = FAMILY.distribution({**parameters, "loc": parameters["loc"] + shift})
        pyro.sample("z", z)


def column_against_row():
    """Data (B, 1) against a latent (B,): each datum would be scored under all latents."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, standard_guide, data()[:, None]


def row_against_column():
    """The other way round: a latent (B, 1) that meets data (B,)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        shift = pyro.param(SHIFT, torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x[:, None] + shift, 0.7).to_event(1))

    return model, guide, data()


def missing_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    return model, standard_guide, data()


def nothing_observed():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    return model, standard_guide, data()


def swapped():
    return standard_guide, standard_model, data()


def factor_in_the_guide():
    def guide(x):
        shift = pyro.param(SHIFT, torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + shift, 0.7))
            pyro.factor("classification", -0.7 * torch.ones(len(x)), has_rsample=False)

    return standard_model, guide, data()


def guide_on_half_the_line():
    def guide(x):
        shift = pyro.param(SHIFT, torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.1 * x + shift, 0.5))

    return standard_model, guide, data()


def guide_in_a_box():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-2.0, 2.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        shift = pyro.param(SHIFT, torch.zeros(()))
        with pyro.plate("data", len(x)):
            upper = (0.5 + 0.1 * x + shift)[:, None].expand(-1, 3)
            pyro.sample("z", dist.Uniform(-2.0, upper).to_event(1))

    return model, guide, data()


def stray_rows():
    """A guide with rows for other data than these."""

    def guide(x):
        rows = pyro.param("rows", torch.zeros(N + 2))
        with pyro.plate("data", N + 2):
            pyro.sample("z", dist.Normal(rows, 0.7))

    return standard_model, guide, data()


def values_outside_the_support():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Exponential(z.exp()), obs=x)

    return model, standard_guide, data()


def nan_under_a_mask():
    def model(x):
        seen = ~x.isnan()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    def guide(x):
        standard_guide(x.nan_to_num())

    return model, guide, data().masked_fill(torch.arange(N) == 2, torch.nan)


WORDS = {
    column_against_row: "'x' of the model to have one log-probability per datum",
    row_against_column: "'x' of the model to have one log-probability per datum",
    missing_latent: "a guide that draws every latent, 'scale' is missing",
    nothing_observed: "a model that observes data, got none observed",
    swapped: "'x' is observed in it: pass the model before the guide",
    factor_in_the_guide: "'classification' is a factor",
    guide_on_half_the_line: "draws 'z' wherever the prior has mass, got numbers from 0 to inf",
    guide_in_a_box: "draws 'z' wherever the prior has mass",
    stray_rows: f"'z' of the guide to have {N} data",
    values_outside_the_support: "values at site 'x' of the model in its support",
    nan_under_a_mask: "values at site 'x' of the model in its support.*NaN, also under a mask",
}
# What completion says itself, which knows of another cure.
OWN_WORDS = {(nan_under_a_mask, "complete"): "no NaN among the observed values: mark them"}
OPTIONS = {"epochs": 1, "compile": False, "seed": 0, "progress": False}
FUNCTIONS = {
    "fit": lambda m, g, x: pv.fit(m, g, x, **OPTIONS),
    **{
        f"fit by {name}": lambda m, g, x, build=build: pv.fit(m, g, x, objective=build(), **OPTIONS)
        for name, build in {
            "AnalyticKL": infer.AnalyticKL,
            "IWAE": lambda: infer.IWAE(3),
            "FreeBits": lambda: infer.FreeBits(0.1),
            "StickingTheLanding": infer.StickingTheLanding,
            "Trace_ELBO": pyro.infer.Trace_ELBO,
            "TraceGraph_ELBO": pyro.infer.TraceGraph_ELBO,
        }.items()
    },
    "bound_terms": infer.bound_terms,
    "log_weights": lambda m, g, x: pv.log_weights(m, g, x, num_samples=3),
    "log_marginal": lambda m, g, x: pv.log_marginal(m, g, x, num_samples=3, seed=0),
    "annealed": lambda m, g, x: pv.log_marginal(
        m, g, x, method="annealed", num_leapfrog_steps=1, num_steps=5, start="guide", seed=0
    ),
    "compare": lambda m, g, x: pv.compare({"a": (m, g)}, x, num_samples=4, num_elbo_samples=4),
    "inference_gaps": lambda m, g, x: evaluation.inference_gaps(m, g, x, family=FAMILY),
    "posterior_divergence": lambda m, g, x: evaluation.posterior_divergence(m, g, x, num_points=41),
    "representation": evaluation.representation,
    "aggregate_posterior": evaluation.aggregate_posterior,
    "posterior_predictive": evaluation.posterior_predictive,
    "calibration": evaluation.calibration,
    "bidirectional": evaluation.bidirectional,
    "complete": lambda m, g, x: tasks.complete(
        m, g, x, torch.zeros_like(x, dtype=torch.bool), num_draws=2, num_steps=5
    ),
    "reconstruct": tasks.reconstruct,
    "interpolate": lambda m, g, x: tasks.interpolate(m, g, x, x),
    "traverse": tasks.traverse,
}


# Of these Pyro's own validation speaks too: both ways each time, the others with the slow part.
VALIDATED = (values_outside_the_support, nan_under_a_mask, missing_latent)


@pytest.mark.parametrize(
    ("kind", "validates"),
    [
        pytest.param(
            kind,
            validates,
            id=f"{kind.__name__}-{'validating' if validates else 'not validating'}",
            marks=() if validates or kind in VALIDATED else pytest.mark.slow,
        )
        for kind in WORDS
        for validates in (True, False)
    ],
)
def test_the_same_words_whoever_asks(kind, validates):
    for name, function in FUNCTIONS.items():
        pyro.clear_param_store()
        model, guide, x = kind()
        with pyro.validation_enabled(validates), pytest.raises(pv.InputError) as caught:
            function(model, guide, x)
        text = str(caught.value)
        assert "\n" not in text, name
        if (kind, name) == (nan_under_a_mask, "complete"):  # what hides values must say which
            assert "no NaN among the observed values: mark them as missing" in text
            continue
        with pytest.raises(AssertionError, match=OWN_WORDS.get((kind, name), WORDS[kind])):
            raise AssertionError(text)


@pytest.mark.filterwarnings("ignore:.* are not trusted")  # chains as short as they are
def test_the_pair_they_differ_from_is_served():
    for name, function in FUNCTIONS.items():
        if name in ("interpolate", "traverse", "inference_gaps", "calibration", "bidirectional"):
            continue  # served too, slowly, in tests of their own
        pyro.clear_param_store()
        assert function(standard_model, standard_guide, data()) is not None


@pytest.mark.parametrize("part", ["prior", "likelihood", "guide"])
def test_a_distribution_in_a_components_place_is_refused_where_it_is_given(part):
    parts = {
        "prior": pv.priors.StandardNormal(2),
        "likelihood": pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (4,)), (3,)),
        "guide": pv.guides.MeanFieldNormal(pv.networks.MLPEncoder((3,), (4,)), 2),
    }
    parts[part] = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(pv.InputError, match=rf"{part} as a function .*lambda"):
        pv.VAE(**parts)


def test_a_name_that_is_taken_names_the_cure():
    x = torch.randn(20, 3)
    for number in range(2):
        encoder, decoder = torch.nn.Linear(3, 4), torch.nn.Linear(2, 3)

        def model(x, decoder=decoder):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x, encoder=encoder):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, raw = encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

        pairs = (model, guide)
        assert ("decoder$$$weight" in pyro.get_param_store()) is (number == 1)
        if number == 1:
            with pytest.raises(pv.InputError, match=r"pyro\.clear_param_store\(\)"):
                pv.fit(*pairs, x, **OPTIONS)
            pyro.clear_param_store()
        assert len(pv.fit(*pairs, x, **OPTIONS).history["train_elbo"]) == 1


def shared_latent():
    def model(x):
        level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(level, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("level", dist.Normal(torch.zeros(()), 0.5))
        standard_guide(x)

    return model, guide, data()


def enumerated_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            level = pyro.sample("level", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + level, 1.0), obs=x)

    return model, standard_guide, data()


SERVED = {
    shared_latent: {"fit", "bound_terms"} | {n for n in FUNCTIONS if n.startswith("fit by")},
    enumerated_latent: {"fit by IWAE", "bound_terms", "log_weights", "log_marginal", "annealed"},
}
SERVED[shared_latent] -= {"fit by IWAE"}


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.__name__)
def test_other_kinds_of_latents_are_served_or_refused_by_name(kind):
    for name, function in FUNCTIONS.items():
        pyro.clear_param_store()
        if name in SERVED[kind]:
            assert function(*kind()) is not None, name
            continue
        with pytest.raises(pv.InputError) as caught:
            function(*kind())
        assert "'level'" in str(caught.value), (name, str(caught.value))
