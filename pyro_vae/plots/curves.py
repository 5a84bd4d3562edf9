"""Pictures of numbers: a training run's course, and how far importance weights can be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots.style import BLUE, ORANGE, Array, fit_vertically, new_figure, open_frame


def training_curves(history: Mapping[str, Array], *, title: str) -> Figure:
    """Show ELBO, rate and distortion against epochs.

    Args:
        history: arrays ``(epochs,)`` as :class:`pyro_vae.FitResult` holds them.
        title: a line above the picture.
    """
    figure = new_figure(title, (9, 3.4))
    panels = figure.subplots(1, 3)
    labels = {"elbo": "ELBO", "rate": "rate (KL)", "distortion": "distortion"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        shown = []
        for part, colour in (("train", BLUE), ("validation", ORANGE)):
            curve = np.asarray(history[f"{part}_{name}"], dtype=float)
            finite = np.isfinite(curve)
            if finite.any():
                epochs = np.arange(1, len(curve) + 1)
                marker = "o" if len(curve) <= 20 else None  # a line needs two epochs to be seen
                axes.plot(epochs, curve, color=colour, label=part, linewidth=1.3, marker=marker, ms=3)
                # The fall of the first epochs would flatten everything that follows.
                start = len(curve) // 20
                shown.append(curve[start:][finite[start:]])
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("epoch")
        open_frame(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        fit_vertically(axes, np.concatenate([*shown, []]))
    panels[0].set_ylabel("nats per datum")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


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
    figure = new_figure(title, (4.6 if alone else 9, 3.4))
    panels = figure.subplots(1, 1 if alone else 2, squeeze=False)[0]
    axes = panels[0]
    axes.scatter(np.arange(1, len(pareto_k) + 1), pareto_k, s=6, color=BLUE, linewidths=0)
    axes.axhline(0.7, color=ORANGE, linewidth=1.2)
    axes.text(1.0, 0.7, " 0.7", color=ORANGE, fontsize=9, transform=axes.get_yaxis_transform())
    above = int((pareto_k > 0.7).sum())
    axes.set(xlabel="datum", ylabel="Pareto k")
    axes.set_title(f"{above} of {len(pareto_k)} above 0.7", fontsize=9)
    open_frame(axes)
    if num_samples is not None and estimates is not None:
        axes = panels[1]
        axes.plot(num_samples, estimates, color=BLUE, marker="o", markersize=3, linewidth=1.3)
        axes.set(xscale="log", xlabel="samples per datum", ylabel="mean log p(x) (nats)")
        axes.set_title("mean estimate by samples; flat does not mean right", fontsize=9)
        open_frame(axes)
    return figure
