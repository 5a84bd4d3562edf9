"""Pictures of data: grids of images, draws, reconstructions and completions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots import style
from pyro_vae.plots.style import BLUE, ORANGE, UNIT, Array, Limits


def is_image(data_shape: Sequence[int]) -> bool:
    """Say whether data of this shape are shown as images.

    They are as ``(C, H, W)`` or ``(H, W, C)`` with 1 or 3 channels, and as ``(H, W)`` of at least 4.
    """
    if len(data_shape) == 3:
        return data_shape[0] in (1, 3) or data_shape[2] in (1, 3)
    return len(data_shape) == 2 and min(data_shape) >= 4


def is_curve(data_shape: Sequence[int]) -> bool:
    """Say whether data of this shape are shown as curves: ``(channels, length)``, few channels."""
    return len(data_shape) == 2 and data_shape[0] < 4 <= data_shape[1]


def image_grid(
    rows: Sequence[Array], *, title: str = "", row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (), limits: Limits = UNIT,
) -> Figure:  # fmt: skip
    """Show images in a grid, one sequence per row; ink is dark on white paper, NaN is tinted.

    Rows are arrays of images ``(columns, *data_shape)`` (see :func:`is_image`); column labels stand
    above the first one.
    """
    cell_width, cell_height = _cell(rows[0].shape[1:])
    left, gap = 0.75 if row_labels else 0.1, 0.05
    width = left + (cell_width + gap) * max(len(row) for row in rows) + gap
    width = max(width, left + 0.075 * len(title))  # about a character's width at this size
    grid_height = (cell_height + gap) * len(rows)
    height = grid_height + 0.1 + 0.3 * bool(title) + 0.2 * bool(column_labels)
    figure = style.Picture(figsize=(width, height), dpi=150)
    # One pair of axes, in inches from the lower left corner, holds everything.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(left, height - 0.2, style.as_text(title), fontsize=10, va="center")
    for row_index, row in enumerate(rows):
        bottom = (len(rows) - 1 - row_index) * (cell_height + gap) + gap
        for column, image in enumerate(row):
            at = left + column * (cell_width + gap)
            show_image(axes, image, (at, at + cell_width, bottom, bottom + cell_height), limits)
            frame = Rectangle((at, bottom), cell_width, cell_height, fill=False, ec="0.8")
            axes.add_patch(frame).set_linewidth(0.6)
        if row_labels:
            middle = bottom + cell_height / 2
            axes.text(left - 0.1, middle, row_labels[row_index], fontsize=9, ha="right", va="center")
    for column, label in enumerate(column_labels):
        middle = left + column * (cell_width + gap) + cell_width / 2
        axes.text(middle, grid_height + 0.14, label, fontsize=8, ha="center", va="center")
    axes.set(xlim=(0, width), ylim=(0, height))
    return figure


def samples(drawn: Array, data: Array, *, title: str = "", limits: Limits = UNIT) -> Figure:
    """Show drawn data: images as a square grid, curves and vectors beside the data's own.

    Of vectors of three and more values the correlations are shown too, drawn against data. Both are
    ``(N, *data_shape)``.
    """
    if is_image(drawn.shape[1:]):
        cell_width, cell_height = _cell(drawn.shape[1:])
        columns = math.ceil(math.sqrt(len(drawn) * cell_height / cell_width))
        rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
        return image_grid(rows, title=title, limits=limits)
    if is_curve(drawn.shape[1:]):
        figure, (axes, other) = style.panels(title, (9, 3.4), columns=2, sharey=True)
        _lines(axes, data[:_CURVES], BLUE, "data")
        _lines(other, drawn[:_CURVES], ORANGE, "drawn")
        return figure
    drawn, data = drawn.reshape(len(drawn), -1), data.reshape(len(data), -1)
    if data.shape[1] > 2:
        figure, (axes, other) = style.panels(title, (9, 4), columns=2, width_ratios=[3, 2])
        _correlations(other, *map(np.ma.masked_invalid, (data, drawn)))
    else:
        figure, axes = style.one_panel(title, (6.4, 4))
    if data.shape[1] == 1:
        bins = np.histogram_bin_edges(np.ma.masked_invalid([*data, *drawn]).compressed(), bins=40)
        style.show_histograms(axes, data[:, 0], drawn[:, 0], bins, ("data", "drawn"))
        axes.set(xlabel="value", ylabel="density")
    elif data.shape[1] == 2:
        for (first, second), colour, label in ((data.T, BLUE, "data"), (drawn.T, ORANGE, "drawn")):
            axes.scatter(first, second, s=6, color=colour, alpha=0.5, label=label, linewidths=0)
        axes.set(xlabel="coordinate 1", ylabel="coordinate 2")
    else:
        _bands(axes, data, drawn)
    style.legend_above(axes)
    return figure


def reconstructions(data: Array, rebuilt: Array, *, title: str = "", limits: Limits = UNIT) -> Figure:
    """Show data and reconstructions: images in two rows, curves over each other, values in a plane.

    Both are ``(N, *data_shape)``.
    """
    if is_image(data.shape[1:]):
        return image_grid([data, rebuilt], title=title, row_labels=("data", "rebuilt"), limits=limits)
    if is_curve(data.shape[1:]):
        figure, places = style.panels(title, (9, 6), 3, 4, shown=min(len(data), 12), sharey=True)
        for index, axes in enumerate(places):
            _lines(axes, data[index : index + 1], BLUE, "data")
            _lines(axes, rebuilt[index : index + 1], ORANGE, "data and rebuilt")
        return figure
    figure, axes = style.one_panel(title, (6.4, 4.4))
    true, got = data.reshape(-1)[:5000], rebuilt.reshape(-1)[:5000]
    if _show_values(axes, true, got, "data", ("reconstruction", "values", "reconstruction")):
        axes.scatter(true, got, s=5, color=BLUE, alpha=0.4, linewidths=0, label="one value")
    style.legend_above(axes)
    return figure


def completions(
    truth: Array, missing: Array, mean: Array, standard_deviation: Array, draws: Array, *,
    title: str = "", limits: Limits = UNIT,
) -> Figure:  # fmt: skip
    """Show completed data: images as panels, vectors value against value.

    Of the whole data, ``truth`` ``(N, *data_shape)``, the boolean ``missing`` says which values were
    hidden. The completions have a mean and a standard deviation of that shape, and draws
    ``(num_draws, N, *data_shape)``.
    """
    if is_image(truth.shape[1:]):
        observed = np.where(missing, np.nan, truth)
        rows = [np.stack([observed[n], mean[n], *draws[:, n], truth[n]]) for n in range(len(truth))]
        labels = ["observed", "mean", *("draw" for _ in draws), "truth"]
        return image_grid(rows, title=title, column_labels=labels, limits=limits)
    figure, axes = style.one_panel(title, (8.4, 4.4))
    hidden = missing & ~np.isnan(truth)
    true, got, spread = (values[hidden][:5000] for values in (truth, mean, standard_deviation))
    told = "mean of the completions", "missing values", "completion of a missing value"
    if _show_values(axes, true, got, "truth", told):
        how: dict[str, Any] = {"fmt": "o", "markersize": 2.5, "elinewidth": 0.5, "alpha": 0.5}
        axes.errorbar(true, got, spread, color=BLUE, label="mean, one deviation", **how)
    style.legend_above(axes)
    return figure


def _show_values(axes: Axes, true: Array, got: Array, name: str, told: tuple[str, str, str]) -> bool:
    """Show bits, found beside the true ones; of other values the line where both are the same."""
    if style.are_bits(true):
        labels, bins = (f"{name} 0", f"{name} 1"), np.linspace(0, 1, 26)
        style.show_histograms(axes, got[true == 0], got[true == 1], bins, labels, density=False)
        axes.set(xlabel=told[0], ylabel=told[1])
        return False
    ends = [min(np.nanmin(true), got.min()), max(np.nanmax(true), got.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="perfect")
    axes.set(xlabel=name, ylabel=told[2])
    return True


def flat_image(image: Array, limits: Limits) -> Array:
    """Return an image as matplotlib shows it: ``(H, W)``, or ``(H, W, 3)`` scaled to [0, 1]."""
    channel = channel_axis(image.shape)
    if channel is None:
        return image
    image = np.moveaxis(image, channel, -1)
    if image.shape[2] == 1:
        return image[:, :, 0]
    low, high = limits
    scaled = np.clip((image - low) / (high - low or 1), 0, 1)
    return np.where(np.isnan(image), to_rgb(style.TINT), scaled)


def _cell(shape: Sequence[int]) -> tuple[float, float]:
    """Return the width and height in inches at which an image is shown: of its own proportions."""
    height, width = (size for axis, size in enumerate(shape) if axis != channel_axis(shape))
    side = math.sqrt(height * width)
    inches = min(max(0.58, side / 48), 1.3)
    return inches * width / side, inches * height / side


def channel_axis(shape: Sequence[int]) -> int | None:
    """Return which axis of an image holds its channels, if there is one."""
    if len(shape) == 2:
        return None
    return 0 if shape[0] in (1, 3) else 2


def show_image(axes: Axes, image: Array, extent: Any, limits: Limits) -> None:
    """Show an image between left, right, bottom and top, whatever its proportions are."""
    shown, (low, high) = flat_image(image, limits), limits
    axes.imshow(shown, cmap=style.INK, vmin=low, vmax=high, extent=extent, aspect="auto")


# Curves in one panel.
_CURVES = 20


def _lines(axes: Axes, curves: Array, colour: str, label: str) -> None:
    """Show curves ``(N, channels, length)``, every channel a line."""
    position = np.arange(1, curves.shape[2] + 1)
    axes.plot(position, curves.reshape(-1, curves.shape[2]).T, color=colour, linewidth=0.8, alpha=0.7)
    axes.set_title(label, fontsize=9)


def _correlations(axes: Axes, data: Array, drawn: Array) -> None:
    """Show the correlation of each two columns that vary, drawn against data."""
    varies = np.ma.filled((data.std(0) > 0) & (drawn.std(0) > 0), False)
    pairs = np.triu_indices(int(varies.sum()), 1)
    found = [np.ma.corrcoef(values[:, varies].T)[pairs] for values in (data, drawn) if len(pairs[0])]
    axes.plot([-1, 1], [-1, 1], color="0.6", linewidth=1)
    if found:
        axes.scatter(found[0], found[1], s=5, color=BLUE, alpha=0.5, linewidths=0)
    axes.set(xlabel="correlation in the data", ylabel="drawn", xlim=(-1, 1), ylim=(-1, 1))


def _bands(axes: Axes, data: Array, drawn: Array) -> None:
    """Show the median and the middle 90 % of each coordinate; for bits the share of ones."""
    bits = style.are_bits(data)
    position = np.arange(1, data.shape[1] + 1)
    for values, colour, label, shift in ((data, BLUE, "data", -0.12), (drawn, ORANGE, "drawn", 0.12)):
        low, middle, high = np.nanquantile(values, [0.05, 0.5, 0.95], axis=0)
        if bits:
            low = middle = high = np.nanmean(values, 0)
        errors = np.stack([middle - low, high - middle])
        how: dict[str, Any] = {"fmt": "o", "markersize": 3, "linewidth": 1}
        axes.errorbar(position + shift, middle, errors, color=colour, label=label, **how)
    axes.set(xlabel="coordinate", ylabel="share of ones" if bits else "median, middle 90 %")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
