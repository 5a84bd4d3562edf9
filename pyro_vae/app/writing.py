"""Where commands write: refused before anything long is computed, if it can't be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pyro_vae.errors import InputError
from pyro_vae.files import refuse_to_write
from pyro_vae.runs.files import CONFIG
from pyro_vae.runs.folder import check_free


def picture_path(path: Path) -> Path:
    """Return the file to write a picture to.

    Raises:
        InputError: a file of another kind, or one that can't be written.
    """
    path = path.expanduser()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"expected a picture file .png, .svg or .pdf, got {path.name!r}")
    if path.is_dir():
        raise InputError(f"expected a picture file, {path} is a folder: choose another name")
    check_writable(path)
    return path


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that is not new or empty, or that can't be made.

    Raises:
        InputError: such a folder.
    """
    check_free(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"expected a new or empty folder, {folder} has files in it: choose another")
    check_writable(folder / CONFIG)


def check_writable(path: Path) -> None:
    """Refuse a file that can't be written; folders that are missing are made later.

    Raises:
        InputError: no permission, or a file where a folder should be.
    """
    folder = next(each for each in path.parents if each.exists())
    reason = 0
    if not folder.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = errno.EACCES
    if reason:
        refuse_to_write(path, OSError(reason, os.strerror(reason)))
