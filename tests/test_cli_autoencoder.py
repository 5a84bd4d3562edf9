"""`pyro-vae autoencoder`: the table, the picture and the JSON of one command."""

import json

import pytest
from typer.testing import CliRunner

from pyro_vae.cli import app
from pyro_vae.errors import InputError

SMALL = ["--epochs", "1", "--latent-dim", "2", "--hidden", "16,8", "--device", "cpu"]


def invoke(*arguments):
    result = CliRunner().invoke(app, ["autoencoder", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("likelihood", "loss"), [("bernoulli", "bce"), ("gaussian", "mse")])
def test_both_are_trained_and_compared(tmp_path, likelihood, loss):
    folder = tmp_path / "both"
    shown = invoke("--output", folder, "--likelihood", likelihood, *SMALL)
    assert "reconstruction error" in shown
    assert "random / held-out" in shown
    assert {path.name for path in folder.iterdir()} == {"autoencoder.png", "autoencoder.json"}
    written = json.loads((folder / "autoencoder.json").read_text())
    assert written["loss"] == loss
    assert written["settings"]["likelihood"] == likelihood
    assert all(value > 0 for row in written["table"].values() for value in row.values())
    assert len(written["history"]["autoencoder"]["train_loss"]) == 1
    assert len(written["history"]["vae"]["train_elbo"]) == 1
    with pytest.raises(InputError, match="expected a new or empty folder"):
        invoke("--output", folder, *SMALL)


def test_an_unknown_loss_is_refused_before_any_training(tmp_path):
    with pytest.raises(InputError, match="unknown loss 'l1'"):
        invoke("--output", tmp_path / "both", "--loss", "l1", *SMALL)
    assert not (tmp_path / "both").exists()


def test_the_vae_is_trained_by_the_objective_that_was_asked_for(tmp_path):
    histories = []
    for options in ([], ["--objective", "iwae", "--num-particles", "3"]):
        folder = tmp_path / f"run-{len(options)}"
        invoke("--output", folder, *SMALL, *options)
        histories.append(json.loads((folder / "autoencoder.json").read_text())["history"])
    plain, weighted = histories
    assert plain["autoencoder"]["train_loss"] == weighted["autoencoder"]["train_loss"]
    assert plain["vae"]["train_elbo"] != weighted["vae"]["train_elbo"]


@pytest.mark.parametrize("option", ["--schedule", "--gradient-clip", "--precision"])
def test_what_the_autoencoders_training_does_not_have_is_no_option(tmp_path, option):
    result = CliRunner().invoke(app, ["autoencoder", "--output", str(tmp_path / "a"), option, "1"])
    assert result.exit_code == 2
