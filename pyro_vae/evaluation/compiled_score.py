"""A model's score captured once and compiled, for evaluations long enough to pay for it."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.infer.capture import (
    CannotCaptureError,
    autocast_dtypes,
    trace_graph,
)
from pyro_vae.infer.program import State
from pyro_vae.pair.agreement import all_close
from pyro_vae.pair.functions import PairFunction, modules_of
from pyro_vae.pair.sites import Latents
from pyro_vae.pair.state import with_submodules
from pyro_vae.weights.particles import Particles

Terms = tuple[Tensor, Tensor]

# Bytes that scoring must allocate in all before a compilation (seconds; half a minute the first time
# on a machine) is repaid: about a minute of work on one CPU core, some seconds on a GPU.
_WORTHWHILE = {"cpu": 5 * 10**10, "cuda": 2 * 10**12}

# Particles (of every datum of a block) by which a program made earlier is held against plain calls
# at every estimate: what can go stale shows in one.
_CHECKED = 1

# The programs of each model, kept as long as the model (or the module whose method it is) lives.
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[Hashable, _Program | None]] = (
    weakref.WeakKeyDictionary()
)


def compiled_score(
    scorer: Particles, latents: Latents, work: int, wanted: bool | None
) -> tuple[Callable[[Latents], Terms], Terms] | None:
    """Return a compiled ``scorer.score`` for as many particles as ``latents`` has.

    Compiled programs are kept per model and shape: later calls pay nothing. A program follows
    parameters that are trained or replaced meanwhile. It is checked against the uncompiled score: on
    a whole chunk when made, on the first particles of every later call.

    Args:
        scorer: the pair bound to its data.
        latents: latents of the shapes to come.
        work: bytes that scoring will allocate in all.
        wanted: True, False, or None for where the work repays the compilation.

    Returns:
        the score, and what it gives at ``latents`` (checking it has paid for that); None where it
        should not or can't be compiled (a warning says why if it was asked for).
    """
    device = scorer.pair.inputs[0].device.type
    repaid = work >= _WORTHWHILE.get(device, _WORTHWHILE["cuda"])
    if wanted is False or not (wanted or repaid):
        return None
    programs = _PROGRAMS.setdefault(_owner(scorer.pair.model), {})
    key = _signature(scorer, latents)
    program = programs.get(key)
    if program is not None:
        terms = _terms_if_it_holds(program, scorer, latents)
        if terms is not None:
            return program.bound_to(scorer), terms
    if key in programs and program is None:
        return None
    with torch.random.fork_rng():  # a seed gives the same draws, compiled now, before or never
        made = _compile(scorer, latents, warn=bool(wanted))
    programs[key] = None if made is None else made[0]
    return None if made is None else (made[0].bound_to(scorer), made[1])


def _terms_if_it_holds(program: _Program, scorer: Particles, latents: Latents) -> Terms | None:
    """Return the program's terms if plain calls give the first particles' too.

    What the key can't see may have changed since the program was made: a plain attribute of the
    model, or its parameters' shapes.
    """
    if program.state.current() is None:
        return None
    terms = program.bound_to(scorer)(latents)
    few = {name: value[:_CHECKED] for name, value in latents.items()}
    first = tuple(term[:_CHECKED] for term in terms)
    return terms if all_close(first, scorer.score_by("_score_plain", "model", few)[:2]) else None


class _Program:
    """A captured score: a graph over latents, inputs and the tensors the model reads."""

    def __init__(self, graph: torch.fx.GraphModule, state: State, names: list[str]) -> None:
        self.state, self.names = state, names
        self.run = torch.compile(graph, fullgraph=True, dynamic=False)

    def bound_to(self, scorer: Particles) -> Callable[[Latents], Terms]:
        """Return the score of latents with this scorer's data."""
        tensors = self.state.current()
        assert tensors is not None
        # The parameters stand still while an estimate runs.
        rest = [*scorer.pair.inputs, *tensors]

        def score(latents: Latents) -> Terms:
            log_likelihood, log_prior = self.run(*(latents[name] for name in self.names), *rest)
            return log_likelihood, log_prior

        return score


def _compile(scorer: Particles, latents: Latents, *, warn: bool) -> tuple[_Program, Terms] | None:
    scorer.score({name: value[:2] for name, value in latents.items()})  # chooses a strategy
    if scorer.pair.knowledge.ways.get("model") == "_score_plain":
        return None
    try:
        program = _capture(scorer, latents)
        compiled, plain = program.bound_to(scorer)(latents), scorer.score(latents)
        if all_close(compiled, plain):
            return program, compiled
        reason = "it gives other values than the model"
    except CannotCaptureError as error:
        reason = str(error)
    except RuntimeError as error:  # every failure of torch.compile's backends is one
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if warn:
        warnings.warn(f"the model's score runs uncompiled: {reason}", stacklevel=7)
    return None


def _capture(scorer: Particles, latents: Latents) -> _Program:
    trace, _ = scorer.traces()
    store = pyro.get_param_store()._params
    in_store = [
        name for name, site in trace.nodes.items() if site["type"] == "param" and name in store
    ]
    state = State(with_submodules(modules_of(scorer.pair.model)), in_store, [])
    # Fresh aliases: a tensor both passed and closed over is then told apart by identity.
    names = list(latents)
    given = {name: latents[name].detach() for name in names}
    inputs = tuple(value.detach() for value in scorer.pair.inputs)
    alias = Particles(scorer.pair.bind(scorer.pair.model, scorer.pair.guide, inputs, {}))
    with poutine.block():
        graph, closed_over = trace_graph(
            lambda: alias.score(given), [*given.values(), *inputs, *state.tensors]
        )
    state.add_fixed(closed_over)
    return _Program(graph, state, names)


def _signature(scorer: Particles, latents: Latents) -> Hashable:
    tensors = [*latents.values(), *scorer.pair.inputs]
    function = scorer.pair.model.__func__ if inspect.ismethod(scorer.pair.model) else None
    return (
        function,
        scorer.pair.plate,
        tuple(latents),
        tuple((value.shape, value.stride(), value.dtype, value.device) for value in tensors),
        torch.get_default_dtype(),
        autocast_dtypes(),
    )


def _owner(function: PairFunction) -> Any:
    return function.__self__ if inspect.ismethod(function) else function
