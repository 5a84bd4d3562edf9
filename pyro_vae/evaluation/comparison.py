"""Train pairs where asked, and measure each in the same way on the same data."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from pyro_vae.errors import InputError, check_choice, check_optional_counts, first_line, whole_number
from pyro_vae.evaluation import comparison_training as training
from pyro_vae.evaluation.ais import AnnealingOptions
from pyro_vae.evaluation.auto import AutoOptions, anneal_alike, why_not_annealed
from pyro_vae.evaluation.comparison_result import Comparison, Measured
from pyro_vae.evaluation.comparison_training import Observed, Pair, Report, Trained, TrainingData
from pyro_vae.evaluation.elbo import PerDatum, measure_bounds
from pyro_vae.evaluation.importance_sampling import ImportanceOptions
from pyro_vae.evaluation.methods import estimate_log_prob
from pyro_vae.evaluation.quadrature import latent_on_grid, measure_divergence
from pyro_vae.infer.settings import as_dict, check_callables
from pyro_vae.infer.training import FitResult
from pyro_vae.pair import functions
from pyro_vae.pair.functions import HANDLER_LOCK, PairFunction
from pyro_vae.pair.inputs import Data, as_inputs, check_data
from pyro_vae.pair.opened import BLOCK, OpenedPair
from pyro_vae.weights.particles import Particles


class _Settings(NamedTuple):
    """How each pair is measured."""

    importance: ImportanceOptions
    bounds: dict[str, int]  # numbers of draws
    annealing: AnnealingOptions | None
    auto: AutoOptions | None
    posterior: str | None
    max_memory: int | None
    seed: int


def compare(
    pairs: Mapping[str, Pair], x: Data, *, num_samples: int = 5000, num_elbo_samples: int = 1000,
    num_importance: int = 50, methods: Sequence[str] = ("importance",),
    annealing_options: Mapping[str, Any] | None = None, posterior: str | None = None,
    train: TrainingData | None = None, hold: str | None = None,
    fit_options: Mapping[str, Any] | None = None, max_memory: int | None = None,
    plate: str = "data", seed: int | None = None, progress: Report | None = None,
) -> Comparison:  # fmt: skip
    """Measure pairs on the same data, with paired differences and their standard errors.

    Every pair gets the same seed, so pairs that draw alike share their draws. The standard error of a
    paired difference is taken from its spread over the data, which is right either way.

    Args:
        pairs: ``{name: (model, guide)}``, trained already unless ``train`` is given.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``, on any device.
        num_samples: draws per datum for log p(x).
        num_elbo_samples: draws per datum for the ELBO, its parts and the importance-weighted bound.
        num_importance: draws in one importance-weighted bound.
        methods: ``"importance"``, with or without ``"annealed"``, or ``"auto"`` alone, which anneals
            a data point that any pair fails to clear in every pair. Of a pair that can't be annealed
            (latents that are discrete or on a sphere) annealing is left out; under auto no data point
            of any pair is trusted then, since none could be annealed in all.
        annealing_options: of :func:`pyro_vae.log_marginal`, e.g. ``num_steps``, ``max_annealed``.
        posterior: ``"quadrature"`` adds KL(q(z|x) || p(z|x)), for real latents of 1 or 2 dimensions.
        train: training data; each pair is then trained by :func:`pyro_vae.fit`, in place.
        hold: ``"model"`` measures all guides against one frozen copy of the first pair's model (which
            is to be trained already) and with ``train`` trains the guides alone; the models of the
            other pairs are not used. None takes each pair whole.
        fit_options: options of :func:`pyro_vae.fit`.
        max_memory, plate: as in :func:`pyro_vae.log_marginal`.
        seed: seed of training and draws; the generators' state is restored afterwards.
        progress: called with (name of the pair, what is being done, share done of it).

    Raises:
        InputError: no pairs, pairs whose likelihoods can't be subtracted (a density and a
            pseudo-likelihood, discrete and continuous observations, other observed values),
            different pairs to train that share parameters, training data that a pair does not take,
            an option that is unknown, out of range or without effect, ``"quadrature"`` for other
            latents, or a pair that can't be weighed: all before anything is trained.

    Source:
        Paired differences: Vehtari, Gelman, Gabry 2017, "Practical Bayesian model evaluation using
        leave-one-out cross-validation and WAIC", section 5.2.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> networks, data = pv.networks, torch.ones(4, 3)
        >>> vae = pv.VAE(
        ...     pv.priors.StandardNormal(1),
        ...     pv.likelihoods.Bernoulli(networks.MLPDecoder(1), (3,)),
        ...     pv.guides.MeanFieldNormal(networks.MLPEncoder((3,)), 1),
        ... )
        >>> pv.compare({"mean field": (vae.model, vae.guide)}, data, seed=0).best()
        'mean field'
    """
    _check_pairs(pairs)
    annealing, max_annealed = _check_options(methods, annealing_options, posterior, hold)
    fitting = training.check_fit_options(fit_options, trains=train is not None)
    check_optional_counts(max_memory=max_memory)
    check_callables(progress=progress)
    as_inputs(x)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    num_samples = whole_number("num_samples", num_samples, least=1)
    num_importance = whole_number("num_importance", num_importance, least=1)
    draws = {"num_samples": whole_number("num_elbo_samples", num_elbo_samples, least=1)}
    draws["num_importance"] = num_importance
    importance = ImportanceOptions(num_samples)
    auto = AutoOptions(importance, annealing, max_annealed) if "auto" in methods else None
    plain = annealing if "annealed" in methods else None
    settings = _Settings(importance, draws, plain, auto, posterior, max_memory, seed)
    report = progress or (lambda name, what, share: None)
    options = {"plate": plate, "seed": seed, "progress": False, **fitting}

    def open_all(pairs: Mapping[str, Pair]) -> dict[str, OpenedPair]:
        # Whether a model is defined for the data is asked where it is used.
        return {n: OpenedPair(*p, as_inputs(x, *p), plate=plate) for n, p in pairs.items()}

    with HANDLER_LOCK:
        opened = open_all(pairs)
        first = next(iter(opened.values()))
        if hold == "model":
            observed = {"the frozen model": _look_at(first, settings)[0]}
            owned = {name: _look_at_guide(pair, settings) for name, pair in opened.items()}
        else:
            looks = {name: _look_at(pair, settings) for name, pair in opened.items()}
            observed = {name: found for name, (found, _) in looks.items()}
            owned = {name: trained for name, (_, trained) in looks.items()}
        likelihood = training.check_comparable(observed)
        if train is not None:
            training.check_apart(pairs, owned, hold)
            # Held, the other guides may still be on another device than the model.
            held = list(pairs.values())[: 1 if hold else None]
            training.check_training(held, train, options, plate)
        shared: AbstractContextManager[Any] = nullcontext()
        if hold == "model":
            shared = _hold(first, pairs, options, trains=train is not None)
        with shared as frozen:
            chosen = {name: (frozen or model, guide) for name, (model, guide) in pairs.items()}
            fits = {} if train is None else training.train_pairs(chosen, train, options, report)
            if fits or frozen:
                opened = open_all(chosen)
            looks_on = {n: (owned[n], fits.get(n)) for n in opened}
            runs = {n: [_measure(n, p, settings, report, *looks_on[n])] for n, p in opened.items()}
            if auto is not None:
                runs = _anneal_alike(opened, runs, auto, settings)
    return Comparison(runs, likelihood, num_importance, num_samples, hold, seed)


def _check_pairs(pairs: Mapping[str, Pair]) -> None:
    """Refuse anything but a mapping from names (a table's headings) to pairs."""
    if not isinstance(pairs, Mapping) or not pairs:
        got = type(pairs).__name__ if pairs else "none"
        raise InputError(f"expected at least one pair {{name: (model, guide)}}, got {got}")
    for name, pair in pairs.items():
        if not isinstance(name, str):
            raise InputError(f"expected names of pairs as text, got {first_line(repr(name))}")
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(map(callable, pair))):
            wanted, advice = f"(model, guide) for {name!r}", "for a VAE pass (vae.model, vae.guide)"
            raise InputError(f"expected {wanted}, got {type(pair).__name__}: {advice}")


