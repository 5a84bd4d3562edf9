"""Trace_ELBO whose step is captured once and compiled: a drop-in for Pyro's SVI."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_vae.errors import InputError
from pyro_vae.infer import capture
from pyro_vae.infer.capture import CannotCaptureError
from pyro_vae.infer.objectives import scale_latents
from pyro_vae.infer.pair import modules_of
from pyro_vae.infer.program import (
    Call,
    DeviceLoss,
    Pair,
    Program,
    Reference,
    State,
    accumulate,
    parts_of,
    refuse_difference,
    refuse_different_buffers,
    refuse_gradients,
)

__all__ = ["CompiledTrace_ELBO"]


class CompiledTrace_ELBO(Trace_ELBO):  # noqa: N801 (Pyro's own naming)
    r"""Pyro's ``Trace_ELBO`` with the whole step, loss and gradients, captured once and compiled.

    .. math:: -L = E_q[\log q(z|x)^\beta - \log p(z)^\beta - \log p(x|z)]

    Use it wherever ``Trace_ELBO`` stands: ``SVI(model, guide, optim, CompiledTrace_ELBO())``.  The
    first call of :meth:`loss_and_grads` with a new signature (shapes, dtypes and devices of the
    tensors; values of other arguments; train and ``requires_grad`` flags; autocast, default dtype)
    is Pyro's own step.  It then captures the joint graph of (loss, gradients), compiles it, and
    holds it against Pyro's own loss and gradients on one generator state.  Later calls run the
    graph: they draw fresh noise from torch's generators, in Pyro's order, so a seed gives the same
    run compiled or not, to rounding.  The pair runs a few extra times in the capturing call;
    generators and module buffers are put back.

    A pair that can't be captured faithfully runs as stock Pyro, with one warning that says why:
    control flow on tensor values, a latent site that isn't reparameterised, enumeration, sparse
    gradients, sites that change, hooks on parameters, Python's or NumPy's global random numbers,
    handlers that stand around the step.  What is *baked in* at capture, as it can't be seen: plain
    Python attributes and globals, private NumPy generators, side effects of the pair's code.  Ask
    for ``verify_every`` where these might change.  A batch of another shape that comes once, such
    as the odd last one of an epoch, runs as stock Pyro; when it comes twice in a row it is
    captured too.  Only :meth:`loss_and_grads` is compiled; :meth:`loss` and
    :meth:`differentiable_loss` are Pyro's own, with ``beta`` applied.

    On the CPU the loss comes back as a float.  On an accelerator it is a 0-dim tensor, so that
    nothing waits before the optimiser is launched; ``SVI.step`` turns it into a float.

    Args:
        num_particles: samples per step.  Without ``vectorize_particles`` the graph is unrolled.
        max_plate_nesting: as in ``Trace_ELBO``.
        vectorize_particles: draw the particles in one outer plate.
        beta: weight of the latent sites' terms in model and guide, at least 0.  Assign the
            attribute ``beta`` to change it, every step if need be: it is an input of the graph.
        backend: ``"inductor"``, any other backend of ``torch.compile``, or ``"eager"`` to run the
            captured graph operator by operator, which needs no compiler.
        mode: mode of ``torch.compile``; None takes ``"reduce-overhead"`` (CUDA graphs) where the
            parameters are on a CUDA device and ``"default"`` elsewhere.
        verify_every: repeat the comparison with stock Pyro every so many steps of a graph.
        options: the other options of ``Trace_ELBO``.

    Raises:
        InputError: if ``beta`` is negative or not finite, or ``verify_every`` is less than 1.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_vae.infer import FusedOptim
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     shift = pyro.param("shift", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(shift, 1.0))
        >>> elbo = CompiledTrace_ELBO(backend="eager")  # without: compiled by inductor
        >>> svi = pyro.infer.SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1e-3}), elbo)
        >>> losses = [svi.step(torch.ones(8)) for _ in range(3)]
        >>> elbo.num_graphs
        1
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        *,
        beta: float = 1.0,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        verify_every: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            **options,
        )
        if verify_every is not None and verify_every < 1:
            raise InputError(f"verify_every must be at least 1, got {verify_every}: use None")
        self.backend = backend
        self.mode = mode
        self.verify_every = verify_every
        self._pairs: dict[tuple[int, ...], Pair] = {}
        self._beta_tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._sites: list[str] = []
        self.beta = beta

    @property
    def beta(self) -> float:
        """Weight of the latent sites' terms."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        if not (0.0 <= float(value) < math.inf):
            raise InputError(f"beta must be finite and at least 0, got {value}")
        self._beta = float(value)
        self._scale: float | Tensor = self._beta
        self._beta_tensors.clear()

    @property
    def num_graphs(self) -> int:
        """How many captured steps are held, over all pairs and signatures."""
        return sum(len(pair.programs) for pair in self._pairs.values())

    def _beta_tensor(self, device: torch.device) -> Tensor:
        key = (device, torch.get_default_dtype())
        if key not in self._beta_tensors:
            self._beta_tensors[key] = torch.full((), self._beta, device=device)
        return self._beta_tensors[key]

    # --- the estimator, shared by the eager and the captured step ---

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        if isinstance(self._scale, Tensor) or self._scale != 1.0:
            if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
                raise InputError("beta needs a guide that is a function of its own, got a handler")
            model = scale_latents(model, self._scale)
            guide = scale_latents(guide, self._scale, is_guide=True)
        self._sites = []
        for model_trace, guide_trace in super()._get_traces(model, guide, args, kwargs):
            for trace in (guide_trace, model_trace):
                self._sites += [n for n, s in trace.nodes.items() if s["type"] == "sample"]
            yield model_trace, guide_trace

    def _negative_elbo(self, call: Call) -> tuple[Tensor, Tensor]:
        """The loss, summed in float64 as Pyro's float sum is, and what its gradient is taken of."""
        loss: Any = 0.0
        surrogate: Any = 0.0
        for model_trace, guide_trace in self._get_traces(*call):
            for sign, trace in ((-1.0, model_trace), (1.0, guide_trace)):
                for site in trace.nodes.values():
                    if site["type"] != "sample":
                        continue
                    term = site["log_prob_sum"]
                    wide = term.detach() if term.device.type == "mps" else term.detach().double()
                    loss = loss + sign / self.num_particles * wide
                    if trace is guide_trace:
                        term = site["score_parts"].entropy_term.sum()
                    surrogate = surrogate + sign / self.num_particles * term
        return loss, surrogate

    def _reference(self, call: Call) -> Reference:
        """Loss and gradients by Pyro's own code; refuse what a graph can't hold."""
        loss: Any = 0.0
        surrogate: Any = 0.0
        with poutine.block(), poutine.trace(param_only=True) as parameters:
            for model_trace, guide_trace in self._get_traces(*call):
                capture.refuse_sites(guide_trace)
                value, term = self._differentiable_loss_particle(model_trace, guide_trace)
                loss = loss + value / self.num_particles
                surrogate = surrogate + term / self.num_particles
        nodes = parameters.trace.nodes
        if not nodes or not getattr(surrogate, "requires_grad", False):
            raise CannotCaptureError("no parameter that Pyro knows of requires a gradient")
        leaves = capture.accumulating_leaves(surrogate)
        gradients = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        used = {leaf: g for leaf, g in zip(leaves, gradients, strict=True) if g is not None}
        return Reference(loss, used, tuple(self._sites), dict(nodes))

    # --- the step ---

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Estimate the loss and add its gradient to the parameters' ``grad``.

        Returns:
            The negative ELBO in nats, summed over the batch (a float on the CPU, a 0-dim tensor on
            an accelerator).
        """
        call = Call(model, guide, args, kwargs)
        pair = self._pair(model, guide)
        if pair.refused or not torch.is_grad_enabled():
            return super().loss_and_grads(model, guide, *args, **kwargs)
        inputs: list[Tensor] = []
        try:
            capture.refuse_handlers()
            signature = self._signature((args, kwargs), inputs)
        except CannotCaptureError as reason:
            pair.warn(reason)
            return super().loss_and_grads(model, guide, *args, **kwargs)
        for program in pair.programs:
            if program.signature == signature:
                tensors = program.state.current()
                due = self.verify_every is not None and program.due(self.verify_every)
                if tensors is None or (due and not self._holds(pair, program, call)):
                    continue
                pair.last = signature
                return self._replay(program, tensors, inputs)
        return self._stock_then_capture(pair, call)

    def _signature(self, arguments: Any, inputs: list[Tensor]) -> tuple[Hashable, Hashable]:
        """All that a graph depends on besides the pair's state; shapes stand apart."""
        structure = capture.describe(arguments, inputs)
        particles = (self.num_particles, self.vectorize_particles, self.max_plate_nesting)
        context = (particles, torch.get_default_dtype(), capture.autocast_dtypes(), structure)
        return context, tuple((tensor.shape, tensor.stride()) for tensor in inputs)

    def _replay(self, program: Program, tensors: list[Tensor], inputs: list[Tensor]) -> Any:
        beta = self._beta_tensor(program.device)
        loss, gradients = program.outputs([beta, *inputs, *tensors])
        accumulate([tensors[i] for i in program.leaves], gradients)
        if _PYRO_STACK:
            program.emit([handler.trace for handler in _PYRO_STACK])
        if program.device.type != "cpu":
            return loss.as_subclass(DeviceLoss)
        value = loss.item()
        warn_if_nan(value, "loss")
        return value

    # --- the first step of a signature ---

    def _stock_then_capture(self, pair: Pair, call: Call) -> Any:
        """Take Pyro's own step, which also creates parameters, then capture the next ones."""
        found: dict[nn.Module, None] = {}
        with capture.called_modules(found):
            loss = super().loss_and_grads(call.model, call.guide, *call.args, **call.kwargs)
        # Pyro may have found out max_plate_nesting meanwhile, and synchronised replaced parameters.
        inputs: list[Tensor] = []
        signature = self._signature((call.args, call.kwargs), inputs)
        known = [program for program in pair.programs if program.signature == signature]
        if pair.refused or any(program.state.current() for program in known):
            return loss
        if pair.wants(signature):
            closed_over = map(modules_of, (call.model, call.guide))
            modules = capture.with_submodules([*found, *itertools.chain(*closed_over)])
            try:
                program = self._capture(call, modules, signature, inputs)
                self._compile(pair, program, call)
                pair.programs.insert(0, program)
            except CannotCaptureError as reason:
                pair.refuse(reason)
            except Exception as error:  # the step itself is done, and right
                pair.refuse(f"its capture failed with {type(error).__name__}: {error}")
        return loss

    def _capture(
        self, call: Call, modules: Sequence[nn.Module], signature: Any, inputs: list[Tensor]
    ) -> Program:
        """Record the step's graph and hold it against Pyro's own step."""
        capture.refuse_pair(call.guide, modules)
        before = capture.Snapshot(modules)
        with before.put_back(), capture.conditions():
            reference = self._reference(call)
            before.refuse_untraceable()
            state = State(modules, list(reference.parameters), list(reference.gradients))
            refuse_gradients(state, reference)
            leaves = list(reference.gradients)
            beta = self._beta_tensor(leaves[0].device)
            # Fresh aliases: a tensor both passed and closed over is then told apart by identity.
            aliases = [tensor.detach() for tensor in inputs]

            def step() -> tuple[Tensor, ...]:
                arguments = capture.replace_tensors((call.args, call.kwargs), iter(aliases))
                loss, surrogate = self._negative_elbo(Call(call.model, call.guide, *arguments))
                return (loss, *torch.autograd.grad(surrogate, leaves))

            try:
                self._scale = beta
                graph, closed_over = capture.trace_graph(step, [beta, *aliases, *state.tensors])
            finally:
                self._scale = self._beta
            capture.refuse_changed_sites(reference.sites, tuple(self._sites))
            state.add_fixed(closed_over)
            program = Program(signature, state, graph, reference)
        self._check(program, call)
        return program

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
            pair.warn(f"the backend {name!r} failed ({text}); the captured graph runs uncompiled")

    # --- holding a program against stock Pyro ---

    def _holds(self, pair: Pair, program: Program, call: Call) -> bool:
        """Repeat the comparison; False, and no program from then on, once it fails."""
        try:
            self._check(program, call)
        except CannotCaptureError as reason:
            pair.refuse(reason)
            return False
        return True

    def _check(self, program: Program, call: Call) -> None:
        """Compare one step of the program with Pyro's own on the same generator state."""
        before = capture.Snapshot(program.state.live_modules())
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
            loss, gradients = program.outputs(values)
            leaves = [tensors[i] for i in program.leaves]
            refuse_difference(program, reference, loss, dict(zip(leaves, gradients, strict=True)))
            refuse_different_buffers(buffers, before.buffer_values())
            program.note_layouts(values, gradients)

    # --- pairs ---

    def _pair(self, model: Any, guide: Any) -> Pair:
        parts = (*parts_of(model), *parts_of(guide))
        key = tuple(id(part) for part in parts)
        pair = self._pairs.get(key)
        if pair is None or not pair.consists_of(parts):
            pairs = self._pairs
            pair = pairs[key] = Pair(parts, lambda _: pairs.pop(key, None))
        return pair
