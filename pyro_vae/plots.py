"""Pictures: arrays in, a matplotlib Figure out; knows no model and touches no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

__all__ = ["image_grid", "is_image", "reconstructions", "samples", "training_curves"]

Array = np.ndarray

_BLUE, _ORANGE = "#1f5a94", "#d1742b"


def is_image(data_shape: Sequence[int]) -> bool:
    """Say whether data of this shape are shown as images: (1 or 3, H, W), or (H, W) of at least 4."""
    if len(data_shape) == 3:
        return data_shape[0] in (1, 3)
    return len(data_shape) == 2 and min(data_shape) >= 4


def image_grid(
    rows: Sequence[Array],
    *,
    title: str,
    row_labels: Sequence[str] = (),
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Show images in a grid, one sequence per row; ink is dark on white paper.

    Args:
        rows: arrays of images ``(columns, C, H, W)`` or ``(columns, H, W)``.
        title: a line above the grid.
        row_labels: one label per row.
        limits: the values shown as white and as black.
    """
    columns = max(len(row) for row in rows)
    left = 1.0 if row_labels else 0.1
    width, height = left + 0.62 * columns + 0.1, 0.62 * len(rows) + 0.5
    figure = Figure(figsize=(width, height), dpi=150)
    figure.text(left / width, 1 - 0.28 / height, title, fontsize=10, va="center")
    for row_index, row in enumerate(rows):
        bottom = (len(rows) - 1 - row_index) * 0.62 + 0.06
        for column, image in enumerate(row):
            box = ((left + 0.62 * column) / width, bottom / height, 0.58 / width, 0.58 / height)
            axes = figure.add_axes(box)
            _show(axes, image, limits)
        if row_labels:
            middle = (bottom + 0.29) / height
            label_at = (left - 0.1) / width
            figure.text(label_at, middle, row_labels[row_index], fontsize=9, ha="right", va="center")
    return figure


def samples(
    drawn: Array, data: Array, *, title: str, limits: tuple[float, float] = (0.0, 1.0)
) -> Figure:
    """Show drawn data: images as a square grid, vectors beside the data's own distribution.

    Args:
        drawn: new data ``(N, *data_shape)``.
        data: real data of the same shape, to compare vectors with.
        title: a line above the picture.
        limits: the values shown as white and as black.
    """
    if is_image(drawn.shape[1:]):
        columns = math.ceil(math.sqrt(len(drawn)))
        rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
        return image_grid(rows, title=title, limits=limits)
    drawn, data = drawn.reshape(len(drawn), -1), data.reshape(len(data), -1)
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    if data.shape[1] == 1:
        bins = np.histogram_bin_edges(np.concatenate([data, drawn]), bins=40).tolist()
        axes.hist(data[:, 0], bins, density=True, color=_BLUE, alpha=0.5, label="data")
        axes.hist(drawn[:, 0], bins, density=True, histtype="step", color=_ORANGE, label="drawn")
        axes.set(xlabel="value", ylabel="density")
    elif data.shape[1] == 2:
        axes.scatter(data[:, 0], data[:, 1], s=6, color=_BLUE, alpha=0.4, label="data", linewidths=0)
        axes.scatter(
            drawn[:, 0], drawn[:, 1], s=6, color=_ORANGE, alpha=0.7, label="drawn", linewidths=0
        )
        axes.set(xlabel="coordinate 1", ylabel="coordinate 2")
    else:
        _bands(axes, data, drawn)
    axes.legend(frameon=False, fontsize=9)
    return figure


def reconstructions(
    data: Array, rebuilt: Array, *, title: str, limits: tuple[float, float] = (0.0, 1.0)
) -> Figure:
    """Show data beside their reconstructions: images in two rows, vectors value against value.

    Args:
        data: ``(N, *data_shape)``.
        rebuilt: their reconstructions, of the same shape.
        title: a line above the picture.
        limits: the values shown as white and as black.
    """
    if is_image(data.shape[1:]):
        labels = ("data", "rebuilt")
        return image_grid([data, rebuilt], title=title, row_labels=labels, limits=limits)
    figure = Figure(figsize=(4.4, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    true, got = data.reshape(-1)[:5000], rebuilt.reshape(-1)[:5000]
    ends = [min(true.min(), got.min()), max(true.max(), got.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="perfect")
    axes.scatter(true, got, s=5, color=_BLUE, alpha=0.4, linewidths=0, label="one value")
    axes.set(xlabel="data", ylabel="reconstruction")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


def training_curves(history: Mapping[str, Array], *, title: str) -> Figure:
    """Show ELBO, rate and distortion against epochs.

    Args:
        history: arrays ``(epochs,)`` as :class:`pyro_vae.FitResult` holds them.
        title: a line above the picture.
    """
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("elbo", "rate", "distortion"), strict=True):
        shown = []
        for part, colour in (("train", _BLUE), ("validation", _ORANGE)):
            curve = np.asarray(history[f"{part}_{name}"], dtype=float)
            if np.isfinite(curve).any():
                epochs = np.arange(1, len(curve) + 1)
                axes.plot(epochs, curve, color=colour, label=part, linewidth=1.3)
                # The fall of the first epochs would flatten everything that follows.
                shown.append(curve[len(curve) // 20 :])
        label = {"elbo": "ELBO", "rate": "rate (KL)", "distortion": "distortion"}[name]
        axes.set(xlabel="epoch", ylabel=f"{label} (nats per datum)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _fit_vertically(axes, shown)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _show(axes: Axes, image: Array, limits: tuple[float, float]) -> None:
    axes.set_axis_off()
    if image.ndim == 3 and image.shape[0] == 3:
        low, high = limits
        axes.imshow(np.clip((image.transpose(1, 2, 0) - low) / (high - low), 0, 1))
        return
    flat = image[0] if image.ndim == 3 else image
    axes.imshow(flat, cmap="gray_r", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor="0.8")
    frame.set_linewidth(0.6)
    axes.add_patch(frame)


def _bands(axes: Axes, data: Array, drawn: Array) -> None:
    """Show the median and the middle 90 % of each coordinate."""
    position = np.arange(1, data.shape[1] + 1)
    for values, colour, label, shift in (
        (data, _BLUE, "data", -0.12),
        (drawn, _ORANGE, "drawn", 0.12),
    ):
        low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
        errors = np.stack([middle - low, high - middle])
        axes.errorbar(
            position + shift,
            middle,
            errors,
            fmt="o",
            markersize=3,
            color=colour,
            label=label,
            linewidth=1,
        )
    axes.set(xlabel="coordinate", ylabel="value (median, middle 90 %)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _fit_vertically(axes: Axes, curves: Sequence[Array]) -> None:
    if not curves:
        return
    low = min(np.nanmin(curve) for curve in curves)
    high = max(np.nanmax(curve) for curve in curves)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
