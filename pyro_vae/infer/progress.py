"""The progress bar of a training run, on standard error."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["EpochProgress"]


class EpochProgress:
    """A progress bar on standard error: epoch, ELBO of both parts, rate and distortion."""

    def __init__(self, epochs: int, show: bool | None) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("epoch {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            console=console,
            expand=True,
            disable=not (console.is_terminal if show is None else show),
        )
        self._task = self._progress.add_task("", total=epochs)

    def __enter__(self) -> EpochProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, epoch: int, row: dict[str, float]) -> None:
        """Show the metrics of an epoch that has ended."""
        text = f"ELBO {row['train_elbo']:.2f}"
        if not math.isnan(row["validation_elbo"]):
            text += f" (valid. {row['validation_elbo']:.2f})"
        text += f"  rate {row['train_rate']:.2f}  distortion {row['train_distortion']:.2f}"
        self._progress.update(self._task, completed=epoch, description=text)
