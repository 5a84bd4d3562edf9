"""What a step does with its gradients: optimiser, parameter groups, rates, moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae.errors import InputError, first_line
from pyro_vae.files import checksum_of
from pyro_vae.infer.optim import FusedOptim, optimizer_class, step_by_kernel
from pyro_vae.infer.settings import FitSettings


class Updates:
    """The optimiser of a run, over all parameters at once, and what moves with it step by step."""

    def __init__(self, settings: FitSettings, num_steps: int) -> None:
        self.settings, self._num_steps = settings, num_steps
        self.parameters: dict[str, Tensor] = {}
        self._constructor: Any = settings.optimizer or torch.optim.Adam
        self._optim = FusedOptim(self._constructor, self._options, scheduler=settings.scheduler)
        self._names: list[str] = []  # as the patterns of the groups see them
        self._averages: dict[str, Tensor] = {}
        self._identity = ""
        self.learning_rate: float | Tensor = 0.0  # of the first group, in the step taken last

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser; None before the first parameters are known."""
        return self._optim.optimizer

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters in the order of their names."""
        return [self.parameters[name] for name in sorted(self.parameters)]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def add(self, new: Mapping[str, Tensor]) -> None:
        """Take in parameters by name: at the first step, and whenever Pyro's store has grown."""
        is_first = self.optimizer is None
        try:
            self._optim._add(list(new.values()))
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"expected an optimiser of torch, got: {first_line(error)}") from error
        self.parameters |= new
        if self.settings.ema is not None:
            self._averages |= {name: leaf.detach().clone() for name, leaf in new.items()}
        if is_first:
            for pattern in self.settings.parameter_groups or {}:
                if not any(fnmatchcase(name, pattern) for name in self._names):
                    raise InputError(
                        f"expected parameter_groups by patterns of names, {pattern!r} matches none "
                        f"of {', '.join(self._names[:4])}, ...: write * for any characters"
                    )
            vars(self.optimizer)["_opt_called"] = True  # a first step may be left out: no warning
            kinds = [type(part).__name__ for part in (self.optimizer, self._optim.scheduler)]
            self._identity = checksum_of([kinds, list(map(_numbers, self._groups))], {})

    def _options(self, name: str) -> dict[str, Any]:
        """Return the options of a parameter; of several patterns the later ones count first."""
        self._names.append(name)
        is_class = optimizer_class(self._constructor) is not None
        own = getattr(self._constructor, "keywords", {})  # of a functools.partial
        options = {"lr": self.settings.learning_rate} if is_class and "lr" not in own else {}
        for pattern, values in (self.settings.parameter_groups or {}).items():
            options |= values if fnmatchcase(name, pattern) else {}
        return options

    @torch.no_grad()
    def apply(self, step: int, flag: Tensor) -> None:
        """Let the optimiser take the gradients, unless the flag of what is not finite is 1."""
        optimizer, scheduler = self.optimizer, self._optim.scheduler
        assert optimizer is not None
        if scheduler is None:
            multiplier = self.settings.multiplier_at(step, self._num_steps)
            for group in self._groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
        self.learning_rate = self._groups[0]["lr"]
        if isinstance(optimizer, torch.optim.Adam) and self._groups[0]["fused"]:
            # Read on the device by the fused kernels, on CPU and CUDA alike: at 1 parameters, moments
            # and step counts stay as they are. It is torch's contract with its gradient scaler.
            vars(optimizer)["found_inf"] = flag
            if not step_by_kernel(optimizer, flag):
                optimizer.step()
        elif not flag:  # other optimisers can't be told so: the step waits for the device
            optimizer.step()
        for leaf in self.parameters.values():
            leaf.grad = None
        if self.settings.ema is not None:
            # Weights that fall by the factor per step back, and sum to 1 from the first step on.
            weight = (1 - self.settings.ema) / (1 - self.settings.ema ** (step + 1))
            for name, average in self._averages.items():
                average += (self.parameters[name] - average) * (weight * (1 - flag))
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Tell a scheduler that goes by a metric what the epoch came to."""
        if isinstance(self._optim.scheduler, ReduceLROnPlateau):
            elbo = row["validation_elbo"]
            self._optim.scheduler.step(-(row["train_bound"] if math.isnan(elbo) else elbo))

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchange the parameters and their moving averages, if the run keeps any."""
        for name, average in self._averages.items():
            value = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the coming steps depend on, parameters in the order of their names."""
        scheduler, state = self._optim.scheduler, self.optimizer.state if self.optimizer else {}
        return {
            "identity": self._identity,
            "states": [copy.deepcopy(state.get(leaf, {})) for leaf in self.leaves],
            "groups": list(map(_numbers, self._groups)),
            "scheduler": scheduler.state_dict() if isinstance(scheduler, ReduceLROnPlateau) else None,
            "averages": [self._averages[name].clone() for name in sorted(self._averages)],
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Take up a state of :meth:`state_dict`; other schedulers are gone through up to the step.

        Raises:
            InputError: optimiser or scheduler of another class or with other options.
        """
        if state["identity"] != self._identity:
            raise InputError(
                "expected the optimiser and the scheduler that the run was begun with, got others "
                "in class or options: repeat them or choose another folder"
            )
        scheduler, by_metric = self._optim.scheduler, state["scheduler"] is not None
        if by_metric:
            scheduler.load_state_dict(state["scheduler"])
        for _ in range(0 if by_metric or scheduler is None else step):
            scheduler.step()
        for group, kept in zip(self._groups, state["groups"], strict=True):
            group.update({name: v for name, v in kept.items() if by_metric or name != "lr"})
        self.load_states(state["states"])
        for name, value in zip(sorted(self._averages), state["averages"], strict=True):
            self._averages[name].copy_(value)

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Give the optimiser its state of each parameter, which fused ones keep on its device."""
        assert self.optimizer is not None
        for leaf, state in zip(self.leaves, states, strict=True):
            if state:
                self.optimizer.state[leaf] = {
                    name: value.to(leaf.device).clone() if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a group's options that a file holds as they are."""
    plain = {name: value for name, value in group.items() if name != "params"}
    return {name: v for name, v in plain.items() if isinstance(v, bool | int | float | str | None)}
