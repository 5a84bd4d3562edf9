"""Pictures of completed data: what was seen, what was filled in, what was there."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pyro_vae.plots.images import image_grid, is_image
from pyro_vae.plots.style import BLUE, Array, legend_above, one_panel, two_histograms


def completions(
    truth: Array,
    missing: Array,
    mean: Array,
    standard_deviation: Array,
    draws: Array,
    *,
    title: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Show completed data: images as panels, vectors value against value.

    Args:
        truth: the whole data ``(N, *data_shape)``.
        missing: which values were hidden, boolean, of the same shape.
        mean: mean of the completions, of the same shape.
        standard_deviation: their standard deviation, of the same shape.
        draws: completions ``(num_draws, N, *data_shape)``.
        title: a line above the picture.
        limits: the values shown as white and as black.
    """
    if is_image(truth.shape[1:]):
        observed = np.where(missing, np.nan, truth)
        rows = [np.stack([observed[n], mean[n], *draws[:, n], truth[n]]) for n in range(len(truth))]
        labels = ["observed", "mean", *("draw" for _ in draws), "truth"]
        return image_grid(rows, title=title, column_labels=labels, limits=limits)
    figure, axes = one_panel(title, (8.4, 4.4))
    true, got, spread = (values[missing][:5000] for values in (truth, mean, standard_deviation))
    if ((true == 0) | (true == 1)).all():
        zeros, ones = (got[true == 0], "truth 0"), (got[true == 1], "truth 1")
        two_histograms(axes, zeros, ones, np.linspace(0, 1, 26))
        axes.set(xlabel="mean of the completions", ylabel="missing values")
    else:
        ends = [float(true.min()), float(true.max())] if len(true) else [0.0, 1.0]
        axes.plot(ends, ends, color="0.6", linewidth=1, label="perfect")
        axes.errorbar(
            true, got, spread, fmt="o", markersize=2.5, color=BLUE, elinewidth=0.5, alpha=0.5,
            label="mean, one deviation",
        )  # fmt: skip
        axes.set(xlabel="truth", ylabel="completion of a missing value")
    legend_above(axes)
    return figure
