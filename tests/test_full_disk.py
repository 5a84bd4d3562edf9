"""A disk that is full, or read-only: one line, nothing half-written, and what was there stays."""

import contextlib
import ctypes
import json
import resource

import numpy as np
import pytest
import torch
from command_line import run, sketching
from process_cases import full_disk
from small_vae import PIXELS, make_vae

import pyro_vae as pv
from pyro_vae.app import train as training
from pyro_vae.files import write_whole

TIMES = {"seconds", "data_per_second"}
SMALL = (
    *("--hidden", 32, "--latent-dim", 2, "--batch-size", 16, "--validation-size", 20),
    *("--epochs", 3, "--device", "cpu"),
)


@contextlib.contextmanager
def room_for(size):
    """Let no file grow beyond so many bytes; the system says EFBIG, and Python raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def held_to_permissions():
    """Let root too write only where the mode of a folder says so (Linux)."""
    libc, header, sets = (
        ctypes.CDLL(None),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    assert libc.capget(header, sets) == 0
    effective, overrides = sets[0], 1 << 1
    try:
        sets[0] &= ~overrides
        assert libc.capset(header, sets) == 0
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


def set_mode(folder, mode):
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(mode)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def x():
    return torch.bernoulli(torch.rand(40, PIXELS))


def trained(x, folder, **options):
    """Three steps an epoch, a checkpoint after each of them."""
    vae = make_vae()
    given = {"epochs": 2, "batch_size": 16, "seed": 0, "checkpoint_minutes": 0}
    pv.fit(vae.model, vae.guide, x, checkpoint=folder, **given, **options)
    return torch.nn.utils.parameters_to_vector(vae.parameters()).detach()


def test_a_checkpoint_without_room_leaves_those_before_it(x, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    before = {}

    def note(epoch, row):
        before.update(bytes_in(folder))

    message = "got: No space left on device; make room"
    with full_disk(3), pytest.raises(pv.InputError, match=message) as caught:
        trained(x, folder, on_epoch=note)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-0000000002.safetensors",
        "step-0000000003.safetensors",
    ]
    second = "step-0000000002.safetensors"
    assert bytes_in(folder)[second] == before[second]
    whole = trained(x, tmp_path / "whole")
    assert torch.equal(trained(x, folder, resume=True), whole)


def test_a_folder_that_is_written_to_no_more_keeps_its_checkpoints(x, tmp_path):
    folder = tmp_path / "run"
    close = {"on_epoch": lambda *_: set_mode(folder, 0o500)}
    with held_to_permissions(), pytest.raises(pv.InputError, match="got: Permission denied; make"):
        trained(x, folder, **close)
    set_mode(folder, 0o700)
    assert len(bytes_in(folder)) == 2
    assert torch.equal(trained(x, folder, resume=True), trained(x, tmp_path / "whole"))


@pytest.mark.parametrize("size", [0, 1000])
def test_a_first_checkpoint_without_room_leaves_nothing(x, tmp_path, size):
    with room_for(size), pytest.raises(pv.InputError, match="got: File too large; make room"):
        trained(x, tmp_path / "a" / "run")
    assert list(tmp_path.rglob("*.safetensors")) == list(tmp_path.rglob(".part-*")) == []


# Less than the lock takes, than the settings take, than the weights take.
@pytest.mark.parametrize("size", [0, 100, 1500])
def test_a_save_without_room_leaves_nothing(tmp_path, size):
    whole = pv.save(make_vae(), tmp_path / "whole")
    sizes = [(whole / name).stat().st_size for name in ("config.json", "model.safetensors")]
    assert 100 < sizes[0] < 1500 < sizes[1]
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new" / "run", tmp_path / "mine"):
        with room_for(size), pytest.raises(pv.InputError, match="got: File too large; make room"):
            pv.save(make_vae(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "whole"]
    assert list((tmp_path / "mine").iterdir()) == []


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bits.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2, (120, 6)))
    return path


def train(bits, folder):
    return run("train", "--dataset", bits, *SMALL, "--checkpoint-minutes", 0, "--output", folder)


@pytest.fixture(scope="module")
def whole(bits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(bits, folder).code == 0
    return folder


def ending(folder):
    """All that a run leaves and no clock decides."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("training_seconds")
    history = {name: row for name, row in metrics.pop("history").items() if name not in TIMES}
    names = sorted(path.name for path in folder.iterdir())
    return (folder / "model.safetensors").read_bytes(), history, metrics, names


def one_line(result, message):
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("pyro-vae: expected to write ")
    assert result.err.endswith(f"got: {message}; make room or choose another folder\n")
    assert result.err.count("\n") == 1


# Less than the lock, than the settings, than the first checkpoint takes.
@pytest.mark.parametrize("size", [0, 100, 8000])
def test_a_run_without_room_at_its_start_leaves_nothing(bits, tmp_path, size):
    with room_for(size):
        result = train(bits, tmp_path / "new" / "run")
    one_line(result, "File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_without_room_on_its_way_keeps_its_checkpoints_and_goes_on(bits, whole, tmp_path):
    folder = tmp_path / "run"
    with full_disk(4):  # the settings and three checkpoints are written
        result = train(bits, folder)
    one_line(result, "No space left on device")
    assert sorted(bytes_in(folder)) == [
        "config.json",
        "step-0000000002.safetensors",
        "step-0000000003.safetensors",
    ]
    with sketching():
        assert run("train", "--resume", folder).code == 0
    assert ending(folder) == ending(whole)


@pytest.mark.slow
def test_a_run_whose_folder_is_written_to_no_more_goes_on_when_it_is(
    bits, whole, tmp_path, monkeypatch
):
    folder, fit = tmp_path / "run", training.fit
    close = {"on_epoch": lambda *_: set_mode(folder, 0o500)}
    with monkeypatch.context() as patch, held_to_permissions():
        patch.setattr(training, "fit", lambda *given, **options: fit(*given, **options, **close))
        result = train(bits, folder)
    one_line(result, "Permission denied")
    set_mode(folder, 0o700)
    with sketching():
        assert run("train", "--resume", folder).code == 0
    assert ending(folder) == ending(whole)


@pytest.mark.slow
def test_a_run_without_room_for_its_page_is_finished_when_there_is(bits, whole, tmp_path):
    folder = tmp_path / "run"
    largest = max(path.stat().st_size for path in whole.iterdir())
    with room_for(largest - 1):
        result = train(bits, folder)
    one_line(result, "File too large")
    assert not (folder / "metrics.json").exists()
    assert not list(folder.rglob(".part-*"))
    with sketching():
        assert run("train", "--resume", folder).code == 0
    assert ending(folder) == ending(whole)


def test_what_the_writer_of_a_file_gets_wrong_is_not_taken_for_a_full_disk(tmp_path):
    def write(stream):
        stream.write(b"half")
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match=r"^no such picture$"):
        write_whole(tmp_path / "picture.png", write)
    assert list(tmp_path.iterdir()) == []
