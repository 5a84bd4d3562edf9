"""A generative model held fixed while guides are trained against it."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_vae.errors import InputError
from pyro_vae.pair.contract import check_latents_match
from pyro_vae.pair.functions import PairFunction, device_of, evaluation_mode, owned_modules
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import Given, latent_sites, sample_sites
from pyro_vae.pair.state import accumulating_leaves


@contextmanager
def frozen_model(
    model: PairFunction, guides: Mapping[str, PairFunction], inputs: Inputs, device: torch.device
) -> Iterator[PairFunction]:
    """Yield the model with nothing in it that trains, in eval mode, on a device.

    A module, or the owner of a method, is copied and the original left alone: what the model takes
    from the guide's side (the family under a VampPrior) is copied with it, and stays as it was. The
    parameters of a plain function are frozen in place and given back afterwards.
    """
    owners = owned_modules(model)
    if owners:
        twin = copy.deepcopy(owners[0]).to(device).eval().requires_grad_(False)
        fixed = _wrap(_rebind(model, twin))
        _check_frozen(fixed, guides, inputs)
        yield fixed
        return
    parameters = _parameters_of(model, inputs)
    for name, guide in guides.items():
        if parameters.keys() & _parameters_of(guide, inputs).keys():
            raise _shared(name)
    trained = [leaf for leaf in parameters.values() if leaf.requires_grad]
    try:
        for leaf in trained:
            leaf.requires_grad_(False)
        fixed = _wrap(model)
        # pyro.module warns of frozen parameters in a module that is in training mode.
        with evaluation_mode(model):
            _check_frozen(fixed, guides, inputs)
            yield fixed
    finally:
        for leaf in trained:
            leaf.requires_grad_(True)


def parameters_in(trace: Trace) -> dict[int, Tensor]:
    """Return the parameters that a traced function names to Pyro, unconstrained, by identity."""
    sites = [site for site in trace.nodes.values() if site["type"] == "param"]
    return {id(leaf): leaf for leaf in (site["value"].unconstrained() for site in sites)}


def _parameters_of(function: PairFunction, inputs: Inputs) -> dict[int, Tensor]:
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        function(*inputs)
    return parameters_in(capture.trace)


def _wrap(function: PairFunction) -> PairFunction:
    """Wrap a function, so that nobody trains or moves the module that it belongs to."""

    def frozen(*inputs: Tensor) -> Any:
        return function(*inputs)

    return frozen


def _rebind(function: PairFunction, twin: nn.Module) -> PairFunction:
    """Return the function with its owner replaced."""
    if isinstance(function, functools.partial):
        inner = _rebind(function.func, twin)
        return functools.partial(inner, *function.args, **function.keywords)
    if isinstance(function, types.MethodType):
        return types.MethodType(function.__func__, twin)
    return twin


def _check_frozen(fixed: PairFunction, guides: Mapping[str, PairFunction], inputs: Inputs) -> None:
    """Refuse a model that depends on something to be trained, and guides of other latents."""
    device = inputs[0].device
    for name, guide in guides.items():
        # A guide that is yet to be trained may still be elsewhere.
        place = device_of(guide, default=device)
        with torch.no_grad():
            drawn = poutine.trace(guide).get_trace(*(value.to(place) for value in inputs))
        values = {site["name"]: site["value"].to(device) for site in latent_sites(drawn)}
        with torch.enable_grad(), Given(values):
            trace = poutine.trace(fixed).get_trace(*inputs)
            check_latents_match(trace, drawn)
            terms = [site["fn"].log_prob(site["value"]) for site in sample_sites(trace)]
        leaves = {id(leaf) for leaf in accumulating_leaves(*terms)}
        if leaves & parameters_in(drawn).keys():
            raise _shared(name)
        if leaves:
            raise InputError(
                "expected a model to freeze whose trainable tensors Pyro knows, got unknown ones: "
                "name their modules by pyro.module, or call requires_grad_(False) on them"
            )


def _shared(name: str) -> InputError:
    return InputError(
        f"expected a model to freeze that shares no parameters with the guide of {name!r}, got "
        "shared ones: give the model as a method of the module that owns both, or separate them"
    )
