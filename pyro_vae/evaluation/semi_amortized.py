"""The best member of a variational family for each datum, found by gradient ascent on its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.blocks import blocks_of, few_of, memory_budget, rows_of
from pyro_vae.evaluation.elbo import single_latent
from pyro_vae.pair.agreement import all_close
from pyro_vae.pair.functions import PairFunction, owned_modules
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.sites import data_dim
from pyro_vae.weights.particles import PairScorer, check_weights

Parameters = dict[str, Tensor]

# Adam's step is about its learning rate whatever the gradient's size: the first rate carries an
# encoder that is far off, the last leaves a jitter that averaging over a window makes invisible.
_LEARNING_RATES = (0.05, 0.015, 0.005, 0.0015)

# Steps between two looks at the objective, and windows at the last rate that are averaged.
_WINDOW, _AVERAGED_WINDOWS = 50, 5

# Forward and backward keep and make about three times what a forward pass makes.
_GRADIENT_MEMORY = 3

# Data refined together at most, and draws that decide whether a refined q is better than the start.
_BLOCK, _SELECTION_DRAWS = 1024, 400


def family_of(guide: PairFunction, family: Any) -> Any:
    """Return the object whose ``encode`` and ``distribution`` make the guide's q."""
    if family is None:
        owners = owned_modules(guide)
        family = getattr(owners[0], "variational_family", None) if owners else None
        if family is None:
            raise InputError(
                "expected a guide that is a VAE's, or a family, got a plain guide: pass family=, an "
                "object whose distribution(encode(x)) the guide draws from"
            )
    missing = [
        name for name in ("encode", "distribution") if not callable(getattr(family, name, None))
    ]
    if missing:
        kind = getattr(family, "__name__", type(family).__name__)
        raise InputError(
            f"expected a family with encode and distribution, got {kind} without "
            f"{' and '.join(missing)}: derive it from pyro_vae.guides.VariationalFamily"
        )
    return family


