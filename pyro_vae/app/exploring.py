"""Looking into a run's latent space: ``pyro-vae latent``, ``traverse`` and ``interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from pyro_vae.app.names import PLANES, VIEWS
from pyro_vae.app.pictures import (
    interpolation_picture,
    latent_picture,
    manifold_picture,
    traversal_picture,
)
from pyro_vae.app.run import PictureOptions, RunPicture, check_pictured
from pyro_vae.errors import InputError, unknown_name

# Steps of a way: more than fit into a picture would take memory for nothing.
_MOST_STEPS = 200


def latent(
    run: Path,
    *,
    view: str,
    plane: str,
    number: int | None,
    num_steps: int | None,
    **options: Unpack[PictureOptions],
) -> Path:
    """Show a run's latent space: codes of its test data, or what a grid decodes to.

    Args:
        run: the run folder.
        view: one of :data:`pyro_vae.app.names.VIEWS`.
        plane: axes of the scatter, one of :data:`pyro_vae.app.names.PLANES`.
        number: how many test data; by default 5,000 at most.
        num_steps: values of each latent in the grid.
        options: as :class:`PictureOptions` has them.

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
    picture = RunPicture(run, f"latent-{view}", **options)
    vae, dataset, seed = picture.vae, picture.dataset, picture.seed
    data = dataset.test[: number or 5000]
    if view == "manifold":
        figure = manifold_picture(vae, data, picture.limits, num_steps=num_steps, seed=seed)
    else:
        labels = None if dataset.test_labels is None else dataset.test_labels[: len(data)]
        figure = latent_picture(vae, data, labels, plane=plane, seed=seed)
    return picture.saved(figure)


def traverse(
    run: Path, *, datum: int, number: int, num_steps: int, **options: Unpack[PictureOptions]
) -> Path:
    """Show what each latent of a run does to one test datum.

    Args:
        run: the run folder.
        datum: which test datum, from 1.
        number: how many latents at most, the most active ones.
        num_steps: values of each latent.
        options: as :class:`PictureOptions` has them.

    Returns:
        the file.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    check_pictured(number)
    _check_steps(num_steps)
    picture = RunPicture(run, f"traversal-{datum}", **options)
    data = picture.dataset.test
    if not 1 <= datum <= len(data):
        raise InputError(f"expected a test datum from 1 to {len(data)}, got {datum}")
    figure = traversal_picture(
        picture.vae,
        data,
        datum - 1,
        picture.limits,
        number=number,
        num_steps=num_steps,
        seed=picture.seed,
    )
    return picture.saved(figure)


def interpolate(run: Path, *, number: int, num_steps: int, **options: Unpack[PictureOptions]) -> Path:
    """Show the ways between the codes of a run's first test data.

    Args:
        run: the run folder.
        number: how many ways.
        num_steps: points on each, both ends included.
        options: as :class:`PictureOptions` has them.

    Returns:
        the file.

    Raises:
        InputError: no run there, data that changed since, or options out of range.
    """
    check_pictured(number)
    _check_steps(num_steps)
    picture = RunPicture(run, "interpolations", **options)
    data = picture.dataset.test
    if len(data) < 2:
        raise InputError("expected at least 2 test data to walk between, got 1")
    figure = interpolation_picture(
        picture.vae, data, picture.limits, number=number, num_steps=num_steps, seed=picture.seed
    )
    return picture.saved(figure)


def _check_steps(num_steps: int | None) -> None:
    if num_steps is not None and not 2 <= num_steps <= _MOST_STEPS:
        raise InputError(f"expected from 2 to {_MOST_STEPS} steps, got {num_steps}")
