"""Run folders: made, locked, saved to and loaded from."""

import functools
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_vae.errors import InputError
from pyro_vae.files import PART, check_in_place, expand_path, is_regular, writing_to
from pyro_vae.infer.checkpoint_files import checkpoint_files
from pyro_vae.pair.functions import resolve_device, seeded
from pyro_vae.runs.description import Components, build, describe
from pyro_vae.runs.files import CHECKPOINTS, CONFIG, STUDY, WEIGHTS, read_config, write_json
from pyro_vae.runs.weights import assign, read_weights, save_weights
from pyro_vae.vae import VAE

_LOCK = ".lock"


def save(vae: VAE, folder: str | Path, *, settings: Mapping[str, Any] | None = None) -> Path:
    """Write a VAE to a folder: ``config.json`` and ``model.safetensors``.

    A component is described by its class and its constructor's arguments, read from the attributes of
    the same names. The folder, which is returned, is created if missing and must not hold a run yet;
    a ``~`` is the home directory. ``settings`` are more plain values, kept under ``"run"``.

    Raises:
        InputError: what is no VAE, a folder that holds a run, is in use or can't be written, or a
            component, settings or weights that :func:`load` would not read. Nothing is left behind.
    """
    if not isinstance(vae, VAE):
        advice = "pv.save_pair(model, guide, folder) saves any other pair"
        raise InputError(f"expected a VAE to save, got {type(vae).__name__}: {advice}")
    folder = expand_path(folder)
    if not isinstance(settings, Mapping | None):
        raise InputError(f"expected settings as a dict, got {type(settings).__name__}")
    check_free(folder)
    with new_run(folder, describe(vae, settings)):
        save_weights(vae, folder)
    return folder


def load(folder: str | Path, *, components: Components | None = None, device: str = "cpu") -> VAE:
    """Build a VAE from a folder that :func:`save` or ``pyro-vae train`` wrote.

    Only classes of this package and those passed in are built; nothing is unpickled, no name in a
    file is imported and no file outside the folder is read. Names, shapes, types, values and the
    checksum of settings and weights are checked before any weight is assigned, and nothing global is
    changed: not the random state, nor the default type, nor Pyro's parameter store.

    Components are classes of your own by name, e.g. ``{"MyPrior": MyPrior}``; the device is ``auto``,
    ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: no run there, a file that can't be read or that comes from a newer version, an
            unknown component, weights that do not match the settings, or a device that is not here.
    """
    if not isinstance(components, Mapping | None):
        wanted = "components as classes by their names, such as {'MyPrior': MyPrior}"
        raise InputError(f"expected {wanted}, got {type(components).__name__}")
    folder, place = expand_path(folder), resolve_device(device)
    config = read_config(folder)
    if "pair" in config:
        raise InputError(f"expected a VAE in {folder}, got the weights of a pair: use pv.load_pair")
    weights, checksum = read_weights(folder)
    with seeded(0):  # constructors draw starting values
        vae = build(config, components or {}, sum(value.numel() for value in weights.values()))
    assign(vae, weights, checksum, config["model"])
    return vae.to(place).eval()


def check_free(folder: Path) -> None:
    """Refuse a file of that name, or a folder that holds a run, finished or not."""
    with writing_to(folder):  # a name too long, or a folder that can't be searched
        if folder.exists() and not folder.is_dir():
            raise InputError(f"expected a folder, {folder} is a file: choose another")
        if (folder / STUDY).exists():
            which = "several runs"
        elif (folder / CONFIG).exists():
            which = "a run" if (folder / WEIGHTS).exists() else "an unfinished run"
        else:
            return
    raise InputError(f"expected a folder without a run, {folder} holds {which}: choose another")


def has_files(folder: Path) -> bool:
    """Say whether a folder holds more than what a process leaves that was killed at its start."""
    names = (path.name for path in folder.iterdir()) if folder.exists() else ()
    return any(name != _LOCK and not name.startswith(PART) for name in names)


@contextmanager
def new_run(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Create a run folder and hold its lock; take it away if there is nothing to resume from."""
    with new_folder(folder), locked(folder):
        check_free(folder)
        begun = os.stat(folder)
        try:
            write_json(folder / CONFIG, config)
            yield
        except BaseException:
            with suppress(OSError, InputError):
                check_in_place(folder, begun)
                if not (checkpoint_files(folder / CHECKPOINTS) or (folder / WEIGHTS).exists()):
                    (folder / CONFIG).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create a folder and those above it; take away what is empty of them if the body fails."""
    made: list[Path] = []
    try:
        with writing_to(folder, ValueError):  # a zero byte in the name
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one run and refuse a second; the lock ends with the process at the latest."""
    path = folder / _LOCK
    with writing_to(path):
        descriptor = _acquire(path)
    _once_at_fork(after_in_child=_let_go)
    _HELD.add(descriptor)
    try:
        with writing_to(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if descriptor in _HELD:  # not in a child
            with suppress(OSError):
                # Not of a run that has come to the place of one that was moved.
                if _is_at(descriptor, path):
                    path.unlink()  # before it is released: the next one makes its own
            _HELD.discard(descriptor)
            os.close(descriptor)


# Descriptors of the locks that are held. A forked child has copies, which would keep a lock held for
# as long as the child lives.
_HELD: set[int] = set()


_once_at_fork = functools.cache(os.register_at_fork)


def _let_go() -> None:
    while _HELD:
        os.close(_HELD.pop())


def _is_at(descriptor: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), os.lstat(path))


def _acquire(path: Path) -> int:
    import fcntl  # not on every system that can load a run

    # Nothing but the lock's own file is opened, for a process writes its name into it.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        if os.path.lexists(path) and not (is_regular(path) and path.stat().st_nlink == 1):
            raise InputError(f"expected the lock {path} as a file of its own, got a link: delete it")
        descriptor = os.open(path, flags, 0o666)
        with ExitStack() as unless_held:
            unless_held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another run"
                raise InputError(
                    f"expected a folder that no other run uses, {path.parent} is in use by {owner}: "
                    "wait for it or choose another folder"
                ) from None
            # Its last holder may have taken it away in between: then try again with a new one.
            with suppress(FileNotFoundError):
                if _is_at(descriptor, path):
                    unless_held.pop_all()
                    return descriptor
