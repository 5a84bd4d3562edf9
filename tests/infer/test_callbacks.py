"""What watches a run is told of it, and may end it."""

import numpy as np
import pytest
import torch
from small_vae import make_vae

import pyro_vae as pv


class Log(pv.infer.Callback):
    """Keeps what it is told; ends the run at a step or an epoch."""

    def __init__(self, every=1, last_step=None, last_epoch=None):
        self.every, self.last_step, self.last_epoch = every, last_step, last_epoch
        self.steps, self.epochs, self.told = {}, {}, []

    def on_begin(self, options):
        self.told.append(options)
        return "what only steps and epochs may end"

    def on_step(self, step, metrics):
        self.steps[step] = metrics
        return step == self.last_step

    def on_epoch(self, epoch, metrics):
        self.epochs[epoch] = metrics
        return epoch == self.last_epoch

    def on_end(self, result):
        self.told.append(result)


def train(x, *callbacks, **options):
    vae = make_vae()
    return pv.fit(
        vae.model, vae.guide, x, batch_size=3, epochs=4, seed=0, callbacks=list(callbacks), **options
    )


def test_a_run_is_told_from_its_begin_to_its_end(x):
    log, seldom = Log(), Log(every=5)
    result = train(x, log, seldom, learning_rate=0.01)
    assert log.told[0]["learning_rate"] == 0.01
    assert log.told[0]["epochs"] == 4
    assert log.told[1] is result
    assert list(log.steps) == list(range(1, 13))  # batches of 3, 3 and 1
    assert list(seldom.steps) == [5, 10]
    assert seldom.steps[5] == log.steps[5]
    assert list(log.epochs) == [1, 2, 3, 4]
    for name in ("train_bound", "train_elbo", "train_rate", "train_distortion"):
        by_step = np.array([log.steps[step][name] for step in range(1, 13)]).reshape(4, 3)
        np.testing.assert_allclose(by_step @ [3 / 7, 3 / 7, 1 / 7], result.history[name], rtol=1e-9)
    assert {entry["learning_rate"] for entry in log.steps.values()} == {0.01}


def test_watching_changes_nothing(x):
    plain, watched = train(x), train(x, Log())
    np.testing.assert_array_equal(watched.history["train_bound"], plain.history["train_bound"])


def test_a_step_ends_the_run_and_its_epoch_counts_what_was_taken(x):
    log = Log(last_step=5)
    result = train(x, log, validation=x)
    assert result.stopped_early
    assert list(log.steps) == [1, 2, 3, 4, 5]
    assert len(result.history["train_elbo"]) == 2
    expected = np.mean([log.steps[4]["train_bound"], log.steps[5]["train_bound"]])
    assert result.history["train_bound"][1] == pytest.approx(expected)
    assert np.isfinite(result.history["validation_elbo"]).all()


def test_an_epoch_ends_the_run(x):
    result = train(x, Log(last_epoch=2))
    assert result.stopped_early
    assert len(result.history["train_elbo"]) == 2


def test_a_run_that_was_ended_goes_on_when_it_is_resumed(x, tmp_path):
    train(x, Log(last_epoch=2), checkpoint=tmp_path)
    log = Log()
    vae = make_vae()
    result = pv.fit(
        vae.model, vae.guide, x, batch_size=3, epochs=4, seed=0, callbacks=[log],
        checkpoint=tmp_path, resume=True,
    )  # fmt: skip
    assert list(log.steps) == list(range(7, 13))
    expected = train(x)
    np.testing.assert_array_equal(result.history["train_bound"], expected.history["train_bound"])


def test_one_alone_needs_no_list(x):
    vae, log = make_vae(), Log()
    pv.fit(vae.model, vae.guide, x, epochs=1, callbacks=log)
    assert list(log.epochs) == [1]


def test_an_object_needs_only_the_methods_it_wants(x):
    class Epochs:
        def __init__(self):
            self.seen = []

        def on_epoch(self, epoch, metrics):
            self.seen.append(metrics["train_elbo"])

    epochs = Epochs()
    result = train(x, epochs)
    np.testing.assert_array_equal(epochs.seen, result.history["train_elbo"])


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_the_metrics_of_a_step_that_was_left_out(x):
    bad, log = x.clone(), Log()
    bad[2] = torch.nan
    train(bad, log, on_nonfinite="skip", transform=lambda batch: batch)
    lost = [step for step, metrics in log.steps.items() if not np.isfinite(metrics["train_bound"])]
    assert len(lost) == 4  # once in every epoch


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [print],
            "expected callbacks as objects with on_begin or on_step or on_epoch or on_end, got",
        ),
        (print, "got <built-in function print>: pass a function of epochs as on_epoch="),
        ([Log], "got <class .*Log'>: pass"),
        ([Log(every=0)], "expected every of a callback of at least 1, got 0"),
    ],
)
def test_what_is_no_callback_is_refused(x, callbacks, message):
    vae = make_vae()
    with pytest.raises(pv.InputError, match=message):
        pv.fit(vae.model, vae.guide, x, callbacks=callbacks)
