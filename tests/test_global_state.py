"""Global state is found again as it was; handlers, stores and threads of the caller are respected."""

import concurrent.futures
import random
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import rcParams
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import bidirectional

SHAPE, LATENT = (1, 4, 4), 2


def make_vae():
    vae = pv.VAE(
        pv.priors.StandardNormal(LATENT),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(LATENT, (8,)), SHAPE),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(SHAPE, (8,)), LATENT),
    )
    return vae.float()


def bits():
    start = torch.Generator().manual_seed(0)
    return torch.rand(6, *SHAPE, dtype=torch.float32, generator=start).round()


def run_fit(vae, folder):
    pv.fit(vae.model, vae.guide, bits(), epochs=2, batch_size=4, device="cpu", seed=0)


def run_log_marginal(vae, folder):
    pv.log_marginal(vae.model, vae.guide, bits(), num_samples=4, seed=0)


def run_annealed(vae, folder):
    how = {"start": "guide", "schedule": "linear", "num_steps": 4, "num_leapfrog_steps": 1}
    with warnings.catch_warnings(action="ignore"):  # nothing is known of so few steps
        pv.log_marginal(vae.model, vae.guide, bits(), method="annealed", seed=0, **how)


def run_bracket(vae, folder):
    bidirectional(vae.model, vae.guide, bits(), num_chains=2, num_steps=4, seed=0)


def run_compare(vae, folder):
    pairs = {"a": (vae.model, vae.guide), "b": (vae.model, vae.guide)}
    pv.compare(pairs, bits(), num_samples=8, num_elbo_samples=4, seed=0)


def run_generate(vae, folder):
    pv.tasks.generate(vae.model, bits(), mean=False, seed=0)


def run_reconstruct(vae, folder):
    pv.tasks.reconstruct(vae.model, vae.guide, bits(), mean=False, seed=0)


def run_save(vae, folder):
    pv.save(vae, folder / "new")


def run_load(vae, folder):
    pv.load(folder / "saved")


def run_datasets(vae, folder):
    pv.datasets.load("digits")


def run_plots(vae, folder):
    pv.plots.samples(np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), title="", limits=(0, 1))


ACTIONS = [
    run_fit,
    run_log_marginal,
    run_annealed,
    run_bracket,
    run_compare,
    run_generate,
    run_reconstruct,
    run_save,
    run_load,
    run_datasets,
    run_plots,
]


def state():
    return {
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomalies": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warning only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "validation": (
            torch.distributions.Distribution._validate_args,
            poutine.util.is_validation_enabled(),
            pyro.infer.util.is_validation_enabled(),
        ),
        "torch seed": torch.get_rng_state().tolist(),
        "NumPy seed": str(np.random.get_state()),  # noqa: NPY002
        "Python seed": random.getstate(),
        "handlers": list(poutine.runtime._PYRO_STACK),
        "plates": str(poutine.indep_messenger._DIM_ALLOCATOR._stack),
        "warnings": list(warnings.filters),
        "NumPy errors": np.geterr(),
        "matplotlib": {name: rcParams._get(name) for name in rcParams},
    }


def set_to_double():
    torch.set_default_dtype(torch.float64)


def set_to_deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True


