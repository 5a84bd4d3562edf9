"""An estimate of log p(x): the numbers per datum, and how far they can be trusted."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.pareto import TailWeights, pareto_k_limit
from pyro_vae.pair.opened import Progress
from pyro_vae.summary import Summary, plus_minus, shown


class Convergence(NamedTuple):
    """Estimates ``(T, N)``, nats, from the first ``num_samples`` ``(T,)`` of each datum."""

    num_samples: Tensor
    log_prob: Tensor


class PosteriorDraws(NamedTuple):
    """Weighted draws that were kept, ``(S, N, ...)``: the posterior by importance resampling."""

    latents: dict[str, Tensor]
    log_likelihood: Tensor
    log_weights: Tensor

    def choose(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Choose draws by their weights, ``(count, N)``; where all weights are 0 none is better."""
        weights = self.log_weights.softmax(0).nan_to_num(nan=1.0).T
        return torch.multinomial(weights, count, replacement=True, generator=generator).T

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the draws with all of their tensors changed alike."""
        latents = {name: change(value) for name, value in self.latents.items()}
        likelihood, weights = change(self.log_likelihood), change(self.log_weights)
        return self._replace(latents=latents, log_likelihood=likelihood, log_weights=weights)


@shown
@dataclass(frozen=True)
class LogMarginal:
    """An estimate of log p(x), one value per datum (nats, float64, on the CPU).

    Attributes:
        log_prob: estimate of log p(x), ``(N,)``. Its expectation is a lower bound that tightens with
            the number of samples; ``-inf`` where every sample had likelihood 0.
        standard_error: Monte Carlo standard error of ``log_prob`` by the delta method, ``(N,)``; NaN
            (unknown) for a single sample, infinite with ``log_prob``. ``expected_bias`` is not in it.
        ess: effective sample size, (sum w)^2 / sum w^2, ``(N,)``.
        pareto_k: estimated tail index of the weights, ``(N,)``. Above ``pareto_k_limit`` neither the
            estimate nor its standard error can be trusted; it does not say on which side a datum
            errs. 0 for equal weights, NaN (not known) below 21 weights.
        rate: E_q[log q(z|x) - log p(z)], ``(N,)``, from draws of the guide; NaN without any.
        distortion: -E_q[log p(x|z)], ``(N,)``, as the rate.
        num_samples: weights the estimate rests on, ``(N,)``: draws, or annealing chains.
        cost: evaluations of the model spent on each datum, pilots included, ``(N,)``.
        method: ``"importance"``, ``"annealed"`` or ``"auto"``.
        trusted: which data points passed every check of their number, bool ``(N,)``; see
            ``diagnostics`` and the Pareto k. None where nothing was checked.
        was_annealed: which number annealing gave, bool ``(N,)``; None: all or none, by ``method``.
        diagnostics: of annealing, by name, each ``(N,)``, as a share of its limit; what is above 1,
            or NaN (unknown), is not trusted. ``"steps"``: what half of the steps gives differently,
            ``"halves"``: how two halves of the chains differ, ``"acceptance"``: rejections at the
            worst place of the path, ``"weights"``: chains per effective one, and with
            ``start="both"`` ``"prior"``: by how much a pilot from the prior found more evidence.
        missed_target: whose error is above ``target_standard_error``, bool ``(N,)``; None without.
        pseudo_likelihood: whether the model scores values that its discrete distribution can't take
            (grey pixels under a Bernoulli): then no number here is a log-density or a log-probability
            of the data, and none compares with one.
        acceptance: mean acceptance probability of the transitions, ``(N,)``; annealing only.
        convergence: the estimate after fewer samples, if all data points got one number of them.
        draws: weighted draws kept for :meth:`to_arviz`.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    rate: Tensor
    distortion: Tensor
    num_samples: Tensor
    cost: Tensor
    method: str = "importance"
    trusted: Tensor | None = None
    was_annealed: Tensor | None = None
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    missed_target: Tensor | None = None
    pseudo_likelihood: bool = False
    acceptance: Tensor | None = None
    convergence: Convergence | None = field(default=None, repr=False)
    draws: PosteriorDraws | None = field(default=None, repr=False)

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound per datum, ``(N,)``: minus rate minus distortion."""
        return -self.rate - self.distortion

    @property
    def per_datum(self) -> PerDatum:
        """The estimate and its standard error, with their means over the data."""
        return PerDatum(self.log_prob, self.standard_error)

    @property
    def mean(self) -> float:
        """Mean of log p(x) over the data."""
        return self.per_datum.mean

    @property
    def mean_standard_error(self) -> float:
        """Monte Carlo standard error of :attr:`mean` (the data held fixed)."""
        return self.per_datum.mean_standard_error

    @property
    def data_standard_error(self) -> float:
        """Standard error of :attr:`mean` over the data's distribution; NaN for a single datum."""
        return self.per_datum.data_standard_error

    @property
    def expected_bias(self) -> Tensor:
        """The bias to expect of ``log_prob``, ``(N,)``: about -se^2 / 2, for errors well below 1.

        It is the next term of the delta method: Owen 2013, section 2.7.
        """
        return -0.5 * self.standard_error.square()

    @property
    def mean_expected_bias(self) -> float:
        """The bias to expect of :attr:`mean`; it does not average out over the data."""
        return self.expected_bias.mean().item()

    @property
    def pareto_k_limit(self) -> Tensor:
        """The highest Pareto k to trust for S weights, min(0.7, 1 - 1 / log10 S), ``(N,)``."""
        return pareto_k_limit(self.num_samples)

    @property
    def num_unreliable(self) -> int:
        """How many data points are not trusted; where nothing was checked, by their Pareto k."""
        known = self.pareto_k <= self.pareto_k_limit if self.trusted is None else self.trusted
        return int((~known).sum())

    @property
    def methods(self) -> list[str]:
        """The method behind each data point's number: ``"importance"`` or ``"annealed"``.

        ``"not annealed"`` is importance sampling by ``auto`` where it can't be trusted.
        """
        if self.was_annealed is None or self.trusted is None:
            return [self.method] * len(self.log_prob)
        names = ["not annealed", "importance", "annealed"]
        own = (self.trusted | (self.method != "auto")).long().masked_fill(self.was_annealed, 2)
        return [names[index] for index in own.tolist()]

    def _summary(self) -> Summary:
        count, mark = len(self.log_prob), " (pseudo-likelihood)" * self.pseudo_likelihood
        rows = {
            "mean": plus_minus(self.mean, self.mean_standard_error) + " nats, Monte Carlo error",
            "error over data points": f"{self.data_standard_error:.2g}",
            "expected bias": f"{self.mean_expected_bias:.2g}",
            "trusted": f"{count - self.num_unreliable} of {count} data points",
        }
        if self.num_unreliable:
            more = dict.fromkeys(("annealed", "auto"), "num_steps, then num_chains, higher")
            rows["next"] = (more | {"importance": 'method="auto"'}).get(self.method, "more draws")
        means = {"importance": "importance sampling", "annealed": "annealing"}
        return f"log p(x){mark} of {count} data points by {means.get(self.method, self.method)}", rows

    def to_arviz(self, **options: Any) -> Any:
        """Return the estimate in ArviZ's data structure: see :func:`pyro_vae.evaluation.to_arviz`."""
        return to_arviz(self, **options)


