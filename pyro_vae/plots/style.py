"""The common look of the pictures: colours, panels, legends, ranges."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["BLUE", "ORANGE", "Array", "fit_vertically", "legend_above", "one_panel"]

Array = np.ndarray

BLUE, ORANGE = "#1f5a94", "#d1742b"


def one_panel(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure of one panel with its title at the left."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_above(axes: Axes) -> None:
    """Put the legend right of the title, where it hides no data."""
    axes.legend(
        frameon=False,
        fontsize=9,
        markerscale=2,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderpad=0,
        columnspacing=1,
    )


def fit_vertically(axes: Axes, values: Array) -> None:
    """Set the vertical range to that of the values, with a small margin."""
    if len(values):
        low, high = values.min(), values.max()
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
