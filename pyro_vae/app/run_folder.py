"""A run folder as commands see it: where they may write, and a finished run opened with its data."""

import errno
import os
import platform
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import matplotlib
import pyro
import torch

from pyro_vae import datasets, runs
from pyro_vae.app.names import TrainSettings
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.files import PART, expand_path, writing_to
from pyro_vae.networks import Standardized
from pyro_vae.pair.functions import PairFunction
from pyro_vae.runs.files import CHECKPOINTS, CONFIG, RUNS, STUDY, WEIGHTS, check_schema, read_config
from pyro_vae.runs.folder import check_free, has_files
from pyro_vae.tasks.missing import observed_pair
from pyro_vae.vae import VAE
from pyro_vae.version import __version__

Pair = tuple[PairFunction, PairFunction]

# Of a run, written last: a folder that has it is whole.
METRICS = "metrics.json"


@dataclass(frozen=True)
class Checkpointing:
    """How often a run writes its state, in epochs and in minutes."""

    every: int | None = None
    minutes: float | None = 1.0


# What is read of these files, see check_schema; None stands for a number that is not finite. A run
# may know less of itself: a version before did.
_NUMBER = float | int | None
_BOUND = dict.fromkeys(("elbo", "rate", "distortion"), _NUMBER)
_ESTIMATE = dict.fromkeys(("log_marginal", "standard_error", "data_standard_error"), _NUMBER) | _BOUND
METRICS_SCHEMA = {
    "history": {"train_elbo": [_NUMBER]},
    "training_seconds": float | int,
    "test": _BOUND,
    "test_log_marginal": _ESTIMATE
    | {"num_unreliable": int | None, "num_data": int, "num_samples": int},
    "test_data_standard_errors": _BOUND,
    "active_units": int,
    "pseudo_likelihood": bool,
}
_RUN_SCHEMA = {"limits": [float | int] * 2, "settings": dict, "checkpoints": dict | None}
_RUN_SCHEMA |= {"checksums": dict | None, "processes": int, "versions": dict, "command": str}

# Where the data lie and what computes may be told anew of what was begun; checksums tell the data.
FREE = ("data_root", "download", "device")


def read_run(folder: Path) -> tuple[dict[str, Any], TrainSettings]:
    """Return what a run of `pyro-vae train` records about itself, and its settings."""
    run = read_config(folder).get("run", {})
    if "settings" not in run or "limits" not in run:
        wanted = f"a run of `pyro-vae train` in {folder}"
        raise InputError(f"expected {wanted}, got a folder by pv.save: load it with pv.load")
    kinds = {name: _RUN_SCHEMA[name] for name in _RUN_SCHEMA.keys() & run.keys()}
    check_schema(run, kinds, f"{folder / CONFIG}: run")
    settings, hints = run["settings"], get_type_hints(TrainSettings)
    newer = settings.keys() - hints.keys()
    if newer:
        wanted = f"the settings of `pyro-vae train` in {folder}"
        advice = "it was changed, or written by a newer pyro_vae"
        raise InputError(f"expected {wanted}, got {min(newer)[:80]!r} among them: {advice}")
    kinds = {name: hints[name] | (int if hints[name] is float else hints[name]) for name in settings}
    check_schema(settings, kinds, f"{folder / CONFIG}: settings")
    # An earlier version knew no other way than the data as they come.
    return run, TrainSettings(**{"standardize": False, **settings})


def open_run(run: Path, device: torch.device) -> tuple[VAE, TrainSettings, tuple[float, float]]:
    """Load a run's VAE, its settings, and the values shown as white and as black."""
    check_single(run)
    read_config(run)
    if not (run / WEIGHTS).exists():
        advice = f"resume it with `pyro-vae train --resume {shlex.quote(str(run))}`"
        raise InputError(f"expected a finished run, {run} has no weights yet: {advice}")
    vae, (record, settings) = runs.load(run, device=str(device)), read_run(run)
    low, high = record["limits"]
    return vae, replace(settings, download=False), (low, high)  # that was leave to train, not to look


def check_single(folder: Path) -> None:
    """Refuse a folder of several runs, as ``pyro-vae compare`` and ``sweep`` write it."""
    if (folder / STUDY).is_file():
        advice = f"name one in {folder / RUNS}, or repeat the command that began them to continue"
        raise InputError(f"expected a run folder, {folder} holds several runs: {advice}")


def load_data(settings: TrainSettings, data_root: str | None = None) -> Dataset:
    """Load the data that the settings name, which may have moved to ``data_root`` since."""
    source = Path(settings.dataset)
    if data_root is not None and source.suffix in datasets.FILE_TYPES:
        source = Path(data_root) / source.name
    sizes = None if settings.size_factor == "learned" else settings.size_factor
    given = [name for name in (settings.condition, sizes) if name is not None]
    return datasets.load(
        str(source), data_root or settings.data_root, binarize=settings.binarize or "none",
        validation_size=settings.validation_size, seed=settings.split_seed,
        download=settings.download, labels=settings.labels,
        leave_out=tuple(filter(None, (settings.leave_out or "").split(","))),
        allow_missing=settings.missing == "nan", given=given,
    )  # fmt: skip


def pair_of(vae: VAE, settings: TrainSettings, model: PairFunction | None = None) -> Pair:
    """Return model and guide of a run, for which NaN is a missing value if its settings say so."""
    model = model or vae.model
    if settings.missing is None:
        return model, vae.guide
    encoder: Any = getattr(vae.variational_family, "encoder", None)
    # Where the networks see standardised data the mean, else nothing: 0 of counts and of pixels.
    fill = encoder.loc if isinstance(encoder, Standardized) else 0.0
    return observed_pair(model, vae.guide, fill=fill, nan=True)


def load_data_of_run(run: Path, settings: TrainSettings, data_root: str | None) -> Dataset:
    """Load the data that a run was trained on."""
    dataset = load_data(settings, data_root)
    if dataset.checksums != read_config(run)["run"].get("checksums"):
        wanted, advice = f"the data that {run} was trained on", "restore them or give --data-root"
        raise InputError(f"expected {wanted}, got others by the checksum: {advice}")
    return dataset


def describe_origin() -> dict[str, Any]:
    """Return the command line that is running and the versions it runs with."""
    versions = {each.__name__: each.__version__ for each in (torch, pyro, matplotlib)}
    versions = {"python": platform.python_version(), **versions, "pyro_vae": __version__}
    return {"command": shlex.join(["pyro-vae", *sys.argv[1:]]), "versions": versions}


def check_picture(path: Path) -> Path:
    """Return the file to write a picture to; refuse another kind, or one that can't be written."""
    path = expand_path(path, kind="picture")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture file .png, .svg or .pdf, got {path.name!r}")
    if path.is_dir():
        raise InputError(f"expected a picture file, {path} is a folder: choose another name")
    check_writable(path)
    return path


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that is not new or empty, or that can't be made."""
    check_free(folder)
    if has_files(folder):
        raise InputError(f"expected a new or empty folder, {folder} has files in it: choose another")
    # The longest of the paths below it.
    check_writable(folder / CHECKPOINTS / "step-0000000000.safetensors")


def check_writable(path: Path) -> None:
    """Refuse a file that can't be written; folders that are missing are made later."""
    folder = next(each for each in path.parents if each.exists())
    with writing_to(path):
        with suppress(FileNotFoundError):
            os.lstat(path.absolute().with_name(PART + path.name))  # a name may be too long for it
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
