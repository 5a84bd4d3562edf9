"""The common look of the pictures: colours, panels, legends, ranges."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Array = np.ndarray

BLUE, ORANGE = "#1f5a94", "#d1742b"
# Behind values that are not there.
TINT = "#c9dcee"
# Images are dark ink on white paper; other fields of values are shown by a map of even lightness.
INK = colormaps["gray_r"].with_extremes(bad=TINT)
MAP = colormaps["viridis"]


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """Return an empty figure with its title at the left."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def one_panel(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure of one panel with its title at the left."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    open_frame(axes)
    return figure, axes


def open_frame(axes: Axes) -> None:
    """Leave the frame's upper and right line out."""
    axes.spines[["top", "right"]].set_visible(False)


def two_histograms(
    axes: Axes,
    filled: tuple[Array, str],
    outlined: tuple[Array, str],
    bins: Array,
    *,
    density: bool = False,
) -> None:
    """Show two sets of values with their labels: one filled, one as an outline above it."""
    edges = bins.tolist()
    axes.hist(filled[0], edges, density=density, color=BLUE, alpha=0.5, label=filled[1])
    axes.hist(outlined[0], edges, density=density, color=ORANGE, histtype="step", label=outlined[1])


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


def legend_beside(axes: Axes, *, marker_scale: float) -> None:
    """Put the legend of classes right of the panel, one line per class."""
    axes.legend(
        frameon=False,
        fontsize=9,
        markerscale=marker_scale,
        title="class",
        title_fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )


def class_colours(number: int) -> list[tuple[float, float, float, float]]:
    """Return colours that tell classes apart: fixed ones for up to 10, then around the hues."""
    if number <= 10:
        return [colormaps["tab10"](index) for index in range(number)]
    return [colormaps["turbo"](index / (number - 1)) for index in range(number)]


def fit_vertically(axes: Axes, values: Array) -> None:
    """Set the vertical range to that of the values, with a small margin."""
    if len(values):
        low, high = values.min(), values.max()
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
