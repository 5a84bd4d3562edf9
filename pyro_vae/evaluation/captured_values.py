"""Values of a pair captured for long evaluations: a model's score, an annealing path's gradients."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pyro
from torch import Tensor

from pyro_vae.infer import capture
from pyro_vae.infer import program as recorded
from pyro_vae.infer.capture import CannotCaptureError
from pyro_vae.infer.program import Program, Programs, Signature, State
from pyro_vae.pair.functions import PairFunction, modules_of
from pyro_vae.pair.precision import ROUNDING, precision_now
from pyro_vae.pair.sites import Latents
from pyro_vae.pair.state import Remembered, Snapshot, with_submodules
from pyro_vae.weights.particles import Particles

Terms = tuple[Tensor, Tensor]
Values = tuple[Tensor, ...]
Compute = Callable[[Particles, Sequence[Tensor]], Values]
Captured = tuple[Callable[[Sequence[Tensor]], Any], Any]

# Bytes that scoring must allocate in all before a compilation (seconds; half a minute the first time
# on a machine) is repaid: about a minute of work on one CPU core, some seconds on a GPU. Recording
# alone takes a quarter of a second.
_WORTHWHILE = {"cpu": 5 * 10**10, "cuda": 2 * 10**12}
_WORTH_RECORDING = {"cpu": 3 * 10**9}

# Of every pair whose values were captured, as long as it lives.
PROGRAMS: Remembered[Programs[Program]] = Remembered()


def compiled_score(
    scorer: Particles, latents: Latents, work: int, wanted: bool | None
) -> tuple[Callable[[Latents], Terms], Terms] | None:
    """Return a captured ``scorer.score`` and its values at ``latents``; None if that can't pay."""
    device = scorer.pair.inputs[0].device.type
    compile = wanted or work >= _WORTHWHILE.get(device, _WORTHWHILE["cuda"])
    recorded = work >= _WORTH_RECORDING.get(device, math.inf)
    if wanted is False or not (compile or recorded):
        return None
    names = list(latents)

    def score(scorer: Particles, given: Sequence[Tensor]) -> Terms:
        return scorer.score(dict(zip(names, given, strict=True)))

    def say(reason: str) -> None:
        if wanted:
            warnings.warn(f"the model's log-probabilities run uncompiled: {reason}", stacklevel=7)

    key, given = ("score", compile, *names), list(latents.values())
    how: Any = {"num_checked": 1, "compile": compile, "say": say}
    captured = capture_values(scorer, (scorer.pair.model,), key, given, score, **how)
    if captured is None:
        return None
    run, shown = captured
    return lambda latents: run([latents[name] for name in names]), shown


def capture_values(
    particles: Particles, functions: Sequence[PairFunction], key: Hashable, given: Sequence[Tensor],
    compute: Compute, *, elsewhere: Callable[[], Sequence[Tensor]] | None = None,
    num_checked: int | None = None, compile: bool = False,
    say: Callable[[str], None] = lambda reason: None,
) -> Captured | None:  # fmt: skip
    """Find or record the program of some values of a pair; return it and what its check gave."""
    pair, programs = particles.pair, PROGRAMS.get(*functions)
    if programs is None:
        programs = Programs()
        PROGRAMS.keep(programs, *functions)
    signature = recorded.sign((key, pair.plate), [*given, *pair.inputs], [], {})
    where = functools.cache(elsewhere or (lambda: given))  # drawn where first needed, and once

    def check(program: Program, num_checked: int | None) -> list[Tensor]:
        def compare(expected: Values, found: list[Tensor], tensors: list[Tensor]) -> None:
            dtypes = [value.dtype for value in (*where(), *tensors, *found)]
            tolerance = recorded.tolerance_of([*dtypes, *ROUNDING.get(precision_now(), ())])
            for own, standard in zip(found, expected, strict=True):
                if not recorded.are_close(own[: len(standard)], standard, tolerance):
                    raise CannotCaptureError("it gives other values than the model")

        few = [value[:num_checked] for value in where()]
        return recorded.verify(
            program, [*where(), *pair.inputs], lambda: compute(particles, few), compare
        )

    def ready(program: Program, shown: list[Tensor]) -> Captured:
        tensors, inputs = program.state.current(), pair.inputs
        assert tensors is not None  # the pair stands still while an evaluation runs
        return lambda given: program.outputs([*given, *inputs], tensors), shown

    known = programs.find(signature)
    if known is not None:
        # What no signature shows, such as a plain attribute, may have changed: then record anew.
        try:
            return ready(known[0], check(known[0], num_checked))
        except CannotCaptureError:
            programs.kept.remove(known[0])
    if signature in programs.impossible:
        if programs.impossible[signature]:
            where()  # as at the first time: a seed gives the same numbers
        return None
    program = None
    try:
        plain = elsewhere is not None  # a path takes thousands of steps, a score one for each chunk
        program = _record(particles, functions, signature, given, compute, is_worth_plain=plain)
        backend = "inductor" if compile else {"cuda": "cudagraphs"}.get(pair.device.type, "eager")
        shown = program.compile(backend, "default", lambda: check(program, None), say)
    except CannotCaptureError as reason:
        programs.impossible[signature] = program is not None
        say(str(reason))
        return None
    programs.add(program)
    return ready(program, shown)


def _record(
    particles: Particles, functions: Sequence[PairFunction], signature: Signature,
    given: Sequence[Tensor], compute: Compute, *, is_worth_plain: bool,
) -> Program:  # fmt: skip
    """Record the values over fresh aliases: a tensor both passed and closed over is told apart."""
    pair, modules = particles.pair, with_submodules(modules_of(*functions))
    with Snapshot(modules).put_back(), capture.conditions():
        traces = particles.pair.trace()[: len(functions)]
        nodes = [item for trace in traces for item in trace.nodes.items()]
        store = pyro.get_param_store()._params
        names = [name for name, site in nodes if site["type"] == "param" and name in store]
        state = State(modules, dict.fromkeys(names))
        compute(particles, [value[:2] for value in given])  # finds the ways that hold
        if pair.knowledge.ways.get("model") == "_score_plain" and not is_worth_plain:
            raise CannotCaptureError("its particles can't be scored at once")
        aliases = [tensor.detach() for tensor in given]
        inputs = tuple(tensor.detach() for tensor in pair.inputs)
        other = Particles(pair.on(inputs))
        program = Program(signature, state)
        program.record(lambda: compute(other, aliases), [*aliases, *inputs])
    return program
