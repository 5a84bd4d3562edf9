"""`pyro-vae autoencoder`: the table, the picture and the JSON of one command."""

import json
import os
import signal

import numpy as np
import pytest
from command_line import SMALL, refused, run

from pyro_vae.infer.trainer import Trainer
from pyro_vae.runs.folder import locked

OPTIONS = (*SMALL, "--epochs", "1", "--hidden", "16,8", "--dataset", "images.npy")


@pytest.fixture(autouse=True)
def _images(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "images.npy", np.random.default_rng(0).random((200, 1, 4, 4)))
    monkeypatch.chdir(folder)


def autoencoder(*arguments):
    result = run("autoencoder", *OPTIONS, *arguments)
    assert result.code == 0, result.err
    return result.out


def test_both_are_trained_and_compared(tmp_path):
    train_and_compare(tmp_path / "both", "gaussian", "mse")


@pytest.mark.slow
def test_both_are_trained_compared_and_their_pictures_rendered(tmp_path, rendered):
    train_and_compare(tmp_path / "both", "bernoulli", "bce")


def train_and_compare(folder, likelihood, loss):
    shown = autoencoder("--output", folder, "--likelihood", likelihood)
    assert "reconstruction error" in shown
    assert "random / held-out" in shown
    assert {path.name for path in folder.iterdir()} == {
        *("autoencoder.png", "autoencoder.json", "report.html", "study.json", "runs"),
    }
    assert "held-out datum to nearest datum" in (folder / "report.html").read_text()
    written = json.loads((folder / "autoencoder.json").read_text())
    assert written["loss"] == loss
    assert written["settings"]["likelihood"] == likelihood
    assert all(value > 0 for row in written["table"].values() for value in row.values())
    assert len(written["history"]["autoencoder"]["train_loss"]) == 1
    assert len(written["history"]["vae"]["train_elbo"]) == 1
    again = ("autoencoder", *OPTIONS, "--output", folder, "--seed", "1", "--likelihood", likelihood)
    refused(folder, *again, message="expected seed 0 as")


def test_a_comparison_that_was_interrupted_goes_on_by_the_same_command(tmp_path, monkeypatch):
    def results(folder):
        written = json.loads((folder / "autoencoder.json").read_text())
        history = written["history"]
        return written["table"], history["autoencoder"]["train_loss"], history["vae"]["train_elbo"]

    options = (*OPTIONS, "--epochs", "2")
    assert run("autoencoder", *options, "--output", tmp_path / "whole").code == 0
    take = Trainer._step
    folder, left = tmp_path / "left", []

    def step(self, *arguments):
        left.append(self.count)
        if len(left) in (4, 10):  # in the autoencoder's training, and in the VAE's
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)
    for _ in range(2):
        result = run("autoencoder", *options, "--output", folder)
        assert result.code == 143
        assert "interrupted: resume with the same command" in result.err
        assert not (folder / "autoencoder.json").exists()
    for _ in range(2):  # once more when it is finished: nothing is trained twice
        assert run("autoencoder", *options, "--output", folder).code == 0
        assert len(left) == 2 * 2 * 3
        assert results(folder) == results(tmp_path / "whole")


def test_a_folder_that_another_process_works_on_is_refused(tmp_path):
    folder = tmp_path / "both"
    assert run("autoencoder", *OPTIONS, "--output", folder).code == 0
    with locked(folder):
        result = run("autoencoder", *OPTIONS, "--output", folder)
    assert result.code == 2
    assert "is in use by" in result.err


def test_an_unknown_loss_is_refused_before_any_training(tmp_path):
    options = ("--output", tmp_path / "both", "--loss", "l1")
    refused(tmp_path, "autoencoder", *OPTIONS, *options, message="unknown loss 'l1'")
    assert not (tmp_path / "both").exists()


def test_the_vae_is_trained_by_the_objective_that_was_asked_for(tmp_path):
    histories = []
    for options in ([], ["--objective", "iwae", "--num-particles", "3"]):
        folder = tmp_path / f"run-{len(options)}"
        autoencoder("--output", folder, *options)
        histories.append(json.loads((folder / "autoencoder.json").read_text())["history"])
    plain, weighted = histories
    assert plain["autoencoder"]["train_loss"] == weighted["autoencoder"]["train_loss"]
    assert plain["vae"]["train_elbo"] != weighted["vae"]["train_elbo"]


@pytest.mark.parametrize("option", ["--schedule", "--gradient-clip", "--precision"])
def test_what_the_autoencoders_training_does_not_have_is_no_option(tmp_path, option):
    assert run("autoencoder", "--output", tmp_path / "a", option, "1").code == 2
