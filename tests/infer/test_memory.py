"""Memory stays flat: epochs and evaluations leave no tensor behind."""

import gc

import pytest
import torch
from small_vae import PIXELS, make_vae

import pyro_vae as pv


@pytest.fixture(autouse=True)
def _only_what_the_test_makes():
    gc.freeze()  # what is there before is not gone through again at each count


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_epochs_and_checkpoints_leave_nothing(tmp_path):
    vae, x, counts = make_vae(), torch.bernoulli(torch.rand(40, PIXELS)), []
    pv.fit(
        vae.model, vae.guide, x, epochs=30, batch_size=16, validation=x, patience=30,
        checkpoint=tmp_path, checkpoint_every=3, on_epoch=lambda *_: counts.append(live_tensors()),
    )  # fmt: skip
    assert len(set(counts[5:])) == 1, counts


@pytest.mark.filterwarnings("ignore:.* data points have Pareto k")
def test_runs_and_evaluations_leave_nothing():
    vae, x, counts = make_vae(), torch.bernoulli(torch.rand(40, PIXELS)), []
    for _ in range(6):
        pv.fit(vae.model, vae.guide, x, epochs=1, batch_size=16)
        pv.log_marginal(vae.model, vae.guide, x, num_samples=200)
        counts.append(live_tensors())
    assert len(set(counts[2:])) == 1, counts
