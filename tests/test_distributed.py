"""Several processes train one pair: the same parameters in all, the same run as one process.

Their start costs half a minute, so what needs two of them is in the slow part.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from process_cases import SEEDS, kept, outcome
from torch.testing import assert_close

import pyro_vae as pv
from pyro_vae.distributed import ALONE, Processes, join_processes
from pyro_vae.infer.checkpoint_files import checkpoint_files, read_newest

TESTS = Path(__file__).parent
COMMAND = ("-m", "pyro_vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes write."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def shared(folder):
    """The outcomes of every case, one set of them per process of two."""
    kept(folder / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "process_cases.py"), str(folder)],
            env={**os.environ, **told, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [out for out, _ in said] == ["written by 0\n", ""]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def both(shared, case):
    """Return the outcome of a case that both processes agree on, to the bit."""
    first, second = (outcomes[case] for outcomes in shared)
    if isinstance(first, str):
        assert second == first
    else:
        assert_close(second, first, rtol=0, atol=0, equal_nan=True)
    return first


def like_one_process(found, case, parts=("parameters", "history", "epochs", "skipped")):
    """Check an outcome against one process's: a sum is taken in another order, no more."""
    alone = outcome(case)
    for part in parts:
        assert_close(found[part], alone[part], rtol=1e-4, atol=1e-5, equal_nan=True)
    return alone


@pytest.mark.slow
def test_without_noise_the_run_is_that_of_one_process(shared):
    found = both(shared, "exact")
    like_one_process(found, "exact")
    # What the pair counts by itself is the first process's: half of 20, half of 20, and 1 of 1; it
    # was run once before to find its parameters.
    assert found["buffers"].tolist()[0] == 10 + 4 * (10 + 10 + 1)


@pytest.mark.slow
def test_the_norm_that_is_clipped_is_that_of_the_whole_gradient(shared):
    alone = like_one_process(both(shared, "clipped"), "clipped")
    assert (alone["history"]["gradient_norm"] > 0.1).all()
    assert not torch.allclose(alone["parameters"], outcome("exact")["parameters"])


@pytest.mark.slow
def test_captured_steps_are_shared_too(shared):
    found = both(shared, "compiled")
    alone = like_one_process(found, "compiled")
    assert found["compiled"]
    assert alone["compiled"]


@pytest.mark.slow
def test_patience_ends_all_processes_at_once(shared):
    found = both(shared, "stopped")
    like_one_process(found, "stopped")
    best, stopped_early, epochs = found["epochs"]
    assert stopped_early
    assert epochs == best + 3


@pytest.mark.slow
def test_a_step_that_one_process_finds_not_finite_is_skipped_by_all(shared):
    for case in ("skipped", "skipped by its loss"):
        found = both(shared, case)
        alone = like_one_process(found, case)
        assert found["skipped"] == alone["skipped"] == 3
        assert found["parameters"].isfinite().all()


@pytest.mark.slow
def test_stopping_on_what_is_not_finite_is_told_in_every_process(shared):
    for case in ("not finite", "over the limit"):
        assert both(shared, case) == outcome(case)
        assert "expected a finite loss" in both(shared, case)


@pytest.mark.slow
def test_noise_and_data_differ_between_processes(shared):
    (first, second), alone = (outcomes["drawn"] for outcomes in shared), outcome("drawn")
    for mine, other, whole in zip(first, second, alone, strict=True):
        assert torch.equal(torch.cat([mine[1:], other[1:]]), whole[1:])
        assert mine[0] == whole[0]
        assert mine[0] != other[0]


@pytest.mark.slow
def test_the_elbo_is_that_of_one_process(shared):
    """Different noise, the same expectation: the paired difference over seeds is noise alone."""
    differences = []
    for seed in SEEDS:
        found, alone = both(shared, f"noisy {seed}"), outcome(f"noisy {seed}")
        curves = [each["history"]["validation_elbo"] for each in (found, alone)]
        differences.append(curves[0][-3:].mean() - curves[1][-3:].mean())
        assert found["epochs"] == alone["epochs"]
    differences = torch.stack(differences)
    standard_error = differences.std() / len(differences) ** 0.5
    assert 0 < standard_error < 0.1
    assert abs(differences.mean()) < 5 * standard_error


@pytest.mark.slow
def test_shared_evaluation_gives_the_means_over_all_data(shared):
    assert both(shared, "evaluated") == pytest.approx(outcome("evaluated"), rel=1e-5)


@pytest.mark.slow
def test_the_first_process_decides_and_its_refusal_reaches_all(shared):
    assert both(shared, "decided") == "rank 0"
    assert both(shared, "refused") == "refused by 0"


@pytest.mark.slow
def test_what_one_process_finds_in_its_share_is_refused_by_all(shared):
    text = "expected x in [0, 1] for Bernoulli, got values from 0 to 2"
    assert both(shared, "out of range").startswith(text)