def to_arviz(
    estimate: LogMarginal, *, num_draws: int = 1000, seed: int = 0,
    labels: Iterable[Any] | None = None,
) -> Any:  # fmt: skip
    """Return an estimate as ArviZ's ``InferenceData`` (0.23) or as a ``DataTree`` (1.x).

    Groups, all with the data points as coordinate ``data``:

    - ``posterior``: the latents, resampled by their weights (chain, draw, data, ...);
    - ``log_likelihood``: log p(x given z) of these draws, as variable ``x`` (chain, draw, data);
    - ``sample_stats``: the log weights of these draws (chain, draw, data);
    - ``importance``: the log weights of all kept draws (sample, data), and the estimate per datum
      with its standard error, expected bias, effective sample size and Pareto k, its method, and
      whether it is trusted; a pseudo-likelihood is named in the group's attributes.

    Each datum has latents of its own, so ``arviz.loo`` on the result is not predictive of new data:
    E[1 / p(x given z)] over the posterior is 1 / p(x), which makes it a (smoothed) harmonic mean
    estimate of log p(x), worse than the one in ``importance``.

    Args:
        estimate: what :func:`pyro_vae.log_marginal` returned.
        num_draws: posterior draws per datum, resampled from the weighted draws that were kept.
        seed: seed of the resampling.
        labels: names of the data points, N of them; by default their positions.

    Raises:
        InputError: no draws were kept (``keep_draws=0``), other labels than N, or below one draw.
    """
    if estimate.draws is None:
        raise InputError("expected an estimate that kept draws, got none: use keep_draws=1000")
    import xarray

    check_counts(num_draws=num_draws)
    latents, log_likelihood, log_weights = estimate.draws
    num_data = log_weights.shape[1]
    names = list(range(num_data)) if labels is None else list(labels)
    if len(names) != num_data:
        raise InputError(f"expected {num_data} labels, one per datum, got {len(names)}")
    variables: dict[str, Any] = {"log_weight": (("sample", "data"), log_weights.numpy())}
    for name in ("log_prob", "standard_error", "expected_bias", "ess", "pareto_k"):
        variables[name] = (("data",), getattr(estimate, name).numpy())
    if estimate.trusted is not None:
        variables["trusted"] = (("data",), estimate.trusted.numpy())
        variables["method"] = (("data",), estimate.methods)
    about = {"method": estimate.method, "unit": "nats"}
    how: Any = {"coords": {"sample": list(range(len(log_weights))), "data": names}}
    how["attrs"] = about | (_MARK if estimate.pseudo_likelihood else {})
    chosen = estimate.draws.choose(num_draws, torch.Generator().manual_seed(seed))
    drawn = {"posterior": latents, "log_likelihood": {"x": log_likelihood}}
    drawn["sample_stats"] = {"log_weight": log_weights}
    groups = {name: _choose(values, chosen, names) for name, values in drawn.items()}
    return structure({**groups, "importance": xarray.Dataset(variables, **how)})