class Refinement:
    """The best member of a family for each datum."""

    def __init__(
        self,
        model: PairFunction,
        guide: PairFunction,
        family: Any,
        plate: str,
        num_samples: int,
        max_steps: int,
        tolerance: float,
    ) -> None:
        self.model, self.guide, self.family, self.plate = model, guide, family, plate
        self.num_samples, self.max_steps, self.tolerance = num_samples, max_steps, tolerance

    def run(
        self,
        inputs: Inputs,
        max_memory: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[PairFunction, int, bool]:
        """Return the refined guide of all data, the steps taken and whether they sufficed."""
        blocks = self._blocks(inputs, max_memory)
        self.site = self._site(rows_of(inputs, blocks[0]))
        found: list[Parameters] = []
        steps: list[int] = []
        converged = True
        for rows in blocks:
            parameters, count, ended = self._refine(rows_of(inputs, rows))
            found.append(parameters)
            steps.append(count)
            converged = converged and ended
            if progress is not None:
                progress(min(rows.stop, len(inputs[0])), len(inputs[0]))
        parameters = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return self._guide_of(parameters), max(steps), converged

    def _site(self, inputs: Inputs) -> str:
        """Return the latent's name; refuse a guide whose q the family's is not."""
        trace = poutine.trace(self.guide).get_trace(*inputs)
        site = single_latent(trace)
        if site is None:
            raise InputError(
                "expected a guide with one latent site, got several or none: the best q of each "
                "datum is searched over one family's parameters"
            )
        q = self.family.distribution(self._encoded(inputs))
        if not q.has_rsample:
            raise InputError(
                f"expected a family with reparameterised draws, got {type(q).__name__}: its bound "
                "can't be optimised by gradients through the draws"
            )
        name: str = site["name"]
        same_place = data_dim(site, self.plate) == -1 and q.batch_shape == (len(inputs[0]),)
        value = site["value"].clone()  # neither has just drawn it: both solve for it alike
        if not same_place or not all_close((q.log_prob(value),), (site["fn"].log_prob(value),)):
            raise InputError(
                f"expected the family whose distribution(encode(x)) the guide draws {name!r} from, "
                "got another density: pass the guide's own family"
            )
        return name

    def _encoded(self, inputs: Inputs) -> Parameters:
        """Return the family's parameters of each datum; refuse what has no row for each."""
        parameters: Any = self.family.encode(*inputs)
        if not isinstance(parameters, dict) or any(
            not isinstance(value, Tensor) or value.shape[:1] != inputs[0].shape[:1]
            for value in parameters.values()
        ):
            raise InputError(
                f"expected encode(x) of {type(self.family).__name__} as a dict of tensors, each with "
                f"a row for each of {len(inputs[0])} data, got {type(parameters).__name__}"
            )
        return parameters

    def _blocks(self, inputs: Inputs, max_memory: int | None) -> list[slice]:
        budget = max_memory or memory_budget(inputs[0].device)
        few = few_of(self.model, self.guide, inputs, self.plate, 64)
        scorer = PairScorer(self.model, self.guide, few, plate=self.plate)
        size = budget // (_GRADIENT_MEMORY * scorer.bytes_per_datum * self.num_samples)
        size = max(2, min(_BLOCK, size))
        return blocks_of(self.model, self.guide, inputs, self.plate, size)

    def _guide_of(self, parameters: Parameters) -> PairFunction:
        """Return the guide of as many data as there are parameters."""
        num_data = len(next(iter(parameters.values())))
        family, plate, site = self.family, self.plate, self.site

        def refined_guide(*inputs: Tensor) -> None:
            if len(inputs[0]) != num_data:
                raise InputError(
                    f"expected the {num_data} data that the guide was refined for, got "
                    f"{len(inputs[0])}: it has parameters of its own for each"
                )
            with pyro.plate(plate, num_data, dim=-1):
                pyro.sample(site, family.distribution(parameters))

        return refined_guide

    def _refine(self, block: Inputs) -> tuple[Parameters, int, bool]:
        """Return the better of the encoder's and the refined parameters for each datum."""
        start = {name: value.detach() for name, value in self._encoded(block).items()}
        refined, steps, ended = self._optimise(block, start)
        better = self._elbo(block, refined) > self._elbo(block, start)
        chosen = {
            name: torch.where(better.view(-1, *[1] * (value.dim() - 1)), refined[name], value)
            for name, value in start.items()
        }
        return chosen, steps, ended

    def _elbo(self, block: Inputs, parameters: Parameters) -> Tensor:
        scorer = PairScorer(self.model, self._guide_of(parameters), block, plate=self.plate)
        count, sums = 0, torch.zeros(len(block[0]), dtype=torch.float64, device=block[0].device)
        while count < _SELECTION_DRAWS:
            scores = scorer.draw(self.num_samples)
            check_weights(scores)
            sums += scores.log_weights.sum(0)
            count += self.num_samples
        return sums / count

    def _optimise(self, block: Inputs, start: Parameters) -> tuple[Parameters, int, bool]:
        leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        scorer = PairScorer(self.model, self._guide_of(leaves), block, plate=self.plate)
        optimizer = torch.optim.Adam(leaves.values(), lr=_LEARNING_RATES[0])
        steps, settled = 0, False
        for rate in _LEARNING_RATES:
            optimizer.param_groups[0]["lr"] = rate
            before: tuple[float, float] | None = None
            settled = False
            while not settled and steps < self.max_steps:
                now, _ = self._window(scorer, leaves, optimizer)
                steps += _WINDOW
                settled = before is not None and _has_settled(before, now, self.tolerance)
                before = now
        windows = _AVERAGED_WINDOWS if settled else 1
        averages = [self._window(scorer, leaves, optimizer)[1] for _ in range(windows)]
        mean = {name: torch.stack([part[name] for part in averages]).mean(0) for name in leaves}
        return mean, steps + windows * _WINDOW, settled

    def _window(
        self, scorer: PairScorer, leaves: Parameters, optimizer: torch.optim.Optimizer
    ) -> tuple[tuple[float, float], Parameters]:
        """Take one window of steps; return the mean bound with its error, and mean parameters."""
        history = []
        sums = {name: torch.zeros_like(value) for name, value in leaves.items()}
        values = list(leaves.values())
        for _ in range(_WINDOW):
            with torch.enable_grad():
                scores = scorer.draw(self.num_samples)
                elbo = scores.log_weights.mean(0)
                # Data don't meet: the gradient of the sum is every datum's own.
                gradients = torch.autograd.grad(-elbo.sum(), values)
            for leaf, gradient in zip(values, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            history.append(elbo.detach().mean())
            for name, value in leaves.items():
                sums[name] += value.detach() / _WINDOW
        check_weights(scores)
        bounds = torch.stack(history)
        error = bounds.std() / math.sqrt(_WINDOW)
        return (bounds.mean().item(), error.item()), sums


def _has_settled(before: tuple[float, float], now: tuple[float, float], tolerance: float) -> bool:
    """Tell whether the rise of the bound between two windows is lost in its standard error."""
    rise, error = now[0] - before[0], math.hypot(before[1], now[1])
    # Where q reaches the posterior the error vanishes with the gap, and rounding is all that is left.
    rounding = 1e-6 * max(1.0, abs(now[0]))
    return rise <= tolerance * error + rounding
