"""The common look of the pictures: colours, panels, histograms, legends."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.errors import printable

Array = np.ndarray
Labels = Sequence[str]
Limits = tuple[float, float]  # the values shown as white and as black
UNIT: Limits = (0.0, 1.0)

BLUE, ORANGE = "#1f5a94", "#d1742b"
# Behind values that are not there.
TINT = "#c9dcee"
# Images are dark ink on white paper; other fields of values are shown by a map of even lightness.
INK = colormaps["gray_r"].with_extremes(bad=TINT)
MAP = colormaps["viridis"]


class Picture(Figure):
    """A figure that Jupyter shows as a cell's last line, whatever its matplotlib is set to."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", bbox_inches="tight")
        return file.getvalue()


def as_text(name: str) -> str:
    """Return a name as a picture shows it: no mathematics between dollars, no line break."""
    return printable(name).replace("$", r"\$")


def panels(
    title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, *,
    shown: int | None = None, framed: bool = False, **how: Any,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Return a figure with its title at the left and its first panels, the rest left empty."""
    figure = Picture(figsize=size, dpi=150, layout="constrained")
    if title:
        figure.suptitle(as_text(title), fontsize=10, x=0.01, ha="left")
    places = list(figure.subplots(rows, columns, squeeze=False, **how).flat)
    shown = len(places) if shown is None else shown
    for axes in places[shown:]:
        axes.set_axis_off()
    for axes in places[:shown]:
        axes.spines[["top", "right"]].set_visible(framed)
    return figure, places[:shown]


def one_panel(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure of one panel with its title at the left."""
    figure = Picture(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(as_text(title), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def show_histograms(
    axes: Axes, filled: Array, outlined: Array, bins: Array, labels: Labels, *, density: bool = True
) -> None:
    """Show two distributions in the same bins: one as an area, the other as an outline."""
    edges = bins.tolist()
    axes.hist(filled, edges, density=density, color=BLUE, alpha=0.5, label=labels[0])
    axes.hist(outlined, edges, density=density, color=ORANGE, histtype="step", label=labels[1])


def are_bits(data: Array) -> bool:
    """Say whether there are no other values than 0 and 1, and NaN."""
    return bool(((data == 0) | (data == 1) | np.isnan(data)).all())


def legend_above(axes: Axes) -> None:
    """Put the legend right of the title, where it hides no data."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderpad": 0}
    axes.legend(frameon=False, fontsize=9, markerscale=2, ncols=2, columnspacing=1, **place)


def legend_beside(axes: Axes, *, marker_scale: float) -> None:
    """Put the legend of classes right of the panel, one line per class."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    sizes: dict[str, Any] = {"fontsize": 9, "title_fontsize": 9, "markerscale": marker_scale}
    axes.legend(frameon=False, title="class", **sizes, **place)


def class_colours(number: int) -> list[tuple[float, float, float, float]]:
    """Return colours that tell classes apart: fixed ones for up to 10, then around the hues."""
    if number <= 10:
        return [colormaps["tab10"](index) for index in range(number)]
    return [colormaps["turbo"](index / (number - 1)) for index in range(number)]
