"""Pages of runs, and the commands of several runs: begun, interrupted, continued, refused."""

import csv
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from command_line import SMALL, WARNED, refused, run, sketching, snapshot

import pyro_vae as pv
from pyro_vae import datasets
from pyro_vae.app import pages, study
from pyro_vae.app import study as studies
from pyro_vae.app import train as training
from pyro_vae.app.compare import load_measured

pytestmark = WARNED

TINY = (*SMALL, "--epochs", "1", "--dataset", "bits.npy")
SWEEP = ("sweep", *TINY, "--betas", "0.5,2")
COMPARE = (
    "compare", *TINY, "--guides", "mean-field,full-rank", "--seeds", "2", "--num-samples", "60",
    "--method", "importance",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    # One coin per datum, told by six bits of which a tenth is wrong: something to encode.
    coins = random.integers(0, 2, (100, 1))
    np.save(folder / "bits.npy", coins ^ (random.random((100, 6)) < 0.1))
    np.save(folder / "other.npy", random.integers(0, 2, (100, 6)))
    np.save(folder / "unit.npy", random.random((100, 4)))
    return folder


@pytest.fixture
def here(tmp_path, data, monkeypatch):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A finished sweep and a finished comparison, with the data they were made from."""
    folder = tmp_path_factory.mktemp("studies")
    shutil.copytree(data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        compare = (*COMPARE, "--output", "compared")
        sweep = (*SWEEP, "--output", "swept")
        # A second time, when the runs are finished; test_plots_of_studies.py renders the pictures.
        with sketching():
            results = [run(*command) for command in (compare, sweep, compare, sweep)]
    for result in results:
        assert result.code == 0, result.err
        assert result.err == ""
    return folder


@pytest.fixture
def there(tmp_path, finished, monkeypatch):
    """An own copy of the finished studies; the data lie where they were."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def same(finished, command):
    """Return a command with the data where the finished studies found them."""
    return [str(finished / part) if part == "bits.npy" else part for part in command]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_page(path, *expected):
    html = path.read_text()
    assert not re.search(r"https?:|<script|<link", html)
    assert html.count("<figure>") >= 1
    for text in (*expected, "Versions", "SHA-256 of the data", "torch"):
        assert text in html, text
    return html


def test_a_run_has_its_page(finished):
    for folder in (finished / "swept" / "runs").iterdir():
        html = check_page(
            folder / "report.html", f"<h1>Run {folder.name}</h1>", "Pareto k", "ELBO", "bits.npy"
        )
        config = json.loads((folder / "config.json").read_text())["run"]
        for checksum in config["checksums"].values():
            assert checksum in html
        metrics = json.loads((folder / "metrics.json").read_text())
        assert f"{metrics['test_log_marginal']['log_marginal']:.2f}" in html
        assert metrics["compile_choice"] in html
        assert "pyro-vae sweep --hidden 16" in html
        assert html.count("<figure>") == 4


@pytest.mark.parametrize(("untrusted", "warned"), [(0, False), (1, False), (30, True)])
def test_the_page_warns_in_words_where_many_weights_are_heavy(untrusted, warned):
    estimate = {
        "num_data": 100, "num_unreliable": untrusted, "num_samples": 50, "median_ess": 3.0,
        "standard_error": 0.1, "data_standard_error": float("nan"), "expected_bias": -0.005,
    }  # fmt: skip
    page = pages.Page("t")
    pages.add_reliability(page, estimate)
    html = page.html()
    assert f"{untrusted} of 100 data points can&#x27;t be trusted" in html
    assert "-0.0050" in html
    assert ("<strong>Warning:</strong>" in html) == warned


def test_pseudo_likelihoods_are_labelled_on_the_page(here):
    result = run("train", *SMALL, "--epochs", 0, "--binarize", "none", "--dataset", "unit.npy",
                 "--output", "grey")  # fmt: skip
    assert result.code == 0, result.err
    html = check_page(here / "grey" / "report.html", "log p(x) (pseudo-likelihood)")
    assert "<strong>Warning:</strong> grey values under a Bernoulli" in html
    assert html.count("<figure>") == 3  # no curve of no epochs


def test_the_sweep_writes_table_picture_and_page(finished):
    folder = finished / "swept"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "study.json",
        "sweep.csv",
        "sweep.json",
        "rate-distortion.png",
        "report.html",
        "runs",
    }
    rows = rows_of(folder / "sweep.csv")
    assert [row["beta"] for row in rows] == ["0.5", "2.0"]
    content = json.loads((folder / "sweep.json").read_text())
    for row, plain in zip(rows, content["rows"], strict=True):
        assert float(row["elbo"]) == pytest.approx(-float(row["rate"]) - float(row["distortion"]))
        assert float(row["elbo"]) == plain["elbo"]
        assert 0 <= int(row["active_units"]) <= 2
        assert float(row["elbo_standard_error"]) > 0
    assert content["settings"]["warm_start"] is False
    check_page(folder / "report.html", "active units", rows[0]["beta"])


