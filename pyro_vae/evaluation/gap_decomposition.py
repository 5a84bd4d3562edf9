"""The inference gap of a pair, split into what the family and what the encoder loses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError, check_counts, check_optional_counts, positive_number
from pyro_vae.evaluation.ais import GRADIENT_MEMORY
from pyro_vae.evaluation.elbo import Moments, PerDatum, measure_bounds, single_latent
from pyro_vae.evaluation.estimate import LogMarginal, warn_if_unreliable
from pyro_vae.evaluation.importance_sampling import ImportanceOptions
from pyro_vae.evaluation.methods import estimate_log_prob
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import PairFunction, owned_modules
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import BLOCK, Knowledge, OpenedPair, Progress, open_pair
from pyro_vae.pair.sites import all_close, data_dim
from pyro_vae.summary import Summary, plus_minus, shown
from pyro_vae.weights.particles import Particles, check_weights

Parameters = dict[str, Tensor]

# Adam's step is about its learning rate whatever the gradient's size: the first rate carries an
# encoder that is far off, the last leaves a jitter that averaging over a window makes invisible.
_LEARNING_RATES = (0.05, 0.015, 0.005, 0.0015)

# Steps between two looks, windows that are averaged in the end, draws that hold it against the start.
_WINDOW, _AVERAGED_WINDOWS, _SELECTION_DRAWS = 50, 5, 400


def _gap(upper: str, lower: str, meaning: str) -> tuple[property, property]:
    """Return properties: the difference of two quantities of a class, and its standard error."""

    def difference(self: Any) -> Tensor:
        return getattr(self, upper) - getattr(self, lower)

    def error(self: Any) -> Tensor:
        return torch.hypot(*(getattr(self, f"{name}_standard_error") for name in (upper, lower)))

    return property(difference, doc=meaning), property(error, doc=f"Standard error. {meaning}")


@shown
@dataclass(frozen=True)
class InferenceGaps:
    """log p(x) - ELBO per datum, split in two (nats, float64, on the CPU, ``(N,)`` each).

    The standard errors are Monte Carlo. A gap may come out slightly below 0 within its error.

    Attributes:
        log_prob: estimate of log p(x), with ``log_prob_standard_error``.
        elbo: the bound with the guide as it is, with ``elbo_standard_error``.
        best_elbo: that with the best member of the family for each datum, and its error likewise.
        refined_guide: that member as a guide for exactly these data, e.g. for ``log_marginal``.
        log_marginal: the estimate that ``log_prob`` comes from, with its diagnostics.
        num_steps: optimisation steps taken (the largest number over the blocks of data).
        converged: whether the stopping rule, and not ``max_steps``, ended the optimisation.
    """

    log_prob: Tensor
    log_prob_standard_error: Tensor
    elbo: Tensor
    elbo_standard_error: Tensor
    best_elbo: Tensor
    best_elbo_standard_error: Tensor
    refined_guide: PairFunction = field(repr=False)
    log_marginal: LogMarginal = field(repr=False)
    num_steps: int
    converged: bool

    total, total_standard_error = _gap(
        "log_prob", "elbo", "The whole gap: log p(x) - ELBO = KL(q(z|x) || p(z|x))."
    )
    approximation, approximation_standard_error = _gap(
        "log_prob", "best_elbo", "What the family can't express: log p(x) - best ELBO."
    )
    amortization, amortization_standard_error = _gap(
        "best_elbo", "elbo", "The encoder's shortfall: best ELBO - ELBO."
    )

    def _summary(self) -> Summary:
        names = ("total", "approximation", "amortization")
        gaps = {n: PerDatum(getattr(self, n), getattr(self, f"{n}_standard_error")) for n in names}
        rows = {n: plus_minus(gap.mean, gap.mean_standard_error) for n, gap in gaps.items()}
        ended = "converged" if self.converged else "stopped at max_steps, not converged"
        mark = " (pseudo-likelihood)" * self.log_marginal.pseudo_likelihood
        title = f"inference gap of {len(self.log_prob)} data points, mean in nats{mark}"
        return title, {**rows, "search": f"{self.num_steps} steps, {ended}"}


def inference_gaps(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *, family: Any = None,
    num_samples: int = 1000, num_importance_samples: int = 5000, num_optimization_samples: int = 32,
    max_steps: int = 3000, tolerance: float = 1.0, estimate: LogMarginal | None = None,
    max_memory: int | None = None, plate: str = "data", seed: int | None = None,
    progress: Progress | None = None,
) -> InferenceGaps:  # fmt: skip
    r"""Split log p(x) - ELBO into the family's part and the encoder's.

    .. math:: \log p(x) - L(q) = [\log p(x) - L(q^*)] + [L(q^*) - L(q)],
        \quad q^* = \arg\max_{q \in Q} L(q)

    The first bracket is the approximation gap, the second the amortisation gap. The best member q* is
    found for each datum by Adam on what the family's ``encode`` gave, from the encoder's output on,
    with fresh reparameterised draws in every step. The learning rate falls each time the mean
    objective rises, from one window of steps to the next, by less than ``tolerance`` of that rise's
    standard error; the last window's average is kept. A datum whose refined q is not better than its
    encoder's keeps the latter. All reported values come from draws that chose nothing.

    What a family shares between data (the layers of a flow) stays as trained: q* is then the best
    member given the shared part, and the approximation gap that of the flow as trained. The search is
    local: the true approximation gap can only be smaller.

    Args:
        model, x, max_memory, plate, seed: as in :func:`pyro_vae.log_marginal`.
        guide: its variational function, with one latent site.
        family: object with ``encode(*x)`` (a dict of unconstrained per-datum tensors) and
            ``distribution(parameters)`` that the guide draws from; by default the
            ``variational_family`` of the VAE whose method the guide is.
        num_samples: draws per datum for each of the two ELBOs.
        num_importance_samples: draws per datum for log p(x); the refined q is the proposal.
        num_optimization_samples: draws per datum and step.
        max_steps: optimisation steps after which the search stops in any case; it looks every 50
            steps, and 50 more (250 where it has converged) make the average that is kept.
        tolerance: share of a standard error below which a window's improvement counts as none.
        estimate: an estimate of log p(x) to use instead, e.g. an annealed one of the same data.
        progress: called with (data refined, N).

    Raises:
        InputError: a guide without that split, with several latent sites or without reparameterised
            draws, a family not the guide's, an estimate of other data, or an option out of range.

    Source:
        Cremer, Li, Duvenaud 2018, "Inference Suboptimality in Variational Autoencoders", section 3.
    """
    check_counts(num_samples=num_samples, num_importance_samples=num_importance_samples)
    check_counts(num_optimization_samples=num_optimization_samples, max_steps=max_steps)
    positive_number("tolerance", tolerance)
    check_optional_counts(max_memory=max_memory)
    check_callables(progress=progress)
    pair = open_pair(model, guide, x, plate=plate)
    if estimate is not None and not isinstance(estimate, LogMarginal):
        wanted = "an estimate as pyro_vae.log_marginal returns it"
        advice = "leave it out to have one made"
        raise InputError(f"expected {wanted}, got {type(estimate).__name__}: {advice}")
    if estimate is not None and len(estimate.log_prob) != pair.num_data:
        wanted = f"an estimate of these {pair.num_data} data points"
        got = f"one of {len(estimate.log_prob)}"
        raise InputError(f"expected {wanted}, got {got}: pass that of the same x")
    family = _family_of(guide, family)
    search = _Refinement(pair, family, num_optimization_samples, max_steps, tolerance)
    with pair.evaluating(seed, family):
        refined, num_steps, converged = search.run(max_memory, progress)
        how: Any = {"num_samples": num_samples, "max_memory": max_memory}
        elbo, best = (measure_bounds(each, **how).elbo for each in (pair, refined))
        if estimate is None:
            options = ImportanceOptions(num_importance_samples)
            estimate = estimate_log_prob(refined, options, max_memory=max_memory)
            warn_if_unreliable(estimate, stacklevel=2)
    log_prob = (estimate.log_prob, estimate.standard_error)
    return InferenceGaps(*log_prob, *elbo, *best, refined.guide, estimate, num_steps, converged)


def _family_of(guide: PairFunction, family: Any) -> Any:
    """Return the object whose ``encode`` and ``distribution`` make the guide's q."""
    if family is None:
        owners = owned_modules(guide)
        family = getattr(owners[0], "variational_family", None) if owners else None
        if family is None:
            wanted = "a guide that is a VAE's, or a family"
            advice = "pass family=, an object whose distribution(encode(x)) the guide draws from"
            raise InputError(f"expected {wanted}, got a plain guide: {advice}")
    missing = [n for n in ("encode", "distribution") if not callable(getattr(family, n, None))]
    if missing:
        kind = getattr(family, "__name__", type(family).__name__)
        wanted = "a family with encode and distribution"
        advice = "derive it from pyro_vae.guides.VariationalFamily"
        raise InputError(f"expected {wanted}, got {kind} without {' and '.join(missing)}: {advice}")
    return family


