"""A folder of several runs that is begun, interrupted and continued: sweeps and comparisons."""

import csv
import io
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_vae import runs
from pyro_vae.app import run_folder
from pyro_vae.app.names import TrainSettings
from pyro_vae.app.output import plus_minus, print_line
from pyro_vae.app.run_folder import FREE, METRICS, METRICS_SCHEMA, load_data
from pyro_vae.app.train import train_run
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, check_same
from pyro_vae.files import expand_path, finite_or_none, parse_json, serialise, write_whole
from pyro_vae.pair.functions import resolve_device
from pyro_vae.runs.files import FORMAT, RUNS, STUDY, check_schema, own_folder, read_json, write_json
from pyro_vae.runs.folder import locked, new_folder
from pyro_vae.vae import VAE


class Study:
    """A study's folder, its data, and the runs below it."""

    def __init__(self, folder: Path, dataset: Dataset, device: torch.device) -> None:
        self.folder, self.dataset, self.device = folder, dataset, device

    def run(
        self, name: str, settings: TrainSettings, *, start: VAE | None = None, held: VAE | None = None
    ) -> tuple[VAE, dict[str, Any]]:
        """Return a finished run of this name, or train it; a half-done one is trained anew.

        Arguments are those of :func:`train_run`; the run's metrics are returned beside the VAE.
        """
        folder = own_folder(own_folder(self.folder, RUNS), name)
        metrics = read_json(folder, METRICS)
        if metrics is not None:
            check_schema(metrics, METRICS_SCHEMA, METRICS)
            vae = runs.load(folder, device=str(self.device))
            how = "finished before"
        else:
            if folder.exists():
                shutil.rmtree(folder)
            with warnings.catch_warnings():
                # The study's own table says how many are not trusted.
                warnings.filterwarnings("ignore", r"\d+ of \d+ data")
                vae, metrics = train_run(settings, self.dataset, folder, start=start, held=held)
            how = f"{metrics['training_seconds']:.1f} s"
        print_line(f"{name}: test ELBO {plus_minus(metrics['test']['elbo'], None)} ({how})")
        return vae.eval(), metrics

    def describe(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Describe, for a page and a JSON file, how their numbers were made."""
        made = {"settings": settings, "checksums": self.dataset.checksums}
        return made | run_folder.describe_origin()


@contextmanager
def open_study(folder: Path, asked: Mapping[str, Any], settings: TrainSettings) -> Iterator[Study]:
    """Begin a study in a new or empty folder, or continue the same one, and hold its lock.

    A study that ends before its first run is whole leaves nothing behind. What is asked is everything
    that decides its result, as plain values; the settings name data and device of all its runs.
    """
    device, folder = resolve_device(settings.device), expand_path(folder)
    begun, dataset = _check_folder(folder, asked), load_data(settings)
    if begun not in (None, dataset.checksums):
        wanted = f"the data that {folder} was begun with"
        advice = "restore them or choose another folder"
        raise InputError(f"expected {wanted}, got others by the checksum: {advice}")
    record = {"format": FORMAT, "asked": dict(asked), "checksums": dataset.checksums}
    with new_folder(folder), locked(folder):
        try:
            # Looked at again: another process may have begun one while the data were read.
            if _check_folder(folder, asked) is None:
                write_json(folder / STUDY, record)
            yield Study(folder, dataset, device)
        except BaseException:
            if not (folder / RUNS).exists():
                (folder / STUDY).unlink(missing_ok=True)
            raise


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same names as CSV, whole or not at all; unknown values stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(finite_or_none(list(rows)))
    write_whole(path, text.getvalue().encode())


def _check_folder(folder: Path, asked: Mapping[str, Any]) -> Any:
    """Refuse a folder that can't be this study's; return the checksums of one that is begun."""
    found = read_json(folder, STUDY)
    if found is None:
        run_folder.check_new_folder(folder)
        return None
    run_folder.check_writable(folder / STUDY)
    check_schema(found, {"asked": dict, "checksums": dict}, str(folder / STUDY))
    begun = dict(found["asked"])
    if "standardize" not in begun:  # an earlier version took data as they come
        has_sigma = "gaussian" in f"{begun.get('likelihood')} {begun.get('likelihoods')}"
        begun |= {"standardize": False} if has_sigma else {"standardize": None, "sigma": None}
    now, advice = parse_json(serialise(asked)), "repeat it or choose another folder"
    check_same(begun, now, str(folder), advice, FREE)
    return found["checksums"]
