"""Pictures of numbers: a training's course, trust in importance weights, rate against distortion."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots.style import BLUE, ORANGE, Array, Limits, panels


def training_curves(history: Mapping[str, Array], *, title: str = "") -> Figure:
    """Show ELBO, rate and distortion against epochs, as :class:`pyro_vae.FitResult` holds them."""
    figure, places = panels(title, (9, 3.4), columns=3)
    labels = {"elbo": "ELBO", "rate": "rate (KL)", "distortion": "distortion"}
    for axes, (name, label) in zip(places, labels.items(), strict=True):
        shown = []
        for part, colour in (("train", BLUE), ("validation", ORANGE)):
            curve = np.asarray(history[f"{part}_{name}"], dtype=float)
            finite = np.isfinite(curve)
            if finite.any():
                marker = "o" if len(curve) <= 20 else None  # a line needs two epochs to be seen
                line: dict[str, Any] = {"linewidth": 1.3, "marker": marker, "markersize": 3}
                axes.plot(np.arange(1, len(curve) + 1), curve, color=colour, label=part, **line)
                # The fall of the first epochs would flatten everything that follows.
                start = len(curve) // 20
                shown.append(curve[start:][finite[start:]])
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if shown:
            values = np.concatenate(shown)
            margin = 0.05 * np.ptp(values) or 0.5
            axes.set_ylim(values.min() - margin, values.max() + margin)
    places[0].set_ylabel("nats per datum")
    places[0].legend(frameon=False, fontsize=9)
    return figure


def weight_diagnostics(
    pareto_k: Array, num_samples: Array | None, estimates: Array | None, *, title: str = "",
    limit: float = 0.7,
) -> Figure:  # fmt: skip
    """Show how far importance weights can be trusted: their tail index, and the estimate's course.

    ``pareto_k`` is the tail index of each datum's weights, ``(N,)``, and ``limit`` the highest one to
    trust of so many; ``estimates`` are the mean log p(x) from ``num_samples`` samples, ``(T,)`` each,
    nats, or None to leave the second panel out.
    """
    alone = num_samples is None or estimates is None
    figure, (axes, *others) = panels(title, (4.6 if alone else 9, 3.4), columns=1 if alone else 2)
    axes.scatter(np.arange(1, len(pareto_k) + 1), pareto_k, s=6, color=BLUE, linewidths=0)
    axes.axhline(limit, color=ORANGE, linewidth=1.2)
    place = axes.get_yaxis_transform()
    axes.text(1.0, limit, f" {limit:.2g}", color=ORANGE, fontsize=9, transform=place)
    above, unknown = int((pareto_k > limit).sum()), int(np.isnan(pareto_k).sum())
    said = f"{above} of {len(pareto_k)} above {limit:.2g}" + f", {unknown} not known" * bool(unknown)
    axes.set(xlabel="datum", ylabel="Pareto k", title=said)
    axes.title.set_fontsize(9)
    if num_samples is not None and estimates is not None:
        axes = others[0]
        axes.plot(num_samples, estimates, color=BLUE, marker="o", markersize=3, linewidth=1.3)
        axes.set(xscale="log", xlabel="samples per datum", ylabel="mean log p(x) (nats)")
        axes.set_title("mean estimate by samples; flat does not mean right", fontsize=9)
    return figure


def rate_distortion(
    beta: Array, rate: Array, distortion: Array, *, rate_error: Array | None = None,
    distortion_error: Array | None = None, active_units: Sequence[int] | None = None,
    title: str = "",
) -> Figure:  # fmt: skip
    """Show rate against distortion with the lines of constant ELBO, beside the active units.

    All are of R runs, ``(R,)``: beta, the weight of the rate; the rate, mean KL(q(z|x) || p(z)), and
    the distortion, mean -E_q[log p(x|z)], nats per datum, with standard errors; and the active units,
    latent coordinates in use: leave them out for no second panel.

    Source:
        Alemi et al. 2018, "Fixing a Broken ELBO", figure 1.
    """
    beta, rate, distortion = (np.asarray(values, dtype=float) for values in (beta, rate, distortion))
    widths, size = ([1.0], (5.4, 4.2)) if active_units is None else ([1.6, 1.0], (9, 4.2))
    figure, (axes, *others) = panels(title, size, columns=len(widths), width_ratios=widths)
    points: dict[str, Any] = {"fmt": "o", "markersize": 4, "linewidth": 0, "elinewidth": 1}
    axes.errorbar(rate, distortion, distortion_error, rate_error, color=BLUE, zorder=3, **points)
    order = np.argsort(rate)
    axes.plot(rate[order], distortion[order], color=BLUE, linewidth=1, alpha=0.6, zorder=2)
    for text, place in _place_labels(beta, rate, distortion):
        axes.annotate(text, place, (5, 4), textcoords="offset points", fontsize=8, color=BLUE)
    axes.set(xlabel="rate R (nats per datum)", ylabel="distortion D (nats per datum)")
    axes.set_title("each point is a run, its number is beta", fontsize=9)
    _draw_constant_elbo(axes, rate, distortion)
    if active_units is not None:
        _show_units(others[0], beta, active_units)
    return figure


def _place_labels(beta: Array, rate: Array, distortion: Array) -> list[tuple[str, Limits]]:
    """Return the text and place of each label; points that lie on each other share one."""
    labels: list[tuple[str, Limits]] = []
    near = [0.02 * (np.ptp(values) or 1.0) for values in (rate, distortion)]
    for value, right, up in zip(beta, rate, distortion, strict=True):
        for index, (text, (x, y)) in enumerate(labels):
            if abs(x - right) < near[0] and abs(y - up) < near[1]:
                labels[index] = (f"{text}, {value:g}", (x, y))
                break
        else:
            labels.append((f"{value:g}", (float(right), float(up))))
    return labels


def _draw_constant_elbo(axes: Axes, rate: Array, distortion: Array) -> None:
    """Draw lines on which R + D, which is -ELBO, stays the same; the best run's stands out."""
    margins = [0.12 * (np.ptp(values) or 1.0) for values in (rate, distortion)]
    left, right = rate.min() - margins[0], rate.max() + margins[0]
    if rate.min() >= 0:  # as every true rate is
        left = max(left, 0.0)
    bottom, top = distortion.min() - margins[1], distortion.max() + margins[1]
    best, ends = (rate + distortion).min(), np.array([left, right])
    for level in MaxNLocator(nbins=7).tick_values(left + bottom, right + top):
        axes.plot(ends, level - ends, color="0.85", linewidth=0.8, zorder=1)
    label = f"R + D = -ELBO = {best:.2f}, the best"
    axes.plot(ends, best - ends, color=ORANGE, linewidth=1.2, linestyle="--", label=label, zorder=1)
    axes.plot([], [], color="0.75", linewidth=0.8, label="other lines of constant R + D")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _show_units(axes: Axes, beta: Array, active_units: Sequence[int]) -> None:
    # Positions instead of values: a series of betas is neither evenly spaced nor free of 0.
    order, places = np.argsort(beta), np.arange(len(beta))
    axes.bar(places, np.asarray(active_units)[order], color=BLUE, width=0.6)
    axes.set_xticks(places, [f"{value:g}" for value in beta[order]])
    axes.set(xlabel="beta", ylabel="active units")
    axes.set_title("active: variance of the code's mean over data > 0.01", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
