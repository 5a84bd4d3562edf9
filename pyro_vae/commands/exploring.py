"""Looking into a run's latent space: ``pyro-vae latent``, ``traverse`` and ``interpolate``."""

from __future__ import annotations

from pathlib import Path

import torch

from pyro_vae.commands.pictures import (
    interpolation_picture,
    latent_picture,
    manifold_picture,
    save_picture,
    traversal_picture,
)
from pyro_vae.commands.settings import check_seed
from pyro_vae.commands.using import check_pictured, data_of, opened, picture_path
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.names import PLANES, VIEWS

__all__ = ["interpolate", "latent", "traverse"]

# Steps of a way: more than fit into a picture would take memory for nothing.
_MOST_STEPS = 200


def latent(
    run: Path,
    *,
    view: str,
    plane: str,
    number: int | None,
    num_steps: int | None,
    data_root: str | None,
    output: Path | None,
    seed: int,
) -> Path:
    """Show a run's latent space: codes of its test data, or what a grid decodes to.

    Args:
        run: the run folder.
        view: one of :data:`pyro_vae.names.VIEWS`.
        plane: one of :data:`pyro_vae.names.PLANES`, for the scatter of more than two latents.
        number: how many test data; by default 5,000 at most.
        num_steps: values of each latent in the grid.
        data_root: where the data are now; by default where they were.
        output: file to write; by default in the run folder.
        seed: seed of what has to be drawn.

    Returns:
        the file.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    for kind, name, known in (("view", view, VIEWS), ("plane", plane, PLANES)):
        if name not in known:
            raise unknown_name(kind, name, known)
    check_pictured(number)
    _check_steps(num_steps)
    check_seed(seed)
    path = picture_path(output, run / f"latent-{view}-seed-{seed}.png")
    vae, settings, limits = opened(run, torch.device("cpu"))
    dataset = data_of(run, settings, data_root)
    data = dataset.test[: number or 5000]
    if view == "manifold":
        figure = manifold_picture(vae, data, limits, num_steps=num_steps, seed=seed)
    else:
        labels = None if dataset.test_labels is None else dataset.test_labels[: len(data)]
        figure = latent_picture(vae, data, labels, plane=plane, seed=seed)
    save_picture(figure, path)
    return path


def traverse(
    run: Path,
    *,
    datum: int,
    number: int,
    num_steps: int,
    data_root: str | None,
    output: Path | None,
    seed: int,
) -> Path:
    """Show what each latent of a run does to one test datum.

    Args:
        run: the run folder.
        datum: which test datum, from 1.
        number: how many latents at most, the most active ones.
        num_steps: values of each latent.
        data_root: where the data are now; by default where they were.
        output: file to write; by default in the run folder.
        seed: seed of what has to be drawn.

    Returns:
        the file.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    check_pictured(number)
    _check_steps(num_steps)
    check_seed(seed)
    path = picture_path(output, run / f"traversal-{datum}-seed-{seed}.png")
    vae, settings, limits = opened(run, torch.device("cpu"))
    data = data_of(run, settings, data_root).test
    if not 1 <= datum <= len(data):
        raise InputError(f"expected a test datum from 1 to {len(data)}, got {datum}")
    figure = traversal_picture(
        vae, data, datum - 1, limits, number=number, num_steps=num_steps, seed=seed
    )
    save_picture(figure, path)
    return path


def interpolate(
    run: Path,
    *,
    number: int,
    num_steps: int,
    data_root: str | None,
    output: Path | None,
    seed: int,
) -> Path:
    """Show the ways between the codes of a run's first test data.

    Args:
        run: the run folder.
        number: how many ways.
        num_steps: points on each, both ends included.
        data_root: where the data are now; by default where they were.
        output: file to write; by default in the run folder.
        seed: seed of what has to be drawn.

    Returns:
        the file.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    check_pictured(number)
    _check_steps(num_steps)
    check_seed(seed)
    path = picture_path(output, run / f"interpolations-seed-{seed}.png")
    vae, settings, limits = opened(run, torch.device("cpu"))
    data = data_of(run, settings, data_root).test
    if len(data) < 2:
        raise InputError("expected at least 2 test data to walk between, got 1")
    figure = interpolation_picture(vae, data, limits, number=number, num_steps=num_steps, seed=seed)
    save_picture(figure, path)
    return path


def _check_steps(num_steps: int | None) -> None:
    if num_steps is not None and not 2 <= num_steps <= _MOST_STEPS:
        raise InputError(f"expected from 2 to {_MOST_STEPS} steps, got {num_steps}")
