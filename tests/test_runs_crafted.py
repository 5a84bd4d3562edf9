"""A run folder made to run code: each way in is shown to be one, and none runs."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyro_vae as pv
from pyro_vae.runs import weights

SHAPE = (1, 4, 4)


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (Path(self.trace),)


@pytest.fixture
def run(tmp_path):
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (4,)), SHAPE),
        pv.guides.MeanFieldNormal(pv.networks.MLPEncoder(SHAPE, (4,)), 2),
    )
    return pv.save(vae, tmp_path / "run")


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace"


def rewrite(run, change):
    """Change a description as a forger would, who can compute the checksum as well."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    change(config["model"])
    path.write_text(json.dumps(config))
    state = load_file(run / "model.safetensors")
    checksum = weights.checksum_of(config["model"], state)
    save_file(state, run / "model.safetensors", {"checksum": checksum})


def pickle_in_place_of_weights(run, trace):
    torch.save({"payload": Payload(trace)}, run / "model.safetensors")
    content = (run / "model.safetensors").read_bytes()
    return lambda: torch.load(io.BytesIO(content), weights_only=False)


def bare_pickle_in_place_of_weights(run, trace):
    (run / "model.safetensors").write_bytes(pickle.dumps(Payload(trace)))
    return lambda: pickle.loads((run / "model.safetensors").read_bytes())


def pickle_in_place_of_settings(run, trace):
    (run / "config.json").write_bytes(pickle.dumps(Payload(trace)))
    return lambda: pickle.loads((run / "config.json").read_bytes())


def object_array_in_place_of_weights(run, trace):
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(trace)], dtype=object), allow_pickle=True)
    (run / "model.safetensors").write_bytes(stream.getvalue())
    return lambda: np.load(run / "model.safetensors", allow_pickle=True)


def component_name_as_an_import_path(run, trace):
    (run / "payload.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\n\nclass Prior: pass\n"
    )
    rewrite(run, lambda model: model["prior"].update({"class": "payload.Prior"}))
    code = [sys.executable, "-c", "import payload"]
    return lambda: subprocess.run(code, cwd=run, check=True)


def component_name_as_a_call(run, trace):
    def change(model):
        model["prior"] = {"class": "os.system", "settings": {"command": f"touch {trace}"}}

    rewrite(run, change)
    return lambda: os.system(f"touch {trace}")


def component_name_of_the_callers_namespace(run, trace):
    def change(model):
        settings = {"code": f"open({str(trace)!r}, 'w')"}
        model["prior"] = {"class": "custom.__builtins__.exec", "settings": settings}

    rewrite(run, change)
    return lambda: trace.touch()


def path_that_leaves_the_folder(run, trace):
    outside = run.parent / "outside.safetensors"
    outside.write_bytes(pickle.dumps(Payload(trace)))
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").symlink_to(outside)
    return lambda: pickle.loads((run / "model.safetensors").read_bytes())


def path_in_the_settings(run, trace):
    outside = run.parent / "outside"
    outside.write_bytes(pickle.dumps(Payload(trace)))

    def change(model):
        model["prior"]["class"] = "custom.../outside"
        model["prior"]["settings"] = {"file": "../outside", "weights": str(outside)}

    rewrite(run, change)
    return lambda: pickle.loads((run / "../outside").read_bytes())


def json_trick(run, trace):
    # What libraries that restore objects from JSON look for.
    def change(model):
        model["prior"]["settings"] = {
            "py/object/apply:os.system": [f"touch {trace}"],
            "py/reduce": [{"py/type": "os.system"}, {"py/tuple": [f"touch {trace}"]}],
            "__reduce__": ["os.system", [f"touch {trace}"]],
            "__class__": "subprocess.Popen",
            "latent_dim": f"__import__('os').system('touch {trace}')",
        }

    rewrite(run, change)
    return lambda: eval(f"__import__('os').system('touch {trace}')")


def json_trick_with_a_name_twice(run, trace):
    """A reader that checks the first and builds from the last would let the last one through."""
    text = (run / "config.json").read_text()
    twice = f'"class": "priors.StandardNormal", "class": "os.system(\'touch {trace}\')"'
    assert '"class": "priors.StandardNormal"' in text
    (run / "config.json").write_text(text.replace('"class": "priors.StandardNormal"', twice))
    return lambda: os.system(f"touch {trace}")


WAYS = [
    pickle_in_place_of_weights,
    bare_pickle_in_place_of_weights,
    pickle_in_place_of_settings,
    object_array_in_place_of_weights,
    component_name_as_an_import_path,
    component_name_as_a_call,
    component_name_of_the_callers_namespace,
    path_that_leaves_the_folder,
    path_in_the_settings,
    json_trick,
    json_trick_with_a_name_twice,
]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_in_a_run_folder_is_run(run, trace, way, monkeypatch):
    spring = way(run, trace)
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    with pytest.raises(pv.InputError) as caught:
        pv.load(run)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    spring()
    assert trace.exists()  # the trap was real
