"""Shared set-up: one thread per process, a fixed seed and an empty parameter store for each test."""

import gc
import os
import re
import signal

import pytest

# A shell ignores SIGINT for what it begins in the background, and a fit leaves an ignored one so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        default=None,
        metavar="N",
        help="how many random cases each fuzz and property test tries (default: 200 mutated files, "
        "some ten drawn models; try 2000 before a release)",
    )


def pytest_configure(config):
    """Let a machine with a GPU run what one without runs: "auto" means CUDA only to tests of CUDA."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import without a look for garbage: what modules make is kept."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """Leave what the imports made out of every later collection, and collect all the rest seldom."""
    import torch  # here: a process that only deals out the tests needs none of it

    torch.set_num_threads(1)
    if not any(device.is_available() for device in (torch.cuda, torch.xpu, torch.mtia)):
        # A seed would be kept for each of them, with its stack, which takes half a millisecond.
        for device in (torch.cuda, torch.xpu, torch.mtia):
            device.manual_seed_all = lambda seed: None
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)


@pytest.fixture(autouse=True)
def _fresh_state():
    import pyro
    import torch

    devices = range(torch.cuda.device_count())  # of several, torch wants each to be named
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices):
        pyro.set_rng_seed(0)
        yield