@pytest.mark.slow
def test_calls_that_do_not_fit_together_are_refused_everywhere(shared):
    for case in ("other data", "other part"):
        assert "expected the same data in every process" in both(shared, case)


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_left_at_any_step_by_a_signal_to_either_is_the_run_that_was_not(shared, folder):
    assert_close(both(shared, "left"), both(shared, "whole"), rtol=0, atol=0, equal_nan=True)
    names = [path.name for path in checkpoint_files(folder / "left")]
    assert names == ["step-0000000010.safetensors", "step-0000000020.safetensors"]


@pytest.mark.slow
def test_each_process_keeps_what_is_its_own(shared, folder):
    own = read_newest(folder / "whole")["state"]["own"]
    assert len(own) == 2
    for generator in ("python", "numpy"):
        assert not torch.equal(*(each["generators"][generator]["words"] for each in own))
    assert not torch.equal(*(each["generators"]["torch"] for each in own))
    assert not torch.equal(*(each["steps"]["summaries"] for each in own))


@pytest.mark.slow
def test_another_number_of_processes_is_refused(shared, folder):
    text = "expected number of processes {} as the run in .* was begun with, got {}"
    assert re.match(text.format(1, 2), both(shared, "alone"))
    with pytest.raises(pv.InputError, match=text.format(2, 1)) as caught:
        kept(folder / "whole", resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_checkpoints_that_are_there_or_not_wanted_by_all_are_refused_everywhere(shared, folder):
    assert "holds some: continue with resume=True" in both(shared, "begun")
    assert "expected the same checkpoints in every process" in both(shared, "one of two")
    assert not (folder / "one").exists()


@pytest.mark.slow
def test_a_full_disk_is_told_in_every_process_and_leaves_the_checkpoints_before(shared):
    assert "No space left on device; make room" in both(shared, "full disk")
    found, expected = both(shared, "room again"), both(shared, "whole")
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_the_last_good_state_is_written_by_the_first_of_them(shared, folder):
    text = both(shared, "last good")
    assert text.endswith(f"; the state before it is in {folder / 'good'}")
    batch = int(re.search(r"in epoch 1, batch (\d)", text)[1])
    assert batch > 1
    (path,) = checkpoint_files(folder / "good")
    assert path.stem == f"step-{batch - 1:010d}"
    parameters = read_newest(folder / "good")["state"]["steps"]["parameters"]
    assert all(value.isfinite().all() for value in parameters)


# --- one process -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_of_the_rows_in_order(size):
    for number in (1, 2, 5, 20):
        rows = torch.arange(number)
        shares = [Processes(rank, size).share(rows) for rank in range(size)]
        assert torch.equal(torch.cat(shares), rows)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_own_seeds_differ_between_ranks_and_between_neighbouring_seeds():
    seeds = [Processes(rank, 8).own_seed(seed) for seed in range(20) for rank in range(8)]
    assert len(set(seeds)) == 160
    assert [Processes(0, 8).own_seed(seed) for seed in range(20)] == list(range(20))


def test_a_process_that_is_alone_shares_with_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.current() == ALONE
    with join_processes() as processes:
        assert processes == ALONE
        assert processes.gather("mine") == ["mine"]
        assert processes.decide(lambda: 3) == 3
        assert torch.equal(processes.sum_(torch.ones(2)), torch.ones(2))


def test_one_device_for_several_processes_is_refused(monkeypatch):
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (told | local).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, message in (("cuda:0", "each takes the device"), ("auto", "got 2 for 1")):
        with pytest.raises(pv.InputError, match=message), join_processes(device):
            pytest.fail("joined")


# --- the commands ----------------------------------------------------------------------------


def under_torchrun(folder, *arguments):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND)
    return subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_commands_run_under_torchrun(tmp_path):
    settings = ("--hidden", 32, "--latent-dim", 2, "--device", "cpu", "--output", "run")
    result = under_torchrun(tmp_path, "train", "--epochs", 8, *settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run folder: run") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    curve = json.loads((tmp_path / "run/metrics.json").read_text())["history"]["validation_elbo"]
    assert len(curve) == 8
    assert curve[-1] > curve[0]

    how = (
        "evaluate",
        "run",
        "--num-samples",
        300,
        "--method",
        "importance",
        "--device",
        "cpu",
        "--json",
    )
    several = under_torchrun(tmp_path, *how, "--picture", "weights.png")
    assert several.returncode == 0, several.stderr
    alone = subprocess.run(
        [sys.executable, *COMMAND, *map(str, how)], cwd=tmp_path, capture_output=True, text=True
    )
    ours, theirs = json.loads(several.stdout), json.loads(alone.stdout)
    assert ours["num_data"] == theirs["num_data"]
    error = (ours["standard_error"] ** 2 + theirs["standard_error"] ** 2) ** 0.5
    assert abs(ours["log_marginal"] - theirs["log_marginal"]) < 5 * error
    assert (tmp_path / "weights.png").exists()

    again = under_torchrun(tmp_path, "train", "--epochs", 1, *settings)
    assert again.returncode != 0
    assert "pyro-vae: expected a folder without a run" in again.stderr
