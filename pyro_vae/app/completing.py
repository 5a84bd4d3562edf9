"""``pyro-vae complete``: hide a part of a run's test data and fill it in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from pyro_vae import plots, tasks
from pyro_vae.app.names import COMPLETIONS
from pyro_vae.app.pictures import completion_picture, data_shape_of
from pyro_vae.app.run import PictureOptions, RunPicture, check_pictured
from pyro_vae.app.settings import check_counts
from pyro_vae.errors import InputError, unknown_name


def complete(
    run: Path,
    *,
    missing: str,
    method: str,
    number: int | None,
    num_draws: int,
    num_steps: int,
    num_samples: int,
    **options: Unpack[PictureOptions],
) -> Path:
    """Hide a part of a run's first test data, fill it in, and show it beside the truth.

    Args:
        run: the run folder.
        missing: what is hidden, see :func:`hidden_part`.
        method: one of :data:`pyro_vae.app.names.COMPLETIONS`.
        number: how many data; by default 8 images or 200 vectors.
        num_draws: completions of each that are shown.
        num_steps: steps of each chain.
        num_samples: importance samples per datum.
        options: as :class:`PictureOptions` has them; the seed is also that of what is hidden.

    Returns:
        the file.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    if method not in COMPLETIONS:
        raise unknown_name("method", method, COMPLETIONS)
    check_pictured(number)
    check_counts({"num_draws": num_draws, "num_steps": num_steps, "num_samples": num_samples})
    picture = RunPicture(run, f"completions-{missing.replace(':', '-')}", **options)
    vae, seed, shape = picture.vae, picture.seed, data_shape_of(picture.vae)
    hidden_part(missing, shape, 1, seed=seed)  # refused before any data are read
    data = picture.dataset.test[: number or (8 if plots.is_image(shape) else 200)]
    hidden = hidden_part(missing, shape, len(data), seed=seed)
    completed = tasks.complete(
        vae.model,
        vae.guide,
        data,
        hidden,
        method=method,
        num_draws=num_draws,
        num_steps=None if method == "importance" else num_steps,
        num_samples=num_samples if method == "importance" else None,
        seed=seed,
    )
    return picture.saved(completion_picture(data, hidden, completed, picture.limits))


def hidden_part(missing: str, data_shape: Sequence[int], number: int, *, seed: int) -> Tensor:
    """Return what is hidden of so many data, boolean ``(number, *data_shape)``.

    Args:
        missing: ``lower``, ``upper``, ``left`` or ``right`` half of an image, of a vector ``left``
            (its first half) or ``right``; or ``random:SHARE``, each pixel by itself with that
            probability, all its channels together.
        data_shape: shape of one datum.
        number: how many data.
        seed: seed of what is hidden at random.

    Raises:
        InputError: another word, a share that is not between 0 and 1, or data without that half.
    """
    image = plots.is_image(data_shape)
    channel = None
    if image and len(data_shape) == 3:
        channel = 0 if data_shape[0] in (1, 3) else 2
    plane = [size for axis, size in enumerate(data_shape) if axis != channel]
    word, _, text = missing.partition(":")
    if word == "random":
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand(number, *plane, generator=generator) < _share(text)
    else:
        halves = {"left": -1, "right": -1} | ({"upper": -2, "lower": -2} if image else {})
        if missing not in halves:
            raise InputError(
                f"expected as missing {', '.join(halves)} or random:SHARE, got {missing!r}"
            )
        axis = halves[missing]
        size = plane[axis]
        first = torch.arange(size) < (size + (missing in ("left", "upper"))) // 2
        half = first if missing in ("left", "upper") else ~first
        rows = [1] * len(plane)
        rows[axis] = size
        hidden = half.view(rows).expand(number, *plane)
    if channel is not None:
        hidden = hidden.unsqueeze(channel + 1)
    return hidden.expand(number, *data_shape).clone()


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise InputError(f"expected a share between 0 and 1 after random:, got {text!r}")
    return share
