"""Pictures: arrays in, a matplotlib Figure out; knows no model and touches no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

__all__ = [
    "image_grid",
    "is_image",
    "reconstructions",
    "samples",
    "training_curves",
    "weight_diagnostics",
]

Array = np.ndarray

_BLUE, _ORANGE = "#1f5a94", "#d1742b"


def is_image(data_shape: Sequence[int]) -> bool:
    """Say whether data of this shape are shown as images.

    They are as ``(C, H, W)`` or ``(H, W, C)`` with 1 or 3 channels, and as ``(H, W)`` of at least 4.
    """
    if len(data_shape) == 3:
        return data_shape[0] in (1, 3) or data_shape[2] in (1, 3)
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
        rows: arrays of images ``(columns, *data_shape)`` (see :func:`is_image`).
        title: a line above the grid.
        row_labels: one label per row.
        limits: the values shown as white and as black.
    """
    cell_width, cell_height = _cell(rows[0].shape[1:])
    left, gap = 0.75 if row_labels else 0.1, 0.05
    width = left + (cell_width + gap) * max(len(row) for row in rows) + gap
    width = max(width, left + 0.075 * len(title))  # about a character's width at this size
    height = (cell_height + gap) * len(rows) + 0.4
    figure = Figure(figsize=(width, height), dpi=150)
    # One pair of axes, in inches from the lower left corner, holds everything.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(left, height - 0.2, title, fontsize=10, va="center")
    for row_index, row in enumerate(rows):
        bottom = (len(rows) - 1 - row_index) * (cell_height + gap) + gap
        for column, image in enumerate(row):
            at = left + column * (cell_width + gap)
            _show(axes, image, (at, at + cell_width, bottom, bottom + cell_height), limits)
        if row_labels:
            middle = bottom + cell_height / 2
            axes.text(left - 0.1, middle, row_labels[row_index], fontsize=9, ha="right", va="center")
    axes.set(xlim=(0, width), ylim=(0, height))
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
        cell_width, cell_height = _cell(drawn.shape[1:])
        columns = math.ceil(math.sqrt(len(drawn) * cell_height / cell_width))
        rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
        return image_grid(rows, title=title, limits=limits)
    drawn, data = drawn.reshape(len(drawn), -1), data.reshape(len(data), -1)
    figure, axes = _one_panel(title, (6.4, 4))
    if data.shape[1] == 1:
        bins = np.histogram_bin_edges(np.concatenate([data, drawn]), bins=40).tolist()
        axes.hist(data[:, 0], bins, density=True, color=_BLUE, alpha=0.5, label="data")
        axes.hist(drawn[:, 0], bins, density=True, histtype="step", color=_ORANGE, label="drawn")
        axes.set(xlabel="value", ylabel="density")
    elif data.shape[1] == 2:
        for values, colour, label in ((data, _BLUE, "data"), (drawn, _ORANGE, "drawn")):
            axes.scatter(
                values[:, 0], values[:, 1], s=6, color=colour, alpha=0.5, label=label, linewidths=0
            )
        axes.set(xlabel="coordinate 1", ylabel="coordinate 2")
    else:
        _bands(axes, data, drawn)
    _legend_above(axes)
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
    figure, axes = _one_panel(title, (6.4, 4.4))
    true, got = data.reshape(-1)[:5000], rebuilt.reshape(-1)[:5000]
    if _are_bits(data):
        bins = np.linspace(0, 1, 26).tolist()
        axes.hist(got[true == 0], bins, color=_BLUE, alpha=0.5, label="data 0")
        axes.hist(got[true == 1], bins, color=_ORANGE, histtype="step", label="data 1")
        axes.set(xlabel="reconstruction", ylabel="values")
        _legend_above(axes)
        return figure
    ends = [min(true.min(), got.min()), max(true.max(), got.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="perfect")
    axes.scatter(true, got, s=5, color=_BLUE, alpha=0.4, linewidths=0, label="one value")
    axes.set(xlabel="data", ylabel="reconstruction")
    _legend_above(axes)
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
            finite = np.isfinite(curve)
            if finite.any():
                epochs = np.arange(1, len(curve) + 1)
                marker = "o" if len(curve) <= 20 else None  # a line needs two epochs to be seen
                axes.plot(
                    epochs,
                    curve,
                    color=colour,
                    label=part,
                    linewidth=1.3,
                    marker=marker,
                    markersize=3,
                )
                # The fall of the first epochs would flatten everything that follows.
                start = len(curve) // 20
                shown.append(curve[start:][finite[start:]])
        label = {"elbo": "ELBO", "rate": "rate (KL)", "distortion": "distortion"}[name]
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _fit_vertically(axes, np.concatenate([*shown, []]))
    panels[0].set_ylabel("nats per datum")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _one_panel(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_above(axes: Axes) -> None:
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


def _are_bits(data: Array) -> bool:
    return bool(((data == 0) | (data == 1)).all())


def _cell(shape: Sequence[int]) -> tuple[float, float]:
    """Return the width and height in inches at which an image is shown: of its own proportions."""
    height, width = (size for axis, size in enumerate(shape) if axis != _channel_axis(shape))
    side = math.sqrt(height * width)
    inches = min(max(0.58, side / 48), 1.3)
    return inches * width / side, inches * height / side


def _channel_axis(shape: Sequence[int]) -> int | None:
    if len(shape) == 2:
        return None
    return 0 if shape[0] in (1, 3) else 2


def _show(
    axes: Axes, image: Array, extent: tuple[float, float, float, float], limits: tuple[float, float]
) -> None:
    low, high = limits
    channel_axis = _channel_axis(image.shape)
    if channel_axis is not None:
        image = np.moveaxis(image, channel_axis, -1)
        image = (
            image[:, :, 0]
            if image.shape[2] == 1
            else np.clip((image - low) / (high - low or 1), 0, 1)
        )
    axes.imshow(image, cmap="gray_r", vmin=low, vmax=high, extent=extent, aspect="auto")
    left, right, bottom, top = extent
    axes.add_patch(
        Rectangle((left, bottom), right - left, top - bottom, fill=False, ec="0.8", linewidth=0.6)
    )


def _bands(axes: Axes, data: Array, drawn: Array) -> None:
    """Show the median and the middle 90 % of each coordinate; for bits the share of ones."""
    bits = _are_bits(data)
    position = np.arange(1, data.shape[1] + 1)
    for values, colour, label, shift in (
        (data, _BLUE, "data", -0.12),
        (drawn, _ORANGE, "drawn", 0.12),
    ):
        low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
        if bits:
            low = middle = high = values.mean(0)
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
    axes.set(xlabel="coordinate", ylabel="share of ones" if bits else "median, middle 90 %")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _fit_vertically(axes: Axes, values: Array) -> None:
    if len(values):
        low, high = values.min(), values.max()
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def weight_diagnostics(
    pareto_k: Array, num_samples: Array | None, estimates: Array | None, *, title: str
) -> Figure:
    """Show how far importance weights can be trusted: their tail index, and the estimate's course.

    Args:
        pareto_k: tail index of each datum's weights, ``(N,)``.
        num_samples: numbers of samples ``(T,)``, or None to leave the second panel out.
        estimates: mean estimate of log p(x) from so many samples, ``(T,)``, nats.
        title: a line above the picture.
    """
    alone = num_samples is None or estimates is None
    figure = Figure(figsize=(4.6 if alone else 9, 3.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(1, 1 if alone else 2, squeeze=False)[0]
    axes: Axes = panels[0]
    axes.scatter(np.arange(1, len(pareto_k) + 1), pareto_k, s=6, color=_BLUE, linewidths=0)
    axes.axhline(0.7, color=_ORANGE, linewidth=1.2)
    axes.text(1.0, 0.7, " 0.7", color=_ORANGE, fontsize=9, transform=axes.get_yaxis_transform())
    above = int((pareto_k > 0.7).sum())
    axes.set(xlabel="datum", ylabel="Pareto k", title=f"{above} of {len(pareto_k)} above 0.7")
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    if num_samples is not None and estimates is not None:
        axes = panels[1]
        axes.plot(num_samples, estimates, color=_BLUE, marker="o", markersize=3, linewidth=1.3)
        axes.set(xscale="log", xlabel="samples per datum", ylabel="mean log p(x) (nats)")
        axes.set_title("a curve that still rises is still too low", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