@dataclass(eq=False)
class _Refinement:
    """The best member of a family for each datum."""

    pair: OpenedPair
    family: Any
    num_samples: int
    max_steps: int
    tolerance: float

    def run(self, max_memory: int | None, progress: Progress | None) -> tuple[OpenedPair, int, bool]:
        """Return the pair with the refined guide, the steps taken and whether they sufficed."""
        bytes_per_datum = GRADIENT_MEMORY * self.pair.structure.bytes_per_datum * self.num_samples
        size = max(2, min(BLOCK, self.pair.memory(max_memory) // bytes_per_datum))
        self.site = self._site(self.pair.few(size))
        blocks = [self._refine(part) for _, part in self.pair.blocks(size, progress)]
        found, steps, ended = zip(*blocks, strict=True)
        parameters = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        return self._with(self.pair, parameters), max(steps), all(ended)

    def _site(self, pair: OpenedPair) -> str:
        """Return the latent's name; refuse a guide whose q the family's is not."""
        site = single_latent(poutine.trace(pair.guide).get_trace(*pair.inputs))
        if site is None:
            advice = "the best q of each datum is searched over one family's parameters"
            raise InputError(f"expected a guide with one latent site, got several or none: {advice}")
        q = self.family.distribution(self._encode(pair.inputs))
        if not q.has_rsample:
            wanted = "a family with reparameterised draws"
            advice = "its bound can't be optimised by gradients through the draws"
            raise InputError(f"expected {wanted}, got {type(q).__name__}: {advice}")
        name: str = site["name"]
        same_place = data_dim(site, pair.plate) == -1 and q.batch_shape == (pair.num_data,)
        value = site["value"].clone()  # neither has just drawn it: both solve for it alike
        if not same_place or not all_close((q.log_prob(value),), (site["fn"].log_prob(value),)):
            wanted = f"the family whose distribution(encode(x)) the guide draws {name!r} from"
            raise InputError(f"expected {wanted}, got another density: pass the guide's own family")
        return name

    def _encode(self, inputs: Inputs) -> Parameters:
        """Return the family's parameters of each datum; refuse what has no row for each."""
        owners: Any = owned_modules(self.pair.guide)  # a VAE knows what of them its q depends on
        if owners and getattr(owners[0], "variational_family", None) is self.family:
            inputs = owners[0].family_inputs(*inputs)
        parameters: Any = self.family.encode(*inputs)
        if not isinstance(parameters, dict) or any(
            not isinstance(value, Tensor) or value.shape[:1] != inputs[0].shape[:1]
            for value in parameters.values()
        ):
            raise InputError(
                f"expected encode(x) of {type(self.family).__name__} as a dict of tensors, each with "
                f"a row for each of {len(inputs[0])} data points, got {type(parameters).__name__}"
            )
        return parameters

    def _with(self, pair: OpenedPair, parameters: Parameters) -> OpenedPair:
        """Return the pair with the guide of these parameters, one row for each data point."""
        family, site, plate, num_data = self.family, self.site, pair.plate, pair.num_data

        def refined_guide(*inputs: Tensor) -> None:
            if len(inputs[0]) != num_data:
                wanted = f"the {num_data} data points that the guide was refined for"
                advice = "it has parameters of its own for each"
                raise InputError(f"expected {wanted}, got {len(inputs[0])}: {advice}")
            with pyro.plate(plate, num_data, dim=-1):
                pyro.sample(site, family.distribution(parameters))

        return replace(pair, guide=refined_guide, knowledge=Knowledge())

    def _refine(self, pair: OpenedPair) -> tuple[Parameters, int, bool]:
        """Return the better of the encoder's and the refined parameters for each datum."""
        start = {name: value.detach() for name, value in self._encode(pair.inputs).items()}
        refined, steps, ended = self._optimise(pair, start)
        better = self._elbo(pair, refined) > self._elbo(pair, start)
        for name, value in start.items():
            rows = better.view(-1, *[1] * (value.dim() - 1))
            refined[name] = torch.where(rows, refined[name], value)
        return refined, steps, ended

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
        steps = 0
        for rate in _LEARNING_RATES:
            optimizer.param_groups[0]["lr"] = rate
            bound, error, settled = -math.inf, 0.0, False
            while not settled and steps < self.max_steps:
                (now, its_error), _ = self._window(particles, leaves, optimizer)
                steps += _WINDOW
                # Where q reaches the posterior the error vanishes with the gap: rounding is left.
                lost = self.tolerance * math.hypot(error, its_error) + 1e-6 * max(1.0, abs(now))
                settled = now - bound <= lost
                bound, error = now, its_error
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
        for _ in range(_WINDOW):
            optimizer.zero_grad()
            with torch.enable_grad():
                densities = particles.draw(self.num_samples)
                elbo = densities.log_weights.mean(0)
                # Data don't meet: the gradient of the sum is every datum's own.
                (-elbo.sum()).backward(inputs=list(leaves.values()))
            optimizer.step()
            history.append(elbo.detach().mean())
            for name, value in leaves.items():
                sums[name] += value.detach() / _WINDOW
        check_weights(densities)
        bounds = torch.stack(history)
        return (bounds.mean().item(), bounds.std().item() / math.sqrt(_WINDOW)), sums