# The attribute of numbers that are no density and no probability.
_MARK = {"likelihood": "pseudo-likelihood"}


def log_mean_weights(log_weights: Tensor) -> dict[str, Tensor]:
    """Estimate log p(x) from log weights ``(K, N)``: estimate, standard error, ess, each ``(N,)``."""
    largest = log_weights.amax(0)
    weights = (log_weights - torch.where(largest.isneginf(), 0.0, largest)).exp()
    return summarise(largest, weights.sum(0), weights.square().sum(0), len(log_weights))


def measure_weights(log_weights: Tensor, precision: float) -> dict[str, Any]:
    """Estimate log p(x) from log weights ``(K, N)``, with Pareto k and trust in it, ``(N,)`` each."""
    tail = TailWeights(len(log_weights), precision)
    tail.add(log_weights)
    pareto_k = tail.pareto_k()
    trusted = pareto_k <= pareto_k_limit(len(log_weights))
    return {**log_mean_weights(log_weights), "pareto_k": pareto_k, "trusted": trusted}


def summarise(largest: Tensor, total: Tensor, squares: Tensor, count: int) -> dict[str, Tensor]:
    """Turn sums of w and w^2, relative to the largest weight, into the estimate and its error.

    Source:
        Owen 2013, "Monte Carlo theory, methods and examples", sections 9.2 and 9.3.
    """
    log_prob = total.log() + largest - math.log(count)
    ess = total.square() / squares
    # Var(log mean w) ~ Var(w) / (K mean(w)^2), with the unbiased sample variance of w.
    relative_variance = (1 / ess - 1 / count).clamp(min=0)
    correction = count / (count - 1) if count > 1 else math.nan
    standard_error = (relative_variance * correction).sqrt()
    impossible = largest.isneginf()
    found = {"log_prob": log_prob, "standard_error": standard_error, "ess": ess}
    without = {"log_prob": -math.inf, "standard_error": math.inf, "ess": 0.0}
    return {name: torch.where(impossible, without[name], value) for name, value in found.items()}


