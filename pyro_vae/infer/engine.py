"""Captured steps of any bound: found again, replayed, or captured after an eager step."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.beta import scale_latents
from pyro_vae.errors import InputError
from pyro_vae.infer import capture
from pyro_vae.infer.capture import CannotCaptureError
from pyro_vae.infer.estimators import Estimator
from pyro_vae.infer.program import (
    Call,
    Pair,
    Program,
    Reference,
    State,
    parts_of,
    refuse_difference,
    refuse_different_buffers,
    refuse_gradients,
)
from pyro_vae.pair.functions import modules_of
from pyro_vae.pair.state import Snapshot, accumulating_leaves, with_submodules

Result = TypeVar("Result")


class _Sites(Messenger):
    """Notes the sites of a run, and what is drawn without a pathwise gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.problem: str | None = None

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        self.names.append(name)
        if self.problem or message["is_observed"] or site_is_subsample(message):
            return
        if message["infer"].get("enumerate"):
            self.problem = f"site {name!r} is enumerated"
        elif not message["done"] and not message["fn"].has_rsample:
            self.problem = f"site {name!r} is not reparameterised"


def scaled(call: Call, beta: float | Tensor) -> Call:
    """Return the call with beta on the latent terms of both functions."""
    model = scale_latents(call.model, beta)
    guide = scale_latents(call.guide, beta, is_guide=True)
    return Call(model, guide, call.args, call.kwargs)


class Replay(NamedTuple):
    """A step taken by a graph: its gradients wait to be handed to the leaves."""

    program: Program
    leaves: list[Tensor]
    summary: Tensor
    gradients: list[Tensor]


