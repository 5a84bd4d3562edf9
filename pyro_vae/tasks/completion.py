"""Data completion: draws of the missing values given the observed ones, by any pair."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts, check_name, check_optional_counts
from pyro_vae.evaluation.elbo import Moments
from pyro_vae.evaluation.estimate import rank_normalized_r_hat
from pyro_vae.evaluation.importance_sampling import ImportanceOptions
from pyro_vae.evaluation.methods import estimate_log_prob
from pyro_vae.pair import sites as traced
from pyro_vae.pair.contract import check_density_known, check_latents_match
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import as_inputs, tile_inputs
from pyro_vae.pair.opened import BLOCK, Knowledge, OpenedPair
from pyro_vae.pair.sites import Given, Latents, Site
from pyro_vae.summary import shown
from pyro_vae.tasks.missing import check_missing, on_observed_part
from pyro_vae.tasks.observed_parts import observing_sites, parts_of, take_part, value_moments

METHODS = {
    "metropolis": "exact in the limit of many steps",
    "importance": "consistent: exact in the limit of many samples, biased with few (see ess)",
    "pseudo-gibbs": "biased: exact only where the guide is the exact posterior",
}

_NUM_SAMPLES, _NUM_STEPS = 1000, 200
# Draws of the latents from the prior whose mean data are the first fill.
_PRIOR_DRAWS = 16

# Share of the proposals that are the prior's: weights far off are at most p(x | z) / share.
_PRIOR_SHARE = 0.1

# What the chains are judged by: at most so many projections of latents and of hidden values, at so
# many steps; and the R-hat above which they are said to disagree.
_PROJECTIONS, _JUDGED_STEPS, _R_HAT_LIMIT = 4, 50, 1.1


@shown
class Completion(NamedTuple):
    """Draws of p(x_missing given x_observed), and how far they can be trusted.

    Attributes:
        draws: ``(num_draws, N, *data_shape)``; observed values as they came.
        mean: mean of each value given the observed ones, ``(N, *data_shape)``.
        standard_deviation: likewise; 0 where observed.
        method: how the draws were made, one of :data:`METHODS`.
        acceptance: share of accepted proposals, ``(N,)``; metropolis only.
        r_hat: rank-normalised split R-hat over the chains' second halves, ``(N,)``, the largest over
            log p(x, z), the latents and the hidden values (of many values, over fixed projections);
            metropolis only. Above 1.1 the chains still remember their starts, half of which are the
            prior's. NaN (not known) for a single chain, below 4 steps, or where nothing moves.
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
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], missing: Tensor, *,
    method: str = "metropolis", num_draws: int = 16, num_samples: int | None = None,
    num_steps: int | None = None, initial: float | Tensor | None = None,
    observed: str | None = None, position: int = 0, plate: str = "data",
    max_memory: int | None = None, seed: int | None = None,
) -> Completion:  # fmt: skip
    r"""Draw the missing values given the observed ones.

    ``metropolis`` alternates two moves that leave :math:`p(z, x_{mis} | x_{obs})` invariant: z' from
    the guide at the data as filled now, accepted with probability

    .. math:: \min\left(1, \frac{p(x_{obs}, x_{mis} | z') p(z')\, q(z | x_{obs}, x_{mis})}
        {p(x_{obs}, x_{mis} | z) p(z)\, q(z' | x_{obs}, x_{mis})}\right),

    then :math:`x_{mis} \sim p(x_{mis} | z)`. A tenth of the z' are the prior's (q is that mixture),
    so that a chain can leave places where the guide puts too little. Each draw is the end of a chain
    of its own, so draws are independent of each other. ``pseudo-gibbs`` accepts every z': its limit
    is not the conditional unless the guide is the exact posterior. ``importance`` draws z from the
    guide at the data as filled first, weighs it by :math:`p(x_{obs}, z) / q(z)` and resamples.

    Args:
        model: a generative function whose observed site is elementwise given the latents.
        guide, max_memory, plate, seed: as in :func:`pyro_vae.log_marginal`.
        x: data ``(N, *data_shape)``, or a tuple of tensors; hidden places may hold anything.
        missing: boolean, of the shape of the data: what to fill in.
        method: one of :data:`METHODS`.
        num_draws: draws per datum: chains, or resampled importance samples.
        num_samples: importance samples per datum, by default 1,000; of importance only.
        num_steps: steps of each chain, by default 200; of the other two methods only. ``mean`` and
            ``standard_deviation`` are averages over the second half of all chains.
        initial: what the hidden places are filled with first: a number, or a tensor that broadcasts
            to the data, where the guide is to start from. By default each chain has draws of its
            own, of the model; every second one starts from a draw of the prior in any case.
        observed: name of the observed site with missing values; by default all that observe the
            input or a part of it, such as ``x[:, t]``.
        position: which of the inputs has the missing values.

    Raises:
        InputError: an option out of range or without effect, a ``missing`` that doesn't fit, a NaN
            among the observed values, a site that is not elementwise, a model that uses the data
            elsewhere than at its observed site, or a pair that can't be weighed (see
            :func:`pyro_vae.log_weights`).

    Warns:
        UserWarning: how many data points' chains disagree or can't be judged.

    Source:
        R-hat: Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021, "Rank-Normalization, Folding, and
        Localization: An Improved R-hat"; metropolis: Mattei, Frellsen 2018, "Leveraging the exact
        likelihood of deep latent variable models", algorithm 2; importance: Mattei, Frellsen 2019,
        "MIWAE", section 4; pseudo-gibbs: Rezende, Mohamed, Wierstra 2014, appendix F.
    """
    _check_options(method, num_samples, num_steps)
    check_counts(num_draws=num_draws)
    check_counts(position=position, least=0)
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
        pair = _replace_input(pair, position, torch.where(missing, fill, given))
    with pair.alone(model).evaluating(seed, guide):
        if len(seen):
            pair.structure  # noqa: B018
        pair = _fill_first(pair, missing, position, initial, observed)
        problem = _bind(pair, missing, position, observed)
        divisible = problem.is_divisible
        if method == "metropolis":
            sites = traced.latent_sites(pair.alone(guide).trace())
            check_density_known(sites, 'use method="importance" or "pseudo-gibbs"')
        # What weighs draws by the density of the observed part.
        weighed = OpenedPair(
            on_observed_part(model, observed=problem.named, position=position),
            lambda *given: guide(*given[:-1]),
            (*pair.inputs, missing),
            plate=plate,
            knowledge=Knowledge(is_divisible=divisible),
        )
        budget = pair.memory(max_memory)
        rows = max(1, budget // problem.pair.structure.bytes_per_datum)
        parts = []
        size = min(BLOCK, rows) if divisible else len(given)
        for first in range(0, len(given), size):
            block = slice(first, first + size)
            part = problem.rows(block)
            if method == "importance":
                own, count = weighed.part(block), num_samples or _NUM_SAMPLES
                parts.append(_by_importance(part, own, num_draws, count, budget))
            else:
                together = max(1, rows // len(part.missing)) if divisible else 1
                steps = num_steps or _NUM_STEPS
                parts.append(_by_chains(part, method, num_draws, steps, together, initial is None))
    found = _join(parts, given, missing)
    if found.r_hat is not None and (count := int((~(found.r_hat <= _R_HAT_LIMIT)).sum())):
        warnings.warn(
            f"{count} of {len(given)} data points have R-hat > {_R_HAT_LIMIT} or not known: the "
            "draws may depend on where chains started; use more num_steps and num_draws",
            stacklevel=2,
        )
    return found


class _Problem(NamedTuple):
    """A pair opened on data with filled hidden places."""

    pair: OpenedPair  # of its inputs, ``(N, ...)`` each, the incomplete one is filled
    missing: Tensor  # what is hidden of that one
    position: int  # which one it is
    sites: tuple[str, ...]  # names of the sites that observe it or parts of it
    named: str | None  # of these, the one that was asked for
    is_divisible: bool = False  # whether the pair accepts fewer data than these, and more

    @property
    def x(self) -> Tensor:
        """The incomplete input as filled, ``(N, *data_shape)``."""
        return self.pair.inputs[self.position]

    def fill(self, x: Tensor) -> Self:
        return self._replace(pair=_replace_input(self.pair, self.position, x))

    def rows(self, rows: slice) -> Self:
        return self._replace(pair=self.pair.part(rows), missing=self.missing[rows])

    def tile(self, count: int) -> Self:
        """Return the problem with all data points repeated, repetitions outermost."""
        if count == 1:
            return self
        *inputs, missing = tile_inputs((*self.pair.inputs, self.missing), count)
        tiled = self._replace(pair=self.pair.on(tuple(inputs)), missing=missing)
        return tiled.fill(inputs[self.position])

    @property
    def mixes(self) -> bool:
        """Whether the prior may propose beside the guide: not where this places point masses."""
        return not any(latent.is_point_mass for latent in self.pair.structure.latents.values())

    def draw(self, function: PairFunction) -> tuple[Latents, list[Site]]:
        """Draw latents from the guide, or from the model's prior, and return the sites too."""
        trace = self.pair.alone(function).trace()
        latents = {name: trace.nodes[name]["value"] for name in self.pair.axes}
        return latents, traced.sample_sites(trace)

    def choose(self, truth: Tensor, one: Latents, other: Latents) -> Latents:
        """Take latents of one or the other, by one truth value for each data point."""
        shapes = {name: (-1, *[1] * (-axis - 1)) for name, axis in self.pair.axes.items()}
        return {n: torch.where(truth.view(shapes[n]), v, other[n]) for n, v in one.items()}

    def trace(self, function: PairFunction, latents: Latents) -> Any:
        with Given(latents):
            return self.pair.alone(function).trace()

    def log_prob(self, sites: list[Site]) -> Tensor:
        """Sum the sites' log-probabilities per data point, ``(N,)``, float64."""
        return traced.total(sites, self.pair.plate, self.pair.inputs)


def _replace_input(pair: OpenedPair, position: int, x: Tensor) -> OpenedPair:
    # Contiguous, so that parts of it are told by where they lie.
    return pair.on((*pair.inputs[:position], x.contiguous(), *pair.inputs[position + 1 :]))


def _by_chains(
    problem: _Problem, method: str, num_draws: int, num_steps: int, together: int, spread_out: bool
) -> Completion:
    """Run a chain per draw, as many at once as the memory allows."""
    how = num_steps, method == "pseudo-gibbs", spread_out
    chains = [range(num_draws)[first : first + together] for first in range(0, num_draws, together)]
    runs = [_run_chains(problem, some, *how) for some in chains]
    x, moments, acceptance, judged = map(torch.cat, zip(*runs, strict=True))
    checks = () if method == "pseudo-gibbs" else (acceptance.mean(0), rank_normalized_r_hat(judged))
    return Completion(x, *_spread(moments.mean(0)), method, *checks)


class _State(NamedTuple):
    """Where chains are: latents, fill, log-densities ``(N,)``, :func:`value_moments` given z."""

    latents: Latents
    problem: _Problem
    log_joint: Tensor  # log p(x, z)
    log_prior: Tensor  # log p(z)
    moments: Tensor


def _run_chains(
    problem: _Problem, chains: range, num_steps: int, accept_all: bool, spread_out: bool
) -> tuple[Tensor, ...]:
    """Run some of the chains at once, those of odd number from the prior; return ``(C, N, ...)``.

    That is the last fill, mean moments of x over the second half of the steps, the share of accepted
    proposals, and what they are judged by, ``(C, T, N, Q)``.
    """
    shape = (len(chains), len(problem.missing))
    problem = problem.tile(len(chains))
    is_odd = torch.tensor([number % 2 == 1 for number in chains], device=problem.x.device)
    state = _start(problem, is_odd.repeat_interleave(shape[1]), accept_all, spread_out)
    accepted = torch.zeros(len(problem.missing), device=problem.x.device)
    moments, judged, half = Moments(), [], num_steps // 2
    for step in range(num_steps):
        state, moved = _step(state, accept_all)
        accepted += moved
        if step >= half:
            moments.add(state.moments[None])
            if not accept_all and (step - half) % -(-(num_steps - half) // _JUDGED_STEPS) == 0:
                judged.append(_numbers_of(state).unflatten(0, shape))
    results = (state.problem.x, moments.mean(), accepted / num_steps)
    untiled = (value.unflatten(0, shape) for value in results)
    return (*untiled, torch.stack(judged, 1) if judged else torch.zeros(0))


def _start(problem: _Problem, from_prior: Tensor, accept_all: bool, spread_out: bool) -> _State:
    """Draw latents from the prior or the guide; it sees each chain's own fill if ``spread_out``."""
    guide = problem.pair.guide
    if accept_all or not problem.mixes:
        return _redraw(problem, problem.draw(guide)[0])
    prior, _ = problem.draw(problem.pair.model)
    seen = _redraw(problem, prior).problem if spread_out else problem
    return _redraw(problem, problem.choose(from_prior, prior, seen.draw(guide)[0]))


def _numbers_of(state: _State) -> Tensor:
    """Return what chains are judged by, ``(rows, Q)``: log p(x, z), latents and hidden values."""
    problem, rows = state.problem, len(state.log_joint)
    values = [value.movedim(problem.pair.axes[n], 0) for n, value in state.latents.items()]
    values.append(problem.x * problem.missing)
    columns = [state.log_joint[:, None]]
    for value in (each.reshape(rows, -1).double() for each in values):
        if value.shape[1] > _PROJECTIONS:
            fixed = torch.Generator().manual_seed(0)
            value = value @ torch.randn(value.shape[1], _PROJECTIONS, generator=fixed).to(value)
        columns.append(value)
    return torch.cat(columns, 1).cpu()


def _draw_hidden(problem: _Problem, latents: Latents) -> tuple[Tensor, list[Site], Tensor]:
    """Redraw the hidden values; return the data, the model's sites with them, the data's moments."""
    trace = problem.trace(problem.pair.model, latents)
    x = problem.x.clone()
    missing, parts = problem.missing.contiguous(), parts_of(trace, problem.sites, problem.x)
    for site, place in parts:
        hidden = take_part(missing, place)
        take_part(x, place)[hidden] = site["fn"].sample().to(x.dtype).expand(hidden.shape)[hidden]
    for site, place in parts:
        site["value"] = take_part(x, place)
    return x, traced.sample_sites(trace), value_moments(parts, x)


def _step(state: _State, accept_all: bool) -> tuple[_State, Tensor]:
    """Propose latents, accept or not, redraw the hidden values: one step of every chain."""
    problem = state.problem
    proposal, sites = problem.draw(problem.pair.guide)
    if accept_all:
        return _redraw(problem, proposal), torch.ones_like(state.log_joint)

    def log_proposal(latents: Latents, log_prior: Tensor) -> Tensor:
        """Score latents under what proposes, given the data as filled now."""
        if len(sites) == 1:  # its distribution is there
            log_guide = problem.log_prob([{**sites[0], "value": latents[sites[0]["name"]]}])
        else:
            trace = problem.trace(problem.pair.guide, latents)
            log_guide = problem.log_prob(traced.sample_sites(trace))
        if not problem.mixes:
            return log_guide
        shares = math.log1p(-_PRIOR_SHARE), math.log(_PRIOR_SHARE)
        return torch.logaddexp(log_guide + shares[0], log_prior + shares[1])

    if problem.mixes:
        from_prior = torch.rand_like(state.log_joint) < _PRIOR_SHARE
        proposal = problem.choose(from_prior, problem.draw(problem.pair.model)[0], proposal)
    scored = traced.sample_sites(problem.trace(problem.pair.model, proposal))
    log_prior = problem.log_prob([site for site in scored if not site["is_observed"]])
    there, back = log_proposal(proposal, log_prior), log_proposal(state.latents, state.log_prior)
    log_ratio = problem.log_prob(scored) - there - state.log_joint + back
    # NaN: neither point has a density; stay.
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    latents = problem.choose(accepted, proposal, state.latents)
    return _redraw(problem, latents), accepted.to(state.log_joint)


def _redraw(problem: _Problem, latents: Latents) -> _State:
    x, sites, moments = _draw_hidden(problem, latents)
    log_prior = problem.log_prob([each for each in sites if not each["is_observed"]])
    return _State(latents, problem.fill(x), problem.log_prob(sites), log_prior, moments)


def _by_importance(
    problem: _Problem, weighed: OpenedPair, num_draws: int, num_samples: int, budget: int
) -> Completion:
    """Weigh draws from the guide by the density of the observed part, and resample."""
    how = ImportanceOptions(num_samples, compile=False)
    found = estimate_log_prob(weighed, how, max_memory=budget, keep_draws=num_samples)
    impossible = int(found.log_prob.isneginf().sum())
    if impossible or found.draws is None:
        wanted = "latents that explain the observed values"
        got = f"only weights of 0 for {impossible} data points"
        raise InputError(f"expected {wanted}, got {got}: raise num_samples, or use metropolis")
    picked = found.draws.choose(num_draws), torch.arange(len(found.log_prob))
    own, axes = found.draws.latents, problem.pair.axes
    chosen = {n: own[n][picked].to(problem.x.device).movedim(1, axis) for n, axis in axes.items()}
    draws, moments = [], Moments()
    for index in range(num_draws):
        latents = {name: value[index] for name, value in chosen.items()}
        x, _, of_values = _draw_hidden(problem, latents)
        draws.append(x)
        moments.add(of_values[None])
    ess = found.ess.to(problem.x.device)
    return Completion(torch.stack(draws), *_spread(moments.mean()), "importance", ess=ess)


def _spread(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of what has these :func:`value_moments`."""
    mean, square = moments.unbind(1)
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def _join(parts: list[Completion], x: Tensor, missing: Tensor) -> Completion:
    """Join blocks of data, and put the observed values back as they came."""
    columns: Any = zip(*(part[1:3] + part[4:] for part in parts), strict=True)
    joined: Any = (None if each[0] is None else torch.cat(each) for each in columns)
    mean, deviation, *found = joined
    draws = torch.cat([part.draws for part in parts], dim=1)
    drawn, centre = (torch.where(missing, value, x) for value in (draws, mean.to(draws.dtype)))
    spread = deviation.to(draws.dtype).masked_fill(~missing, 0.0)
    return Completion(drawn, centre, spread, parts[0].method, *found)


def _fill_first(
    pair: OpenedPair, missing: Tensor, position: int, initial: Any, observed: str | None
) -> OpenedPair:
    """Return the pair with the hidden places filled as asked, or by the model's own mean."""
    x = pair.inputs[position]

    def with_fill(fill: Tensor) -> OpenedPair:
        return _replace_input(pair, position, torch.where(missing, fill.to(x), x))

    if initial is not None:
        if not isinstance(initial, int | float | Tensor):
            raise InputError(f"expected initial as a number or a tensor, got {initial!r}")
        fill = torch.as_tensor(initial)
        try:
            fill.expand(x.shape)
        except RuntimeError:
            wanted = f"initial to broadcast to the data's shape {tuple(x.shape)}"
            raise InputError(f"expected {wanted}, got {tuple(fill.shape)}") from None
        if not fill.isfinite().all():
            raise InputError("expected finite values to fill with, got NaN or infinity in initial")
        return with_fill(fill)
    blank = with_fill(x.new_zeros(()))
    model, empty = blank.alone(blank.model), blank.inputs[position]
    means = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for _ in range(_PRIOR_DRAWS):
        trace = model.trace()
        parts = parts_of(trace, observing_sites(trace, empty, observed), empty)
        drawn = x.double().clone()
        for site, place in parts:
            take_part(drawn, place).copy_(site["fn"].sample())
        means += value_moments(parts, drawn)[:, 0]
    return with_fill(means / _PRIOR_DRAWS)


def _bind(pair: OpenedPair, missing: Tensor, position: int, observed: str | None) -> _Problem:
    """Bind a pair of filled data to what is missing, or refuse it."""
    trace, guide_trace = pair.trace()
    names = observing_sites(trace, x := pair.inputs[position], observed)
    unseen = missing.clone(memory_format=torch.contiguous_format)
    for _, place in parts_of(trace, names, x):
        take_part(unseen, place).fill_(False)
    if unseen.any():
        raise InputError(
            f"expected missing values that an observed site explains, {int(unseen.sum())} lie "
            f"outside {', '.join(names)}: they can't be filled in"
        )
    check_latents_match(trace, guide_trace)
    latents = {site["name"]: site["value"] for site in traced.latent_sites(guide_trace)}
    problem = _Problem(pair, missing, position, names, observed)
    # Inspected with hidden values in the support of the likelihood: the first fill need not be there.
    drawn = problem.fill(_draw_hidden(problem, latents)[0])
    _check_conditional_independence(drawn, latents)
    if (why := drawn.pair.structure.why_unweighable) is not None:
        raise InputError(why)
    return problem._replace(is_divisible=_is_divisible(drawn))


def _is_divisible(problem: _Problem) -> bool:
    """Tell whether the pair accepts fewer data than these, and more."""
    if len(problem.missing) >= 3:
        return problem.pair.is_divisible()
    twice = problem.tile(2).pair
    twice.knowledge = Knowledge()  # whether it takes so many is to be seen
    try:
        twice.structure  # noqa: B018
    except traced.CALLING_ERRORS as error:
        traced.raise_out_of_memory(error)
        return False
    return True


def _check_conditional_independence(problem: _Problem, latents: Latents) -> None:
    """Refuse a model in which anything but the observed site itself depends on the hidden values."""
    other, *_ = _draw_hidden(problem, latents)
    traces = []
    for x in (problem.x, other):
        trace = problem.fill(x).trace(problem.pair.model, latents)
        for site, place in parts_of(trace, problem.sites, x):
            site["value"] = take_part(problem.x, place)
        traces.append(trace)
    if (name := traced.changed_site(*traces)) is not None:
        raise InputError(
            f"expected a model that uses the data at observed sites alone, the density at {name!r} "
            "changes with the hidden values: these can't be drawn given latents"
        )


def _check_options(method: str, num_samples: int | None, num_steps: int | None) -> None:
    check_name("method", method, METHODS)
    check_optional_counts(num_samples=num_samples, num_steps=num_steps)
    own, other, value = "num_steps", "num_samples", num_samples
    if method == "importance":
        own, other, value = other, own, num_steps
    if value is not None:
        wanted = f"no {other} with method {method!r}, which has {own}"
        raise InputError(f"expected {wanted}, got {value}: leave it out")
