"""Bidirectional Monte Carlo: a lower and an upper bound of log p(x) on data drawn from the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.errors import check_counts, check_optional_counts
from pyro_vae.evaluation import ais
from pyro_vae.evaluation.ais import AnnealingOptions
from pyro_vae.evaluation.annealing_path import AnnealingPath
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import log_mean_weights
from pyro_vae.evaluation.simulation_checks import simulate
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import Inputs
from pyro_vae.pair.opened import Progress, open_pair
from pyro_vae.pair.sites import Latents
from pyro_vae.summary import Summary, plus_minus, shown
from pyro_vae.weights.particles import Particles


@shown
@dataclass(frozen=True)
class Bidirectional:
    """Bounds of log p(x) per simulated datum (nats, float64, on the CPU).

    Both hold in expectation, and the upper one for data simulated from the model only: it starts from
    an exact posterior draw, which real data don't come with.

    Attributes:
        lower: log of the mean forward weight, ``(M,)``.
        upper: minus the log of the mean inverse reverse weight, ``(M,)``.
        x: the simulated data, as the pair takes them.
        num_chains: chains per datum and direction.
        num_steps: intermediate distributions.
        acceptance: mean acceptance of forward and of reverse transitions, ``(2, M)``.
    """

    lower: Tensor
    upper: Tensor
    x: Inputs
    num_chains: int
    num_steps: int
    acceptance: Tensor

    @property
    def gap(self) -> Tensor:
        """Upper minus lower bound per datum, ``(M,)``: how far annealing can be off."""
        return self.upper - self.lower

    @property
    def mean_lower(self) -> float:
        """Mean of the lower bound."""
        return self.lower.mean().item()

    @property
    def mean_upper(self) -> float:
        """Mean of the upper bound."""
        return self.upper.mean().item()

    @property
    def mean_gap(self) -> float:
        """Mean of the gap."""
        return self.gap.mean().item()

    @property
    def mean_gap_standard_error(self) -> float:
        """Standard error of :attr:`mean_gap` over simulated data; NaN for a single one."""
        return PerDatum(self.gap, torch.zeros_like(self.gap)).data_standard_error

    def _summary(self) -> Summary:
        title = f"bracket of log p(x) of {len(self.gap)} simulated data points, mean in nats"
        upper = f"{self.mean_upper:.3f}, which holds for simulated data only"
        rows = {"lower": f"{self.mean_lower:.3f}", "upper": upper}
        rows["gap"] = plus_minus(self.mean_gap, self.mean_gap_standard_error)
        return title, rows | {"annealing": f"{self.num_chains} chains, {self.num_steps} steps"}


def bidirectional(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    num_data: int | None = None, num_chains: int = 16, num_steps: int = 1000,
    num_leapfrog_steps: int = 5, num_transitions: int = 1, start: str = "guide",
    schedule: str = "sigmoid", max_memory: int | None = None, plate: str = "data",
    seed: int | None = None, progress: Progress | None = None,
) -> Bidirectional:  # fmt: skip
    r"""Draw data from the model and bracket their log p(x) by annealing in both directions.

    .. math:: E[\log \frac1K \sum_k w_k] \le \log p(x) \le E[-\log \frac1K \sum_k 1 / w'_k]

    w is the annealed weight of a chain from the start of the path to the posterior, w' the same
    weight along a chain that runs back from the exact latents the datum was drawn with.
    The gap says what annealed importance sampling with these options can be trusted for on this
    model. The upper side holds for simulated data only.

    Args:
        model, guide, max_memory, plate, seed: as in :func:`pyro_vae.log_marginal`.
        x: a template ``(N, ...)``: its shapes, and its inputs that the model does not observe
            (labels), which are repeated as often as needed. Its observed values are not used.
        num_data: data to simulate, M; by default N.
        num_chains, num_steps, num_leapfrog_steps, num_transitions: as there; chains each way.
        start: ``"guide"`` or ``"prior"``, the far end of the path.
        schedule: ``"sigmoid"`` or ``"linear"``.
        progress: called with (data points done, M).

    Raises:
        InputError: a pair that can't be annealed, or that no data can be simulated from: one whose
            observed sites are not inputs as they are, or that uses these inputs elsewhere, or that
            takes no number of data points but N; an option out of range.

    Source:
        Grosse, Ghahramani, Adams 2015, "Sandwiching the marginal likelihood using bidirectional Monte
        Carlo"; Grosse, Ancha, Roy 2016, "Measuring the reliability of MCMC inference with
        bidirectional Monte Carlo", section 3.
    """
    numbers = num_chains, num_steps, num_leapfrog_steps, num_transitions
    options = AnnealingOptions(*numbers, start, schedule)
    template = open_pair(model, guide, x, plate=plate)
    num_data = template.num_data if num_data is None else num_data
    check_counts(num_data=num_data)
    check_optional_counts(max_memory=max_memory)
    check_callables(progress=progress)
    blocks = []
    with template.evaluating(seed):
        pair, latents = simulate(template, num_data)
        size = ais.annealing_block_size(pair, num_chains, max_memory)
        for rows, part in pair.blocks(size, progress):
            particles = Particles(part)
            drawn = {n: value[rows].movedim(0, particles.axes[n]) for n, value in latents.items()}
            blocks.append(_both_ways(particles, options, drawn))
    lower, upper, *acceptance = torch.cat(blocks, dim=1)
    return Bidirectional(lower, upper, pair.inputs, num_chains, num_steps, torch.stack(acceptance))


def _both_ways(particles: Particles, options: AnnealingOptions, drawn: Latents) -> Tensor:
    """Return the bounds and the acceptances of one block, ``(4, N)``."""
    plan = ais.make_plan(AnnealingPath(particles, options.start), options)
    path = plan.path
    start = path.evaluate(path.draw(options.num_chains))
    forward, _, accepted = ais.annealed_weights(plan, start, options)
    exact = path.position({name: value[None] for name, value in drawn.items()})
    end = path.evaluate(exact.expand(options.num_chains, -1, -1))
    reverse, _, accepted_back = ais.annealed_weights(plan, end, options, reverse=True)
    lower = log_mean_weights(forward)["log_prob"]
    upper = -log_mean_weights(-reverse)["log_prob"]
    return torch.stack([lower, upper, accepted.mean(0), accepted_back.mean(0)]).cpu()
