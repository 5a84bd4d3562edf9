"""`pyro-vae evaluate`, `sample`, `reconstruct` on a finished run: numbers, pictures, the data."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import ESTIMATE_KEYS, WARNED, refused, run, snapshot, train

pytestmark = WARNED


def test_evaluate_prints_one_json_object_alone(digits):
    result = run(
        "evaluate", digits, "--num-samples", 50, "--method", "importance", "--json", "--device", "cpu"
    )
    assert result.code == 0
    values = json.loads(result.out)
    assert set(values) == ESTIMATE_KEYS
    assert (values["num_data"], values["num_samples"]) == (359, 50)
    assert values["elbo"] == pytest.approx(-values["rate"] - values["distortion"])
    assert values["elbo"] < values["log_marginal"]
    assert result.out.count("\n") == 1
    again = run(
        "evaluate", digits, "--num-samples", 50, "--method", "importance", "--json", "--device", "cpu"
    )
    assert again.out == result.out
    table = run("evaluate", digits, "--num-samples", 50, "--method", "importance")
    assert f"{values['log_marginal']:.3f}" in table.out


def test_the_default_anneals_within_a_budget_told_before(digits):
    how = ("--num-samples", 200, "--num-data", 20, "--max-annealed", 4, "--num-steps", 20, "--json")
    result = run("evaluate", digits, *how)
    values = json.loads(result.out)
    assert values["method"] == "auto"
    assert values["num_annealed"] <= 4
    assert values["num_unreliable"] >= 4  # of the 20 at most 16 are looked at
    assert result.err.startswith("log p(x) of 20 data points by importance sampling; up to 16 ")
    assert "20 data points are not trusted" in result.err


def test_numbers_that_are_not_finite_are_null(digits):
    result = run("evaluate", digits, "--num-samples", 1, "--method", "importance", "--json")
    values = json.loads(result.out, parse_constant=pytest.fail)
    assert values["standard_error"] is None  # unknown from one sample
    assert values["log_marginal"] is not None


def test_evaluate_by_both_methods_agrees_within_the_errors_and_draws_a_picture(
    digits, tmp_path, rendered
):
    picture = tmp_path / "k.png"
    result = run(
        "evaluate", digits, "--method", "both", "--num-samples", 500, "--num-chains", 8,
        "--num-steps", 30, "--num-data", 5, "--picture", picture, "--json",
    )  # fmt: skip
    values = json.loads(result.out)
    annealed = values["annealed"]
    assert (values["method"], annealed["method"]) == ("importance", "annealed")
    assert values["num_data"] == annealed["num_data"] == 5
    assert 0 < annealed["acceptance"] <= 1
    error = math.hypot(values["standard_error"], annealed["standard_error"])
    assert abs(values["log_marginal"] - annealed["log_marginal"]) < 5 * error
    assert picture.stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:.*missed target_standard_error")  # of single data points
def test_evaluate_to_a_target_error_reaches_it(digits):
    options = ("--num-samples", 100, "--target-standard-error", 0.02, "--num-data", 5)
    options += ("--method", "importance")
    result = run("evaluate", digits, *options, "--json")
    assert json.loads(result.out)["standard_error"] < 2 * 0.02 / 5**0.5


def test_evaluate_leaves_the_run_alone(here):
    before = snapshot(here)
    run("evaluate", "run", "--num-samples", 5, "--method", "importance", "--json")
    assert snapshot(here) == before


def test_sample_and_reconstruct_write_pictures(here, rendered):
    for command in ("sample", "reconstruct"):
        result = run(command, "run", "--seed", 3)
        assert result.code == 0, result.err
        assert Path(result.out.strip()).read_bytes().startswith(b"\x89PNG")
        assert Path(result.out.strip()).parent == Path("run")
        picture = here / "new" / f"{command}.svg"
        assert run(command, "run", "--num", 3, "--output", picture).code == 0
        assert b"<svg" in picture.read_bytes()
    means, draws = here / "means.png", here / "draws.png"
    assert run("sample", "run", "--mean", "--output", means).code == 0
    assert run("sample", "run", "--draw", "--output", draws).code == 0
    assert means.read_bytes() != draws.read_bytes()
    assert means.read_bytes() == (here / "run" / "samples.png").read_bytes()


def test_images_are_sampled_without_the_data(here):
    train("--dataset", "grey.npy", "--output", "grey-run", epochs=0)
    (here / "grey.npy").unlink()
    assert run("sample", "grey-run").code == 0
    refused(here, "reconstruct", "grey-run", message="found none: check the path")


def test_warnings_are_one_line(here):
    result = run("evaluate", "run", "--num-samples", 50, "--method", "importance", "--json")
    assert result.err == "" or result.err.startswith("pyro-vae: warning: ")
    assert result.err.count("\n") == result.err.count("pyro-vae: warning: ")


def test_files_are_found_from_another_folder_and_moved_ones_by_their_root(here, monkeypatch):
    train("--dataset", "vectors.npy", "--likelihood", "gaussian", "--output", "own")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    evaluate = ("evaluate", here / "own", "--num-samples", 5, "--method", "importance", "--json")
    expected = run(*evaluate).out
    assert json.loads(expected)
    shutil.move(here / "vectors.npy", here / "elsewhere")
    refused(here, *evaluate, message="found none: check the path")
    assert run(*evaluate, "--data-root", ".").out == expected
    assert run("sample", here / "own", "--data-root", here / "elsewhere").code == 0


def test_data_that_changed_since_are_refused(here):
    train("--dataset", "vectors.npy", "--likelihood", "gaussian", "--output", "own")
    vectors = np.load("vectors.npy")
    vectors[7, 1] += 1e-3
    np.save("vectors.npy", vectors)
    for command in ("evaluate", "reconstruct", "sample"):
        refused(here, command, "own", message="got others by the checksum")


def test_the_table_names_what_it_shows(digits):
    shown = run("evaluate", digits, "--num-samples", 5, "--method", "importance", "--num-data", 3).out
    for label in ("log p(x)", "its error, Monte Carlo", "ELBO", "rate (KL)", "points not trusted"):
        assert label in shown
