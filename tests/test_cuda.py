"""What holds on a CUDA device, or the stand-in for one: devices, precision, memory, waits, graphs."""

import collections
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import cuda_stand_in
import pyro
import pyro.distributions as dist
import pytest
import torch
from components import DATA_SHAPE, make_family, make_likelihood, make_prior
from small_vae import PIXELS, make_vae

import pyro_vae as pv
from pyro_vae.errors import InputError
from pyro_vae.evaluation import captured_values
from pyro_vae.infer import validation
from pyro_vae.pair.inputs import take_rows
from pyro_vae.pair.opened import open_pair
from pyro_vae.pair.precision import PRECISIONS, compute_in, precision_now
from pyro_vae.weights.particles import Particles

# What an untrained guide's weights are like is no matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto")
gpu = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture
def stand_in():
    if not cuda_stand_in.is_active():
        pytest.skip("counts or breaks what only the stand-in can: python tests/cuda_stand_in.py")
    cuda_stand_in.clear()
    yield cuda_stand_in
    cuda_stand_in.clear()


def bits(count=16):
    return torch.bernoulli(torch.full((count, PIXELS), 0.5))


def own_prior(prior):
    vae = make_vae()
    return pv.VAE(prior, vae.likelihood, vae.variational_family)


def test_a_machine_with_a_gpu_runs_the_suite_without_it():
    assert not torch.cuda.is_available()


# --- devices ---


class StudentPrior(pv.priors.Prior):
    def forward(self):
        return dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1)


def normal_family(x):
    return dist.Normal(torch.zeros(2), torch.ones(2)).expand([len(x), 2]).to_event(1)


OWN = {
    "class": lambda: own_prior(StudentPrior()),
    "lambda": lambda: own_prior(lambda: dist.Laplace(torch.zeros(2), 1.0).to_event(1)),
    "family": lambda: pv.VAE(
        pv.priors.StandardNormal(2), make_vae().likelihood, lambda x: normal_family(x)
    ),
}


@gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_tensors_that_a_component_makes_are_made_on_its_device(name, compile):
    vae = OWN[name]()
    result = pv.fit(vae.model, vae.guide, bits(), epochs=2, seed=0, compile=compile)
    assert result.device.startswith("cuda")
    assert result.compiled == compile
    estimate = pv.log_marginal(vae.model, vae.guide, bits(), num_samples=300, seed=0)
    assert estimate.log_prob.isfinite().all()


def model_with_cpu_prior(vae):
    def model(x):
        pyro.module("decoder", vae.likelihood)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", vae.likelihood(z), obs=x)

    return model


@gpu
def test_a_site_on_another_device_is_refused_by_its_name():
    vae = make_vae().cuda()
    model, x = model_with_cpu_prior(vae), bits().cuda()
    said = "parameters of site 'z' of the model on cuda:0, got one on cpu: make it"
    for call in (pv.log_marginal, pv.log_weights):
        with pytest.raises(InputError, match=said):
            call(model, vae.guide, x, num_samples=5)
    with pytest.raises(InputError, match=said):
        pv.fit(model, vae.guide, x, epochs=1)


@gpu
def test_a_vamp_prior_starts_at_data_of_another_device():
    family = make_family("MeanFieldNormal")
    vae = pv.VAE(
        pv.priors.VampPrior(family, DATA_SHAPE, num_pseudo_inputs=4),
        make_likelihood("Bernoulli"),
        family,
    ).cuda()
    x = torch.zeros(8, *DATA_SHAPE)
    vae.start_at_data(x)
    torch.testing.assert_close(vae.prior.pseudo_inputs.cpu(), torch.full((4, *DATA_SHAPE), 0.01))


@gpu
def test_generators_of_every_device_are_kept(recwarn):
    vae, x = make_vae().cuda(), bits().cuda()
    before = torch.cuda.get_rng_state_all()
    options = {"num_samples": 40, "seed": 0}
    first = pv.log_marginal(vae.model, vae.guide, x, compile=True, **options).log_prob
    again = pv.log_marginal(vae.model, vae.guide, x, compile=True, **options).log_prob
    assert torch.equal(first, again)
    for state, kept in zip(torch.cuda.get_rng_state_all(), before, strict=True):
        assert torch.equal(state, kept)
    assert not [w for w in recwarn if "fork_rng" in str(w.message)]


# --- precision ---


def flags():
    def read(get):
        try:
            return get()
        except RuntimeError:
            return "old and new flags differ"

    backends = torch.backends
    return (
        backends.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
        read(torch.get_float32_matmul_precision),
        read(lambda: backends.cuda.matmul.allow_tf32),
        read(lambda: backends.cudnn.allow_tf32),
    )