def _check_options(
    methods: Sequence[str], given: Mapping[str, Any] | None, posterior: str | None, hold: str | None
) -> tuple[AnnealingOptions, int]:
    """Refuse options out of range or without effect; return annealing's, and how many data points."""
    named = set(methods) if isinstance(methods, Iterable) and not isinstance(methods, str) else set()
    if named not in ({"importance"}, {"importance", "annealed"}, {"auto"}):
        wanted = "('importance',), ('importance', 'annealed') or ('auto',)"
        raise InputError(f"expected methods {wanted}, got {methods!r}")
    check_choice("posterior", posterior, (None, "quadrature"))
    check_choice("hold", hold, (None, "model"))
    options = as_dict("annealing_options", given)
    known = set(AnnealingOptions.__dataclass_fields__)
    if named == {"auto"}:
        known.add("max_annealed")
    for name in set(options) - known:
        raise InputError(f"expected annealing_options among {', '.join(sorted(known))}, got {name!r}")
    max_annealed = whole_number("max_annealed", options.pop("max_annealed", 100), least=1)
    annealing = AnnealingOptions(**options)
    if options and named == {"importance"}:
        what = "methods=('importance', 'annealed') with annealing_options"
        raise InputError(f"expected {what}, got {methods!r}: leave them out, or ask for annealing")
    return annealing, max_annealed


