"""Pictures of pairs compared, run by run, and of a guide held against what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots.style import BLUE, ORANGE, Array, one_panel

# Most panels of a figure with one per latent dimension.
_MOST_PANELS = 16


def paired_differences(
    names: Sequence[str],
    differences: Sequence[float],
    errors: Sequence[float],
    *,
    best: str,
    title: str,
    by_run: Sequence[Sequence[float]] | None = None,
) -> Figure:
    """Show differences to the best pair with their errors, the best at the top.

    Args:
        names: names of the pairs.
        differences: mean paired difference of each, at most 0, nats.
        errors: half the width of each one's bar; NaN where unknown.
        best: the name that the others are compared to.
        title: a line above the picture.
        by_run: differences of the single runs of each pair, as small dots.
    """
    figure, axes = one_panel(title, (6.4, 1.2 + 0.36 * len(names)))
    order = sorted(range(len(names)), key=lambda index: (names[index] != best, -differences[index]))
    _draw_differences(
        axes,
        0,
        [differences[index] for index in order],
        [errors[index] for index in order],
        [by_run[index] for index in order] if by_run else [()] * len(names),
    )
    axes.set_yticks(range(len(names)), [names[index] for index in order], fontsize=9)
    axes.set(xlabel="nats per datum", ylim=(len(names) - 0.5, -0.5))
    return figure


def families_and_runs(
    names: Sequence[str],
    by_run: Sequence[Sequence[Sequence[float]]],
    means: Sequence[Sequence[float]],
    half_widths: Sequence[Sequence[float]],
    *,
    labels: Sequence[str],
    title: str,
) -> Figure:
    """Show differences to the best family, one panel per quantity, the first named family on top.

    Args:
        names: names of the families, F of them.
        by_run: differences of the single runs, for each quantity and family, nats.
        means: mean differences, for each quantity and family; 0 for the best.
        half_widths: half-widths of their intervals; NaN where unknown.
        labels: names of the quantities.
        title: a line above the picture.
    """
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(names)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for index, axes in enumerate(panels):
        best = int(np.argmax(means[index]))
        _draw_differences(axes, best, means[index], half_widths[index], by_run[index])
        axes.set_title(labels[index], fontsize=10)
        axes.set_xlabel("difference to the best (nats)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def datum_against_datum(
    first: Array, second: Array, *, labels: tuple[str, str], title: str
) -> Figure:
    """Show one quantity of every datum under two pairs.

    Args:
        first: values under the first pair, ``(N,)``, nats.
        second: values under the second, ``(N,)``.
        labels: names of the two.
        title: a line above the picture.
    """
    figure, axes = one_panel(title, (4.6, 4.4))
    finite = np.isfinite(first) & np.isfinite(second)
    first, second = first[finite], second[finite]
    if len(first):
        ends = [min(first.min(), second.min()), max(first.max(), second.max())]
        margin = 0.05 * (ends[1] - ends[0]) or 0.5
        limits = (ends[0] - margin, ends[1] + margin)
        axes.set(xlim=limits, ylim=limits)
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.scatter(first, second, s=7, color=BLUE, alpha=0.5, linewidths=0)
        share = float((second > first).mean())
        axes.text(
            0.03,
            0.97,
            f"{labels[1]} higher for {share:.0%}",
            transform=axes.transAxes,
            va="top",
            size=9,
        )
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_aspect("equal")
    return figure


def rank_histograms(
    counts: Array, band: tuple[float, float], labels: Sequence[str], *, title: str
) -> Figure:
    """Show histograms of ranks, which are flat where a guide is calibrated.

    Args:
        counts: data in each bin of ranks, ``(D, B)``.
        band: numbers of data between which a bin should lie.
        labels: a line above each panel, D of them.
        title: a line above the picture.
    """
    figure, panels = _panels(len(counts), title)
    for axes, row, label in zip(panels, counts, labels, strict=False):
        edges = np.linspace(0, 1, len(row) + 1)
        axes.bar(edges[:-1], row, width=1 / len(row), align="edge", color=BLUE, alpha=0.6)
        for end in band:
            axes.axhline(end, color=ORANGE, linewidth=1)
        axes.set_title(label, fontsize=8)
        axes.set_xlim(0, 1)
    figure.supxlabel("rank of the true latent among the guide's draws", fontsize=9)
    return figure


def observed_and_replicated(
    observed: Mapping[str, Array],
    replicated: Mapping[str, Array],
    labels: Sequence[str],
    *,
    title: str,
) -> Figure:
    """Show the distribution of statistics over the data, and over data drawn in their place.

    Args:
        observed: by statistic, its value for each datum, ``(N,)``.
        replicated: by statistic, its values for the drawn data, ``(S, N)``.
        labels: a line above each panel.
        title: a line above the picture.
    """
    figure, panels = _panels(len(observed), title)
    for axes, name, label in zip(panels, observed, labels, strict=False):
        _two_histograms(
            axes, (observed[name], "data"), (replicated[name].reshape(-1), "posterior predictive")
        )
        axes.set_title(label, fontsize=8)
    _legend_beside_title(figure, panels[0])
    return figure


def prior_and_aggregate(
    aggregate: Array, prior: Array, labels: Sequence[str], *, title: str
) -> Figure:
    """Show draws of the aggregate posterior beside draws of the prior, one panel per dimension.

    Args:
        aggregate: draws of the guide over the data, ``(S, D)``.
        prior: draws of the prior, ``(S, D)``.
        labels: a line above each panel, D of them.
        title: a line above the picture.
    """
    figure, panels = _panels(aggregate.shape[1], title)
    for index, (axes, label) in enumerate(zip(panels, labels, strict=False)):
        _two_histograms(axes, (prior[:, index], "prior"), (aggregate[:, index], "aggregate"))
        axes.set_title(label, fontsize=8)
    figure.supxlabel("value of the coordinate", fontsize=9)
    figure.supylabel("draws", fontsize=9)
    _legend_beside_title(figure, panels[0])
    return figure


def _draw_differences(
    axes: Axes,
    best: int,
    means: Sequence[float],
    half_widths: Sequence[float],
    by_run: Sequence[Sequence[float]],
) -> None:
    """Draw one row per pair: its mean difference with a bar, and below it a dot for each run."""
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    for row, (mean, width, runs) in enumerate(zip(means, half_widths, by_run, strict=True)):
        colour = ORANGE if row == best else BLUE
        axes.plot(runs, [row + 0.2] * len(runs), "o", color=colour, markersize=3, alpha=0.6)
        known = None if row == best or not np.isfinite(width) else width
        axes.errorbar(
            mean, row, xerr=known, fmt="o", color=colour, markersize=5, capsize=3, linewidth=1.3
        )


def _two_histograms(axes: Axes, filled: tuple[Array, str], outlined: tuple[Array, str]) -> None:
    together = np.concatenate([filled[0], outlined[0]])
    bins = np.histogram_bin_edges(together[np.isfinite(together)], bins=30).tolist()
    axes.hist(filled[0], bins, density=True, color=BLUE, alpha=0.5, label=filled[1])
    axes.hist(outlined[0], bins, density=True, histtype="step", color=ORANGE, label=outlined[1])
    axes.set_yticks([])


def _legend_beside_title(figure: Figure, axes: Axes) -> None:
    """Put the legend of one panel at the right of the figure's title."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False, fontsize=8, borderpad=0)


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels in rows of four, as many as a page holds."""
    shown = min(count, _MOST_PANELS)
    columns = min(shown, 4)
    rows = -(-shown // columns)
    figure = Figure(
        figsize=(max(4.6, 2.3 * columns), 0.7 + 1.7 * rows), dpi=150, layout="constrained"
    )
    rest = "" if shown == count else f" (first {shown} of {count})"
    figure.suptitle(title + rest, fontsize=10, x=0.01, ha="left")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[shown:]:
        axes.set_visible(False)
    for axes in panels[:shown]:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return figure, panels[:shown]