SETTINGS = {
    "as it is": (lambda: None, lambda: None),
    "double": (set_to_double, lambda: torch.set_default_dtype(torch.float32)),
    "no gradients": (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    "no validation": (lambda: pyro.enable_validation(False), lambda: pyro.enable_validation(True)),
    "deterministic": (set_to_deterministic, lambda: torch.use_deterministic_algorithms(False)),
    "anomalies": (
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        lambda: torch.autograd.set_detect_anomaly(False),
    ),
}


# Each has a code path of its own through the settings but these, which are slow; a bracket anneals.
SLOW = {
    run_annealed: ("no gradients",),
    run_bracket: ("double",),
    run_compare: ("double", "no gradients"),
}
CASES = [(action, setting) for action in ACTIONS for setting in SLOW.get(action, SETTINGS)]


@pytest.fixture(scope="module")
def _imported(tmp_path_factory):
    """Run everything once: libraries imported on the way may add warning filters of their own."""
    folder = tmp_path_factory.mktemp("imported")
    pv.save(make_vae(), folder / "saved")
    with pyro.get_param_store().scope():
        for action in ACTIONS:
            action(make_vae(), folder)


@pytest.mark.usefixtures("_imported")
@pytest.mark.parametrize(("action", "setting"), CASES)
def test_global_state_is_found_again(tmp_path, action, setting):
    vae = make_vae()
    pv.save(vae, tmp_path / "saved")
    set_up, take_down = SETTINGS[setting]
    deterministic = torch.backends.cudnn.deterministic
    set_up()
    try:
        pyro.param("mine", torch.ones(3))
        store = dict(pyro.get_param_store().items())
        training = [part.training for part in vae.modules()]
        before = state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
            before["warnings"] = list(warnings.filters)
            action(vae, tmp_path)
            after = state()
        assert [name for name in before if before[name] != after[name]] == []
        assert [part.training for part in vae.modules()] == training
        left = {name for name, _ in pyro.get_param_store().items()} - set(store)
        # Training leaves the pair's parameters where Pyro looks for them.
        assert left == (set() if action is not run_fit else _names_of(vae))
        assert all(pyro.get_param_store()[name] is value for name, value in store.items())
    finally:
        take_down()
        torch.backends.cudnn.deterministic = deterministic


def _names_of(vae):
    parts = ("prior", "likelihood", "variational_family")
    return {
        f"{vae.name}.{part}$$${name}"
        for part in parts
        for name, _ in getattr(vae, part).named_parameters()
    }


def test_a_failed_run_leaves_nothing_behind(tmp_path):
    vae = make_vae()
    broken = nn.Linear(16, 4)

    def guide(x):
        pyro.module("broken", broken)
        with pyro.plate("data", len(x)):
            raise RuntimeError("on the way")

    before = state()
    for act in (
        lambda: pv.fit(vae.model, guide, torch.zeros(6, *SHAPE), epochs=1, seed=0),
        lambda: pv.log_marginal(vae.model, guide, torch.zeros(6, *SHAPE), num_samples=2, seed=0),
        lambda: pv.tasks.reconstruct(vae.model, guide, torch.zeros(6, *SHAPE), seed=0),
    ):
        with pytest.raises(RuntimeError, match="on the way"):
            act()
        after = state()
        assert [name for name in before if before[name] != after[name]] == []


def weights_of(vae):
    return torch.cat([value.flatten() for value in vae.state_dict().values()])


def made(seed):
    torch.manual_seed(seed)
    return make_vae()


def trained(vae, seed):
    pv.fit(vae.model, vae.guide, bits(), epochs=6, batch_size=2, device="cpu", seed=seed)
    estimate = pv.log_marginal(vae.model, vae.guide, bits(), num_samples=7, seed=seed)
    return torch.cat([weights_of(vae), estimate.log_prob])


@pytest.mark.parametrize("num_threads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fits_in_threads_take_turns_and_give_what_each_gives_alone(num_threads):
    alone = [trained(made(seed), seed) for seed in range(num_threads)]
    # Made before: threads that draw starting values would share one stream.
    vaes = [made(seed) for seed in range(num_threads)]
    start = threading.Barrier(num_threads)

    def work(seed):
        start.wait()
        return trained(vaes[seed], seed)

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        together = list(pool.map(work, range(num_threads)))
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first, second)


def test_a_seed_handler_around_a_call_is_served():
    weights = []
    for _ in range(2):
        vae = made(3)
        with poutine.seed(rng_seed=0):
            pv.fit(vae.model, vae.guide, bits(), epochs=1, device="cpu")
        weights.append(weights_of(vae))
    assert torch.equal(*weights)


def test_a_fit_in_a_store_scope_stays_in_it():
    vae, other = make_vae(), make_vae()
    pv.fit(other.model, other.guide, bits(), epochs=1, device="cpu")
    before = dict(pyro.get_param_store().items())
    with pyro.get_param_store().scope() as scope:
        pv.fit(vae.model, vae.guide, bits(), epochs=2, device="cpu", seed=0)
        estimate = pv.log_marginal(vae.model, vae.guide, bits(), num_samples=2, seed=0)
    assert estimate.log_prob.isfinite().all()
    assert set(scope["params"]) == _names_of(vae)
    assert dict(pyro.get_param_store().items()).keys() == before.keys()
    pv.fit(vae.model, vae.guide, bits(), epochs=1, device="cpu")  # and goes on outside


HANDLERS = {
    "trace": poutine.trace,
    "block": poutine.block,
    "scale": lambda: poutine.scale(scale=0.5),
    "mask": lambda: poutine.mask(mask=False),
    "condition": lambda: poutine.condition(data={"z": torch.zeros(LATENT)}),
    "plate": lambda: pyro.plate("particles", 3, dim=-2),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("action", [run_fit, run_log_marginal, run_generate])
def test_a_handler_left_open_around_a_call_is_refused(tmp_path, action, handler):
    vae = make_vae()
    before = weights_of(vae)
    around = HANDLERS[handler]()
    with around, pytest.raises(pv.InputError, match="no Pyro handler around the call, got") as caught:
        action(vae, tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.equal(weights_of(vae), before)
    action(vae, tmp_path)  # served once it is left


def test_a_handler_of_another_thread_is_refused_not_mixed_in():
    vae, inside, done = make_vae(), threading.Event(), threading.Event()

    def trace_for_long():
        with poutine.trace():
            inside.set()
            done.wait(10)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(trace_for_long)
        inside.wait(10)
        try:
            with pytest.raises(pv.InputError, match="or wait for the thread that is in it"):
                pv.log_marginal(vae.model, vae.guide, bits(), num_samples=2)
        finally:
            done.set()
        waiting.result()
    assert pv.log_marginal(vae.model, vae.guide, bits(), num_samples=2).log_prob.isfinite().all()


class ImportanceWeighted:
    """An objective of one's own: Pyro's SVI traces parameters around it."""

    def __init__(self):
        self.trace = Trace_ELBO()

    def __call__(self, model, guide, x):
        loss = -pv.log_weights(model, guide, x, num_samples=3).logsumexp(0).sum()
        loss.backward()
        return loss.item()


def test_weights_serve_as_a_loss_of_pyros_own_svi():
    vae, x = make_vae(), bits()
    before = weights_of(vae)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO().loss)
    svi.loss_and_grads = ImportanceWeighted()
    losses = [svi.step(x) for _ in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not torch.equal(weights_of(vae), before)


def test_a_fit_works_where_gradients_are_off():
    with torch.no_grad():
        expected = trained_without(torch.no_grad())
    assert torch.equal(trained_without(torch.enable_grad()), expected)
    assert torch.equal(trained_without(torch.inference_mode()), expected)


def trained_without(mode):
    torch.manual_seed(0)
    vae = make_vae()
    with mode:
        pv.fit(vae.model, vae.guide, bits(), epochs=2, device="cpu", seed=0)
    return weights_of(vae)


def test_evaluations_keep_no_model_alive():
    sizes = []
    for _ in range(3):
        vae = make_vae()
        run_log_marginal(vae, None)
        run_generate(vae, None)
        sizes.append(len(pyro.get_param_store()))
    assert sizes == [0, 0, 0]


def test_evaluations_keep_the_parameters_of_plain_functions():
    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    x = torch.randn(5, 2)
    first = pv.log_marginal(model, guide, x, num_samples=9, seed=0).log_prob
    again = pv.log_marginal(model, guide, x, num_samples=9, seed=1).log_prob
    assert pyro.get_param_store().keys() == {"loc"}
    assert (first - again).abs().max() < 1.0