def _look_at(pair: OpenedPair, settings: _Settings) -> tuple[dict[str, Observed], Trained]:
    """Return what a pair observes and trains; refuse what can't be measured as asked."""
    check_data(pair.model, pair.inputs)
    with pair.evaluating(settings.seed):
        Particles(pair)  # refuses a pair that has no weights
        observed, (model_trace, guide_trace) = training.observed_sites(pair)
        if settings.posterior == "quadrature":
            latent_on_grid(guide_trace, pair.few(BLOCK).num_data)
    in_guide = training.parameters_in(guide_trace)
    return observed, Trained(training.parameters_in(model_trace) | in_guide, in_guide)


def _look_at_guide(pair: OpenedPair, settings: _Settings) -> Trained:
    """Do so for a guide alone: its own model is not used."""
    with pair.alone(pair.guide).evaluating(0, pair.model):
        first = pair.few(BLOCK)
        trace = first.alone(pair.guide).trace()
        if settings.posterior == "quadrature":
            latent_on_grid(trace, first.num_data)
    return Trained(training.parameters_in(trace), training.parameters_in(trace))


def _hold(
    first: OpenedPair, pairs: Mapping[str, Pair], options: Mapping[str, Any], *, trains: bool
) -> AbstractContextManager[PairFunction]:
    """Freeze the first pair's model where the guides will be: training moves modules, only these."""
    place = functions.device_of(first.model, default=first.inputs[0].device)
    if trains and functions.owned_modules(first.model):
        place = functions.resolve_device(options.get("device", "auto"))
    shown = tuple(value.to(place) for value in first.few(BLOCK).inputs)
    guides = {name: guide for name, (_, guide) in pairs.items()}
    return training.frozen_model(first.model, guides, shown, place)


def _measure(
    name: str, pair: OpenedPair, how: _Settings, report: Report, owned: Trained, fit: FitResult | None
) -> Measured:
    def run(measure: Callable[..., Any], number: int, what: str, *given: Any, **options: Any) -> Any:
        """Measure by a seed of its own: log p(x) is to be independent of the bounds."""
        options["progress"] = lambda done, total: report(name, what, done / total)
        with pair.evaluating((how.seed + number) % 2**32):
            return measure(pair, *given, max_memory=how.max_memory, **options)

    bounds = run(measure_bounds, 0, "bounds", **how.bounds)
    start = time.perf_counter()
    estimate = run(estimate_log_prob, 1, "log p(x)", how.importance)
    seconds = time.perf_counter() - start
    annealed = annealed_trusted = divergence = None
    if how.annealing is not None:
        with pair.evaluating(how.seed):
            reason = why_not_annealed(pair, how.annealing.start)
        if reason is None:
            found = run(estimate_log_prob, 2, "log p(x), annealed", how.annealing)
            annealed, annealed_trusted = found.per_datum, found.trusted
    if how.posterior == "quadrature":
        exact = run(measure_divergence, 0, "posterior")
        divergence = PerDatum(exact.kl, exact.error)
    epochs = len(fit.history["seconds"]) if fit else 0
    return Measured(
        **bounds._asdict(), log_prob=estimate.per_datum, annealed=annealed,
        posterior_divergence=divergence, estimate=estimate, annealed_trusted=annealed_trusted,
        num_parameters=sum(leaf.numel() for leaf in owned.parameters.values()),
        num_guide_parameters=sum(leaf.numel() for leaf in owned.of_guide.values()),
        seconds_per_1000=1000 * seconds / pair.num_data, fit=fit,
        seconds_per_epoch=fit.seconds / epochs if fit and epochs else math.nan,
    )  # fmt: skip


def _anneal_alike(
    pairs: Mapping[str, OpenedPair], runs: dict[str, list[Measured]], auto: AutoOptions,
    how: _Settings,
) -> dict[str, list[Measured]]:  # fmt: skip
    """Anneal what any pair does not clear in every pair: else the paired difference is biased."""

    def run(pair: OpenedPair, number: int) -> AbstractContextManager[None]:
        return pair.evaluating((how.seed + number) % 2**32)

    first = {name: measured for name, (measured,) in runs.items()}
    estimates = {name: measured.estimate for name, measured in first.items()}
    found = anneal_alike(pairs, estimates, auto, run, max_memory=how.max_memory)
    return {n: [replace(first[n], estimate=e, log_prob=e.per_datum)] for n, e in found.items()}
