"""The recipes for watching a run do what they say."""

import re
from pathlib import Path

import pytest
import torch
from small_vae import PIXELS, make_vae

RECIPES = Path(__file__).parent.parent / "docs" / "watching_a_run.md"
BLOCKS = re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", RECIPES.read_text(), re.M | re.S)
MISSING = "comes with the extra `test`"


def run(title, **names):
    code = dict(BLOCKS)[title].replace("epochs=20", "epochs=4").replace("n_trials=20", "n_trials=8")
    x = torch.bernoulli(torch.rand(30, PIXELS))
    vae = make_vae()
    names |= {"model": vae.model, "guide": vae.guide, "x": x, "held_out": x[:10]}
    exec(compile(code, RECIPES, "exec"), names)
    return names


@pytest.mark.slow
def test_tensorboard_has_every_epoch(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason=MISSING)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run("TensorBoard")
    log = EventAccumulator("logs").Reload()
    assert [event.step for event in log.Scalars("validation_elbo")] == [1, 2, 3, 4]
    assert "train_rate" in log.Tags()["scalars"]


@pytest.mark.slow
def test_optuna_prunes_and_finds_the_better_rate():
    optuna = pytest.importorskip("optuna", reason=MISSING)

    def make_pair():
        vae = make_vae()
        return vae.model, vae.guide

    study = run("Pruning by Optuna", make_pair=make_pair)["study"]
    states = {trial.state for trial in study.trials}
    assert states <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    assert len(study.trials) == 8
    assert optuna.trial.TrialState.PRUNED in states