@pytest.mark.slow
def test_more_weight_on_the_rate_gives_less_of_it(here):
    command = ("sweep", *SMALL, "--dataset", "bits.npy", "--epochs", 30, "--learning-rate", 0.02)
    assert run(*command, "--betas", "0.01,10", "--output", "swept").code == 0
    low, high = rows_of(here / "swept" / "sweep.csv")
    assert float(low["rate"]) > float(high["rate"]) + 0.1
    assert float(low["distortion"]) < float(high["distortion"])
    assert int(low["active_units"]) > int(high["active_units"])


def test_a_warm_start_takes_over_the_weights(here):
    # Without epochs the last run's weights are the first one's.
    command = ("sweep", *SMALL, "--dataset", "bits.npy", "--epochs", 0, "--betas", "1,2")
    for option in ("--warm-start", "--no-warm-start"):
        assert run(*command, option, "--output", option.strip("-")).code == 0
    folder = here / "warm-start" / "runs"
    first, last = ((folder / f"beta-{beta}" / "model.safetensors").read_bytes() for beta in (1, 2))
    assert first == last
    settings = json.loads((folder / "beta-2" / "config.json").read_text())["run"]["settings"]
    assert (settings["warmup_epochs"], settings["beta"]) == (0, 2.0)


def test_the_comparison_writes_tables_figures_and_page(finished):
    folder = finished / "compared"
    assert {path.name for path in folder.iterdir()} == {
        "comparison.csv", "comparison.json", "differences.png", "per-datum.png", "report.html",
        "runs", "runs.csv", "study.json",
    }  # fmt: skip
    rows, singles = rows_of(folder / "comparison.csv"), rows_of(folder / "runs.csv")
    assert [row["name"] for row in rows] == ["mean-field", "full-rank"]
    assert [(row["name"], row["seed"]) for row in singles] == [
        ("mean-field", "0"), ("mean-field", "1"), ("full-rank", "0"), ("full-rank", "1"),
    ]  # fmt: skip
    for row in rows:
        own = [float(run["log_prob"]) for run in singles if run["name"] == row["name"]]
        assert float(row["log_prob"]) == pytest.approx(np.mean(own))
        assert float(row["log_prob_run_deviation"]) == pytest.approx(np.std(own, ddof=1))
        assert float(row["elbo"]) < float(row["log_prob"])
        assert float(row["log_prob_data_standard_error"]) > float(row["log_prob_standard_error"])
    content = json.loads((folder / "comparison.json").read_text())
    assert content["settings"]["guide"] == ["mean-field", "full-rank"]
    check_page(folder / "report.html", "deviation between runs", "difference from the best")


def test_seeds_share_the_data_and_runs_stay_usable(there):
    folders = sorted((there / "compared" / "runs").iterdir())
    configs = [json.loads((folder / "config.json").read_text())["run"] for folder in folders]
    assert {config["settings"]["seed"] for config in configs} == {0, 1}
    assert len({json.dumps(config["checksums"]) for config in configs}) == 1
    result = run(
        "evaluate",
        folders[1],
        "--num-samples",
        5,
        "--method",
        "importance",
        "--json",
        "--device",
        "cpu",
    )
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("command", "folder", "table"),
    [
        pytest.param(SWEEP, "swept", "sweep.csv", marks=pytest.mark.slow),
        (COMPARE, "compared", "comparison.csv"),
    ],
)
def test_a_finished_study_is_loaded_and_a_half_done_run_trained_again(
    there, finished, monkeypatch, command, folder, table
):
    table, runs = there / folder / table, sorted((there / folder / "runs").iterdir())
    before, kept = table.read_bytes(), snapshot(runs[1])
    (runs[0] / "metrics.json").unlink()  # as a kill leaves it
    table.unlink()
    trained = []

    def train_run(settings, dataset, where, **options):
        trained.append(where.name)
        return training.train_run(settings, dataset, where, **options)

    monkeypatch.setattr(studies, "train_run", train_run)
    result = run(*same(finished, command), "--output", folder)
    assert result.code == 0, result.err
    assert trained == [runs[0].name]
    assert f"{runs[1].name}: test ELBO" in result.out
    assert "finished before" in result.out
    assert snapshot(runs[1]) == kept
    # The same seeds give the same numbers again; seconds differ.
    again = rows_of(table)
    table.write_bytes(before)
    for old, new in zip(rows_of(table), again, strict=True):
        for name in old.keys() - {"training_seconds", "seconds_per_epoch", "seconds_per_1000"}:
            assert old[name] == new[name], name


