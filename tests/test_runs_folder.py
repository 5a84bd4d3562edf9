"""Run folders: never overwritten, one run at a time, every file whole or not there."""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import signal
import stat
import time

import pytest
from saved_vaes import make_vae

import pyro_vae as pv
from pyro_vae.files import write_whole
from pyro_vae.runs import folder
from pyro_vae.runs.files import write_json
from pyro_vae.runs.folder import locked, new_run


def test_a_run_is_never_overwritten(tmp_path):
    folder = pv.save(make_vae(), tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(pv.InputError, match="holds a run: choose another"):
        pv.save(make_vae(), folder)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(pv.InputError, match="holds an unfinished run"):
        pv.save(make_vae(), folder)
    (tmp_path / "weights").rename(folder / "model.safetensors")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(pv.InputError, match="is a file: choose another"):
        pv.save(make_vae(), tmp_path / "file")


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(pv.InputError, match="got: No space left on device; make room or choose"):
        pv.save(make_vae(), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(pv.InputError, match="No space left"):
        pv.save(make_vae(), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]  # it was there before


def test_files_can_be_read_by_whom_the_mask_allows(tmp_path):
    folder = pv.save(make_vae(), tmp_path / "run")
    mask = os.umask(0)
    os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("name", [3, None, ["a"], "~nobody-of-this-name/run"])
def test_what_is_no_path_is_one_line(name):
    for act in (pv.load, lambda folder: pv.save(make_vae(), folder)):
        with pytest.raises(pv.InputError, match="expected the path of a folder, got") as caught:
            act(name)
        assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pv.save(make_vae(), "~/run") == tmp_path / "run"
    assert pv.load("~/run")


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "../" * 3000])
def test_names_that_are_no_path_are_refused(name):
    for act in (pv.load, lambda folder: pv.save(make_vae(), folder)):
        with pytest.raises(pv.InputError, match="expected"):
            act(name)


def test_folders_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "run", "/proc/run", "/dev/null/run"):
        with pytest.raises(pv.InputError, match="expected to write"):
            pv.save(make_vae(), place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def hold(folder, held):
    with locked(folder):
        held.set()
        time.sleep(60)


def test_a_second_run_in_one_folder_is_refused_until_the_first_one_ends(tmp_path):
    processes = multiprocessing.get_context("fork")  # a new one would import all of torch
    held = processes.Event()
    first = processes.Process(target=hold, args=(tmp_path, held))
    first.start()
    try:
        assert held.wait(30)
        for act in (lambda: locked(tmp_path), lambda: new_run(tmp_path, {})):
            with (
                pytest.raises(pv.InputError, match=f"in use by process {first.pid} on .*: wait"),
                act(),
            ):
                pytest.fail("entered")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        first.kill()
        first.join()
    assert (tmp_path / ".lock").exists()  # of a process that is no more
    pv.save(make_vae(), tmp_path)
    assert pv.load(tmp_path)
    assert not (tmp_path / ".lock").exists()


LINKS = {
    "a link": lambda path, target: path.symlink_to(target),
    "a link to nothing": lambda path, target: path.symlink_to(target.with_name("nothing")),
    "a second name": lambda path, target: path.hardlink_to(target),
    "a pipe": lambda path, target: os.mkfifo(path),
    "a device": lambda path, target: path.symlink_to("/dev/null"),
    "a folder": lambda path, target: path.mkdir(),
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_lock_that_is_no_file_of_its_own_is_refused_and_left_alone(tmp_path, kind):
    (tmp_path / "mine").write_text("precious")
    place = tmp_path / "run"
    place.mkdir()
    LINKS[kind](place / ".lock", tmp_path / "mine")
    with pytest.raises(pv.InputError, match="as a file of its own, got a link: delete it"):
        pv.save(make_vae(), place)
    assert (tmp_path / "mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
    assert os.path.lexists(place / ".lock")


@pytest.mark.parametrize("kind", sorted(LINKS.keys() - {"a folder"}))
def test_what_stands_where_a_file_is_written_is_never_written_through(tmp_path, kind):
    (tmp_path / "mine").write_text("precious")
    place = tmp_path / "run"
    place.mkdir()
    for name in (".part-config.json", ".part-model.safetensors", "model.safetensors"):
        if name != "model.safetensors" or kind in ("a link to nothing", "a pipe"):
            LINKS[kind](place / name, tmp_path / "mine")
    pv.save(make_vae(), place)
    assert pv.load(place)
    assert (tmp_path / "mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_with_what_a_killed_process_left_counts_as_empty(tmp_path):
    for name in (".lock", ".part-config.json"):
        (tmp_path / name).write_text("half")
        assert not folder.has_files(tmp_path)
    pv.save(make_vae(), tmp_path)
    assert folder.has_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_moved_run_leaves_the_lock_of_its_successor(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        successor = locked(tmp_path / "run")
        successor.__enter__()
    with pytest.raises(pv.InputError, match="in use by"):
        pv.save(make_vae(), tmp_path / "run")
    successor.__exit__(None, None, None)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_moved_run_that_fails_leaves_the_settings_of_its_successor(tmp_path):
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(ZeroDivisionError))
        stack.enter_context(new_run(tmp_path / "run", {"format": 1}))
        (tmp_path / "run").rename(tmp_path / "moved")
        pv.save(make_vae(), tmp_path / "run")
        raise ZeroDivisionError
    assert pv.load(tmp_path / "run")


@contextlib.contextmanager
def child():
    """Fork a process that lives as long as the block."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.write(writer, b"here")
        time.sleep(60)
    try:
        os.read(reader, 4)
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


def test_a_forked_child_does_not_keep_a_lock(tmp_path):
    lock = locked(tmp_path)
    lock.__enter__()
    with child():
        folder._let_go()  # as the end of a process does it, whatever ends it
        with locked(tmp_path):
            assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    lock.__exit__(None, None, None)


def test_a_forked_child_does_not_take_a_lock_away(tmp_path):
    lock = locked(tmp_path)
    lock.__enter__()
    process = os.fork()
    if not process:
        lock.__exit__(None, None, None)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    with pytest.raises(pv.InputError, match="in use by"):
        pv.save(make_vae(), tmp_path)
    lock.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_threads_exclude_each_other_too(tmp_path):
    with (
        locked(tmp_path),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        pytest.raises(pv.InputError, match=f"in use by process {os.getpid()} "),
    ):
        pool.submit(pv.save, make_vae(), tmp_path).result()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_one_wins(tmp_path):
    def attempt(_):
        try:
            with new_run(tmp_path / "run", {"format": 1}):
                time.sleep(0.05)
                return True
        except pv.InputError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(attempt, range(16)))
    refusals = [result for result in results if result is not True]
    assert len(refusals) == 15
    assert all("in use" in text or "holds an unfinished run" in text for text in refusals)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf}})
    assert json.loads(path.read_text()) == {"a": [None, 1.5, [None, 2]], "b": {"c": None}}
    with pytest.raises(pv.InputError, match="which can be read again, got: Object of type object"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"][1] == 1.5
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")

    def write(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
