"""The best member of a variational family for each datum, found by gradient ascent on its bound."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError
from pyro_vae.evaluation.ais import GRADIENT_MEMORY
from pyro_vae.evaluation.elbo import Moments, single_latent
from pyro_vae.pair.agreement import all_close
from pyro_vae.pair.functions import PairFunction, owned_modules
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import BLOCK, OpenedPair, Progress
from pyro_vae.pair.sites import data_dim
from pyro_vae.weights.particles import Particles, check_weights

Parameters = dict[str, Tensor]

# Adam's step is about its learning rate whatever the gradient's size: the first rate carries an
# encoder that is far off, the last leaves a jitter that averaging over a window makes invisible.
_LEARNING_RATES = (0.05, 0.015, 0.005, 0.0015)

# Steps between two looks at the objective, and windows at the last rate that are averaged.
_WINDOW, _AVERAGED_WINDOWS = 50, 5

# Draws that decide whether a refined q is better than the start.
_SELECTION_DRAWS = 400


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
        self, pair: OpenedPair, family: Any, num_samples: int, max_steps: int, tolerance: float
    ) -> None:
        self.pair, self.family = pair, family
        self.num_samples, self.max_steps, self.tolerance = num_samples, max_steps, tolerance

    def run(self, max_memory: int | None, progress: Progress | None) -> tuple[OpenedPair, int, bool]:
        """Return the pair with the refined guide, the steps taken and whether they sufficed."""
        bytes_per_datum = GRADIENT_MEMORY * self.pair.structure.bytes_per_datum * self.num_samples
        size = max(2, min(BLOCK, self.pair.memory(max_memory) // bytes_per_datum))
        self.site = self._site(self.pair.few(size))
        found: list[Parameters] = []
        steps, converged = 0, True
        for _, part in self.pair.blocks(size, progress):
            parameters, count, ended = self._refine(part)
            found.append(parameters)
            steps, converged = max(steps, count), converged and ended
        parameters = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        return self._with(self.pair, parameters), steps, converged

    def _site(self, pair: OpenedPair) -> str:
        """Return the latent's name; refuse a guide whose q the family's is not."""
        trace = poutine.trace(pair.guide).get_trace(*pair.inputs)
        site = single_latent(trace)
        if site is None:
            raise InputError(
                "expected a guide with one latent site, got several or none: the best q of each "
                "datum is searched over one family's parameters"
            )
        q = self.family.distribution(self._encode(pair.inputs))
        if not q.has_rsample:
            raise InputError(
                f"expected a family with reparameterised draws, got {type(q).__name__}: its bound "
                "can't be optimised by gradients through the draws"
            )
        name: str = site["name"]
        same_place = data_dim(site, pair.plate) == -1 and q.batch_shape == (pair.num_data,)
        value = site["value"].clone()  # neither has just drawn it: both solve for it alike
        if not same_place or not all_close((q.log_prob(value),), (site["fn"].log_prob(value),)):
            raise InputError(
                f"expected the family whose distribution(encode(x)) the guide draws {name!r} from, "
                "got another density: pass the guide's own family"
            )
        return name

    def _encode(self, inputs: Inputs) -> Parameters:
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

    def _with(self, pair: OpenedPair, parameters: Parameters) -> OpenedPair:
        """Return the pair with the guide of these parameters, one row for each data point."""
        family, site, plate, num_data = self.family, self.site, pair.plate, pair.num_data

        def refined_guide(*inputs: Tensor) -> None:
            if len(inputs[0]) != num_data:
                raise InputError(
                    f"expected the {num_data} data that the guide was refined for, got "
                    f"{len(inputs[0])}: it has parameters of its own for each"
                )
            with pyro.plate(plate, num_data, dim=-1):
                pyro.sample(site, family.distribution(parameters))

        return pair.with_guide(refined_guide)

    def _refine(self, pair: OpenedPair) -> tuple[Parameters, int, bool]:
        """Return the better of the encoder's and the refined parameters for each datum."""
        start = {name: value.detach() for name, value in self._encode(pair.inputs).items()}
        refined, steps, ended = self._optimise(pair, start)
        better = self._elbo(pair, refined) > self._elbo(pair, start)
        chosen = {
            name: torch.where(better.view(-1, *[1] * (value.dim() - 1)), refined[name], value)
            for name, value in start.items()
        }
        return chosen, steps, ended

    def _elbo(self, pair: OpenedPair, parameters: Parameters) -> Tensor:
        particles, moments = Particles(self._with(pair, parameters)), Moments()
        while moments.count < _SELECTION_DRAWS:
            densities = particles.draw(self.num_samples)
            check_weights(densities)
            moments.add(densities.log_weights)
        return moments.mean()

    def _optimise(self, pair: OpenedPair, start: Parameters) -> tuple[Parameters, int, bool]:
        leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        particles = Particles(self._with(pair, leaves))
        optimizer = torch.optim.Adam(leaves.values(), lr=_LEARNING_RATES[0])
        steps, settled = 0, False
        for rate in _LEARNING_RATES:
            optimizer.param_groups[0]["lr"] = rate
            before: tuple[float, float] | None = None
            settled = False
            while not settled and steps < self.max_steps:
                now, _ = self._window(particles, leaves, optimizer)
                steps += _WINDOW
                settled = before is not None and _has_settled(before, now, self.tolerance)
                before = now
        windows = _AVERAGED_WINDOWS if settled else 1
        averages = [self._window(particles, leaves, optimizer)[1] for _ in range(windows)]
        mean = {name: torch.stack([part[name] for part in averages]).mean(0) for name in leaves}
        return mean, steps + windows * _WINDOW, settled

    def _window(
        self, particles: Particles, leaves: Parameters, optimizer: torch.optim.Optimizer
    ) -> tuple[tuple[float, float], Parameters]:
        """Take one window of steps; return the mean bound with its error, and mean parameters."""
        history = []
        sums = {name: torch.zeros_like(value) for name, value in leaves.items()}
        values = list(leaves.values())
        for _ in range(_WINDOW):
            with torch.enable_grad():
                densities = particles.draw(self.num_samples)
                elbo = densities.log_weights.mean(0)
                # Data don't meet: the gradient of the sum is every datum's own.
                gradients = torch.autograd.grad(-elbo.sum(), values)
            for leaf, gradient in zip(values, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            history.append(elbo.detach().mean())
            for name, value in leaves.items():
                sums[name] += value.detach() / _WINDOW
        check_weights(densities)
        bounds = torch.stack(history)
        error = bounds.std() / math.sqrt(_WINDOW)
        return (bounds.mean().item(), error.item()), sums


def _has_settled(before: tuple[float, float], now: tuple[float, float], tolerance: float) -> bool:
    """Tell whether the rise of the bound between two windows is lost in its standard error."""
    rise, error = now[0] - before[0], math.hypot(before[1], now[1])
    # Where q reaches the posterior the error vanishes with the gap, and rounding is all that is left.
    rounding = 1e-6 * max(1.0, abs(now[0]))
    return rise <= tolerance * error + rounding
