"""Any pair on disk: parameters and buffers by name, whoever wrote its two functions."""

from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from pyro_vae.distributions import unit_sphere
from pyro_vae.errors import InputError, expecting
from pyro_vae.files import expand_path
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction, device_of, modules_of
from pyro_vae.runs import weights as files
from pyro_vae.runs.files import CONFIG, FORMAT, read_config
from pyro_vae.runs.folder import check_free, new_run
from pyro_vae.vae import VAE
from pyro_vae.version import __version__

# Constraints by their names, and the classes of those that have numbers of their own.
_CONSTRAINTS: dict[str, Any] = {
    name: value
    for name, value in {**vars(constraints), "unit_sphere": unit_sphere}.items()
    if isinstance(value, Constraint) or (isinstance(value, type) and issubclass(value, Constraint))
}


def save_pair(model: PairFunction, guide: PairFunction, folder: str | Path) -> Path:
    """Write parameters and buffers of any pair to a folder, for :func:`load_pair`; no code.

    They are those of every module that the two functions reach, and what ``pyro.param`` has put into
    Pyro's store: all of it, so clear the store of other pairs before. The folder, which is returned,
    is created if missing and must not hold a run yet; a ``~`` is the home directory.

    Raises:
        InputError: a pair without parameters, a constraint that is not one of Pyro's between plain
            numbers, or a folder that holds a run, is in use or can't be written.
    """
    folder = expand_path(folder)
    check_free(folder)
    with HANDLER_LOCK:
        tensors, store = _tensors_of(model, guide), pyro.get_param_store()
        known = {id(value): where for where, value in tensors.items()}
        vaes = [module for module in modules_of(model, guide) if isinstance(module, VAE)]
        named: dict[str, Any] = {}
        for name, value in store._params.items():
            if id(value) not in known and "$$$" in name:
                continue  # of a module of another pair
            if name.startswith(tuple(f"{vae.name}." for vae in vaes)):
                continue  # another name in every process
            where = known.get(id(value), f"store.{name}")
            tensors[where] = value
            named[where] = {"name": name, "constraint": _describe(store._constraints[name])}
        if not tensors:
            raise InputError("expected a pair with parameters, got none: train it before it is saved")
        with new_run(folder, {"format": FORMAT, "pyro_vae": __version__, "pair": named}):
            files.write_weights(folder, named, tensors)
    return folder


def load_pair(folder: str | Path, model: PairFunction, guide: PairFunction) -> None:
    """Put parameters and buffers that :func:`save_pair` wrote into a pair of the same functions.

    Modules are told apart by their order in the functions. What is in none of them is put into
    Pyro's store, from which training goes on. Nothing is unpickled or executed, and everything is
    checked before any of it is assigned.

    Raises:
        InputError: no pair there, a file that can't be read or was changed, names, shapes or types
            that are not the pair's, or names that Pyro's store has taken.
    """
    folder = expand_path(folder)
    named = read_config(folder).get("pair")
    if not isinstance(named, dict):
        raise InputError(f"expected a pair in {folder}, got the {CONFIG} of a VAE: use pv.load")
    weights, checksum = files.read_weights(folder)
    files.check_checksum(named, weights, checksum)
    with HANDLER_LOCK, torch.no_grad():
        own, store = _tensors_of(model, guide), pyro.get_param_store()
        unusable = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
        with expecting(f"a description of a pair in {folder}", *unusable):
            names = {where: str(entry["name"]) for where, entry in named.items()}
            # Those of pyro.module belong into a module that is there.
            rest = {w: weights[w] for w, name in names.items() if w not in own and "$$$" not in name}
            limits = {names[where]: _build(named[where]["constraint"]) for where in rest}
            for where, value in rest.items():
                transform_to(limits[names[where]])(value)  # or the first use of it would fail
        inside = {where: value for where, value in weights.items() if where not in rest}
        files.check_weights(own, inside)
        for where, name in names.items():
            if name in store and store._params[name] is not own.get(where):
                wanted = "names that Pyro's store does not hold"
                advice = "pyro.clear_param_store() frees the names of earlier pairs"
                raise InputError(f"expected {wanted}, {name!r} is taken: {advice}")
        for where, value in own.items():
            if value.dtype != weights[where].dtype:
                raise InputError(f"expected {where} as {value.dtype}, got {weights[where].dtype}")
        for where, value in own.items():
            value.copy_(weights[where])
        place = device_of(model, guide, default=torch.device("cpu"))
        params = {names[where]: value.to(place).requires_grad_() for where, value in rest.items()}
        store.set_state({"params": params, "constraints": limits})


def _tensors_of(model: PairFunction, guide: PairFunction) -> dict[str, Tensor]:
    return files.tensors_of({f"{i}.": module for i, module in enumerate(modules_of(model, guide))})


def _describe(constraint: Any) -> Any:
    """Return a constraint's name, or the name of its class and what it holds."""
    names = {id(value): name for name, value in _CONSTRAINTS.items()}
    if id(constraint) in names:
        return names[id(constraint)]
    kind = names.get(id(type(constraint)))
    held = {n: _describe(v) if isinstance(v, Constraint) else v for n, v in vars(constraint).items()}
    if kind is None or not all(isinstance(v, int | float | str | list) for v in held.values()):
        what = "parameters under a constraint of Pyro between plain numbers"
        raise InputError(f"expected {what}, got {constraint}")
    return [kind, held]


def _build(description: Any) -> Any:
    """Return what :func:`_describe` described; nothing of it is called."""
    if isinstance(description, str):
        return _CONSTRAINTS[description]
    name, held = description
    constraint = object.__new__(_CONSTRAINTS[name])
    held = {n: _build(v) if isinstance(v, str | list) else v for n, v in held.items()}
    vars(constraint).update(held)
    return constraint