def set_to(place, name, value):
    return lambda: setattr(place, name, value)


SAID_BEFORE = {
    "nothing": lambda: None,
    "old high": lambda: torch.set_float32_matmul_precision("high"),
    "old medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new product tf32": set_to(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new product ieee": set_to(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    "new of all tf32": set_to(torch.backends, "fp32_precision", "tf32"),
    "new of all ieee": set_to(torch.backends, "fp32_precision", "ieee"),
    "old convolution": set_to(torch.backends.cudnn, "allow_tf32", False),
    "new convolution": set_to(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.fixture
def _own_flags():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.usefixtures("_own_flags")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("said", SAID_BEFORE)
def test_precision_is_set_and_put_back_whichever_flags_were_used(said, precision):
    SAID_BEFORE[said]()
    before = flags()
    with compute_in(precision, CUDA):
        inside = flags()
    is_tf32 = precision == "tf32"
    assert inside[1:4] == ("tf32" if is_tf32 else "ieee",) * 3
    assert inside[4:] == ("high" if is_tf32 else "highest", is_tf32, is_tf32)
    assert flags() == before


@pytest.mark.usefixtures("_own_flags")
def test_a_cpu_run_leaves_the_flags_of_cuda_alone():
    before = flags()
    with compute_in("tf32", torch.device("cpu")):
        assert flags() == before


@gpu
def test_validation_and_evaluation_are_float32_and_training_as_asked(monkeypatch):
    vae, x, seen = make_vae().cuda(), bits().cuda(), collections.defaultdict(set)
    bound, score = validation.evaluate_bound, Particles.score
    decode = type(vae.likelihood).forward

    def note(what, function):
        def noted(*args, **kwargs):
            seen[what].add((precision_now(), torch.backends.cudnn.conv.fp32_precision))
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(validation, "evaluate_bound", note("validation", bound))
    monkeypatch.setattr(Particles, "score", note("evaluation", score))
    monkeypatch.setattr(type(vae.likelihood), "forward", note("run", decode))
    options = {"epochs": 1, "validation": x, "compile": False}
    for precision, rounded in (("tf32", "tf32"), ("float32", "ieee")):
        pv.fit(vae.model, vae.guide, x, precision=precision, **options)
        assert (precision, rounded) in seen["run"]
    pv.log_marginal(vae.model, vae.guide, x, num_samples=50)
    assert seen["validation"] == seen["evaluation"] == {("float32", "ieee")}


# --- memory ---


@gpu
def test_chunks_and_so_draws_do_not_hang_on_what_is_free(monkeypatch):
    vae, x = make_vae().cuda(), bits().cuda()
    estimates = []
    for free in (70 << 30, 1 << 20):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 80 << 30))
        estimates.append(pv.log_marginal(vae.model, vae.guide, x, num_samples=600, seed=0).log_prob)
        assert open_pair(vae.model, vae.guide, x).memory() == 1 << 32
    assert torch.equal(*estimates)


@gpu
def test_data_that_stay_on_the_cpu_leave_the_gpu_its_chunks(monkeypatch):
    vae, x = make_vae().cuda(), bits()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (x.nbytes, x.nbytes))
    with pytest.warns(UserWarning, match="are moved in blocks"):
        pair = open_pair(vae.model, vae.guide, x)
    assert pair.inputs[0].device.type == "cpu"
    assert pair.memory() == 1 << 32


OUT_OF_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
}


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
@pytest.mark.parametrize("way", ["_score_under_vmap", "_draw_under_plate"])
def test_no_memory_left_is_not_a_pair_that_takes_no_batches(where, way, monkeypatch):
    def fill(*_):
        raise OUT_OF_MEMORY[where]

    vae = make_vae()
    monkeypatch.setattr(Particles, way, fill)
    with pytest.raises(RuntimeError, match="allocate"):
        pv.log_marginal(vae.model, vae.guide, bits(), num_samples=8, seed=0)


def test_no_memory_left_is_not_a_pair_with_a_row_for_each_data_point(monkeypatch):
    vae, x = make_vae(), bits()
    pair = open_pair(vae.model, vae.guide, x)

    def fill(*_):
        raise OUT_OF_MEMORY["device"]

    monkeypatch.setattr("pyro_vae.pair.opened._holds_for", fill)
    with pytest.raises(torch.OutOfMemoryError):
        pair.is_divisible()


# --- waits ---


