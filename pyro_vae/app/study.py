"""A folder of several runs that is begun, interrupted and continued: sweeps and comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_vae import runs
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.report import plus_minus, print_line
from pyro_vae.app.run import FREE, METRICS, RUNS, STUDY, check_writable
from pyro_vae.app.train import train_run
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.files import finite_or_none, write_whole
from pyro_vae.pair.functions import resolve_device
from pyro_vae.runs.files import FORMAT, write_json
from pyro_vae.runs.folder import locked, new_folder
from pyro_vae.vae import VAE


class Study:
    """A study's folder, its data, and the runs below it."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder, self.dataset = folder, dataset

    def run(
        self,
        name: str,
        settings: TrainSettings,
        *,
        start: VAE | None = None,
        held: VAE | None = None,
    ) -> tuple[VAE, dict[str, Any]]:
        """Return a finished run of this name, or train it; a half-done one is trained anew.

        Arguments are those of :func:`train_run`. The VAE is on the device of the settings; beside it
        are the run's metrics.
        """
        folder = self.folder / RUNS / name
        if (folder / METRICS).is_file():
            vae = runs.load(folder, device=str(resolve_device(settings.device)))
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
            self._say(name, metrics, "finished before")
            return vae, metrics
        if folder.exists():
            shutil.rmtree(folder)
        with warnings.catch_warnings():
            # The study's own table says how many have k > 0.7.
            warnings.filterwarnings("ignore", r"\d+ of \d+ data")
            vae, metrics = train_run(settings, self.dataset, folder, start=start, held=held)
        self._say(name, metrics, f"{metrics['training_seconds']:.1f} s")
        return vae.eval(), metrics

    def _say(self, name: str, metrics: Mapping[str, Any], how: str) -> None:
        elbo = plus_minus(metrics["test"]["elbo"], None)
        print_line(f"{name}: test ELBO {elbo} ({how})")


def check_study_folder(folder: Path) -> None:
    """Refuse a folder that can't be written, before any data are read.

    Raises:
        InputError: such a folder, or a file.
    """
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder, {folder} is a file: choose another")
    check_writable(folder / STUDY)


@contextmanager
def open_study(folder: Path, asked: Mapping[str, Any], dataset: Dataset) -> Iterator[Study]:
    """Begin a study in a new or empty folder, or continue the same one, and hold its lock.

    A study that ends before its first run is whole leaves nothing behind. What is asked is everything
    that decides its result, as plain values.

    Raises:
        InputError: a folder that holds something else, a study of other settings or of other data,
            or one that another process works on.
    """
    folder = folder.expanduser()
    record = {"format": FORMAT, "asked": dict(asked), "checksums": dataset.checksums}
    _check(folder, record)
    with new_folder(folder), locked(folder):
        try:
            if not (folder / STUDY).exists():
                write_json(folder / STUDY, record)
            yield Study(folder, dataset)
        except BaseException as error:
            if not (folder / RUNS).exists():
                (folder / STUDY).unlink(missing_ok=True)
            elif isinstance(error, KeyboardInterrupt):
                sys.stderr.write("pyro-vae: interrupted: go on by the same command\n")
            raise


def restore_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers as they were before JSON made null of those that are not finite."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of equal names as CSV, whole or not at all; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(finite_or_none(list(rows)))
    content = text.getvalue()
    write_whole(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def _check(folder: Path, record: Mapping[str, Any]) -> None:
    path = folder / STUDY
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"expected a new folder or one to continue, {folder} has other files in it: choose "
                "another"
            )
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        begun, checksums = dict(found["asked"]), found["checksums"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"expected a study's settings in {path}, got none that can be read"
        ) from error
    asked = json.loads(json.dumps(record["asked"]))  # as they look after being read
    for name in asked | begun:
        if name not in FREE and asked.get(name) != begun.get(name):
            raise InputError(
                f"expected {name.replace('_', ' ')} {begun.get(name)!r} as {folder} was begun with, "
                f"got {asked.get(name)!r}: repeat it or choose another folder"
            )
    if checksums != record["checksums"]:
        raise InputError(
            f"expected the data that {folder} was begun with, got others by the checksum: restore "
            "them or choose another folder"
        )
