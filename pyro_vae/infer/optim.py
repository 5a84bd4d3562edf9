"""One torch optimiser over all parameters: a drop-in for Pyro's optimiser-per-tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pyro_vae.errors import InputError

# Devices on which an optimiser's fused kernel exists in every supported release of torch.
FUSED_DEVICES = {
    torch.optim.Adam: ("cpu", "cuda"),
    torch.optim.AdamW: ("cpu", "cuda"),
    torch.optim.SGD: ("cpu", "cuda"),
    torch.optim.Adagrad: ("cpu",),
}

# Options that choose an implementation and leave the numbers alone; not part of a saved state.
IMPLEMENTATION_OPTIONS = frozenset({"fused", "foreach", "capturable", "differentiable", "params"})

# What torch is told to run at the steps of all optimisers.
_EVERY = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)

# Before the number of a tensor that isn't in Pyro's store, which no name there begins with.
_UNNAMED = "\0"


class FusedOptim(PyroOptim):
    """A ``PyroOptim`` that holds a single torch optimiser over all parameters.

    ``pyro.optim.Adam`` makes one optimiser per tensor and steps them one by one.  Here all
    parameters are stepped by one call, with torch's fused kernel where optimiser and device have
    one.  Parameters are ordered by their name in Pyro's store, so that two processes agree.
    Parameters whose options are equal share a group; one that first appears later joins the group
    of its options, at that group's present learning rate, or opens a new group; one that no longer
    appears keeps its state.  A parameter replaced in the store under its old name starts afresh,
    as it does in Pyro.

    After a step the gradients of the parameters it was given are None.  Stock Pyro leaves zeros, by
    which Adam's momentum and weight decay go on moving a parameter that a later step is given and
    does not use, as where two losses share an optimiser; so does this one, unless told to
    ``keep_none``.  ``optim_objs`` holds the one optimiser once: a loop over its values changes
    a learning rate once.

    The state has the format of ``PyroOptim``, parameter name to the state dict of an optimiser over
    that one parameter, and loads from and into ``pyro.optim`` optimisers. A tensor that is not in
    Pyro's store is stepped too; it keeps its gradient and has no state there.

    Args:
        optim_constructor: a ``torch.optim.Optimizer`` class, or a function that is called as one is.
        optim_args: its options, or a callable from the parameter's name (as in
            ``nn.Module.named_parameters``, behind the Pyro module's name) to its options.
        clip_args: ``{"clip_norm": ..., "clip_value": ...}`` or a callable from (module name,
            parameter name) to such a dict.  As in Pyro the norm is that of each parameter's own
            gradient, not the global one; the norm is clipped before the values.
        scheduler: a class of ``torch.optim.lr_scheduler``; call :meth:`step` when it should move.
        scheduler_args: the scheduler's options besides the optimiser.
        keep_none: leave a parameter alone in a step that gives it no gradient.

    Raises:
        InputError: for clipping options other than the two above, for an optimiser that needs a
            closure, or if a parameter with new options appears after a schedule began.

    Example:
        >>> optim = FusedOptim(torch.optim.Adam, {"lr": 1e-3},
        ...                    scheduler=torch.optim.lr_scheduler.ExponentialLR,
        ...                    scheduler_args={"gamma": 0.9})
    """

    def __init__(
        self, optim_constructor: Callable[..., torch.optim.Optimizer],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, float] | Callable[[str, str], dict[str, float]] | None = None, *,
        scheduler: Callable[..., Any] | None = None, scheduler_args: dict[str, Any] | None = None,
        keep_none: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(optim_constructor, optim_args, clip_args)
        if optimizer_class(optim_constructor) is torch.optim.LBFGS:
            raise InputError("LBFGS needs a closure, which SVI does not give: choose another")
        self._scheduler_constructor = scheduler
        self._scheduler_args = dict(scheduler_args or {})
        self.keep_none = keep_none
        self._had_gradient: set[Tensor] = set()
        self._reset()

    def _reset(self) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self.optim_objs: dict[Tensor, Any] = {}
        self._names: dict[Tensor, str] = {}
        self._outside: set[Tensor] = set()  # tensors that aren't in Pyro's store, stepped by hand
        # What each group was opened with: its options, and those of a loaded state.
        self._group_options: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
        self._clipped: dict[tuple[float | None, float | None], list[Tensor]] = {}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step the given parameters, then set the gradients of those in Pyro's store to None."""
        given = params if isinstance(params, set) else set(params)
        if not given:
            return
        if not given <= self._names.keys():
            self._add([param for param in given if param not in self._names])
        others = self._names.keys() - given if len(given) < len(self._names) else ()
        hidden = [(param, param.grad) for param in others if param.grad is not None]
        for param, _ in hidden:
            param.grad = None
        if not self.keep_none:
            for param in given:
                if param.grad is not None:
                    self._had_gradient.add(param)
                elif param in self._had_gradient:
                    param.grad = torch.zeros_like(param)
        self._clip()
        assert self.optimizer is not None
        if args or kwargs or not step_by_kernel(self.optimizer):
            self.optimizer.step(*args, **kwargs)
        for param in given - self._outside if self._outside else given:
            param.grad = None
        for param, gradient in hidden:
            param.grad = gradient

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move the learning-rate schedule, as ``PyroLRScheduler.step`` does."""
        if self.scheduler is not None:
            self.scheduler.step(*args, **kwargs)

    def _add(self, params: list[Tensor]) -> None:
        store, named = pyro.get_param_store(), {}
        for number, param in enumerate(params, start=len(self._names)):
            name = store.param_name(param)
            if name is None:
                name = f"{_UNNAMED}{number}"
                self._outside.add(param)
            named[name] = param
        for name, param in sorted(named.items()):
            self._drop_replaced(name)
            self._names[param] = name
            self._place(name, param)
            key = self._clip_key(param)
            if key != (None, None):
                self._clipped.setdefault(key, []).append(param)
        assert self.optimizer is not None
        if self.scheduler is None and self._scheduler_constructor is not None:
            self.scheduler = self._scheduler_constructor(self.optimizer, **self._scheduler_args)
        self._consume_waiting_state()
        self.optim_objs = {next(iter(self._names)): self.scheduler or self.optimizer}

    def _drop_replaced(self, name: str) -> None:
        """Forget the tensor that had this name before."""
        old = next((param for param, known in self._names.items() if known == name), None)
        if old is None or self.optimizer is None:
            return
        del self._names[old]
        self._had_gradient.discard(old)
        self.optimizer.state.pop(old, None)
        lists = [group["params"] for group in self.optimizer.param_groups]
        for tensors in [*lists, *self._clipped.values()]:
            tensors[:] = [tensor for tensor in tensors if tensor is not old]

    def _place(self, name: str, param: Tensor) -> None:
        """Put a parameter into the group of its options."""
        # An optimiser of its own for a moment: some fill a parameter's state in the constructor.
        own = self._construct(param, self._get_optim_args(param))
        options = {k: v for k, v in own.param_groups[0].items() if k != "params"}
        waiting = self._state_waiting_to_be_consumed.get(name)
        loaded = None if waiting is None else _options(waiting)
        groups = enumerate(self._group_options)
        index = next(
            (i for i, (its, known) in groups if its == options and loaded in (None, known)), None
        )
        if self.optimizer is None:
            self.optimizer = own
        elif index is not None:
            self.optimizer.param_groups[index]["params"].append(param)
        elif self.scheduler is not None:
            raise InputError(
                f"parameter {name!r} has options of its own and appeared after the schedule began: "
                "run the pair once before the first step of the schedule"
            )
        else:
            self.optimizer.add_param_group(own.param_groups[0])
        if index is None:
            self._group_options.append((options, loaded))
        self.optimizer.state.update(own.state)

    def _construct(self, param: Tensor, options: dict[str, Any]) -> torch.optim.Optimizer:
        devices = FUSED_DEVICES.get(optimizer_class(self.pt_optim_constructor), ())
        own = getattr(self.pt_optim_constructor, "keywords", {})  # of a functools.partial
        chosen = {*options, *own} & IMPLEMENTATION_OPTIONS
        if not chosen and param.device.type in devices and param.is_floating_point():
            options = {**options, "fused": True}
        own = self.pt_optim_constructor([param], **options)
        own.param_groups[:] = [group for group in own.param_groups if group["params"]]
        return own

    def _clip_key(self, param: Tensor) -> tuple[float | None, float | None]:
        options = dict(self._get_grad_clip_args(param))
        key = (options.pop("clip_norm", None), options.pop("clip_value", None))
        if options:
            raise InputError(f"expected clip_norm and clip_value in clip_args, got {list(options)}")
        return key

    def _clip(self) -> None:
        for (norm, value), params in self._clipped.items():
            gradients = [param.grad for param in params if param.grad is not None]
            if norm is not None and gradients:
                # torch.nn.utils.clip_grad_norm_ of each tensor by itself, all in a few launches.
                factors = torch._foreach_norm(gradients)
                torch._foreach_add_(factors, 1e-6)
                torch._foreach_reciprocal_(factors)
                torch._foreach_mul_(factors, norm)
                torch._foreach_clamp_max_(factors, 1.0)
                torch._foreach_mul_(gradients, factors)
            if value is not None and gradients:
                torch.nn.utils.clip_grad_value_(params, value)

    def get_state(self) -> dict[str, Any]:
        """State of every parameter by name, in the format of ``PyroOptim``."""
        result = dict(self._state_waiting_to_be_consumed)
        if self.optimizer is None:
            return result
        packed = self.optimizer.state_dict()
        for name, index, packed_group in self._packed(packed):
            if name[0] == _UNNAMED:
                continue  # nothing to know it by in another process
            state: dict[str, Any] = {
                "state": {0: packed["state"][index]} if index in packed["state"] else {},
                "param_groups": [{**packed_group, "params": [0]}],
            }
            if self.scheduler is not None:
                state = {"scheduler": self.scheduler.state_dict(), "optimizer": state}
            result[name] = state
        return result

    def _packed(self, packed: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Each parameter's name, its number in the optimiser's state dict, and its group there."""
        assert self.optimizer is not None
        groups = zip(self.optimizer.param_groups, packed["param_groups"], strict=True)
        for group, packed_group in groups:
            for param, index in zip(group["params"], packed_group["params"], strict=True):
                yield self._names[param], index, packed_group

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; it is applied when its parameters are next stepped."""
        waiting = {**self.get_state(), **state_dict}
        self._reset()
        self._state_waiting_to_be_consumed = waiting

    state_dict, load_state_dict = get_state, set_state

    def _consume_waiting_state(self) -> None:
        """Load what waits for the parameters now present."""
        kept, known = self._state_waiting_to_be_consumed, self._names.values()
        waiting = {name: kept.pop(name) for name in known if name in kept}
        if not waiting:
            return
        assert self.optimizer is not None
        packed = self.optimizer.state_dict()
        for name, index, packed_group in self._packed(packed):
            if (state := waiting.get(name)) is None:
                continue
            if self.scheduler is not None and "scheduler" in state:
                self.scheduler.load_state_dict(state["scheduler"])
            own = state.get("optimizer", state)
            if own["state"]:
                packed["state"][index] = own["state"][0]
            packed_group.update(_options(state))
        self.optimizer.load_state_dict(packed)


@torch.no_grad()
def step_by_kernel(optimizer: torch.optim.Optimizer, found_inf: Tensor | None = None) -> bool:
    """Take a step of a fused Adam by torch's kernel alone; tell whether that could be done.

    Its own method looks anew for hooks, devices and dtypes, which takes longer than a small step.
    """
    own = vars(optimizer)  # a scheduler or a user may have put another method there
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or "step" in own:
        return False
    launches: list[tuple[dict[str, Any], list[Any]]] = []
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        gradients, states = [p.grad for p in params], [optimizer.state[p] for p in params]
        kinds = {(t.dtype, t.device, t.layout) for t in (*params, *gradients) if t is not None}
        is_plain = group["fused"] and not group["amsgrad"] and type(group["lr"]) is float
        watched = [*_EVERY, own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]]
        if not (is_plain and len(kinds) == 1 and all(states)) or any(watched):
            return False
        moments = [[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq")]
        launches.append((group, [params, gradients, *moments, [], [s["step"] for s in states]]))
    for group, tensors in launches:
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        (beta1, beta2), steps = group["betas"], tensors[-1]
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        torch._foreach_add_(steps, 1)
        kernel(*tensors, beta1=beta1, beta2=beta2, found_inf=found_inf, **options)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
    return True


def optimizer_class(optimizer: Any) -> Any:
    """Return the class that is called, behind functools.partial too; None of any other function."""
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    return optimizer if isinstance(optimizer, type) else None


def _options(state: dict[str, Any]) -> dict[str, Any]:
    """Options in a parameter's state, the learning rate the schedule had reached among them."""
    group = state.get("optimizer", state)["param_groups"][0]
    return {k: v for k, v in group.items() if k not in IMPLEMENTATION_OPTIONS}