class Engine:
    """The captured steps of one estimator, over pairs and signatures.

    Args:
        estimator: what a step computes.
        name: who runs, in messages.
        backend: backend of ``torch.compile``, or ``"eager"`` for the graph as it was recorded.
        mode: mode of ``torch.compile``; None takes CUDA graphs where there is CUDA.
        verify_every: repeat the comparison with the reference every so many steps.
        warn: whether to warn of a pair that can't be captured; else ``reasons`` tells.
        keep_outputs: whether results must outlive the next step, which under CUDA graphs costs a
            copy.
    """

    def __init__(
        self,
        estimator: Estimator,
        *,
        name: str,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        verify_every: int | None = None,
        warn: bool = True,
        keep_outputs: bool = True,
    ) -> None:
        if verify_every is not None and verify_every < 1:
            raise InputError(f"verify_every must be at least 1, got {verify_every}: use None")
        self.estimator, self.name = estimator, name
        self.backend, self.mode, self.verify_every = backend, mode, verify_every
        self.warn, self.keep_outputs = warn, keep_outputs
        self.reasons: list[str] = []
        self._pairs: dict[tuple[int, ...], Pair] = {}
        self._beta = 1.0
        self._beta_tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def beta(self) -> float:
        """Weight of the latent sites' terms, an input of every graph."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        if not (0.0 <= float(value) < math.inf):
            raise InputError(f"beta must be finite and at least 0, got {value}")
        if value != self._beta:
            self._beta = float(value)
            self._beta_tensors.clear()

    @property
    def num_graphs(self) -> int:
        """How many captured steps are held, over all pairs and signatures."""
        return sum(len(pair.programs) for pair in self._pairs.values())

    def outcome(self, choice: str) -> str:
        """Say in a line what became of the choice to capture."""
        if not self.reasons:
            return choice
        after = "" if self.num_graphs else "eager after all: "
        return f"{choice}; {after}{'; '.join(self.reasons)}"

    def step(self, call: Call, eager: Callable[[], Result]) -> Replay | Result:
        """Take a captured step, or else the eager one; then capture it for the next time.

        Args:
            call: the pair and what it is given.
            eager: takes the step by itself, gradients included.
        """
        pair = self._pair(call.model, call.guide)
        if pair.refused or not torch.is_grad_enabled():
            return eager()
        inputs: list[Tensor] = []
        try:
            capture.refuse_handlers()
            signature = self._signature(call, inputs)
        except CannotCaptureError as reason:
            pair.report(reason)
            return eager()
        for program in pair.programs:
            if program.signature == signature:
                tensors = program.state.current()
                due = self.verify_every is not None and program.due(self.verify_every)
                if tensors is None or (due and not self._holds(pair, program, call)):
                    continue
                pair.last = signature
                return self._replay(program, tensors, inputs)
        return self._eager_then_capture(pair, call, eager)

    def _replay(self, program: Program, tensors: list[Tensor], inputs: list[Tensor]) -> Replay:
        values = [self._beta_tensor(program.device), *inputs, *tensors]
        summary, gradients = program.outputs(values, keep=self.keep_outputs)
        return Replay(program, [tensors[i] for i in program.leaves], summary, gradients)

    def _signature(self, call: Call, inputs: list[Tensor]) -> tuple[Hashable, Hashable]:
        """All that a graph depends on besides the pair's state; shapes stand apart."""
        structure = capture.describe((call.args, call.kwargs), inputs)
        setting = (torch.get_default_dtype(), capture.autocast_dtypes())
        context = (self.estimator.key(), *setting, structure)
        return context, tuple((tensor.shape, tensor.stride()) for tensor in inputs)

    def _beta_tensor(self, device: torch.device) -> Tensor:
        key = (device, torch.get_default_dtype())
        if key not in self._beta_tensors:
            self._beta_tensors[key] = torch.full((), self._beta, device=device)
        return self._beta_tensors[key]

    # --- the first step of a signature ---

    def _eager_then_capture(
        self, pair: Pair, call: Call, eager: Callable[[], Result]
    ) -> Replay | Result:
        """Take the eager step, which also creates parameters, then capture the next ones."""
        found: dict[nn.Module, None] = {}
        with capture.called_modules(found):
            result = eager()
        # Pyro may have found out max_plate_nesting meanwhile, and synchronised replaced parameters.
        inputs: list[Tensor] = []
        signature = self._signature(call, inputs)
        known = [program for program in pair.programs if program.signature == signature]
        if pair.refused or any(program.state.current() for program in known):
            return result
        if pair.wants(signature):
            closed_over = map(modules_of, (call.model, call.guide))
            modules = with_submodules([*found, *itertools.chain(*closed_over)])
            try:
                program = self._capture(call, modules, signature, inputs)
                self._compile(pair, program, call)
                pair.programs.insert(0, program)
            except CannotCaptureError as reason:
                pair.refuse(reason)
            except Exception as error:  # the step itself is done, and right
                pair.refuse(f"its capture failed with {type(error).__name__}: {error}")
        return result

    def _capture(
        self, call: Call, modules: Sequence[nn.Module], signature: Any, inputs: list[Tensor]
    ) -> Program:
        """Record the step's graph and hold it against the reference."""
        capture.refuse_pair(call.guide, modules)
        before = Snapshot(modules)
        with before.put_back(), capture.conditions():
            reference = self._reference(call)
            capture.refuse_untraceable(before)
            state = State(modules, list(reference.parameters), list(reference.gradients))
            refuse_gradients(state, reference)
            leaves = list(reference.gradients)
            beta = self._beta_tensor(leaves[0].device)
            # Fresh aliases: a tensor both passed and closed over is then told apart by identity.
            aliases = [tensor.detach() for tensor in inputs]
            sites = _Sites()

            def step() -> tuple[Tensor, ...]:
                arguments = capture.replace_tensors((call.args, call.kwargs), iter(aliases))
                with sites:
                    terms = self.estimator.terms(
                        scaled(Call(call.model, call.guide, *arguments), beta)
                    )
                gradients = torch.autograd.grad(terms.surrogate, leaves)
                summary, finished = self.estimator.finish(terms, gradients)
                return (summary, *finished)

            graph, closed_over = capture.trace_graph(step, [beta, *aliases, *state.tensors])
            capture.refuse_changed_sites(reference.sites, tuple(sites.names))
            state.add_fixed(closed_over)
            program = Program(signature, state, graph, reference)
        self._check(program, call)
        return program

    def _reference(self, call: Call) -> Reference:
        """One step by the standard's code; refuse what a graph can't hold."""
        sites = _Sites()
        with poutine.block(), sites, poutine.trace(param_only=True) as parameters:
            terms = self.estimator.reference(scaled(call, self._beta))
        if sites.problem:
            raise CannotCaptureError(sites.problem)
        nodes = parameters.trace.nodes
        if not nodes or not getattr(terms.surrogate, "requires_grad", False):
            raise CannotCaptureError("no parameter that Pyro knows of requires a gradient")
        gradients: Sequence[Tensor]
        leaves = accumulating_leaves(terms.surrogate)
        found = torch.autograd.grad(terms.surrogate, leaves, allow_unused=True)
        used = {leaf: g for leaf, g in zip(leaves, found, strict=True) if g is not None}
        if any(gradient.layout is not torch.strided for gradient in used.values()):
            summary, gradients = terms.loss, tuple(used.values())  # refused by the caller, by name
        else:
            with torch.no_grad():
                summary, gradients = self.estimator.finish(terms, tuple(used.values()))
        return Reference(
            summary, dict(zip(used, gradients, strict=True)), tuple(sites.names), dict(nodes)
        )

    def _compile(self, pair: Pair, program: Program, call: Call) -> None:
        """Hand the graph to the backend; without one it runs operator by operator."""
        if self.backend == "eager":
            return
        options: dict[str, Any] | None = None
        if self.backend == "inductor":
            from torch._inductor import list_mode_options

            mode = self.mode or ("reduce-overhead" if program.device.type == "cuda" else "default")
            # Eager torch's random stream: then the compiled graph too can be held against Pyro.
            options = {**list_mode_options(mode), "fallback_random": True}
        compiled = torch.compile(
            program.graph, backend=self.backend, fullgraph=True, dynamic=False, options=options
        )
        program.use(compiled, device_graphs=bool(options and options.get("triton.cudagraphs")))
        try:
            self._check(program, call)
        except CannotCaptureError:
            raise
        except Exception as error:
            program.use(program.graph)
            text = " ".join(str(error).split()[:20]) or type(error).__name__
            name = getattr(self.backend, "__name__", self.backend)
            pair.report(f"the backend {name!r} failed ({text}); the captured graph runs uncompiled")

    # --- holding a program against the reference ---

    def _holds(self, pair: Pair, program: Program, call: Call) -> bool:
        """Repeat the comparison; False, and no program from then on, once it fails."""
        try:
            self._check(program, call)
        except CannotCaptureError as reason:
            pair.refuse(reason)
            return False
        return True

    def _check(self, program: Program, call: Call) -> None:
        """Compare one step of the program with the reference on the same generator state."""
        before = Snapshot(program.state.live_modules())
        inputs: list[Tensor] = []
        capture.describe((call.args, call.kwargs), inputs)
        with before.put_back():
            with capture.conditions():
                reference = self._reference(call)
            capture.refuse_changed_sites(program.sites, reference.sites)
            buffers = before.buffer_values()
            before.restore()
            tensors = program.state.current()
            if tensors is None:
                raise CannotCaptureError("the pair changes its parameters' places at every step")
            values = [self._beta_tensor(program.device), *inputs, *tensors]
            summary, gradients = program.outputs(values)
            leaves = [tensors[i] for i in program.leaves]
            own = Reference(summary, dict(zip(leaves, gradients, strict=True)), (), {})
            refuse_difference(program, reference, own, self.estimator.names, self.estimator.rounding)
            refuse_different_buffers(buffers, before.buffer_values())
            program.note_layouts(values, gradients)

    # --- pairs ---

    def _pair(self, model: Any, guide: Any) -> Pair:
        parts = (*parts_of(model), *parts_of(guide))
        key = tuple(id(part) for part in parts)
        pair = self._pairs.get(key)
        if pair is None or not pair.consists_of(parts):
            pairs = self._pairs
            pair = pairs[key] = Pair(parts, lambda _: pairs.pop(key, None), self._say)
        return pair

    def _say(self, title: str, reason: str) -> None:
        self.reasons.append(reason)
        if self.warn:
            warnings.warn(f"{self.name} runs {title} eagerly: {reason}", stacklevel=6)
