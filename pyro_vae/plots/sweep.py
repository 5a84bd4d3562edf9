"""Pictures of a series of runs over beta: rate against distortion, and the units in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots.style import BLUE, ORANGE, Array, new_figure, open_frame


def rate_distortion(
    beta: Array,
    rate: Array,
    distortion: Array,
    *,
    rate_error: Array | None = None,
    distortion_error: Array | None = None,
    active_units: Sequence[int] | None = None,
    title: str,
) -> Figure:
    """Show rate against distortion with the lines of constant ELBO, beside the active units.

    Args:
        beta: weight of the rate in each run, ``(R,)``.
        rate: mean KL(q(z|x) || p(z)) of each run, ``(R,)``, nats per datum.
        distortion: mean -E_q[log p(x|z)], ``(R,)``, nats per datum.
        rate_error: standard errors of the rates, ``(R,)``.
        distortion_error: standard errors of the distortions, ``(R,)``.
        active_units: latent coordinates in use in each run; leave out for no second panel.
        title: a line above the picture.

    Source:
        Alemi et al. 2018, "Fixing a Broken ELBO", figure 1.
    """
    beta, rate, distortion = (np.asarray(values, dtype=float) for values in (beta, rate, distortion))
    alone = active_units is None
    figure = new_figure(title, (5.4 if alone else 9, 4.2))
    widths = [1.0] if alone else [1.6, 1.0]
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    axes = panels[0]
    errors = (distortion_error, rate_error)
    axes.errorbar(
        rate, distortion, *errors, fmt="o", color=BLUE, ms=4, linewidth=0, elinewidth=1, zorder=3
    )
    order = np.argsort(rate)
    axes.plot(rate[order], distortion[order], color=BLUE, linewidth=1, alpha=0.6, zorder=2)
    for text, place in _labels(beta, rate, distortion):
        axes.annotate(text, place, (5, 4), textcoords="offset points", fontsize=8, color=BLUE)
    axes.set(xlabel="rate R (nats per datum)", ylabel="distortion D (nats per datum)")
    axes.set_title("each point is a run, its number is beta", fontsize=9)
    _constant_elbo(axes, rate, distortion)
    if active_units is not None:
        _units(panels[1], beta, active_units)
    for panel in panels:
        open_frame(panel)
    return figure


def _labels(beta: Array, rate: Array, distortion: Array) -> list[tuple[str, tuple[float, float]]]:
    """Return the text and place of each label; points that lie on each other share one."""
    labels: list[tuple[str, tuple[float, float]]] = []
    near = [0.02 * (np.ptp(values) or 1.0) for values in (rate, distortion)]
    for value, right, up in zip(beta, rate, distortion, strict=True):
        for index, (text, (x, y)) in enumerate(labels):
            if abs(x - right) < near[0] and abs(y - up) < near[1]:
                labels[index] = (f"{text}, {value:g}", (x, y))
                break
        else:
            labels.append((f"{value:g}", (float(right), float(up))))
    return labels


def _constant_elbo(axes: Axes, rate: Array, distortion: Array) -> None:
    """Draw lines on which R + D, which is -ELBO, stays the same; the best run's stands out."""
    margins = [0.12 * (np.ptp(values) or 1.0) for values in (rate, distortion)]
    left, right = rate.min() - margins[0], rate.max() + margins[0]
    if rate.min() >= 0:  # as every true rate is
        left = max(left, 0.0)
    bottom, top = distortion.min() - margins[1], distortion.max() + margins[1]
    best = (rate + distortion).min()
    ends = np.array([left, right])
    for level in MaxNLocator(nbins=7).tick_values(left + bottom, right + top):
        axes.plot(ends, level - ends, color="0.85", linewidth=0.8, zorder=1)
    label = f"R + D = -ELBO = {best:.2f}, the best"
    axes.plot(ends, best - ends, color=ORANGE, linewidth=1.2, linestyle="--", label=label, zorder=1)
    axes.plot([], [], color="0.75", linewidth=0.8, label="other lines of constant R + D")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _units(axes: Axes, beta: Array, active_units: Sequence[int]) -> None:
    # Positions instead of values: a series of betas is neither evenly spaced nor free of 0.
    order = np.argsort(beta)
    places = np.arange(len(beta))
    axes.bar(places, np.asarray(active_units)[order], color=BLUE, width=0.6)
    axes.set_xticks(places, [f"{value:g}" for value in beta[order]])
    axes.set(xlabel="beta", ylabel="active units")
    axes.set_title("active: variance of the code's mean over data > 0.01", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
