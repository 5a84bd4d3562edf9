"""`pyro-vae autoencoder`: the table, the picture and the JSON of one command."""

import json

import pytest
from command_line import SMALL, refused, run

OPTIONS = (*SMALL, "--epochs", "1", "--hidden", "16,8")


def autoencoder(*arguments):
    result = run("autoencoder", *OPTIONS, *arguments)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.parametrize(("likelihood", "loss"), [("bernoulli", "bce"), ("gaussian", "mse")])
def test_both_are_trained_and_compared(tmp_path, rendered, likelihood, loss):
    folder = tmp_path / "both"
    shown = autoencoder("--output", folder, "--likelihood", likelihood)
    assert "reconstruction error" in shown
    assert "random / held-out" in shown
    assert {path.name for path in folder.iterdir()} == {"autoencoder.png", "autoencoder.json"}
    written = json.loads((folder / "autoencoder.json").read_text())
    assert written["loss"] == loss
    assert written["settings"]["likelihood"] == likelihood
    assert all(value > 0 for row in written["table"].values() for value in row.values())
    assert len(written["history"]["autoencoder"]["train_loss"]) == 1
    assert len(written["history"]["vae"]["train_elbo"]) == 1
    again = ("autoencoder", *OPTIONS, "--output", folder)
    refused(folder, *again, message="expected a new or empty folder")


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
