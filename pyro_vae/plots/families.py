"""Picture of families trained in several runs: each run's difference, the mean and its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.plots.style import BLUE, ORANGE


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
        _panel(axes, by_run[index], means[index], half_widths[index])
        axes.set_title(labels[index], fontsize=10)
        axes.set_xlabel("difference to the best (nats)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _panel(
    axes: Axes,
    by_run: Sequence[Sequence[float]],
    means: Sequence[float],
    half_widths: Sequence[float],
) -> None:
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    best = int(np.argmax(means))
    for row, (own, mean, width) in enumerate(zip(by_run, means, half_widths, strict=True)):
        colour = ORANGE if row == best else BLUE
        axes.plot(own, [row + 0.2] * len(own), "o", color=colour, markersize=3, alpha=0.6)
        known = None if row == best or not np.isfinite(width) else width
        axes.errorbar(
            mean, row, xerr=known, fmt="o", color=colour, markersize=5, capsize=3, linewidth=1.3
        )
