"""Pictures of the latent space: where data lie in it, and what its points decode to."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from pyro_vae.plots import style
from pyro_vae.plots.images import flat_image, image_grid, is_image, show_image
from pyro_vae.plots.style import UNIT, Array, Labels, Limits

# Coordinates of vectors that are shown as lines with a legend; more become a map of colours.
_MOST_LINES = 8
# Panels of a picture of vectors.
_MOST_PANELS = 9
# Classes with a legend; more (identities, say) would fill it.
_MOST_CLASSES = 50


def latent_scatter(
    codes: Array, labels: Array | None = None, *, title: str = "",
    axis_labels: Labels = ("z[0]", "z[1]"), unit_circle: bool = False,
) -> Figure:  # fmt: skip
    """Show latent codes in the plane, coloured by label; a single latent as histograms.

    Codes are ``(N, 2)`` or ``(N, 1)``, labels classes ``(N,)``; ``axis_labels`` say what the two
    coordinates are, ``unit_circle`` draws the outline of the unit sphere that the codes lie in.
    """
    classes = [] if labels is None else list(np.unique(labels))
    named = classes if len(classes) <= _MOST_CLASSES else []
    colours = zip(named, style.class_colours(len(named)), strict=True)
    how: list[dict[str, Any]] = [{"color": [each], "label": str(name)} for name, each in colours]
    groups = [*zip((codes[labels == value].T for value in named), how, strict=True)]
    if codes.shape[1] == 1:
        figure, axes = style.one_panel(title, (6.2, 4))
        bins = np.histogram_bin_edges(codes, bins=50).tolist()
        for (own,), look in groups:
            axes.hist(own, bins, histtype="step", linewidth=1.3, **look)
        if groups:
            style.legend_beside(axes, marker_scale=1)
        else:
            axes.hist(codes[:, 0], bins, color=style.BLUE, alpha=0.5)
        axes.set(xlabel=axis_labels[0], ylabel="data points")
        return figure
    figure, axes = style.one_panel(title, (6.2 if classes else 5.4, 5.4))
    size = max(1.5, min(12.0, 12_000 / len(codes)))
    for own, look in groups:
        axes.scatter(own[0], own[1], s=size, linewidths=0, **look)
    if groups:
        style.legend_beside(axes, marker_scale=6 / math.sqrt(size))
    else:
        axes.scatter(codes[:, 0], codes[:, 1], s=size, color=style.BLUE, alpha=0.6, linewidths=0)
    if unit_circle:
        axes.add_patch(Circle((0, 0), 1, fill=False, ec="0.6", linewidth=0.8))
        axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    axes.set_aspect("equal", adjustable="box" if unit_circle else "datalim")
    return figure


def manifold(
    data: Array, first: Array, second: Array, *, title: str = "",
    axis_labels: tuple[str, str] = ("z[0]", "z[1]"), limits: Limits = UNIT,
) -> Figure:  # fmt: skip
    """Show what a grid of latents decodes to: images in their places, vectors as maps.

    Decoded ``data`` are ``(rows, columns, *data_shape)``, at a value of the ``first`` latent for each
    column, ``(columns,)``, and of the ``second`` for each row, ``(rows,)``: increasing values stand
    higher. ``axis_labels`` say what the two coordinates are.
    """
    if is_image(data.shape[2:]):
        return _image_manifold(data, first, second, title, axis_labels, limits)
    rows, columns = data.shape[:2]
    values = data.reshape(rows, columns, -1)
    # The coordinates that vary most, as many as fit, in their order.
    shown = np.sort(np.argsort(-values.var((0, 1)), kind="stable")[:_MOST_PANELS]).tolist()
    figure, places = _panels(title, len(shown), framed=rows > 1)
    for axes, coordinate in zip(places, shown, strict=True):
        axes.set_title(f"coordinate {coordinate + 1}", fontsize=9)
        if rows == 1:
            axes.plot(first, values[0, :, coordinate], color=style.BLUE, linewidth=1.3)
            axes.set_xlabel(axis_labels[0])
            continue
        height = values[:, :, coordinate]
        mesh = axes.pcolormesh(first, second, height, cmap=style.MAP, shading="gouraud")
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
        figure.colorbar(mesh, ax=axes, label="decoded mean")
    return figure


def traversals(
    data: Array, values: Array, names: Labels, *, title: str = "", limits: Limits = UNIT
) -> Figure:
    """Show what moving each of the named latents does to a datum.

    ``data`` are decoded, ``(latents, steps, *data_shape)``, at ``values`` ``(latents, steps)`` of the
    moved latent.
    """
    if is_image(data.shape[2:]):
        return image_grid(list(data), title=title, row_labels=names, limits=limits)
    return _vector_walks(data, list(values), names, title)


def interpolations(
    start: Array, way: Array, end: Array, *, title: str = "", limits: Limits = UNIT
) -> Figure:
    """Show the way from some data points to others, decoded in between.

    ``start`` and ``end`` are ``(N, *data_shape)``, ``way`` is ``(steps, N, *data_shape)``.
    """
    shares = np.linspace(0, 1, len(way))
    if is_image(start.shape[1:]):
        ways = zip(start, way.swapaxes(0, 1), end, strict=True)
        rows = [np.stack([first, *middle, last]) for first, middle, last in ways]
        labels = ["from", *(f"{share:.2g}" for share in shares), "to"]
        return image_grid(rows, title=title, column_labels=labels, limits=limits)
    names = [f"pair {n + 1}: share of the way" for n in range(len(start))]
    return _vector_walks(way.swapaxes(0, 1), [shares] * len(start), names, title)


def _image_manifold(
    data: Array, first: Array, second: Array, title: str, axis_labels: tuple[str, str], limits: Limits
) -> Figure:
    rows, columns = data.shape[:2]
    image_height, image_width = flat_image(data[0, 0], limits).shape[:2]
    # About 7 inches in all, each image with its own proportions.
    cell = 6.4 / max(columns * image_width, rows * image_height, 10 * image_height)
    width, height = cell * columns * image_width, cell * rows * image_height
    figure, axes = style.one_panel(title, (max(width + 1.1, 0.075 * len(title) + 1), height + 1.1))
    gap = 0.03  # of a cell: neighbours are told apart
    for row in range(rows):
        for column in range(columns):
            extent = (column + gap, column + 1 - gap, row + gap, row + 1 - gap)
            show_image(axes, data[row, column], extent, limits)
    axes.set(xlim=(0, columns), ylim=(0, rows), aspect=image_height / image_width)
    axes.set_xlabel(axis_labels[0])
    axes.set_xticks(*_ticks(first))
    if rows > 1:
        axes.set_ylabel(axis_labels[1])
        axes.set_yticks(*_ticks(second))
    else:
        axes.set_yticks([])
    return figure


def _ticks(values: Array) -> tuple[list[float], list[str]]:
    """Return about seven tick positions, in the middle of cells, with the cells' values."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(7, len(values))).round().astype(int))
    digits = 2 if np.abs(values).max() < 10 else 0
    return [index + 0.5 for index in chosen], [f"{values[index]:.{digits}f}" for index in chosen]


def _vector_walks(data: Array, positions: Sequence[Array], names: Labels, title: str) -> Figure:
    """Show vectors along ways ``(ways, steps, *data_shape)``: as lines, or many as a map."""
    data = data.reshape(*data.shape[:2], -1)[:_MOST_PANELS]
    many = data.shape[2] > _MOST_LINES
    figure, places = _panels(title, len(data), framed=many)
    coordinates = np.arange(1, data.shape[2] + 1)
    for axes, way, position, name in zip(places, data, positions, names, strict=False):
        axes.set_xlabel(name)
        if many:
            how: dict[str, Any] = {"cmap": style.MAP, "vmin": data.min(), "vmax": data.max()}
            mesh = axes.pcolormesh(position, coordinates, way.T, shading="nearest", **how)
            axes.set_ylabel("coordinate")
            continue
        colours = style.class_colours(len(coordinates))
        for coordinate, colour in zip(coordinates, colours, strict=True):
            label = f"coordinate {coordinate}"
            axes.plot(position, way[:, coordinate - 1], color=colour, label=label, linewidth=1.3)
        axes.set_ylabel("decoded mean")
    if many:
        figure.colorbar(mesh, ax=places, label="decoded mean")
    else:
        entries = places[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _panels(title: str, number: int, *, framed: bool) -> tuple[Figure, list[Axes]]:
    """Return this many panels, in rows of three."""
    columns = min(3, number)
    rows = math.ceil(number / columns)
    size = 3.2 * columns + 1.3, 2.6 * rows + 0.4
    return style.panels(title, size, rows, columns, shown=number, framed=framed)
