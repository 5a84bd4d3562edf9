"""Runs on disk: a VAE as JSON settings and safetensors weights, built back from registered names."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

import pyro_vae
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.errors import InputError, unknown_name
from pyro_vae.infer.training import resolve_device
from pyro_vae.vae import VAE

__all__ = [
    "CONFIG",
    "FORMAT",
    "WEIGHTS",
    "check_free",
    "describe",
    "finite_or_none",
    "load",
    "new_run",
    "read_config",
    "save",
    "save_weights",
    "write_json",
    "write_whole",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1

# The parts of a VAE, in the order they are built: a prior may use the variational family.
_PARTS = ("variational_family", "prior", "likelihood")
Components = Mapping[str, type[nn.Module]]


def save(vae: VAE, folder: str | Path, *, settings: Mapping[str, Any] | None = None) -> Path:
    """Write a VAE to a folder: ``config.json`` and ``model.safetensors``.

    A component is described by its class and its constructor's arguments, read from the attributes of
    the same names.

    Args:
        vae: the model to save.
        folder: created if missing; must not hold a run yet.
        settings: more plain values to keep under ``"run"`` in ``config.json``.

    Returns:
        the folder.

    Raises:
        InputError: a folder that holds a run, or a component that can't be described.
        OSError: a folder that can't be written.
    """
    folder = Path(folder)
    check_free(folder)
    with new_run(folder, describe(vae, settings)):
        save_weights(vae, folder)
    return folder


def load(folder: str | Path, *, components: Components | None = None, device: str = "cpu") -> VAE:
    """Build a VAE from a folder that :func:`save` or ``pyro-vae train`` wrote.

    Only classes of this package and those passed in are built; nothing is unpickled and no name in a
    file is imported. Weights are checked before any is assigned.

    Args:
        folder: the run folder.
        components: classes of your own by name, e.g. ``{"MyPrior": MyPrior}``.
        device: where to put the weights: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: no run there, a file that can't be read, an unknown component, weights that do
            not match the settings, or a device that is not here.
    """
    folder, place = Path(folder), resolve_device(device)
    config = read_config(folder)
    vae = _build_vae(config, components or {})
    _assign(vae, _read_weights(folder / WEIGHTS))
    return vae.to(place).eval()


def check_free(folder: Path) -> None:
    """Refuse a folder that can't become a run folder without overwriting something.

    Raises:
        InputError: a file of that name, or a folder that holds a run, finished or not.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder, {folder} is a file: choose another")
    if (folder / CONFIG).exists():
        which = "a run" if (folder / WEIGHTS).exists() else "an unfinished run"
        raise InputError(f"expected a folder without a run, {folder} holds {which}: choose another")


