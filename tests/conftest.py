"""Shared set-up: one thread per process, a fixed seed and an empty parameter store for each test."""

import gc

import pyro
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        default=None,
        metavar="N",
        help="how many random cases each fuzz and property test tries (default: 200 mutated files, "
        "some ten drawn models; try 2000 before a release)",
    )


def pytest_collection_finish():
    """Leave what the imports made out of every later collection, and collect all the rest seldom."""
    gc.freeze()
    gc.set_threshold(700, 10, 50)


@pytest.fixture(autouse=True)
def _fresh_state():
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield
