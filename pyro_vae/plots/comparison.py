"""Pictures of pairs compared, of a guide beside what it should be, of an autoencoder and a VAE."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots import style
from pyro_vae.plots.images import flat_image, is_image
from pyro_vae.plots.style import UNIT, Array, Labels, Limits

# Most panels of a figure with one per latent dimension.
_MOST_PANELS = 16

_Row = Sequence[float]
_SHOWN = 12  # images and random latents per row, of an autoencoder and a VAE


def paired_differences(
    names: Labels, differences: Sequence[float], errors: Sequence[float], *, best: str,
    title: str = "", by_run: Sequence[Sequence[float]] | None = None,
) -> Figure:  # fmt: skip
    """Show differences from the best pair with their errors, the best at the top.

    Each named pair has a mean paired difference to the ``best``, at most 0, nats; half the width of
    its bar as its error, NaN where unknown; and differences of single runs, as small dots.
    """
    figure, axes = style.one_panel(title, (6.4, 1.2 + 0.36 * len(names)))
    order = sorted(range(len(names)), key=lambda index: (names[index] != best, -differences[index]))
    columns: Any = differences, errors, by_run or [()] * len(names)
    _draw_rows(axes, 0, *([column[index] for index in order] for column in columns))
    axes.set_yticks(range(len(names)), [style.as_text(names[index]) for index in order], fontsize=9)
    axes.set(xlabel="nats per datum", ylim=(len(names) - 0.5, -0.5))
    return figure


def families_and_runs(
    names: Labels, by_run: Sequence[Sequence[Sequence[float]]], means: Sequence[Sequence[float]],
    half_widths: Sequence[Sequence[float]], *, labels: Labels, title: str = "",
) -> Figure:  # fmt: skip
    """Show differences from the best family, one panel per quantity, the first named family on top.

    For each quantity, which ``labels`` name, and each of the named families there are differences of
    the single runs, nats, their mean, 0 for the best, and the half-width of its interval, NaN where
    unknown.
    """
    size = 9, 1.5 + 0.42 * len(names)
    figure, places = style.panels(title, size, columns=len(labels), sharey=True)
    for index, axes in enumerate(places):
        best = int(np.argmax(means[index]))
        _draw_rows(axes, best, means[index], half_widths[index], by_run[index])
        axes.set_title(labels[index], fontsize=10)
        axes.set_xlabel("difference from the best (nats)")
    places[0].set_yticks(range(len(names)), [style.as_text(name) for name in names])
    places[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def datum_against_datum(first: Array, second: Array, *, labels: Labels, title: str = "") -> Figure:
    """Show one quantity of every datum under two pairs with these labels, ``(N,)`` each, nats."""
    figure, axes = style.one_panel(title, (4.6, 4.4))
    finite = np.isfinite(first) & np.isfinite(second)
    first, second = first[finite], second[finite]
    if len(first):
        ends = [min(first.min(), second.min()), max(first.max(), second.max())]
        margin = 0.05 * (ends[1] - ends[0]) or 0.5
        limits = (ends[0] - margin, ends[1] + margin)
        axes.set(xlim=limits, ylim=limits)
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.scatter(first, second, s=7, color=style.BLUE, alpha=0.5, linewidths=0)
        told = f"{style.as_text(labels[1])} higher for {(second > first).mean():.0%}"
        axes.text(0.03, 0.97, told, transform=axes.transAxes, va="top", size=9)
    axes.set(xlabel=style.as_text(labels[0]), ylabel=style.as_text(labels[1]))
    axes.set_aspect("equal")
    return figure


def rank_histograms(counts: Array, band: Limits, labels: Labels, *, title: str = "") -> Figure:
    """Show histograms of ranks, which are flat where a guide is calibrated.

    ``counts`` are the data points in each bin, ``(D, B)``, ``band`` the numbers between which a bin
    should lie, ``labels`` the lines above the D panels.
    """
    figure, places = _labelled_panels(labels, title)
    for axes, row in zip(places, counts, strict=False):
        edges = np.linspace(0, 1, len(row) + 1)
        axes.bar(edges[:-1], row, width=1 / len(row), align="edge", color=style.BLUE, alpha=0.6)
        for end in band:
            axes.axhline(end, color=style.ORANGE, linewidth=1)
        axes.set_xlim(0, 1)
    figure.supxlabel("rank of the true latent among the guide's draws", fontsize=9)
    return figure


def observed_and_replicated(
    observed: Mapping[str, Array], replicated: Mapping[str, Array], labels: Labels, *, title: str = ""
) -> Figure:
    """Show the distribution of statistics over the data, and over data drawn in their place.

    By statistic, ``observed`` has its value for each datum, ``(N,)``, ``replicated`` those for the
    drawn data, ``(S, N)``; ``labels`` are the lines above the panels.
    """
    figure, places = _labelled_panels(labels, title)
    pairs = [(observed[name], replicated[name].reshape(-1)) for name in observed]
    _show_pairs(figure, places, pairs, ("data", "posterior predictive"))
    return figure


def prior_and_aggregate(aggregate: Array, prior: Array, labels: Labels, *, title: str = "") -> Figure:
    """Show draws of the aggregate posterior beside draws of the prior, one panel per dimension.

    Both are ``(S, D)``; ``labels`` are the lines above the D panels.
    """
    figure, places = _labelled_panels(labels, title)
    _show_pairs(figure, places, list(zip(prior.T, aggregate.T, strict=True)), ("prior", "aggregate"))
    figure.supxlabel("value of the coordinate", fontsize=9)
    figure.supylabel("draws", fontsize=9)
    return figure


def autoencoder_and_vae(
    data: Array, autoencoder: Any, vae: Any, *, title: str = "", limits: Limits = UNIT
) -> Figure:
    """Show reconstructions, decoded random latents, a grid between four codes, and the holes.

    Args:
        data: held-out data ``(N, *data_shape)``.
        autoencoder: arrays of the autoencoder, as attributes: held-out data encoded and decoded
            ``reconstructions`` ``(N, *data_shape)``, decoded random latents ``random``
            ``(S, *data_shape)``, decoded latents between four codes ``grid``
            ``(G, G, *data_shape)``, and nearest-code distances of held-out codes
            ``held_out_distance`` ``(N,)`` and of random latents ``random_distance`` ``(S,)``; see
            :class:`pyro_vae.tasks.autoencoder_comparison.Side`.
        vae: those of the VAE.
        title: a line above the picture.
    """
    data, image = np.asarray(data), is_image(data.shape[1:])
    figure = style.Picture(figsize=(9, 8.4 if image else 3.2), dpi=150, layout="constrained")
    figure.suptitle(style.as_text(title), fontsize=10, x=0.01, ha="left")
    heights = [1.9, 1.5, 1] if image else [1]
    cells = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    sides = (("autoencoder", autoencoder), ("VAE", vae))
    if image:
        rows = [data]
        for part in ("reconstructions", "random"):
            rows += [np.asarray(getattr(side, part)) for _, side in sides]
        shown = min(_SHOWN, *(len(row) for row in rows))
        rows = [row[:shown] for row in rows]
        labels = ("data", "autoencoder", "VAE", "autoencoder,\nrandom code", "VAE,\nrandom latent")
        _show_rows(figure.add_subplot(cells[0, :]), rows, labels, limits)
        for column, (name, side) in enumerate(sides):
            axes = figure.add_subplot(cells[1, column])
            _show_rows(axes, list(np.asarray(side.grid)), (), limits)
            axes.set_title(f"{name}: between the codes of the first four", fontsize=9)
    for column, (name, side) in enumerate(sides):
        _show_distances(figure.add_subplot(cells[-1, column]), name, side)
    return figure


def _draw_rows(axes: Axes, best: int, means: _Row, half_widths: _Row, runs: Sequence[_Row]) -> None:
    """Draw one row per pair: its mean difference with a bar, and below it a dot for each run."""
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    for row, (mean, width, own) in enumerate(zip(means, half_widths, runs, strict=True)):
        colour = style.ORANGE if row == best else style.BLUE
        axes.plot(own, [row + 0.2] * len(own), "o", color=colour, markersize=3, alpha=0.6)
        known = None if row == best or not np.isfinite(width) else width
        how: Any = {"color": colour, "markersize": 5, "capsize": 3, "linewidth": 1.3}
        axes.errorbar(mean, row, xerr=known, fmt="o", **how)


def _show_pairs(figure: Figure, places: list[Axes], pairs: Sequence[Any], labels: Labels) -> None:
    """Show a pair of distributions in each panel, their legend at the right of the title."""
    for axes, (filled, outlined) in zip(places, pairs, strict=False):
        together = np.concatenate([filled, outlined])
        bins = np.histogram_bin_edges(together[np.isfinite(together)], bins=30)
        style.show_histograms(axes, filled, outlined, bins, labels)
        axes.set_yticks([])
    entries = places[0].get_legend_handles_labels()
    figure.legend(*entries, loc="upper right", ncols=2, frameon=False, fontsize=8, borderpad=0)


def _labelled_panels(labels: Labels, title: str = "") -> tuple[Figure, list[Axes]]:
    """Return a panel for each label in rows of four, as many as a page holds."""
    shown = min(len(labels), _MOST_PANELS)
    columns = min(shown, 4)
    rows = -(-shown // columns)
    size = max(4.6, 2.3 * columns), 0.7 + 1.7 * rows
    rest = "" if shown == len(labels) else f" (first {shown} of {len(labels)})"
    figure, places = style.panels(title + rest, size, rows, columns, shown=shown)
    for axes, label in zip(places, labels, strict=False):
        axes.set_title(style.as_text(label), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return figure, places


def _show_rows(axes: Axes, rows: list[Array], labels: tuple[str, ...], limits: Limits) -> None:
    """Show rows of images as one picture with thin lines between them."""
    low, high = limits
    strips = []
    for row in rows:
        images = [flat_image(image, limits) for image in row]
        line = 0.2 if images[0].ndim == 3 else low + 0.2 * (high - low)
        edges = ((0, 1), (0, 1), (0, 0))[: images[0].ndim]
        tiles = [np.pad(each, edges, constant_values=line) for each in images]
        strips.append(np.concatenate(tiles, axis=1))
    picture = np.concatenate(strips, axis=0)
    axes.imshow(picture, cmap=style.INK, vmin=low, vmax=high)
    height = picture.shape[0] / len(rows)
    axes.set_xticks([])
    axes.set_yticks([(index + 0.5) * height for index in range(len(labels))], labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _show_distances(axes: Axes, name: str, side: Any) -> None:
    held_out, random = np.asarray(side.held_out_distance), np.asarray(side.random_distance)
    bins = np.linspace(0, np.quantile(np.concatenate([held_out, random]), 0.995), 40)
    style.show_histograms(axes, held_out, random, bins, ("held-out codes", "random latents"))
    with np.errstate(divide="ignore", invalid="ignore"):  # equal data points have no distance
        ratio = np.median(random) / np.median(held_out)
    axes.set_title(f"{name}: distance to the nearest training code, ratio {ratio:.2f}", fontsize=9)
    axes.set(xlabel="distance", ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
