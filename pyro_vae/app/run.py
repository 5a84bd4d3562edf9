"""A finished run opened again: its VAE, its data, and a picture that is drawn from them."""

from __future__ import annotations

import shlex
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
from matplotlib.figure import Figure

from pyro_vae import datasets, runs
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.pictures import save_picture
from pyro_vae.app.settings import check_seed
from pyro_vae.app.writing import picture_path
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.runs.files import WEIGHTS, read_config
from pyro_vae.vae import VAE

# Of a folder of several runs: its settings, and where its runs are.
STUDY, RUNS = "study.json", "runs"

_MOST_PICTURED = 10_000


class PictureOptions(TypedDict):
    """What every command that draws a picture of a run can be told.

    Attributes:
        data_root: where the data are now; None: where they were.
        output: file to write; None: one in the run folder.
        seed: seed of what has to be drawn.
    """

    data_root: str | None
    output: Path | None
    seed: int


class RunPicture:
    """A picture of a finished run: what it is drawn from, and the file that it becomes.

    Args:
        run: the run folder.
        name: of the picture, of which its file's default name is made.
        data_root: as in :class:`PictureOptions`, like those that follow.
        output: file to write.
        seed: seed of what has to be drawn.

    Attributes:
        vae: the run's VAE, on the CPU.
        limits: the values shown as white and as black.
        seed: seed of what has to be drawn.

    Raises:
        InputError: no run there, or options out of range.
    """

    def __init__(
        self, run: Path, name: str, *, data_root: str | None, output: Path | None, seed: int
    ) -> None:
        check_seed(seed)
        self.seed = seed
        self._run, self._data_root = run, data_root
        self.vae, self._settings, self.limits = opened_run(run, torch.device("cpu"))
        self._path = picture_path(output or run / f"{name}-seed-{seed}.png")

    @cached_property
    def dataset(self) -> Dataset:
        """The run's data, read when they are first asked for."""
        return data_of_run(self._run, self._settings, self._data_root)

    def saved(self, figure: Figure) -> Path:
        """Write the picture; return its file."""
        save_picture(figure, self._path)
        return self._path


def opened_run(run: Path, device: torch.device) -> tuple[VAE, TrainSettings, tuple[float, float]]:
    """Load a run's VAE, its settings, and the values shown as white and as black.

    Raises:
        InputError: no run there, or one that ``pyro-vae train`` has not written.
    """
    check_single(run)
    config = read_config(run)
    if not (run / WEIGHTS).exists():
        raise InputError(
            f"expected a finished run, {run} has no weights yet: go on with it by `pyro-vae train "
            f"--resume {shlex.quote(str(run))}`"
        )
    vae = runs.load(run, device=str(device))
    try:
        low, high = config["run"]["limits"]
        return vae, TrainSettings(**config["run"]["settings"]), (low, high)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"expected the settings of `pyro-vae train` in {run}, got a folder by pv.save: use the "
            "library on it"
        ) from error


def check_single(folder: Path) -> None:
    """Refuse a folder of several runs, as ``pyro-vae compare`` and ``sweep`` write it."""
    if (folder / STUDY).is_file():
        raise InputError(
            f"expected a run folder, {folder} holds several runs: give one in {folder / RUNS}, or "
            "repeat the command that began them to go on"
        )


def data_of_run(
    run: Path, settings: TrainSettings, data_root: str | None, *, download: bool = False
) -> Dataset:
    """Load the data a run was trained on.

    Args:
        run: the run folder, which knows the data's checksums.
        settings: the run's.
        data_root: where the data are now; None: where they were.
        download: download a named set that is missing.

    Raises:
        InputError: data that are missing, or others.
    """
    source = Path(settings.dataset)
    if data_root is not None and source.suffix in datasets.FILE_TYPES:
        source = Path(data_root) / source.name
    dataset = datasets.load(
        source,
        data_root or settings.data_root,
        binarize=settings.binarize or "none",
        validation_size=settings.validation_size,
        seed=settings.split_seed,
        download=download,
    )
    if dataset.checksums != read_config(run)["run"].get("checksums"):
        raise InputError(
            f"expected the data that {run} was trained on, got others by the checksum: restore them "
            "or give --data-root"
        )
    return dataset


def check_pictured(number: int | None) -> None:
    """Refuse a number of data that no picture shows."""
    if number is not None and not 1 <= number <= _MOST_PICTURED:
        raise InputError(f"expected a number from 1 to {_MOST_PICTURED:,} to show, got {number}")
