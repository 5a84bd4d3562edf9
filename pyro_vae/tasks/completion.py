"""Data completion: draws of the missing values given the observed ones, by any pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts, check_optional_counts, unknown_name
from pyro_vae.evaluation.elbo import Moments
from pyro_vae.evaluation.simulate import changed_site
from pyro_vae.pair.agreement import CALLING_ERRORS
from pyro_vae.pair.contract import check_density_known, check_latents_match
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import as_inputs
from pyro_vae.pair.opened import BLOCK, Knowledge, OpenedPair
from pyro_vae.pair.sites import Latents, latent_sites, observed_site
from pyro_vae.tasks.chains import Problem, draw_hidden, replace_input, run_chains, value_moments
from pyro_vae.tasks.missing import check_missing, elementwise_base, on_observed_part
from pyro_vae.weights.particles import LogDensities, Particles, check_weights

METHODS = {
    "metropolis": "exact in the limit of many steps",
    "importance": "consistent: exact in the limit of many samples, biased with few (see ess)",
    "pseudo-gibbs": "biased: exact only where the guide is the exact posterior",
}

# Importance samples of a datum and steps of a chain, unless told otherwise.
_NUM_SAMPLES, _NUM_STEPS = 1000, 200
# Draws of the latents from the prior whose mean data are the first fill.
_PRIOR_DRAWS = 16


class Completion(NamedTuple):
    """Draws of p(x_missing given x_observed), and how far they can be trusted.

    Attributes:
        draws: ``(num_draws, N, *data_shape)``; observed values as they came.
        mean: mean of each value given the observed ones, ``(N, *data_shape)``.
        standard_deviation: likewise; 0 where observed.
        method: how the draws were made, one of :data:`METHODS`.
        acceptance: share of accepted proposals, ``(N,)``; metropolis only.
        r_hat: potential scale reduction of log p(x, z) over the chains' second halves, ``(N,)``;
            metropolis with at least 2 draws. Well above 1.01 the chains still remember their starts.
        ess: effective number of the importance samples, ``(N,)``; importance only.
    """

    draws: Tensor
    mean: Tensor
    standard_deviation: Tensor
    method: str
    acceptance: Tensor | None = None
    r_hat: Tensor | None = None
    ess: Tensor | None = None

    @property
    def guarantee(self) -> str:
        """What the method promises of the draws."""
        return METHODS[self.method]


def complete(
    model: PairFunction,
    guide: PairFunction,
    x: Tensor | Sequence[Tensor],
    missing: Tensor,
    *,
    method: str = "metropolis",
    num_draws: int = 16,
    num_samples: int | None = None,
    num_steps: int | None = None,
    initial: float | Tensor | None = None,
    observed: str | None = None,
    position: int = 0,
    plate: str = "data",
    max_memory: int | None = None,
    seed: int | None = None,
) -> Completion:
    r"""Draw the missing values given the observed ones.

    ``metropolis`` alternates two moves that leave :math:`p(z, x_{mis} | x_{obs})` invariant: z' from
    the guide at the data as filled now, accepted with probability

    .. math:: \min\left(1, \frac{p(x_{obs}, x_{mis} | z') p(z')\, q(z | x_{obs}, x_{mis})}
        {p(x_{obs}, x_{mis} | z) p(z)\, q(z' | x_{obs}, x_{mis})}\right),

    then :math:`x_{mis} \sim p(x_{mis} | z)`. Each draw is the end of a chain of its own, so draws are
    independent of each other. ``pseudo-gibbs`` accepts every z': its limit is not the conditional
    unless the guide is the exact posterior. ``importance`` draws z from the guide at the data as
    filled first, weighs it by :math:`p(x_{obs}, z) / q(z)` and resamples.

    Args:
        model: a generative function whose observed site is elementwise given the latents.
        guide: its variational function.
        x: data ``(N, *data_shape)``, or a tuple of tensors passed as ``model(*x)``. Hidden places
            may hold anything, also NaN.
        missing: boolean, of the shape of the data: what to fill in.
        method: one of :data:`METHODS`.
        num_draws: draws per datum: chains, or resampled importance samples.
        num_samples: importance samples per datum, by default 1,000; of importance only.
        num_steps: steps of each chain, by default 200; of the other two methods only. ``mean`` and
            ``standard_deviation`` are averages over the second half of all chains.
        initial: what the hidden places are filled with first: a number, or a tensor that broadcasts
            to the data. By default the model's own mean of them, over latents from the prior.
        observed: name of the observed site with missing values; needed where the model has several.
        position: which of the inputs has the missing values.
        plate: name of the data plate.
        max_memory: bytes that a pass may need; by default 128 MiB on a CPU and a quarter of the free
            memory on a GPU.
        seed: seed of the draws; the generators' state is restored afterwards.

    Returns:
        draws, their moments and diagnostics.

    Raises:
        InputError: an option out of range or without effect, a ``missing`` that doesn't fit, a NaN
            among the observed values, a site that is not elementwise, a model that uses the data
            elsewhere than at its observed site, or a pair that can't be weighed (see
            :func:`pyro_vae.log_weights`).

    Source:
        metropolis: Mattei, Frellsen 2018, "Leveraging the exact likelihood of deep latent variable
        models", algorithm 2; importance: Mattei, Frellsen 2019, "MIWAE", section 4; pseudo-gibbs:
        Rezende, Mohamed, Wierstra 2014, appendix F.
    """
    _check_options(method, num_draws, num_samples, num_steps, position)
    check_optional_counts(max_memory=max_memory)
    inputs = as_inputs(x, model, guide)
    if not 0 <= position < len(inputs):
        raise InputError(f"expected a position from 0 to {len(inputs) - 1}, got {position}")
    given = inputs[position]
    check_missing(given, missing)
    missing = missing.to(given.device)
    if given[~missing].isnan().any():
        raise InputError("expected no NaN among the observed values: mark them as missing")
    # What is hidden may be no data: the pair is opened with an observed value in its place.
    pair = OpenedPair(model, guide, inputs, plate=plate)
    seen = given[~missing]
    if len(seen):
        fill = seen[seen.double().abs().argmin()]
        pair = replace_input(pair, position, torch.where(missing, fill, given))
    with pair.alone(model).evaluating(seed, guide):
        if len(seen):
            pair.structure  # noqa: B018
        pair = _fill_first(pair, missing, position, initial, observed)
        problem, divisible = _bind(pair, missing, position, observed)
        if method == "metropolis":
            sites = latent_sites(pair.alone(guide).trace())
            check_density_known(sites, 'use method="importance" or "pseudo-gibbs"')
        weighed = _weigh_observed(problem, divisible)
        budget = pair.memory(max_memory)
        rows = max(1, budget // problem.pair.structure.bytes_per_datum)
        parts = []
        size = min(BLOCK, rows) if divisible else len(given)
        for first in range(0, len(given), size):
            block = slice(first, first + size)
            part = problem.rows(block)
            if method == "importance":
                particles, count = Particles(weighed.part(block)), num_samples or _NUM_SAMPLES
                parts.append(_by_importance(part, particles, num_draws, count, budget))
            else:
                together = max(1, rows // len(part.missing)) if divisible else 1
                steps = num_steps or _NUM_STEPS
                parts.append(_by_chains(part, method, num_draws, steps, together))
    return _join(parts, given, missing)


def _by_chains(
    problem: Problem, method: str, num_draws: int, num_steps: int, together: int
) -> Completion:
    """Run a chain per draw, as many at once as the memory allows."""
    accept_all = method == "pseudo-gibbs"
    runs = [
        run_chains(problem, min(together, num_draws - done), num_steps, accept_all=accept_all)
        for done in range(0, num_draws, together)
    ]
    x, mean, square, acceptance, log_joint, variance = (
        torch.cat(values) for values in zip(*runs, strict=True)
    )
    kept = num_steps - num_steps // 2
    r_hat = None if accept_all or num_draws < 2 else _r_hat(log_joint, variance, kept)
    share = None if accept_all else acceptance.mean(0)
    mean, square = mean.mean(0), square.mean(0)
    return Completion(x, mean, _deviation(mean, square), method, share, r_hat)


def _r_hat(means: Tensor, variances: Tensor, length: int) -> Tensor:
    """Return the potential scale reduction of chains from their means and variances ``(C, N)``.

    Source:
        Gelman, Rubin 1992, "Inference from iterative simulation using multiple sequences".
    """
    within = variances.mean(0)
    return ((length - 1) / length + means.var(0) / within).sqrt()


def _weigh_observed(problem: Problem, divisible: bool) -> OpenedPair:
    """Return the pair that weighs draws by the density of the observed part."""
    pair = problem.pair
    masked = on_observed_part(pair.model, observed=problem.site, position=problem.position)
    inputs = (*pair.inputs, problem.missing)
    knowledge = Knowledge(is_divisible=divisible)
    guide = pair.guide
    return OpenedPair(
        masked, lambda *given: guide(*given[:-1]), inputs, plate=pair.plate, knowledge=knowledge
    )


def _by_importance(
    problem: Problem, particles: Particles, num_draws: int, num_samples: int, budget: int
) -> Completion:
    """Weigh draws from the guide by the density of the observed part, and resample."""
    chunk = max(1, budget // (particles.bytes_per_datum * particles.num_data))
    drawn: list[Latents] = []
    weights = []
    for done in range(0, num_samples, chunk):
        latents, log_proposal = particles.propose(min(chunk, num_samples - done))
        densities = LogDensities(*particles.score(latents), log_proposal)
        check_weights(densities)
        drawn.append(particles.data_first(latents))
        weights.append(densities.log_weights)
    shares = torch.cat(weights).softmax(0)  # (num_samples, N)
    if shares.isnan().any():
        raise InputError(
            "expected latents that explain the observed values, got weights of 0 only for "
            f"{int(shares.isnan().any(0).sum())} data: raise num_samples, or use metropolis"
        )
    picked = torch.multinomial(shares.T, num_draws, replacement=True).T
    rows = torch.arange(particles.num_data, device=picked.device)
    chosen = {
        name: torch.cat([latents[name] for latents in drawn])[picked, rows].movedim(1, axis)
        for name, axis in particles.axes.items()
    }
    draws, moments = [], [Moments(), Moments()]
    for index in range(num_draws):
        x, _, site = draw_hidden(problem, {name: value[index] for name, value in chosen.items()})
        draws.append(x)
        for each, value in zip(moments, value_moments(site), strict=True):
            each.add(value[None])
    mean, square = (each.mean() for each in moments)
    ess = 1 / shares.square().sum(0)
    return Completion(torch.stack(draws), mean, _deviation(mean, square), "importance", ess=ess)


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=0).sqrt()


def _join(parts: list[Completion], x: Tensor, missing: Tensor) -> Completion:
    """Join blocks of data, and put the observed values back as they came."""
    draws = torch.cat([part.draws for part in parts], dim=1)
    mean = torch.cat([part.mean for part in parts]).to(draws.dtype)
    deviation = torch.cat([part.standard_deviation for part in parts]).to(draws.dtype)

    diagnostics = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("acceptance", "r_hat", "ess")
        if getattr(parts[0], name) is not None
    }
    return Completion(
        torch.where(missing, draws, x),
        torch.where(missing, mean, x),
        deviation.masked_fill(~missing, 0.0),
        parts[0].method,
        **diagnostics,
    )


def _fill_first(
    pair: OpenedPair,
    missing: Tensor,
    position: int,
    initial: float | Tensor | None,
    observed: str | None,
) -> OpenedPair:
    """Return the pair with the hidden places filled as asked, or by the model's own mean."""
    x = pair.inputs[position]

    def with_fill(fill: Tensor) -> OpenedPair:
        return replace_input(pair, position, torch.where(missing, fill.to(x), x))

    if initial is not None:
        if not isinstance(initial, int | float | Tensor):
            raise InputError(f"expected initial as a number or a tensor, got {initial!r}")
        fill = torch.as_tensor(initial)
        # More dimensions than the data's would add data; sizes count from the last.
        sizes = zip(reversed(fill.shape), reversed(x.shape), strict=False)
        if fill.dim() > x.dim() or any(size not in (1, wanted) for size, wanted in sizes):
            raise InputError(
                f"expected initial to broadcast to the data's shape {tuple(x.shape)}, got "
                f"{tuple(fill.shape)}"
            )
        if not fill.isfinite().all():
            raise InputError("expected finite values to fill with, got NaN or infinity in initial")
        return with_fill(fill)
    blank = with_fill(x.new_zeros(()))
    model = blank.alone(blank.model)
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for _ in range(_PRIOR_DRAWS):
        trace = model.trace()
        site = trace.nodes[observed_site(trace, observed)]
        if site["value"].shape != x.shape:
            raise _not_observed(site["name"], x, site["value"])
        total += value_moments({**site, "value": site["fn"].sample()})[0]
    return with_fill(total / _PRIOR_DRAWS)


def _bind(
    pair: OpenedPair, missing: Tensor, position: int, observed: str | None
) -> tuple[Problem, bool]:
    """Bind a pair of filled data to what is missing; refuse what can't be completed.

    Returns:
        the problem, and whether its pair accepts fewer data than these, and more.
    """
    trace, guide_trace = pair.trace()
    name = observed_site(trace, observed)
    site, x = trace.nodes[name], pair.inputs[position]
    if site["value"].shape != x.shape or not torch.equal(site["value"], x):
        raise _not_observed(name, x, site["value"])
    elementwise_base(name, site["fn"])
    check_latents_match(trace, guide_trace)
    latents = {site["name"]: site["value"] for site in latent_sites(guide_trace)}
    problem = Problem(pair, missing, position, name)
    # Inspected with hidden values in the support of the likelihood: the first fill need not be there.
    drawn = problem.fill(draw_hidden(problem, latents)[0])
    _check_conditional_independence(drawn, latents)
    drawn.pair.structure  # noqa: B018
    return problem, _is_divisible(drawn)


def _is_divisible(problem: Problem) -> bool:
    """Tell whether the pair accepts fewer data than these, and more."""
    if len(problem.missing) >= 3:
        return problem.pair.is_divisible()
    twice = problem.tile(2).pair
    twice.knowledge = Knowledge()  # whether it takes so many is to be seen
    try:
        twice.structure  # noqa: B018
    except CALLING_ERRORS:
        return False
    return True


def _check_conditional_independence(problem: Problem, latents: Latents) -> None:
    """Refuse a model in which anything but the observed site itself depends on the hidden values."""
    other, *_ = draw_hidden(problem, latents)
    traces = []
    for x in (problem.x, other):
        trace = problem.fill(x).trace_model(latents)
        trace.nodes[problem.site]["value"] = problem.x
        traces.append(trace)
    name = changed_site(*traces)
    if name is not None:
        raise InputError(
            f"expected a model that uses the data at its observed site {problem.site!r} alone, the "
            f"density at {name!r} changes with the hidden values: these can't be drawn given latents"
        )


def _not_observed(name: str, x: Tensor, value: Tensor) -> InputError:
    return InputError(
        f"expected site {name!r} to observe the input as it is, shape {tuple(x.shape)}, got other "
        f"values of shape {tuple(value.shape)}: name the site by observed=, the input by position="
    )


def _check_options(
    method: str, num_draws: int, num_samples: int | None, num_steps: int | None, position: int
) -> None:
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    check_counts(num_draws=num_draws)
    check_counts(position=position, least=0)
    check_optional_counts(num_samples=num_samples, num_steps=num_steps)
    own, other, surplus = "num_steps", "num_samples", num_samples
    if method == "importance":
        own, other, surplus = "num_samples", "num_steps", num_steps
    if surplus is not None:
        raise InputError(
            f"expected no {other} with method {method!r}, which has {own}, got {surplus}: leave "
            "it out"
        )