def test_an_interruption_leaves_the_finished_runs(here, monkeypatch):
    def interrupted(settings, dataset, where, **options):
        if settings.guide == "full-rank":
            raise KeyboardInterrupt
        return training.train_run(settings, dataset, where, **options)

    with monkeypatch.context() as patch:
        patch.setattr(studies, "train_run", interrupted)
        result = run(*COMPARE, "--seeds", 1, "--output", "compared")
    assert (result.code, result.err) == (130, "pyro-vae: interrupted: resume with the same command\n")
    name = "standard-normal-bernoulli-mean-field-seed-0"
    assert [path.name for path in (here / "compared" / "runs").iterdir()] == [name]
    kept = snapshot(here / "compared" / "runs" / name)
    result = run(*COMPARE, "--seeds", 1, "--output", "compared")
    assert result.code == 0, result.err
    after = snapshot(here / "compared" / "runs" / name)
    assert {path: after[path] for path in kept} == kept
    assert len(rows_of(here / "compared" / "runs.csv")) == 2


@pytest.mark.slow
def test_one_model_is_held_for_all_guides(here):
    assert run(*COMPARE, "--hold", "model", "--output", "held").code == 0
    runs = here / "held" / "runs"
    for seed in (0, 1):
        states = [
            study.runs.load(runs / f"{kind}standard-normal-bernoulli-{guide}-seed-{seed}")
            for kind, guide in (("model-", "mean-field"), ("", "mean-field"), ("", "full-rank"))
        ]
        for vae in states[1:]:
            for part in ("prior", "likelihood"):
                mine, theirs = (getattr(each, part).state_dict() for each in (vae, states[0]))
                assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        guides = [vae.variational_family.state_dict() for vae in states[:2]]
        assert any(not torch.equal(guides[0][name], guides[1][name]) for name in guides[0])
    rows = rows_of(here / "held" / "comparison.csv")
    assert all(row["num_parameters"] == row["num_guide_parameters"] for row in rows)