def warn_if_unreliable(estimate: LogMarginal, *, stacklevel: int) -> None:
    """Warn of data points that no check clears, and of those that missed the wanted error."""
    count, total, texts = estimate.num_unreliable, len(estimate.log_prob), []
    if count and estimate.method == "importance":
        limits = " to ".join(sorted({f"{limit:.2g}" for limit in estimate.pareto_k_limit.aminmax()}))
        unknown = estimate.pareto_k.isnan()
        why = [f"> {limits}"] * (not unknown.all())
        why += ["not known (below 21 samples)"] * bool(unknown.any())
        doubt = "neither their log p(x) nor its standard error can be trusted"
        advice = 'use method="annealed", a wider guide or more samples'
        found = f"{count} of {total} data points have Pareto k {' or '.join(why)}"
        texts.append(f"{found}: {doubt}; {advice}")
    elif count:
        annealed = torch.tensor([method == "annealed" for method in estimate.methods])
        failed = {n: int((~(v <= 1) & annealed).sum()) for n, v in estimate.diagnostics.items()}
        failed["not being annealed"] = left = estimate.methods.count("not annealed")
        reasons = ", ".join(f"{count} by {name}" for name, count in failed.items() if count)
        behind = f" ({reasons})" * bool(reasons)
        advice = "use more steps or chains" + " or a higher max_annealed" * bool(left)
        doubt = "their log p(x) may be off by more than their standard errors say"
        texts.append(f"{count} of {total} data points are not trusted{behind}: {doubt}; {advice}")
    missed = estimate.missed_target
    if missed is not None and missed.any():
        found = f"{int(missed.sum())} of {total} data points missed target_standard_error"
        most = f"{estimate.standard_error.max():.2g} (see missed_target)"
        texts.append(f"{found}: theirs is up to {most}; raise max_samples")
    for text in texts:
        warnings.warn(text, stacklevel=stacklevel + 1)


@dataclass
class Report:
    """Tells how far an estimate has come, and its mean over the data points so far."""

    num_data: int
    progress: Progress | None = None
    running_mean: Callable[[float], None] | None = None
    done: int = 0
    total: float = 0.0

    def tell(self, in_block: float = 0, so_far: Callable[[], Tensor] | None = None) -> None:
        """Tell of the finished blocks, and of the data done and the estimates of one under way."""
        if self.progress is not None:
            self.progress(self.done + int(in_block), self.num_data)
        if self.running_mean is not None:
            begun = torch.zeros(0) if so_far is None else so_far()
            count = self.done + len(begun)
            if count:
                self.running_mean((self.total + begun.sum().item()) / count)

    def finish(self, log_prob: Tensor) -> None:
        """Take in the estimates of a finished block."""
        self.done, self.total = self.done + len(log_prob), self.total + log_prob.sum().item()


def concatenate(
    parts: Sequence[LogMarginal], *, positions: Sequence[Tensor] = (), keep_draws: int | None = 0
) -> LogMarginal:
    """Put estimates of several sets of data points together, one after the other or at ``positions``.

    What they share is the first one's; of the draws as many as all have are kept, or ``keep_draws``.
    """
    order = torch.cat(list(positions)).argsort() if positions else None

    def join(values: Iterable[Tensor], dim: int = 0) -> Tensor:
        joined = torch.cat(list(values), dim)
        return joined if order is None else joined.index_select(dim, order)

    whole: dict[str, Any] = {}
    for each in fields(LogMarginal):
        values = [getattr(part, each.name) for part in parts]
        if all(isinstance(value, Tensor) for value in values):
            whole[each.name] = join(values)
    names = [n for n in parts[0].diagnostics if all(n in part.diagnostics for part in parts)]
    whole["diagnostics"] = {n: join(part.diagnostics[n] for part in parts) for n in names}
    whole["pseudo_likelihood"] = any(part.pseudo_likelihood for part in parts)
    curves = [part.convergence for part in parts if part.convergence is not None]
    numbers = {tuple(curve.num_samples.tolist()) for curve in curves}
    if len(curves) == len(parts) and len(numbers) == 1:
        log_prob = join((curve.log_prob for curve in curves), 1)
        whole["convergence"] = Convergence(curves[0].num_samples, log_prob)
    draws = [part.draws for part in parts if part.draws is not None]
    kept = min(len(each.log_weights) for each in draws) if len(draws) == len(parts) else 0
    kept = kept if keep_draws is None else min(kept, keep_draws)
    if kept:
        latents, *terms = zip(*(each.map(lambda value: value[:kept]) for each in draws), strict=True)
        together = {name: join((each[name] for each in latents), 1) for name in latents[0]}
        whole["draws"] = PosteriorDraws(together, *(join(each, 1) for each in terms))
    return LogMarginal(**whole, method=parts[0].method)