@contextmanager
def new_run(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Create a run folder with its settings; take it away again if the body fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
        yield
    except BaseException:
        with suppress(OSError):
            for name in (CONFIG, WEIGHTS):
                (folder / name).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a run's settings.

    Raises:
        InputError: no run there, or settings that are no JSON object of a known format.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(
            f"expected a run folder at {folder}, found no {CONFIG} in it: check the path"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"expected JSON in {path}, got: {error}") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise InputError(
            f"expected format {FORMAT} in {path}, got {version!r}: it comes from another version"
        )
    return config


def describe(vae: VAE, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the plain values that a VAE can be built from again."""
    shared: dict[int, str] = {}
    model: dict[str, Any] = {}
    for part in _PARTS:
        component = getattr(vae, part)
        model[part] = _describe(component, shared)
        shared[id(component)] = part
    return {
        "format": FORMAT,
        "pyro_vae": pyro_vae.__version__,
        "model": model,
        "run": dict(settings or {}),
    }


def save_weights(vae: VAE, folder: Path) -> None:
    """Write the weights; the file's bytes depend on their names and values alone."""
    state = {name: value.detach().cpu().contiguous() for name, value in _state(vae).items()}
    write_whole(folder / WEIGHTS, lambda path: path.write_bytes(serialised(state)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; numbers that are not finite become null."""
    text = json.dumps(finite_or_none(content), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite_or_none(value: Any) -> Any:
    """Return plain JSON values with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(name): finite_or_none(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with the path of a temporary file that takes the file's place when done."""
    # The temporary name keeps the suffix, by which a picture's format is chosen.
    temporary = path.with_name(f".part-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _registry() -> dict[str, type[nn.Module]]:
    registry = {}
    for kind in (networks, priors, likelihoods, guides):
        for name in kind.__all__:
            member = getattr(kind, name)
            if inspect.isclass(member) and issubclass(member, nn.Module):
                registry[f"{kind.__name__.removeprefix('pyro_vae.')}.{name}"] = member
    return registry


def _describe(component: Any, shared: dict[int, str]) -> Any:
    """Describe a component or one of its settings by plain values."""
    if id(component) in shared:
        return {"shared": shared[id(component)]}
    if isinstance(component, nn.Module):
        names = {member: name for name, member in _registry().items()}
        kind = type(component)
        settings = {}
        for name in inspect.signature(kind).parameters:
            if not hasattr(component, name):
                raise InputError(
                    f"expected {kind.__name__} to keep its argument {name!r} as an attribute: set "
                    f"self.{name} = {name} so that it can be saved"
                )
            settings[name] = _describe(getattr(component, name), shared)
        return {"class": names.get(kind, f"custom.{kind.__name__}"), "settings": settings}
    if isinstance(component, Tensor):
        return {"tensor": component.tolist()}
    if isinstance(component, float) and not math.isfinite(component):
        return {"float": str(component)}  # JSON has no number for it
    if component is None or isinstance(component, bool | int | float | str):
        return component
    if isinstance(component, list | tuple):
        return [_describe(inner, shared) for inner in component]
    raise InputError(
        f"expected components and settings that can be saved, got {type(component).__name__}: "
        "write it as a module (see pyro_vae.priors.Prior) or save its state_dict yourself"
    )


def _build_vae(config: dict[str, Any], components: Components) -> VAE:
    parts: dict[str, Any] = {}
    try:
        for part in _PARTS:
            parts[part] = _build(config["model"][part], components, parts)
        return VAE(parts["prior"], parts["likelihood"], parts["variational_family"])
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"expected a description of a VAE in {CONFIG}, got {type(error).__name__}: {error}"
        ) from error


def _build(description: Any, components: Components, parts: dict[str, Any]) -> Any:
    if isinstance(description, list):
        return tuple(_build(inner, components, parts) for inner in description)
    if not isinstance(description, dict):
        return description
    if "shared" in description:
        return parts[description["shared"]]
    if "tensor" in description:
        return torch.tensor(description["tensor"])
    if "float" in description:
        return float(description["float"])
    name = description["class"]
    registry = _registry() | {f"custom.{key}": value for key, value in components.items()}
    if name not in registry:
        if name.startswith("custom."):
            own = name.removeprefix("custom.")
            raise InputError(
                f"expected the class of component {own!r}: pass it, components={{{own!r}: {own}}}"
            )
        raise unknown_name("component", name, registry)
    settings = {
        key: _build(value, components, parts) for key, value in description["settings"].items()
    }
    return registry[name](**settings)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"expected weights at {path}, found none: the run did not finish")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"expected safetensors weights in {path}, got: {error}") from error


def _state(vae: VAE) -> dict[str, Tensor]:
    """Return the tensors to keep by name; one shared by two components once, under its first name."""
    names: dict[int, str] = {}
    state = vae.state_dict(keep_vars=True)  # the very tensors, so that shared ones can be told
    for name, value in state.items():
        names.setdefault(id(value), name)
    return {name: state[name] for name in names.values()}


def _assign(vae: VAE, weights: dict[str, Tensor]) -> None:
    """Check every tensor, then assign all of them; the VAE takes on their floating-point type."""
    expected = _state(vae)
    missing, surplus = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or surplus:
        raise InputError(
            f"expected the weights that the settings describe, {len(missing)} are missing and "
            f"{len(surplus)} surplus (first: {(missing + surplus)[0]})"
        )
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise InputError(
                f"expected weight {name} of shape {tuple(expected[name].shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"expected finite weights, got NaN or infinity in {name}")
    types = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(types) > 1:
        raise InputError(f"expected weights of one floating-point type, got {len(types)}")
    for dtype in types:
        vae.to(dtype)
    vae.load_state_dict(weights, strict=False)  # the names were checked above