@pytest.mark.slow
def test_priors_and_likelihoods_are_compared_in_every_combination(here):
    result = run(
        "compare", *SMALL, "--epochs", 0, "--dataset", "unit.npy", "--guides", "mean-field",
        "--priors", "standard-normal,gaussian-mixture", "--seeds", 1, "--num-samples", 30,
        "--method", "importance",
        "--likelihoods", "gaussian,continuous-bernoulli", "--output", "compared",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = rows_of(here / "compared" / "comparison.csv")
    assert {row["name"] for row in rows} == {
        f"{prior} / {likelihood}"
        for prior in ("standard-normal", "gaussian-mixture")
        for likelihood in ("gaussian", "continuous-bernoulli")
    }
    assert all(row["log_prob_run_deviation"] == "" for row in rows)  # unknown from one run
    check_page(here / "compared" / "report.html", "One run each says nothing about the spread")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (SWEEP, "--epochs 2", "expected epochs 1 as swept was begun with, got 2"),
        (SWEEP, "--betas 1,2", "expected beta [0.5, 2.0]"),
        (SWEEP, "--warm-start", "expected warm start False"),
        (COMPARE, "--seeds 3", "expected seeds 2 as compared was begun with, got 3"),
        (COMPARE, "--num-samples 61", "expected num samples 60"),
        (COMPARE, "--hold model", "expected hold None"),
        (COMPARE, "--guides mean-field", "expected guide ['mean-field', 'full-rank']"),
        (COMPARE, "--dataset other.npy", "expected dataset"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(there, finished, command, options, message):
    output = "swept" if command is SWEEP else "compared"
    arguments = [*same(finished, command), *options.split(), "--output", output]
    refused(there, *arguments, message=message)


def test_other_data_under_the_same_name_are_refused(here):
    assert run(*SWEEP, "--epochs", 0, "--output", "swept").code == 0
    shutil.copy("other.npy", "bits.npy")
    refused(here, *SWEEP, "--epochs", 0, "--output", "swept", message="got others by the checksum")


@pytest.mark.parametrize("command", [SWEEP, COMPARE])
def test_folders_of_something_else_are_left_alone(here, command):
    (here / "busy").mkdir()
    (here / "busy" / "notes.txt").write_text("x")
    refused(here, *command, "--output", "busy", message="has files in it: choose another")
    refused(here, *command, "--output", "bits.npy", message="is a file: choose another")
    (here / "busy" / "study.json").write_text("{")
    refused(here, *command, "--output", "busy", message="expected JSON in busy/study.json")


@pytest.mark.parametrize("command", [SWEEP, COMPARE])
def test_data_that_do_not_fit_leave_no_folder(here, command):
    np.save("bytes.npy", np.arange(200).reshape(50, 4))
    message = "divide by the largest possible value"
    refused(here, *command, "--dataset", "bytes.npy", "--output", "deep/new", message=message)


BAD = {
    "sweep --betas 1,x": "expected betas as numbers separated by commas, got '1,x'",
    "sweep --betas 1,1.0": "expected each beta once",
    "sweep --betas 1,-1": "beta",
    "sweep --betas 1,nan": "beta",
    "sweep --epochs -1": "expected --epochs of at least 0",
    "compare --guides mean-field,mean-field": "expected each guide once",
    "compare --guides mean-field,": "expected each guide once",
    "compare --guides mean-feld": "did you mean 'mean-field'?",
    "compare --priors standard-normal,vmp": "did you mean 'vamp'?",
    "compare --priors beta": "latents",
    "compare --likelihoods bernoulli,gaussian": "compare them in two runs",
    "compare --seeds 0": "expected --seeds of at least 1, got 0",
    "compare --hold guide": "expected --hold model, got 'guide'",
    "compare --hold model --priors vamp": "got vamp: use pv.compare",
    "compare --hold model --priors standard-normal,flow": "expected one prior and one likelihood",
    "compare --method annealed": "expected method auto, importance or both",
    "compare --num-samples 0": "at least 1, got 0",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_studies_are_refused_before_data_are_read(here, monkeypatch, options):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    command, *others = options.split()
    refused(here, command, *SMALL, *others, "--output", "new", message=BAD[options])


def test_python_and_the_command_line_call_the_same_ties(finished):
    runs = {
        name: [
            load_measured(
                finished / "compared" / "runs" / f"standard-normal-bernoulli-{name}-seed-{seed}"
            )[0]
            for seed in (0, 1)
        ]
        for name in ("mean-field", "full-rank")
    }
    comparison = pv.Comparison(runs, "probability", 50, 60, None, 0)
    for row in rows_of(finished / "compared" / "comparison.csv"):
        assert row["verdict"] == comparison.verdict(row["name"])
        for quantity in comparison.quantities:
            difference = comparison.difference(row["name"], quantity)
            assert float(row[f"{quantity}_difference"]) == difference.mean
            assert float(row[f"{quantity}_difference_half_width"]) == difference.half_width


def test_measured_numbers_come_back_as_they_were(finished):
    folder = sorted((finished / "compared" / "runs").iterdir())[0]
    found, likelihood = load_measured(folder)
    assert likelihood == "probability"
    assert found.log_prob.value.shape == found.elbo.standard_error.shape == (20,)
    assert torch.equal(found.log_prob.value, found.estimate.log_prob)
    assert found.exact_kl is True


def test_a_long_command_line_stands_on_the_page_as_a_shell_reads_it():
    words = ["pyro-vae", "train", "--dataset", "a file.npy", *(f"--option-{n}" for n in range(20))]
    lines = pages.in_lines(shlex.join(words)).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 84
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == words


@pytest.mark.slow
def test_what_one_pair_does_not_clear_is_annealed_in_all(here):
    how = ("--method", "auto", "--max-annealed", 3, "--seeds", 1, "--output", "alike")
    assert run(*COMPARE[:-2], *how).code == 0
    found = [load_measured(folder)[0] for folder in sorted((here / "alike" / "runs").iterdir())]
    annealed = [measured.estimate.was_annealed for measured in found]
    assert len(annealed) == 2
    assert torch.equal(*annealed)
    assert int(annealed[0].sum()) == 3
    assert [measured.estimate.method for measured in found] == ["auto", "auto"]
