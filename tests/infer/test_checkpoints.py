"""Checkpoints: a run left at any step and resumed is the run that was never left, bit for bit."""

import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from safetensors import safe_open
from torch import nn

import pyro_vae as pv
from pyro_vae.infer import IWAE, CompiledTrace_ELBO, training
from pyro_vae.infer.checkpoint import Interrupted
from pyro_vae.infer.checkpoint_files import checkpoint_files, read_newest, write_checkpoint
from pyro_vae.infer.trainer import Trainer

PIXELS = 6
TIMES = {"seconds", "data_per_second"}
# Three batches per epoch, 18 steps.
OPTIONS = {"epochs": 6, "batch_size": 16, "learning_rate": 0.01, "checkpoint_minutes": None}


def make_vae():
    torch.manual_seed(0)
    decoder, encoder = pv.networks.MLPDecoder(2, (8,)), pv.networks.MLPEncoder((PIXELS,), (8,))
    return pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder, (PIXELS,)),
        pv.guides.MeanFieldNormal(encoder, 2),
    )


class Drawing(nn.Module):
    """Plain functions with a buffer that counts, and draws from every generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(PIXELS, 4)
        self.register_buffer("calls", torch.zeros(()))

    def model(self, x):
        weight = pyro.param("weight", torch.zeros(2, PIXELS))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("net", self.net)
        if self.training:
            self.calls += 1
        loc, raw = self.net(x).chunk(2, -1)
        shift = random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + shift, raw.exp()).to_event(1))


@pytest.fixture
def x():
    return torch.bernoulli(torch.rand(40, PIXELS))


def run(make, data, folder, stops=(), **options):
    """Train with a SIGTERM in the middle of these steps; start again each time."""
    stops = iter(stops)
    while True:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        vae, stop = make(), next(stops, None)
        with pytest.MonkeyPatch.context() as patch:
            take = Trainer._step

            def step(self, *arguments, take=take, stop=stop):
                if self.count == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return take(self, *arguments)

            patch.setattr(Trainer, "_step", step)
            try:
                found = pv.fit(
                    vae.model, vae.guide, data, checkpoint=folder, **{**OPTIONS, **options}
                )
            except Interrupted:
                options["resume"] = True
                continue
        names = sorted(pyro.get_param_store().keys())
        stored = [pyro.param(name).detach().clone() for name in names]
        draws = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
        return found, [*stored, *vae.state_dict().values()], draws


def assert_same(found, expected):
    for name in found[0].history.keys() - TIMES:
        np.testing.assert_array_equal(found[0].history[name], expected[0].history[name], name)
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert torch.equal(found[2][0], expected[2][0])
    assert found[2][1:] == expected[2][1:]
    for name in ("best_epoch", "stopped_early", "skipped_steps", "num_parameters", "warnings"):
        assert getattr(found[0], name) == getattr(expected[0], name)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_vae, {"warmup_epochs": 4, "schedule": "cosine", "gradient_clip": 0.5}),
        (make_vae, {"objective": IWAE(3), "transform": torch.bernoulli}),
        pytest.param(
            make_vae,
            {"objective": RenyiELBO(alpha=0.5, num_particles=2, vectorize_particles=False)},
            marks=pytest.mark.slow,
        ),
        (make_vae, {"patience": 1, "learning_rate": 0.5, "validation": "data"}),
        (Drawing, {"validation": "data"}),
        pytest.param(
            make_vae,
            {"objective": CompiledTrace_ELBO(backend="eager"), "compile": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["schedules", "IWAE", "Renyi", "early stopping", "plain functions", "recorded steps"],
)
def test_a_run_left_at_any_step_is_the_run_that_was_not(make, options, x, tmp_path):
    if options.get("validation") == "data":
        options = {**options, "validation": x[:10]}
    expected = run(make, x, tmp_path / "whole", **options)
    # In the first step, in the middle and at the end of an epoch, in the last step.
    found = run(make, x, tmp_path / "left", stops=(0, 1, 4, 8, 17), **options)
    assert_same(found, expected)
    # The end of a run is taken up too, without another step.
    assert_same(run(make, x, tmp_path / "left", resume=True, **options), expected)


@pytest.mark.slow
def test_a_compiled_run_that_was_left_is_the_same_but_for_rounding(x, tmp_path):
    """The same draws, batches and schedule; each start holds compiled steps against plain ones."""
    options = {"compile": True, "schedule": "cosine", "warmup_epochs": 2}
    expected = run(make_vae, x, tmp_path / "whole", **options)
    found = run(make_vae, x, tmp_path / "left", stops=(0, 4, 17), **options)
    for name in found[0].history.keys() - TIMES:
        np.testing.assert_allclose(found[0].history[name], expected[0].history[name], rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(found[2][0], expected[2][0])


def test_state_after_every_step_and_two_are_kept(x, tmp_path):
    kept = []
    expected = run(make_vae, x, tmp_path / "whole")
    found = run(
        make_vae, x, tmp_path / "often", checkpoint_minutes=0,
        on_epoch=lambda *_: kept.append([path.name for path in checkpoint_files(tmp_path / "often")]),
    )  # fmt: skip
    assert_same(found, expected)
    names = [f"step-{count:010d}.safetensors" for count in range(19)]
    assert kept == [names[last - 1 : last + 1] for last in (3, 6, 9, 12, 15, 18)]
    assert [path.name for path in (tmp_path / "whole").iterdir()] == names[-1:]


def test_period_in_epochs(x, tmp_path):
    run(make_vae, x, tmp_path / "run", checkpoint_every=4)
    names = [path.name for path in checkpoint_files(tmp_path / "run")]
    assert names == ["step-0000000012.safetensors", "step-0000000018.safetensors"]


def test_period_in_minutes(x, tmp_path, monkeypatch):
    """Each step takes twenty seconds of this clock."""
    kept, clock = [], SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def pass_time(batch):
        clock.now += 20
        return batch

    def note(*arguments):
        kept.append([int(path.stem[-2:]) for path in checkpoint_files(tmp_path)])

    monkeypatch.setattr("pyro_vae.infer.checkpoint.time", clock)
    run(make_vae, x, tmp_path, checkpoint_minutes=1.5, transform=pass_time, on_epoch=note)
    assert kept == [[], [5], [5], [5, 10], [10, 15], [10, 15]]


def interrupted(x, folder, **options):
    """Leave a run after 4 and 5 steps."""
    vae = make_vae()
    counts = itertools.count(1)

    def transform(batch):
        if next(counts) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    given = {**OPTIONS, "checkpoint_minutes": 0, "seed": 1, **options}
    with pytest.raises(Interrupted, match="repeat the call with resume=True") as caught:
        pv.fit(vae.model, vae.guide, x, checkpoint=folder, transform=transform, **given)
    assert (caught.value.number, caught.value.folder) == (signal.SIGINT, folder)
    paths = checkpoint_files(folder)
    assert [path.name[-14:-12] for path in paths] == ["04", "05"]
    return paths


def resume(x, folder, **options):
    vae = make_vae()
    given = {**OPTIONS, "seed": 1, "transform": lambda batch: batch, "resume": True, **options}
    result = pv.fit(vae.model, vae.guide, x, checkpoint=folder, **given)
    return result, torch.nn.utils.parameters_to_vector(vae.parameters()).detach()


def test_a_clock_that_jumps_or_stands_still_changes_no_bit(x, tmp_path, monkeypatch):
    expected, draw = run(make_vae, x, tmp_path / "whole"), random.Random(0)
    backwards = itertools.count(1e9, -3600)
    clocks = (lambda: 5.0, lambda: next(backwards), lambda: draw.uniform(-1e9, 1e9))
    for number, clock in enumerate(clocks):
        with monkeypatch.context() as patch:
            for name in ("time", "monotonic", "perf_counter"):
                patch.setattr(time, name, clock)
            found = run(make_vae, x, tmp_path / str(number), stops=(7,), checkpoint_minutes=1)
        assert_same(found, expected)


def test_a_run_goes_on_with_another_number_of_threads(x, tmp_path):
    """Sums may be taken in another order: to the bit it is promised for the same number alone."""
    _, expected = resume(x, tmp_path / "whole")
    interrupted(x, tmp_path / "left")
    torch.set_num_threads(2)
    try:
        _, found = resume(x, tmp_path / "left")
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cut", [0, pytest.param(100, marks=pytest.mark.slow), -1])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(x, tmp_path, cut):
    paths = interrupted(x, tmp_path / "run")
    _, expected = resume(x, tmp_path / "whole")
    paths[-1].write_bytes(paths[-1].read_bytes()[:cut])
    with pytest.warns(UserWarning, match="can't be read .* the one before is taken") as caught:
        _, found = resume(x, tmp_path / "run")
    assert caught[0].filename == __file__  # it points at the call of fit
    assert torch.equal(found, expected)


def test_a_changed_byte_is_seen_and_nothing_readable_is_an_error(x, tmp_path):
    paths = interrupted(x, tmp_path)
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.raises(pv.InputError, match=r"got 2 damaged ones .*its checksum is another"):
        resume(x, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "expected batch size 16 .*, got 8"),
        ({"epochs": 7}, "expected epochs 6 .*, got 7"),
        ({"learning_rate": 0.02}, "expected learning rate 0.01 .*, got 0.02"),
        ({"beta": 2.0}, "expected beta 1.0 .*, got 2.0"),
        ({"objective": IWAE(2)}, "expected objective 'DefaultBound.*, got 'IWAE"),
        ({"seed": 2}, "expected seed 1 .*, got 2"),
        ({"transform": None}, "expected transform True .*, got False"),
        ({"compile": True}, "expected compiled False .*, got True"),
        ({"schedule": "cosine"}, "expected schedule 'constant' .*, got 'cosine'"),
    ],
)
def test_other_options_are_refused(x, tmp_path, options, message):
    interrupted(x, tmp_path)
    with pytest.raises(pv.InputError, match=message):
        resume(x, tmp_path, **options)


def test_other_data_and_another_pair_are_refused(x, tmp_path):
    interrupted(x, tmp_path)
    with pytest.raises(pv.InputError, match="expected data"):
        resume(1 - x, tmp_path)
    other = Drawing()
    with pytest.raises(pv.InputError, match="expected the state of a run of this pair"):
        pv.fit(
            other.model, other.guide, x, checkpoint=tmp_path, resume=True, seed=1,
            transform=lambda batch: batch, **OPTIONS,
        )  # fmt: skip


def test_a_newer_format_is_refused(x, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.checkpoint_files._FORMAT", 2)
    interrupted(x, tmp_path)
    monkeypatch.undo()
    with pytest.raises(pv.InputError, match="written by a newer pyro_vae: update"):
        resume(x, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": None, "resume": True}, "expected the folder of the checkpoints"),
        ({"checkpoint_every": 0}, "checkpoint_every of at least 1"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes of at least 0"),
        ({}, "continue with resume=True"),
    ],
)
def test_options_out_of_range(x, tmp_path, options, message):
    interrupted(x, tmp_path)
    vae = make_vae()
    with pytest.raises(pv.InputError, match=message):
        pv.fit(vae.model, vae.guide, x, **{"checkpoint": tmp_path, **OPTIONS, **options})


def test_a_file_in_the_way_is_one_clear_error(x, tmp_path):
    (tmp_path / "file").write_text("")
    vae = make_vae()
    with pytest.raises(pv.InputError, match=r"expected a folder|expected to write"):
        pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path / "file", **OPTIONS)


def test_checkpoints_hold_plain_values_and_tensors(x, tmp_path):
    path = interrupted(x, tmp_path)[-1]
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["checkpoint"])
    assert content["format"] == 1
    assert content["state"]["steps"]["count"] == 5
    assert content["settings"]["batch_size"] == 16


def test_handlers_are_restored_and_only_the_main_thread_has_them(x, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def note(epoch, row):
        seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    def train(folder):
        vae = make_vae()
        options = {**OPTIONS, "epochs": 1}
        pv.fit(vae.model, vae.guide, x, checkpoint=folder, on_epoch=note, **options)

    train(tmp_path / "main")
    thread = threading.Thread(target=train, args=[tmp_path / "thread"])
    thread.start()
    thread.join()
    assert seen[0] != before
    assert seen[1] == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(checkpoint_files(tmp_path / "thread")) == 1


def test_a_second_signal_ends_the_run_at_once(x, tmp_path):
    def transform(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one was held back")

    vae = make_vae()
    with pytest.raises(KeyboardInterrupt) as caught:
        pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path, transform=transform, **OPTIONS)
    assert not isinstance(caught.value, Interrupted)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_step_that_is_not_finite_leaves_the_state_before_it(x, tmp_path):
    counts = itertools.count(1)

    def transform(batch):
        return batch * (torch.nan if next(counts) == 8 else 1.0)

    def train(transform, **options):
        vae = make_vae()
        pv.fit(
            vae.model, vae.guide, x, checkpoint=tmp_path, transform=transform, seed=1,
            **OPTIONS, **options,
        )  # fmt: skip
        return vae

    with pytest.raises(pv.InputError, match="in epoch 3, batch 2"):
        train(transform)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-0000000007.safetensors"]
    vae = train(lambda batch: batch, resume=True)
    assert all(value.isfinite().all() for value in vae.parameters())
    assert checkpoint_files(tmp_path)[-1].name == "step-0000000018.safetensors"


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_run_that_skips_too_often_leaves_what_the_other_steps_made(x, tmp_path):
    vae, counts = make_vae(), itertools.count(1)

    def transform(batch):
        return batch * (torch.nan if next(counts) in (2, 4) else 1.0)

    options = {"transform": transform, "on_nonfinite": "skip", "nonfinite_limit": 1}
    with pytest.raises(
        pv.InputError, match=r"\(2 steps were skipped\).*; the state at the end of that"
    ):
        pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path, **options, **OPTIONS)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-0000000006.safetensors"]
    kept = read_newest(tmp_path)["state"]["steps"]["parameters"]
    own = torch.nn.utils.parameters_to_vector(vae.parameters()).detach()
    assert sorted(torch.cat([value.flatten() for value in kept])) == sorted(own)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_the_last_good_state_of_a_first_epoch_is_kept_if_there_is_one(x, tmp_path):
    vae, seen = make_vae(), []

    def note(batch):
        seen.append(torch.nn.utils.parameters_to_vector(vae.parameters()).detach().clone())
        return batch

    options = {**OPTIONS, "learning_rate": 1e30, "transform": note, "checkpoint": tmp_path / "run"}
    with pytest.raises(
        pv.InputError, match=r"in epoch 1, batch 2: .*; the state before it is in"
    ) as caught:
        pv.fit(vae.model, vae.guide, x, **options)
    assert str(caught.value).endswith(str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoint_files(tmp_path / "run")] == [
        "step-0000000001.safetensors"
    ]
    kept = read_newest(tmp_path / "run")["state"]["steps"]["parameters"]
    assert sorted(torch.cat([value.flatten() for value in kept])) == sorted(seen[1])
    with pytest.raises(pv.InputError, match="in epoch 1, batch 1: ") as caught:
        pv.fit(vae.model, vae.guide, x, **{**options, "checkpoint": tmp_path / "none"})
    assert "the state before it" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_history_has_its_columns_after_a_resumption(x, tmp_path):
    interrupted(x, tmp_path)
    result, _ = resume(x, tmp_path)
    assert set(result.history) == set(training.HISTORY)
    assert all(len(column) == 6 for column in result.history.values())


def test_a_checkpoint_written_after_a_return_to_an_earlier_step_is_the_newest(tmp_path):
    for count in (8, 9, 10, 5):  # at 10 a GPU finds out that step 6 was not finite
        write_checkpoint(tmp_path, count, {}, {"count": count})
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-0000000005.safetensors"]
    assert read_newest(tmp_path)["state"]["count"] == 5


def test_a_checkpoint_of_version_0_1_0_is_gone_on_with(tmp_path):
    """Written after 11 of 18 steps, in the middle of an epoch, with every schedule in its middle."""
    x = (torch.arange(240).view(40, PIXELS) * 7 % 11 < 5).float()
    options = {
        **OPTIONS,
        **{"warmup_epochs": 4, "schedule": "cosine", "gradient_clip": 0.5, "validation": x[:10]},
        **{"patience": 6, "seed": 1, "transform": lambda batch: batch},
    }
    shutil.copytree(Path(__file__).parent / "written_by_0_1_0", tmp_path / "old")
    results = []
    # What was begun by the objective that was the default then goes on by it.
    for folder, resume, objective in (("new", False, pv.infer.TraceBound()), ("old", True, None)):
        vae = make_vae()
        how = {"resume": resume, "objective": objective, **options}
        found = pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path / folder, **how)
        results.append((found.history, torch.nn.utils.parameters_to_vector(vae.parameters())))
    for name in results[0][0].keys() - TIMES:
        np.testing.assert_allclose(results[1][0][name], results[0][0][name], rtol=1e-5, err_msg=name)
    torch.testing.assert_close(results[1][1], results[0][1])
    assert len(checkpoint_files(tmp_path / "old")) == 2


def test_a_signal_that_is_ignored_stays_ignored(x, tmp_path):
    vae, before = make_vae(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = pv.fit(
            vae.model, vae.guide, x, checkpoint=tmp_path, **OPTIONS,
            on_epoch=lambda *_: os.kill(os.getpid(), signal.SIGINT),
        )  # fmt: skip
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(result.history["beta"]) == OPTIONS["epochs"]


def test_a_signal_to_a_fit_inside_a_fit_leaves_the_state_of_both(x, tmp_path):
    def train(vae, folder, **options):
        pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path / folder, seed=1, **OPTIONS, **options)
        return torch.nn.utils.parameters_to_vector(vae.parameters()).detach()

    inner = make_vae()

    def inside(epoch, row):
        if epoch == 2:
            train(inner, "inner", on_epoch=lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(Interrupted) as caught:
        train(make_vae(), "outer", on_epoch=inside)
    assert caught.value.folder == tmp_path / "inner"
    assert checkpoint_files(tmp_path / "inner")
    whole = train(make_vae(), "whole")
    assert checkpoint_files(tmp_path / "outer")
    assert torch.equal(train(make_vae(), "outer", resume=True), whole)


def test_a_folder_is_the_one_it_was_at_the_start_wherever_the_process_goes(x, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    vae = make_vae()
    go = {"on_epoch": lambda *_: os.chdir(tmp_path / "elsewhere"), "checkpoint_every": 1}
    pv.fit(vae.model, vae.guide, x, checkpoint="kept", **OPTIONS, **go)
    assert len(checkpoint_files(tmp_path / "kept")) == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_run_whose_folder_was_moved_leaves_its_successors_checkpoints_alone(x, tmp_path):
    def move(epoch, row):
        (tmp_path / "kept").rename(tmp_path / "moved")
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "step-0000000099.safetensors").write_text("another's")

    vae = make_vae()
    options = {**OPTIONS, "on_epoch": move, "checkpoint_every": 1}
    with pytest.raises(pv.InputError, match="it was moved, replaced or deleted since") as caught:
        pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path / "kept", **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoint_files(tmp_path / "kept")] == [
        "step-0000000099.safetensors"
    ]


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_a_checkpoint_that_is_no_file_of_its_own_is_not_waited_for(x, tmp_path, kind):
    first, path = interrupted(x, tmp_path / "kept")
    content = path.read_bytes()
    first.unlink()
    path.unlink()
    (tmp_path / "mine").write_bytes(content)
    if kind == "a link":
        path.symlink_to(tmp_path / "mine")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    vae = make_vae()
    with pytest.raises(pv.InputError, match=r"got 1 damaged ones .*no file of its own"):
        pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path / "kept", resume=True, **OPTIONS)
    assert (tmp_path / "mine").read_bytes() == content


def test_two_damaged_checkpoints_are_one_error_and_no_warning(x, tmp_path):
    vae = make_vae()
    pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path, checkpoint_every=1, **OPTIONS)
    assert len(checkpoint_files(tmp_path)) == 2
    for path in checkpoint_files(tmp_path):
        path.write_bytes(b"damaged")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(pv.InputError, match=r"got 2 damaged ones .*: start again"):
            pv.fit(vae.model, vae.guide, x, checkpoint=tmp_path, resume=True, **OPTIONS)
    assert told == []
    assert len(checkpoint_files(tmp_path)) == 2
