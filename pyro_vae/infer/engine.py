"""Captured training steps of any bound: found again, replayed, or captured after an eager step."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.beta import scale_pair
from pyro_vae.errors import InputError, whole_number
from pyro_vae.infer import capture
from pyro_vae.infer import program as recorded
from pyro_vae.infer.bounds import Bound, BoundTerms
from pyro_vae.infer.capture import CannotCaptureError, NothingToLearnError
from pyro_vae.infer.program import Program, Programs, Signature, State
from pyro_vae.infer.surroundings import Surroundings, look_around
from pyro_vae.pair.functions import modules_of
from pyro_vae.pair.state import Remembered, Snapshot, accumulating_leaves, with_submodules


class Call(NamedTuple):
    """One call of an objective: the pair and what it is given."""

    model: Any
    guide: Any
    args: Any
    kwargs: Any

    def scaled(self, beta: float | Tensor) -> Call:
        """Return the call with beta on the latent terms of both functions."""
        return Call(*scale_pair(self.model, self.guide, beta), self.args, self.kwargs)


class Reference(NamedTuple):
    """What one step gives by the code that is the standard a program is held to."""

    summary: Tensor
    gradients: dict[Tensor, Tensor]
    sites: tuple[str, ...]
    parameters: dict[str, dict[str, Any]]


class StepProgram(Program):
    """A captured step: a graph from (beta, arguments, state) to (summary, gradients)."""

    def __init__(
        self, signature: Signature, state: State, around: Surroundings, reference: Reference
    ) -> None:
        super().__init__(signature, state, around)
        self.sites = reference.sites
        position = {tensor: i for i, tensor in enumerate(self.state.tensors)}
        self.leaves = [position[leaf] for leaf in reference.gradients]
        self.device = self.state.tensors[self.leaves[0]].device
        dtypes = {self.state.tensors[i].dtype for i in self.leaves}
        # A float64 number would change the dtype of what it meets.
        self._scalar_dtype = torch.float64 if torch.float64 in dtypes else torch.get_default_dtype()
        self._copied: list[int] = []
        self.calls = 0
        sites = reference.parameters.items()
        self._messages = {name: {**site, "args": (name,)} for name, site in sites}
        values = {name: site["value"] for name, site in self._messages.items()}
        self._constrained = {n for n, value in values.items() if value.unconstrained() is not value}

    def scalars(self, numbers: Sequence[float]) -> list[Tensor]:
        """Return numbers as inputs of the graph."""
        return [_full((), each, dtype=self._scalar_dtype, device=self.device) for each in numbers]

    def outputs(
        self, given: Sequence[Tensor], tensors: Sequence[Tensor], *, keep: bool = True
    ) -> list[Tensor]:
        """Run the step: summary and gradients, the caller's own only if told to ``keep`` them."""
        outputs = super().outputs(given, tensors, keep=keep)
        for i in self._copied:
            outputs[i + 1] = torch.empty_like(tensors[self.leaves[i]]).copy_(outputs[i + 1])
        return outputs

    def note_layouts(
        self, values: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Find the gradients to be copied: those that share memory or aren't laid out as the leaf."""
        # Those of ``backward`` may be changed in place, and fused optimisers rely on the layout.
        used = {value.untyped_storage().data_ptr() for value in values}
        for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            storage = gradient.untyped_storage().data_ptr()
            if storage in used or gradient.stride() != leaf.stride():
                self._copied.append(i)
            used.add(storage)

    def emit(self, traces: Sequence[Any]) -> None:
        """Add the parameter sites to the traces that stand around the step, as the pair would."""
        store = pyro.get_param_store()
        for name, message in self._messages.items():
            if name in self._constrained:
                value = store[name]
            else:
                value = store._params[name]
                if "unconstrained" not in value.__dict__:
                    value.unconstrained = weakref.ref(value)
            message["value"] = value
            for trace in traces:
                trace.add_node(name, **message)


class Step(NamedTuple):
    """What a captured step gave."""

    program: StepProgram
    leaves: list[Tensor]
    summary: Tensor
    gradients: list[Tensor]
    validate: Callable[[], None]  # raises what the standard raises for a step that it refuses


_full = functools.lru_cache(maxsize=64)(torch.full)


class Engine:
    """The captured steps of an objective, over pairs and signatures: summaries and gradients."""

    objective: Bound
    names: tuple[str, ...] = ("loss",)  # of the summary, for messages
    rounding: tuple[torch.dtype, ...] = ()  # precisions computed in besides the gradients'
    warns = True  # of a pair that can't be captured; else ``reasons`` tells
    validates = False  # what is observed: the summary then ends with 1 where it can't be
    keeps_outputs = True  # beyond the next step, which under CUDA graphs costs a copy

    def __init__(
        self, name: str, *, backend: str | Callable[..., Any] = "inductor", compile_after: int = 0,
        mode: str | None = None, verify_every: int | None = None,
    ) -> None:  # fmt: skip
        if verify_every is not None and verify_every < 1:
            raise InputError(f"verify_every must be at least 1, got {verify_every}: use None")
        self.compile_after = whole_number("compile_after", compile_after)
        self.name, self.backend, self.mode, self.verify_every = name, backend, mode, verify_every
        self.reasons: list[str] = []
        self._pairs: Remembered[Programs[StepProgram]] = Remembered()
        self._beta = 1.0

    def bound(self) -> Bound:
        """Return the bound that is captured, its options as they stand."""
        return self.objective

    def _key(self) -> Hashable:
        """The bound's plain attributes: a changed one asks for a graph of its own."""
        plain = (bool, int, float, str, type(None))
        return tuple((k, v) for k, v in vars(self.bound()).items() if isinstance(v, plain))

    def _terms(self, call: Call) -> BoundTerms:
        """Return the terms, without reading any value in Python."""
        return self.bound().terms(*call)

    def _standard_terms(self, call: Call) -> BoundTerms:
        """Return the same by the code that is the standard."""
        return self._terms(call)

    def _finish(
        self, terms: BoundTerms, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summary, and the gradients that are handed over."""
        return terms.loss[None], gradients

    def _hand_over(self, step: Step) -> Any:
        """Give the gradients to the leaves and return what the eager step returns."""
        raise NotImplementedError

    @property
    def beta(self) -> float:
        """Weight of the latent sites' terms, an input of every graph: assign it to change it."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        if not (0.0 <= float(value) < math.inf):
            raise InputError(f"beta must be finite and at least 0, got {value}")
        self._beta = float(value)

    @property
    def num_graphs(self) -> int:
        """How many captured steps are held, over all pairs and signatures."""
        return sum(len(pair.kept) for pair in self._pairs.values())

    def take(self, call: Call, eager: Callable[[], Any]) -> Any:
        """Take a captured step, or else the eager one; then capture it for the next time."""
        pair = self._pairs.get(call.model, call.guide)
        if pair is None:
            names = [repr(getattr(f, "__qualname__", type(f).__name__)) for f in call[:2]]
            pair = Programs(partial(self._say, "model {} with guide {}".format(*names)))
            self._pairs.keep(pair, call.model, call.guide)
        if pair.refused or not torch.is_grad_enabled():
            return eager()
        inputs: list[Tensor] = []
        try:
            capture.refuse_handlers()
            signature = recorded.sign(self._key(), (call.args, call.kwargs), inputs, pair.numbers)
        except CannotCaptureError as reason:
            pair.report(reason)
            return eager()
        found = pair.find(signature)
        if found is None:
            return self._take_then_capture(pair, call, eager)
        program, values, tensors = found
        given = [*program.scalars([self._beta, *values]), *inputs]
        program.calls += 1
        every = self.verify_every
        try:
            if program.calls == self.compile_after and self._compiles_later(program):
                self._compile(pair, program, call, given, self.backend)
            elif program.calls & (program.calls - 1) == 0 or (every and program.calls % every == 0):
                self._check(program, call, given)
        except CannotCaptureError as reason:
            pair.refuse(reason)
            return eager()
        pair.last = signature
        summary, *gradients = program.outputs(given, tensors, keep=self.keeps_outputs)
        leaves = [tensors[i] for i in program.leaves]
        validate = partial(self._validate, program, call)
        return self._hand_over(Step(program, leaves, summary, gradients, validate))

    def _validate(self, program: StepProgram, call: Call) -> None:
        """Run the standard with its own checks; generators and buffers stay as they are."""
        if is_validation_enabled():
            with Snapshot(program.state.alive()).put_back(), poutine.block():
                self._standard_terms(call.scaled(self._beta))

    def _say(self, title: str, reason: str) -> None:
        self.reasons.append(reason)
        if self.warns:
            warnings.warn(f"{self.name} runs {title} eagerly: {reason}", stacklevel=5)

    def _take_then_capture(
        self, pair: Programs[StepProgram], call: Call, eager: Callable[[], Any]
    ) -> Any:
        """Take the eager step, which also creates parameters, then capture the next ones."""
        found: dict[nn.Module, None] = {}
        with register_module_forward_pre_hook(lambda module, _: found.setdefault(module)):
            result = eager()
        # Pyro may have found out max_plate_nesting meanwhile, and synchronised replaced parameters.
        inputs: list[Tensor] = []
        signature = recorded.sign(self._key(), (call.args, call.kwargs), inputs, pair.numbers)
        known = pair.refused or signature in pair.impossible or pair.find(signature)
        if known or not pair.wants(signature):
            return result
        modules = with_submodules([*found, *modules_of(call.model, call.guide)])
        capture_call = partial(self._capture, call, pair, modules, signature, inputs)
        try:
            try:
                pair.add(capture_call())
            except CannotCaptureError:  # with some number as an input, which it can be no more
                if not pair.varied - pair.unfit:
                    raise
                pair.unfit |= pair.varied
                pair.add(capture_call())
        except NothingToLearnError as reason:
            pair.impossible[signature] = False
            pair.report(f"{reason} (in a call with these arguments)")
        except CannotCaptureError as reason:
            pair.refuse(reason)
        except Exception as error:  # the step itself is done, and right
            pair.refuse(f"its capture failed with {type(error).__name__}: {error}")
        return result

    def _capture(
        self, call: Call, pair: Programs[StepProgram], modules: Sequence[nn.Module],
        signature: Signature, inputs: list[Tensor],
    ) -> StepProgram:  # fmt: skip
        """Record the step's graph, compile it and hold it against the reference."""
        capture.refuse_pair(call.guide, modules)
        roots = [pair.numbers, *call[:2], *modules, *self._roots()]
        validates, before = self.validates, Snapshot(modules)  # recording turns Pyro's checks off
        with before.put_back(), capture.conditions():
            earlier = look_around(roots)
            reference = self._reference(call)
            capture.refuse_untraceable(before)
            around = Surroundings(earlier, look_around(roots))
            leaves = list(reference.gradients)
            state = State(modules, reference.parameters, leaves)
            for leaf, gradient in reference.gradients.items():
                if gradient.layout is not torch.strided:
                    raise CannotCaptureError(f"the gradient of {state.name(leaf)!r} is sparse")
                if recorded.hooked(leaf):
                    raise CannotCaptureError(f"a hook is registered on {state.name(leaf)!r}")
            chosen = pair.choose_inputs(signature, around)
            program = StepProgram(signature, state, around, reference)
            numbers = (around.numbers[key][1] for key in chosen)
            beta, *scalars = program.scalars([self._beta, *numbers])
            # Fresh aliases: a tensor both passed and closed over is then told apart by identity.
            aliases = [tensor.detach() for tensor in inputs]
            sites = capture.Sites()

            def step() -> tuple[Tensor, ...]:
                args, kwargs = capture.replace((call.args, call.kwargs), iter(aliases), pair.numbers)
                with sites:
                    terms = self._terms(call._replace(args=args, kwargs=kwargs).scaled(beta))
                summary, finished = self._finish(terms, torch.autograd.grad(terms.surrogate, leaves))
                if validates:
                    summary = torch.cat([summary, sites.outside(summary)[None]])
                return (summary, *finished)

            with around.hold(chosen, scalars):
                program.record(step, [beta, *scalars, *aliases])
            around.refuse_changed([*program.state.tensors, *program.constants])
            around.settle(chosen, program.constants)
            capture.refuse_changed_sites(reference.sites, tuple(sites.names))
        backend = "eager" if self._compiles_later(program) else self.backend
        self._compile(pair, program, call, [beta, *scalars, *inputs], backend)
        return program

    def _compiles_later(self, program: StepProgram) -> bool:
        """Tell whether the first steps run the graph as it was recorded."""
        return self.compile_after > 0 and self.backend == "inductor" and program.device.type == "cpu"

    def _compile(
        self, pair: Programs[StepProgram], program: StepProgram, call: Call, given: list[Tensor],
        backend: str | Callable[..., Any],
    ) -> None:  # fmt: skip
        """Compile a recorded step and hold it against the reference."""
        mode = self.mode or ("reduce-overhead" if program.device.type == "cuda" else "default")
        program.compile(backend, mode, lambda: self._check(program, call, given), pair.report)

    def _roots(self) -> Sequence[Any]:
        """What a step calls besides the pair."""
        return ()

    def _reference(self, call: Call) -> Reference:
        """One step by the standard's code; refuse what a graph can't hold."""
        sites = capture.Sites()
        with poutine.block(), sites, poutine.trace(param_only=True) as parameters:
            terms = self._standard_terms(call.scaled(self._beta))
        if sites.problem:
            raise CannotCaptureError(sites.problem)
        nodes = parameters.trace.nodes
        if not nodes or not getattr(terms.surrogate, "requires_grad", False):
            raise NothingToLearnError("its loss depends on no parameter that Pyro knows of")
        gradients: Sequence[Tensor]
        leaves = accumulating_leaves(terms.surrogate)
        found = torch.autograd.grad(terms.surrogate, leaves, allow_unused=True)
        used = {leaf: g for leaf, g in zip(leaves, found, strict=True) if g is not None}
        summary, gradients = terms.loss, tuple(used.values())
        if all(gradient.layout is torch.strided for gradient in gradients):  # else to be refused
            with torch.no_grad():
                summary, gradients = self._finish(terms, gradients)
        finished = dict(zip(used, gradients, strict=True))
        return Reference(summary, finished, tuple(sites.names), dict(nodes))

    def _check(self, program: StepProgram, call: Call, given: list[Tensor]) -> None:
        """Compare one step of the program with the reference."""

        def compare(reference: Reference, found: list[Tensor], tensors: list[Tensor]) -> None:
            capture.refuse_changed_sites(program.sites, reference.sites)
            leaves, (summary, *gradients) = [tensors[i] for i in program.leaves], found
            if set(leaves) != set(reference.gradients):
                raise CannotCaptureError("the set of parameters that get a gradient changes")
            expected = [reference.gradients[leaf] for leaf in leaves]
            tolerance = recorded.tolerance_of([g.dtype for g in expected] + [*self.rounding])
            for name, value, standard in zip(self.names, summary, reference.summary, strict=False):
                if not recorded.are_close(value, standard, tolerance):
                    raise CannotCaptureError(
                        f"its {name} {float(value):.6g} differs from the eager {float(standard):.6g}"
                    )
            # A gradient that vanishes in exact arithmetic holds nothing but rounding of larger ones.
            finite = (gradient.double().nan_to_num(0.0, 0.0, 0.0) for gradient in expected)
            floor = 1e-3 * math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in finite))
            for leaf, gradient, standard in zip(leaves, gradients, expected, strict=True):
                if not recorded.are_close(gradient, standard, tolerance, floor=floor, whole=True):
                    name = program.state.name(leaf)
                    raise CannotCaptureError(f"its gradient of {name!r} differs from the eager one")
            program.note_layouts([*given, *tensors], leaves, gradients)

        recorded.verify(program, given, lambda: self._reference(call), compare)
