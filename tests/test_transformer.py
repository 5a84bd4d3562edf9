"""VAETransformer: scikit-learn's own contract, and that its numbers are those of the VAE inside."""

import pickle

import numpy as np
import pyro
import pytest
import torch
from command_line import SMALL, run, sketching
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_vae as pv
from pyro_vae import tasks
from pyro_vae.infer.settings import default_warmup_epochs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* data points have Pareto k"),
    # Two epochs end before the latents are used.
    pytest.mark.filterwarnings("ignore:posterior collapse"),
    # Raised by the checks themselves for an estimator that doesn't take sparse data.
    pytest.mark.filterwarnings("ignore:Can't check dok sparse matrix"),
]


def small(**options):
    settings = {"latent_dim": 2, "hidden": (8,), "epochs": 2, "num_samples": 20, "device": "cpu"}
    return pv.VAETransformer(**(settings | options))


# The score of a datum is a Monte Carlo estimate whose draws come in the order of the data, so that it
# is repeated by the same data in the same order, and by others within its error.
DRAWN_IN_ORDER = {
    "check_methods_sample_order_invariance": "score_samples draws in the order of the data",
    "check_methods_subset_invariance": "score_samples draws in the order of the data",
}


@parametrize_with_checks([small(epochs=1)], expected_failed_checks=lambda _: DRAWN_IN_ORDER)
def test_scikit_learns_contract(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def x():
    random = np.random.default_rng(0)
    return random.normal(size=(120, 2)) @ random.normal(size=(2, 5)) + 0.1 * random.normal(
        size=(120, 5)
    )


def test_its_numbers_are_those_of_the_vae_inside(x):
    transformer = small(epochs=20).fit(x)
    vae, data = transformer.vae_, torch.as_tensor(x, dtype=torch.float32)
    z = transformer.transform(x)
    np.testing.assert_allclose(z, tasks.encode(vae.guide, data).numpy(), rtol=1e-5)
    rebuilt = transformer.inverse_transform(z)
    expected = vae.likelihood(torch.from_numpy(z)).mean.detach().numpy()
    np.testing.assert_allclose(rebuilt, expected, rtol=1e-5)
    log_prob = pv.log_marginal(vae.model, vae.guide, data, num_samples=20, seed=0).log_prob
    np.testing.assert_allclose(transformer.score_samples(x), log_prob.numpy(), rtol=1e-5)
    assert transformer.score(x) == pytest.approx(log_prob.mean().item())
    assert len(transformer.history_["train_elbo"]) == 20


def test_order_and_company_change_no_code_and_no_score_beyond_its_error(x):
    transformer = small(epochs=0, sigma=3.0, num_samples=200).fit(x)
    order = np.random.default_rng(1).permutation(len(x))[:50]
    np.testing.assert_allclose(
        transformer.transform(x[order]), transformer.transform(x)[order], rtol=1e-4, atol=1e-6
    )
    vae, data = transformer.vae_, torch.as_tensor(x[order], dtype=torch.float32)
    error = pv.log_marginal(vae.model, vae.guide, data, num_samples=200).standard_error.numpy()
    difference = transformer.score_samples(x[order]) - transformer.score_samples(x)[order]
    assert (np.abs(difference) < 5 * np.sqrt(2) * error).all()


def test_training_is_that_of_the_library(x):
    before = small(epochs=0).fit(x).score(x)
    assert small(epochs=60, learning_rate=0.01).fit(x).score(x) > before + 0.5


def test_a_seed_repeats_a_fit_and_leaves_the_program_alone(x):
    state = torch.get_rng_state()
    names = set(pyro.get_param_store().keys())
    first, second, other = small().fit(x), small().fit(x), small(seed=1).fit(x)
    np.testing.assert_array_equal(first.transform(x), second.transform(x))
    assert not np.allclose(first.transform(x), other.transform(x))
    assert first.score(x) == first.score(x)
    assert torch.equal(state, torch.get_rng_state())
    assert set(pyro.get_param_store().keys()) == names


def test_a_clone_is_unfitted_and_equal_in_its_settings():
    transformer = small(prior="vamp", hidden=[4, 3], sigma=0.5)
    assert clone(transformer).get_params() == transformer.get_params()
    assert set(transformer.get_params()) >= {"latent_dim", "prior", "guide", "likelihood", "seed"}
    assert transformer.set_params(latent_dim=3).latent_dim == 3


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        ("vamp", "full-rank"),
        pytest.param("flow", "iaf", marks=pytest.mark.slow),
        ("gaussian-mixture", "mixture"),
        pytest.param("standard-normal", "spline", marks=pytest.mark.slow),
        ("hypersphere-uniform", "von-mises-fisher"),
        ("von-mises-fisher", "von-mises-fisher"),
        ("beta", "beta"),
    ],
)
def test_every_component_survives_pickling(x, prior, guide):
    transformer = small(prior=prior, guide=guide).fit(x)
    copy = pickle.loads(pickle.dumps(transformer))
    np.testing.assert_array_equal(copy.transform(x), transformer.transform(x))
    np.testing.assert_array_equal(copy.score_samples(x), transformer.score_samples(x))
    z = transformer.transform(x)
    assert z.shape == (120, 2)
    assert np.isfinite(transformer.inverse_transform(z)).all()