def waits_per_step(vae, binarize="dynamic", **options):
    """Which waits there are in the third epoch that come at least once in each of its steps.

    Its steps, 41 to 60, are no powers of two, at which a captured step is held against stock.
    """
    steps = 20
    x = torch.rand(4 * steps, *vae.likelihood.data_shape)
    test = x[:4].round()
    data = pv.datasets.Dataset("bits", x, test[:0], test, binarize=binarize)

    def count(epoch, _):
        if epoch == 2:
            cuda_stand_in.clear()

    options |= {"epochs": 3, "batch_size": 4, "device": "cuda", "seed": 0, "on_epoch": count}
    pv.fit(vae.model, vae.guide, data, **options)
    return {wait: count // steps for wait, count in cuda_stand_in.waits.items() if count >= steps}


def sphere_vae():
    family = make_family("VonMisesFisher")
    return pv.VAE(make_prior("VonMisesFisher"), make_likelihood("Gaussian learned"), family)


@gpu
@pytest.mark.parametrize(
    "objective",
    [None, pv.infer.IWAE(3), pv.infer.AnalyticKL(), pv.infer.StickingTheLanding()],
    ids=["elbo", "iwae", "analytic", "sticking"],
)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_steps_do_not_wait_for_the_device(compile, objective, stand_in):
    waits = waits_per_step(make_vae(), compile=compile, objective=objective)
    assert sum(waits.values()) <= (0 if compile else 2), waits


@gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_steps_on_the_sphere_do_not_wait_for_the_device(compile, stand_in):
    waits = waits_per_step(sphere_vae(), compile=compile, binarize="none")
    assert sum(waits.values()) <= (0 if compile else 2), waits


# --- faults that the stand-in is there to show ---


@gpu
def test_a_prior_on_the_cpu_shows(stand_in):
    with pytest.raises(RuntimeError, match="same device"):
        dist.Normal(torch.zeros(2), 1.0).log_prob(torch.zeros(3, 2, device="cuda"))


@gpu
def test_a_value_read_in_the_step_shows(stand_in):
    vae = make_vae()
    likelihood = vae.likelihood.forward

    def read(z):
        float(z.detach().sum())
        return likelihood(z)

    vae.likelihood.forward = read
    waits = waits_per_step(vae, compile=False)
    assert sum(waits.values()) >= 1, waits


@gpu
def test_a_generator_of_the_cpu_shows(stand_in):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(3, device="cuda", generator=torch.Generator().manual_seed(0))


@gpu
def test_a_result_used_after_the_next_replay_shows(stand_in):
    step = torch.compile(lambda v: (v.exp(),), options={"triton.cudagraphs": True})
    x = torch.ones(3, device="cuda")
    first = step(x)[0]
    assert first.isfinite().all()
    torch.compiler.cudagraph_mark_step_begin()
    assert first.isnan().all()
    assert step(2 * x)[0].isfinite().all()


# --- a CUDA graph is held against the eager step before it is used ---


def raise_at(number):
    def compile(graph, **_):
        calls = iter(range(1, 1_000_000))

        def run(*values):
            if next(calls) == number:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            return graph(*values)

        return run

    return compile


def err_at(number):
    def compile(graph, **_):
        calls = iter(range(1, 1_000_000))

        def run(*values):
            found = list(graph(*values))
            if next(calls) == number:
                found[1] = found[1] + 1.0
            return found

        return run

    return compile


def train(compile):
    pyro.set_rng_seed(0)
    vae = make_vae()
    options = {"epochs": 2, "batch_size": 8, "seed": 0, "device": "cuda", "compile": compile}
    result = pv.fit(vae.model, vae.guide, bits(), **options)
    return result, [parameter.detach().clone() for parameter in vae.parameters()]


@pytest.fixture(scope="module")
def trained_eagerly():
    with pyro.get_param_store().scope():
        return train(compile=False)[1]


@gpu
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("fault", [raise_at, err_at])
def test_a_graph_that_fails_when_recorded_or_replayed_is_not_used(
    fault, number, monkeypatch, trained_eagerly
):
    monkeypatch.setattr(torch, "compile", fault(number))
    with pytest.warns(UserWarning, match="operation not permitted|differs from the eager"):
        result, found = train(compile=True)
    for value, right in zip(found, trained_eagerly, strict=True):
        torch.testing.assert_close(value, right)
    said = "uncompiled" if fault is raise_at else "eager after all"
    assert said in result.compile_choice


@gpu
def test_a_recording_of_another_precision_is_not_taken_up():
    vae, x = make_vae().cuda(), bits().cuda()
    options = {"num_samples": 64, "compile": True, "seed": 0}
    pv.log_marginal(vae.model, vae.guide, x, **options)
    kept = captured_values.PROGRAMS.get(vae.model).kept
    assert len(kept) == 1
    pv.log_marginal(vae.model, vae.guide, x, precision="bfloat16", **options)
    assert len(kept) == 2


@gpu
def test_a_graph_recorded_in_one_thread_serves_another_uncompiled(stand_in):
    vae, x, found = make_vae().cuda(), bits().cuda(), []

    def anneal():
        options = {"method": "annealed", "num_chains": 4, "num_steps": 5, "seed": 0}
        found.append(pv.log_marginal(vae.model, vae.guide, x, **options).log_prob)

    anneal()
    thread = threading.Thread(target=anneal)
    thread.start()
    thread.join()
    assert len(found) == 2
    torch.testing.assert_close(*found)


@gpu
def test_gradients_of_annealing_are_recorded_and_its_numbers_are_those_of_the_cpu(stand_in):
    vae, x = make_vae(), bits()
    options = {"method": "annealed", "num_chains": 64, "num_steps": 20, "seed": 0}
    expected = pv.log_marginal(vae.model, vae.guide, x, **options)
    vae.cuda()
    found = pv.log_marginal(vae.model, vae.guide, x, **options)
    kept = captured_values.PROGRAMS.get(vae.model, vae.guide).kept
    assert any(program.overwrites for program in kept)
    error = expected.standard_error.hypot(found.standard_error)
    assert ((found.log_prob - expected.log_prob).abs() < 5 * error + 1e-6).all()


@gpu
def test_data_are_moved_without_a_wait(stand_in):
    x = torch.rand(4, 3)
    found = take_rows((x,), slice(1, 3), CUDA)[0]
    assert not stand_in.waits
    assert torch.equal(found.cpu(), x[1:3])


# --- precision of an estimate, and the script for a card ---


def test_an_estimate_in_bfloat16_is_that_in_float32_within_its_error():
    vae, x = make_vae(), bits()
    options = {"num_samples": 200, "seed": 0}
    exact = pv.log_marginal(vae.model, vae.guide, x, **options)
    rounded = pv.log_marginal(vae.model, vae.guide, x, precision="bfloat16", **options)
    difference = rounded.log_prob - exact.log_prob
    assert difference.abs().max() > 0
    # Seven bits of a log-probability that is at most PIXELS * log 2 off from nothing.
    error = exact.standard_error.hypot(rounded.standard_error)
    assert (difference.abs() < 5 * error + 2**-7 * PIXELS).all()
    with pytest.raises(InputError, match="precision float32, tf32, bfloat16, got 'half'"):
        pv.log_marginal(vae.model, vae.guide, x, precision="half")


@pytest.fixture
def gpu_script(monkeypatch):
    path = Path(__file__).parent / "benchmarks" / "gpu.py"
    specification = importlib.util.spec_from_file_location("gpu_script", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setattr(sys, "path", [*sys.path])
    specification.loader.exec_module(module)
    return module


PRINTED = {
    "row": ("print('as it goes'); print('{\"value\": 3}')", {"value": 3}),
    "failed": ("print('why'); raise SystemExit(4)", {"failed with status": 4, "last lines": ["why"]}),
    "killed": ("import time; print('begun', flush=True); time.sleep(60)", {"failed with status": -9}),
}


@pytest.mark.parametrize("case", PRINTED)
def test_a_part_of_the_script_leaves_its_row_or_why_not(case, gpu_script, monkeypatch):
    code, expected = PRINTED[case]
    monkeypatch.setattr(gpu_script, "command", lambda *_: [sys.executable, "-c", code])
    row = gpu_script.run_part("graphs", 1.5 if case == "killed" else 60, [])
    assert row | expected == row
    assert row["part"] == "graphs"


def test_the_limits_of_the_script_add_up_to_less_than_eight_minutes(gpu_script):
    assert sum(limit for _, limit in gpu_script.PARTS.values()) < 480


def test_a_test_that_is_left_out_on_the_stand_in_fails_the_run(tmp_path):
    (tmp_path / "test_whole.py").write_text("def test_it(): pass\n")
    (tmp_path / "test_part.py").write_text(
        "import pytest\ndef test_it(): pass\ndef test_no(): pytest.skip('not here')\n"
    )
    code = (
        "import sys, pytest, cuda_stand_in\n"
        "for name in sys.argv[1:]:\n"
        "    plugins = [cuda_stand_in.EveryTestRuns()]\n"
        "    print('ended', int(pytest.main(['-q', '-p', 'no:cacheprovider', name], plugins)))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / f"test_{n}.py") for n in ("whole", "part"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    ended = [line for line in told.stdout.splitlines() if line.startswith("ended")]
    assert ended == ["ended 0", "ended 1"], told.stdout + told.stderr
    assert "expected 2 tests that pass on the stand-in, got 1" in told.stdout
