"""Pictures of a deterministic autoencoder beside a VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.plots.images import is_image
from pyro_vae.plots.style import Array, new_figure, open_frame, two_histograms

_SHOWN = 12  # data and random latents per row


def autoencoder_and_vae(
    data: Array,
    autoencoder: Any,
    vae: Any,
    *,
    title: str,
    limits: tuple[float, float] = (0.0, 1.0),
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
        limits: the values shown as white and as black.
    """
    image = is_image(data.shape[1:])
    figure = new_figure(title, (9, 8.4 if image else 3.2))
    heights = [1.9, 1.5, 1] if image else [1]
    cells = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    sides = (("autoencoder", autoencoder), ("VAE", vae))
    if image:
        rows = [np.asarray(data)]
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


def _show_rows(
    axes: Axes, rows: list[Array], labels: tuple[str, ...], limits: tuple[float, float]
) -> None:
    """Show rows of images as one picture with thin lines between them."""
    low, high = limits
    line = low + 0.2 * (high - low)
    strips = []
    for row in rows:
        tiles = [np.pad(_channels_last(image), _MARGIN, constant_values=line) for image in row]
        strips.append(np.concatenate(tiles, axis=1))
    picture = np.concatenate(strips, axis=0)
    if picture.shape[2] == 1:
        axes.imshow(picture[:, :, 0], cmap="gray_r", vmin=low, vmax=high)
    else:
        axes.imshow(np.clip((picture - low) / (high - low or 1), 0, 1))
    height = picture.shape[0] / len(rows)
    axes.set_xticks([])
    axes.set_yticks([(index + 0.5) * height for index in range(len(labels))], labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# One more pixel below and right of an image; none along the channels.
_MARGIN = ((0, 1), (0, 1), (0, 0))


def _channels_last(image: Array) -> Array:
    """Return an image as ``(H, W, channels)``."""
    if image.ndim == 2:
        return image[:, :, None]
    return np.moveaxis(image, 0, 2) if image.shape[0] in (1, 3) else image


def _show_distances(axes: Axes, name: str, side: Any) -> None:
    held_out, random = np.asarray(side.held_out_distance), np.asarray(side.random_distance)
    bins = np.linspace(0, np.quantile(np.concatenate([held_out, random]), 0.995), 40)
    two_histograms(axes, (held_out, "held-out codes"), (random, "random latents"), bins, density=True)
    ratio = np.median(random) / np.median(held_out)
    axes.set_title(f"{name}: distance to the nearest training code, ratio {ratio:.2f}", fontsize=9)
    axes.set(xlabel="distance", ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    open_frame(axes)