def test_on_a_sphere_the_direction_is_decoded(x):
    transformer = small(prior="hypersphere-uniform", guide="von-mises-fisher").fit(x)
    z = transformer.transform(x)
    assert (np.linalg.norm(z, axis=1) < 1).all()
    np.testing.assert_allclose(
        transformer.inverse_transform(z), transformer.inverse_transform(3 * z), rtol=1e-4
    )


def test_a_pipeline_encodes_decodes_and_scores(x):
    pipeline = make_pipeline(StandardScaler(), PCA(3), small())
    z = pipeline.fit_transform(x)
    assert z.shape == (120, 2)
    assert pipeline.inverse_transform(z).shape == x.shape
    assert pipeline.score_samples(x).shape == (120,)
    assert pipeline[-1].get_feature_names_out().tolist() == ["vaetransformer0", "vaetransformer1"]


@pytest.mark.slow
def test_a_grid_search_finds_the_better_number_of_latents(x):
    search = GridSearchCV(
        small(epochs=20, batch_size=16, learning_rate=2e-2, num_samples=50),
        {"latent_dim": [1, 2]},
        cv=KFold(2),
        error_score="raise",
    )
    search.fit(x)
    assert search.best_params_ == {"latent_dim": 2}
    assert search.best_estimator_.transform(x).shape == (120, 2)


def test_mistakes_are_refused(x):
    with pytest.raises(pv.InputError, match="did you mean 'mean-field'"):
        small(guide="meanfield").fit(x)
    with pytest.raises(pv.InputError, match="expected x in"):
        small(likelihood="bernoulli").fit(x)
    with pytest.raises(pv.InputError, match="latents of 2 coordinates, got 5"):
        small().fit(x).inverse_transform(x)
    with pytest.raises(pv.InputError, match="latent_dim"):
        small(latent_dim=0).fit(x)


def test_one_layer_may_be_said_as_a_number():
    X = np.random.default_rng(0).normal(size=(20, 3))
    codes = [
        pv.VAETransformer(2, hidden=hidden, epochs=1, device="cpu").fit_transform(X)
        for hidden in (8, (8,))
    ]
    np.testing.assert_array_equal(*codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples of at least 1, got 0"),
        ({"num_samples": 20.0}, "num_samples as a whole number, got 20.0"),
        ({"epochs": "5"}, "epochs as a whole number, got '5'"),
        ({"hidden": 8.5}, "hidden"),
    ],
)
def test_settings_of_the_scores_are_checked_before_training(x, options, message):
    transformer = small(**options)
    with pytest.raises(pv.InputError, match=message):
        transformer.fit(x)
    assert not hasattr(transformer, "vae_")


def test_a_grid_of_numpy_numbers_is_taken(x):
    transformer = small(hidden=np.int64(8), latent_dim=np.int64(2), epochs=np.int64(1))
    np.testing.assert_array_equal(transformer.fit_transform(x), small(epochs=1).fit_transform(x))


def test_the_same_names_give_the_same_run_everywhere(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.normal(size=(150, 1)) + 0.3 * random.normal(size=(150, 4)))
    data = ("--dataset", tmp_path / "x.npy", "--validation-size", 0, "--likelihood", "gaussian")
    told = ("--batch-size", 20, "--output", tmp_path / "run")
    with sketching():
        assert run("train", *SMALL, *data, *told, "--epochs", 5).code == 0
    trained = pv.load(tmp_path / "run").state_dict()

    x = pv.datasets.load(tmp_path / "x.npy", binarize="none", validation_size=0).train
    transformer = small(hidden=16, epochs=5, batch_size=20).fit(x.numpy())

    torch.manual_seed(0)
    encoder, decoder = pv.networks.MLPEncoder((4,), (16,)), pv.networks.MLPDecoder(2, (16,))
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    likelihood = pv.likelihoods.Gaussian(decoder, (4,), sigma="per-column")
    vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, guide)
    vae.standardize(x)
    result = pv.fit(
        vae.model, vae.guide, x, epochs=5, batch_size=20, warmup_epochs=None, device="cpu"
    )
    assert default_warmup_epochs(5, 6) == 2
    assert result.history["beta"].tolist() == [0.5, 1, 1, 1, 1]  # of the coming step

    for other in (transformer.vae_.state_dict(), vae.state_dict()):
        for name, value in trained.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def test_columns_in_any_units_are_coded_alike_and_what_went_wrong_is_told(x):
    scaled = x * np.logspace(-3, 4, x.shape[1]) + 300
    first, second = small(epochs=20).fit(x), small(epochs=20).fit(scaled)
    np.testing.assert_allclose(first.transform(x), second.transform(scaled), atol=0.05)
    shift = np.log(np.logspace(-3, 4, x.shape[1])).sum()
    assert second.score(scaled) == pytest.approx(first.score(x) - shift, abs=0.05)
    with pytest.warns(UserWarning, match="scale: the data run from"):
        small(standardize=False).fit(x + 20)
    with pytest.raises(pv.InputError, match="standardise, got Bernoulli"):
        small(likelihood="bernoulli", standardize=True).fit(np.clip(x, 0, 1))
