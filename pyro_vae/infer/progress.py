"""The progress bar of a training run, on standard error."""

from __future__ import annotations

import math
import random
import sys
from typing import Any


class EpochProgress:
    """A bar with epoch, time left, ELBO of both parts, rate and distortion.

    Args:
        epochs: how many there will be.
        show: whether to show it; None shows it on a terminal only.
    """

    def __init__(self, epochs: int, show: bool | None) -> None:
        self._progress: Any = None
        if sys.stderr.isatty() if show is None else show:
            state = random.getstate()  # rich draws from it, already when imported
            self._progress = _bar()
            self._task = self._progress.add_task("", total=epochs)
            random.setstate(state)

    def __enter__(self) -> EpochProgress:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)

    def show(self, epoch: int, row: dict[str, float]) -> None:
        """Show the metrics of an epoch that has ended."""
        if self._progress is not None:
            self._progress.update(self._task, completed=epoch, description=self.describe(row))

    def describe(self, row: dict[str, float]) -> str:
        """Return the metrics in words; another kind of training says others."""
        text = f"ELBO {row['train_elbo']:.2f}"
        if not math.isnan(row["validation_elbo"]):
            text += f" (validation {row['validation_elbo']:.2f})"
        return f"{text}  rate {row['train_rate']:.2f}  distortion {row['train_distortion']:.2f}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def column() -> Column:
        return Column(no_wrap=True)

    return Progress(
        TextColumn("epoch {task.completed}/{task.total}", table_column=column()),
        TimeRemainingColumn(compact=True, table_column=column()),
        TextColumn("{task.description}", table_column=column()),
        console=Console(stderr=True),
    )
