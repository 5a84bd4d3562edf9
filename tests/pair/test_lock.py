"""What is one per process, handlers and random generators: threads take turns, forks get an error."""

import concurrent.futures
import copy
import os
import random
import threading

import numpy as np
import pytest
import torch
from small_vae import PIXELS, make_vae

import pyro_vae as pv
from pyro_vae.pair.functions import HANDLER_LOCK


@pytest.fixture
def saved(tmp_path):
    return pv.save(make_vae(), tmp_path / "run")


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_loads_in_threads_leave_the_random_state_alone(saved):
    before = states()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: pv.load(saved), range(16)))
    assert states() == before


def test_a_load_beside_a_fit_leaves_its_bits_alone(saved):
    vae, x = make_vae(), torch.bernoulli(torch.rand(64, PIXELS))
    ends, loads = [], 0
    for beside in (False, True):
        own, begun = copy.deepcopy(vae), threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            futures = []

            def ask(epoch, row, pool=pool, futures=futures, begun=begun):
                """Let a load begin in the middle of the fit, and see that it waits for the end."""
                futures.append(pool.submit(lambda: begun.set() or pv.load(saved)))
                begun.wait()
                assert not futures[0].done()

            on_epoch = ask if beside else None
            pv.fit(own.model, own.guide, x, epochs=8, seed=0, on_epoch=on_epoch, progress=False)
        loads += sum(isinstance(future.result(), pv.VAE) for future in futures)
        ends.append(torch.nn.utils.parameters_to_vector(own.parameters()).detach())
    assert torch.equal(*ends)
    assert loads == 8


def test_a_load_inside_a_handler_or_a_fit_is_served(saved):
    vae, x = make_vae(), torch.bernoulli(torch.rand(20, PIXELS))
    loaded = []
    pv.fit(vae.model, vae.guide, x, epochs=2, on_epoch=lambda *_: loaded.append(pv.load(saved)))
    assert len(loaded) == 2


def test_a_process_forked_while_another_thread_has_the_lock_gets_an_error(saved):
    held, done = threading.Event(), threading.Event()

    def hold():
        with HANDLER_LOCK:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        text = "loaded"
        try:
            pv.load(saved)
        except pv.InputError as error:
            text = str(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        text = told.read()
    os.waitpid(process, 0)
    done.set()
    thread.join()
    assert text.startswith("expected no other thread to run a pair when this process was forked")
    assert pv.load(saved)


def test_a_process_forked_by_the_thread_that_has_the_lock_may_go_on(saved):
    with HANDLER_LOCK:
        process = os.fork()
        if not process:
            os._exit(0 if pv.load(saved) else 1)
    assert os.waitpid(process, 0)[1] == 0