def pointwise_densities(
    log_prob: Tensor, pareto_k: Tensor, trusted: Tensor, num_samples: int, *, pseudo_likelihood: bool
) -> Any:
    """Return log p(x) of data outside the training as ArviZ's pointwise predictive density.

    ``arviz.compare({name: densities, ...})`` takes it as it is: it ranks the models by the sum over
    the data, with differences and their paired standard errors, and ``arviz.plot_compare`` shows
    them. ArviZ calls such numbers ``elpd_loo``. Nothing is left out here, and nothing needs to be:
    the model has not seen the data, so log p(x) is their log predictive density. There is no
    effective number of parameters (``p`` is 0).

    ``arviz.compare``'s default, stacking, exponentiates each datum's log p(x); where that underflows
    (below about -700 nats) use ``method="pseudo-BMA"``. Attributes name a pseudo-likelihood.
    """
    import arviz
    import xarray

    count, attributes = len(log_prob), _MARK if pseudo_likelihood else {}
    how: Any = {"coords": {"data": range(count)}, "dims": "data", "attrs": attributes}
    values = {"elpd": log_prob.numpy(), "pareto_k": pareto_k.numpy()}
    per_datum = {name: xarray.DataArray(v, name=name, **how) for name, v in values.items()}
    error = math.sqrt(count) * log_prob.std(correction=0).item()
    numbers: dict[str, Any] = {"elpd": log_prob.sum().item(), "se": error, "p": 0.0, "scale": "log"}
    numbers |= {"n_samples": num_samples, "n_data_points": count}
    numbers |= {"warning": not bool(trusted.all()), "pareto_k": per_datum["pareto_k"]}
    numbers["good_k"] = pareto_k_limit(num_samples).item()
    fields = getattr(arviz.ELPDData, "__dataclass_fields__", None)
    if fields is None:  # a pandas Series in the 0.x line
        old_names = {"elpd": "elpd_loo", "p": "p_loo"}
        renamed = {old_names.get(name, name): value for name, value in numbers.items()}
        renamed["loo_i"] = per_datum["elpd"]
        return arviz.ELPDData(list(renamed.values()), index=list(renamed))
    kind = {"kind": "loo"} if "kind" in fields else {}  # asked for until 1.2
    return arviz.ELPDData(**numbers, **kind, elpd_i=per_datum["elpd"])


def rank_normalized_r_hat(values: Tensor) -> Tensor:
    """Return the largest of ArviZ's rank-normalised R-hats of ``(C, T, N, Q)`` over Q, ``(N,)``."""
    # A number that is constant says nothing; infinite where each chain has a constant of its own.
    import arviz
    import numpy as np
    import xarray

    if values.shape[0] < 2 or values.shape[1] < 4:
        return torch.full(values.shape[2:3], math.nan, dtype=torch.float64)
    numbers = xarray.DataArray(values.numpy(), dims=("chain", "draw", "data", "number"), name="x")
    with np.errstate(all="ignore"):  # constants
        found = torch.as_tensor(arviz.rhat(numbers.to_dataset())["x"].values)
    stuck = (values == values[:, :1]).all(1).all(0) & (values[:, 0] != values[0, 0]).any(0)
    known = torch.where(stuck, math.inf, found)
    largest = known.nan_to_num(nan=-math.inf, posinf=math.inf).amax(1)
    return torch.where(known.isnan().all(1), math.nan, largest)


def structure(groups: dict[str, Any]) -> Any:
    """Return groups in the data structure of the installed ArviZ."""
    import arviz

    # The 1.x line has xarray's DataTree under this name, or answers to it with a warning.
    old = vars(arviz).get("InferenceData")
    if old is None or hasattr(old, "from_dict"):
        from xarray import DataTree

        return DataTree.from_dict(groups)
    return old(**groups, warn_on_custom_groups=False)


def one_chain(values: Mapping[str, Tensor], **named: Sequence[Any]) -> Any:
    """Return values ``(S, ...)`` as ArviZ's draws of one chain.

    The dimensions behind the draws have the names and coordinates given, the others numbers.
    """
    import xarray

    variables, coordinates = {}, {"chain": [0], **named}
    for name, value in values.items():
        sizes = enumerate(value.shape[1 + len(named) :])
        others = {f"{name}_dim_{index}": range(size) for index, size in sizes}
        variables[name] = (("chain", "draw", *named, *others), value[None].numpy())
        coordinates |= {"draw": range(len(value)), **others}
    return xarray.Dataset(variables, coords=coordinates)


def _choose(values: Mapping[str, Tensor], chosen: Tensor, names: list[Any]) -> Any:
    """Return the draws ``(S, N, ...)`` at the chosen positions, with their coordinates."""
    columns = torch.arange(chosen.shape[1])
    return one_chain({n: value[chosen, columns] for n, value in values.items()}, data=names)
