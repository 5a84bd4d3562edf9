"""Train pairs where asked, and measure each in the same way on the same data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError
from pyro_vae.evaluation.blocks import can_be_split
from pyro_vae.evaluation.comparison.checks import (
    Pair,
    Trained,
    check_apart,
    check_fit_options,
    check_options,
    check_pairs,
)
from pyro_vae.evaluation.comparison.frozen import frozen_model, parameters_of
from pyro_vae.evaluation.comparison.likelihoods import check_comparable, observed_sites
from pyro_vae.evaluation.comparison.result import Comparison, Measured
from pyro_vae.evaluation.elbo import PerDatum, measure_bounds
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.evaluation.hamiltonian import AnnealingPath
from pyro_vae.evaluation.importance import log_marginal
from pyro_vae.evaluation.quadrature import posterior_divergence
from pyro_vae.infer.devices import resolve_device
from pyro_vae.infer.log_weights import PairScorer
from pyro_vae.infer.pair import (
    HANDLER_LOCK,
    Inputs,
    PairFunction,
    as_inputs,
    check_support,
    device_of,
    evaluation_mode,
    owned_modules,
    seeded,
)
from pyro_vae.infer.training import FitResult, fit

__all__ = ["compare"]

Data = Tensor | Sequence[Tensor]
Report = Callable[[str, str, float], None]

# Data that show what a pair is made of.
_SHOWN = 8


class _Settings(NamedTuple):
    """How each pair is measured."""

    methods: tuple[str, ...]
    num_samples: int
    num_elbo_samples: int
    num_importance: int
    annealing_options: dict[str, Any]
    posterior: str | None
    max_memory: int | None
    plate: str
    seed: int


def compare(
    pairs: Mapping[str, Pair],
    x: Data,
    *,
    num_samples: int = 5000,
    num_elbo_samples: int = 1000,
    num_importance: int = 50,
    methods: Sequence[str] = ("importance",),
    annealing_options: Mapping[str, Any] | None = None,
    posterior: str | None = None,
    train: Dataset | Tensor | Sequence[Tensor] | None = None,
    hold: str | None = None,
    fit_options: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    plate: str = "data",
    seed: int | None = None,
    progress: Report | None = None,
) -> Comparison:
    """Measure pairs on the same data, with paired differences and their standard errors.

    Every pair gets the same seed, so pairs that draw alike share their draws. The standard error of a
    paired difference is taken from its spread over the data, which is right either way.

    Args:
        pairs: ``{name: (model, guide)}``, trained already unless ``train`` is given.
        x: data ``(N, ...)``, or a tuple of tensors passed as ``model(*x)``; taken to each pair's
            device.
        num_samples: draws per datum for log p(x).
        num_elbo_samples: draws per datum for the ELBO, its parts and the importance-weighted bound.
        num_importance: draws in one importance-weighted bound.
        methods: ``"importance"``, with or without ``"annealed"``. Annealing is left out for a pair
            that can't be annealed (latents that are discrete or on a sphere).
        annealing_options: options of :func:`pyro_vae.log_marginal` for annealing, e.g. ``num_steps``.
        posterior: ``"quadrature"`` adds KL(q(z|x) || p(z|x)), for real latents of 1 or 2 dimensions.
        train: training data; each pair is then trained by :func:`pyro_vae.fit`, in place.
        hold: ``"model"`` measures all guides against one frozen copy of the first pair's model (which
            is to be trained already) and with ``train`` trains the guides alone; the models of the
            other pairs are not used. None takes each pair whole.
        fit_options: options of :func:`pyro_vae.fit`.
        max_memory: bytes that a chunk may need.
        plate: name of the data plate.
        seed: seed of training and draws; the generators' state is restored afterwards.
        progress: called with (name of the pair, what is being done, share done of it).

    Raises:
        InputError: no pairs, pairs whose likelihoods can't be subtracted (a density and a
            pseudo-likelihood, discrete and continuous observations, other observed values),
            different pairs to train that share parameters, an unknown option, or a pair that can't
            be weighed.

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
    check_pairs(pairs)
    counts = {
        "num_samples": num_samples,
        "num_elbo_samples": num_elbo_samples,
        "num_importance": num_importance,
    }
    annealing = check_options(methods, annealing_options, posterior, hold, counts)
    check_fit_options(fit_options or {})
    as_inputs(x)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    settings = _Settings(
        tuple(methods),
        num_samples,
        num_elbo_samples,
        num_importance,
        annealing,
        posterior,
        max_memory,
        plate,
        seed,
    )
    report = progress or _silent
    options = {"plate": plate, "seed": seed, "progress": False, **(fit_options or {})}
    first = next(iter(pairs.values()))
    with HANDLER_LOCK:
        likelihood = _check_likelihoods(pairs, x, settings, hold)
        owned = {name: _parameters(pair, x, plate, hold) for name, pair in pairs.items()}
        if train is not None:
            check_apart(pairs, owned, hold)
        shared: Any = nullcontext()
        if hold == "model":
            guides = {name: guide for name, (_, guide) in pairs.items()}
            inputs = as_inputs(x, *first)
            place = _place(first[0], options, inputs, trains=train is not None)
            shown = tuple(value.to(place) for value in _shown(first, inputs, plate))
            shared = frozen_model(first[0], guides, shown, place)
        with shared as frozen:
            chosen = {name: (frozen or model, guide) for name, (model, guide) in pairs.items()}
            fits = _train(chosen, train, options, report)
            measured = {
                name: _measure(name, pair, x, settings, report, owned[name], fits.get(name))
                for name, pair in chosen.items()
            }
    return Comparison(measured, likelihood, num_importance, num_samples, hold, seed)


def _check_likelihoods(
    pairs: Mapping[str, Pair], x: Data, settings: _Settings, hold: str | None
) -> str:
    if hold == "model":
        first = next(iter(pairs.values()))
        pairs = {"the frozen model": first}
    observed = {}
    for name, (model, guide) in pairs.items():
        inputs = as_inputs(x, model, guide)
        check_support(model, inputs)
        with torch.no_grad(), evaluation_mode(model, guide), seeded(settings.seed):
            observed[name] = observed_sites(model, guide, inputs, settings.plate)
    return check_comparable(observed)


def _parameters(pair: Pair, x: Data, plate: str, hold: str | None) -> Trained:
    """Return what trains of a pair, and of its guide."""
    model, guide = pair
    shown = _shown(pair, as_inputs(x, model, guide), plate)
    with seeded(0), evaluation_mode(model, guide):
        in_guide = {id(leaf): leaf.numel() for leaf in parameters_of(guide, shown)}
        in_model = {id(leaf): leaf.numel() for leaf in parameters_of(model, shown)}
    return Trained(in_guide if hold == "model" else in_guide | in_model, in_guide)


def _train(
    pairs: Mapping[str, Pair], train: Any, options: dict[str, Any], report: Report
) -> dict[str, FitResult]:
    """Train each pair once, however many names it has."""
    fits: dict[str, FitResult] = {}
    if train is None:
        return fits
    for name, pair in pairs.items():
        same = next((other for other in fits if pairs[other] == pair), None)
        if same is not None:
            fits[name] = fits[same]
            continue
        fits[name] = fit(*pair, train, **_with_report(options, name, report))
    return fits


def _with_report(options: dict[str, Any], name: str, report: Report) -> dict[str, Any]:
    """Tell the progress of a training run at each epoch, beside what the caller wants then."""
    epochs, given = options.get("epochs", 100), options.get("on_epoch")

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        report(name, "training", epoch / epochs)
        if given is not None:
            given(epoch, row)

    return {**options, "on_epoch": on_epoch}


def _measure(
    name: str,
    pair: Pair,
    x: Data,
    settings: _Settings,
    report: Report,
    owned: Trained,
    trained: FitResult | None,
) -> Measured:
    model, guide = pair
    inputs = as_inputs(x, model, guide)
    common: dict[str, Any] = {"plate": settings.plate, "max_memory": settings.max_memory}

    def share(what: str) -> Callable[[int, int], None]:
        return lambda done, total: report(name, what, done / total)

    with torch.no_grad(), evaluation_mode(model, guide), seeded(settings.seed):
        bounds = measure_bounds(
            model,
            guide,
            inputs,
            num_samples=settings.num_elbo_samples,
            num_importance=settings.num_importance,
            progress=share("bounds"),
            **common,
        )
    start = time.perf_counter()
    estimate = _log_marginal(
        pair,
        inputs,
        num_samples=settings.num_samples,
        seed=_after(settings.seed, 1),
        progress=share("log p(x)"),
        **common,
    )
    seconds = time.perf_counter() - start
    annealed = None
    if "annealed" in settings.methods and _can_be_annealed(pair, inputs, settings):
        annealed = _log_marginal(
            pair,
            inputs,
            method="annealed",
            seed=_after(settings.seed, 2),
            progress=share("log p(x), annealed"),
            **common,
            **settings.annealing_options,
        )
    divergence = None
    if settings.posterior == "quadrature":
        exact = posterior_divergence(
            model, guide, inputs, seed=settings.seed, progress=share("posterior"), **common
        )
        divergence = PerDatum(exact.kl, exact.error)
    return Measured(
        bounds.elbo,
        bounds.iwae,
        PerDatum(estimate.log_prob, estimate.standard_error),
        None if annealed is None else PerDatum(annealed.log_prob, annealed.standard_error),
        bounds.rate,
        bounds.distortion,
        bounds.exact_kl,
        divergence,
        estimate,
        num_parameters=sum(owned.parameters.values()),
        num_guide_parameters=sum(owned.of_guide.values()),
        seconds_per_1000=1000 * seconds / len(inputs[0]),
        fit=trained,
    )


def _log_marginal(pair: Pair, inputs: Inputs, **options: Any) -> LogMarginal:
    with warnings.catch_warnings():
        # The table says how many data have k > 0.7.
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ data have Pareto k")
        return log_marginal(*pair, inputs, **options)


def _can_be_annealed(pair: Pair, inputs: Inputs, settings: _Settings) -> bool:
    shown = _shown(pair, inputs, settings.plate)
    start = settings.annealing_options.get("start", "guide")
    with torch.no_grad(), evaluation_mode(*pair), seeded(settings.seed):
        try:
            AnnealingPath(PairScorer(*pair, shown, plate=settings.plate), start)
        except InputError:
            return False
    return True


def _shown(pair: Pair, inputs: Inputs, plate: str) -> Inputs:
    """Return a few data to look at a pair with; all of them where it accepts no part."""
    if len(inputs[0]) <= _SHOWN:
        return inputs
    with torch.no_grad(), evaluation_mode(*pair), seeded(0):
        splits = can_be_split(*pair, inputs, plate)
    return tuple(value[:_SHOWN] for value in inputs) if splits else inputs


def _place(
    model: PairFunction, options: Mapping[str, Any], inputs: Inputs, *, trains: bool
) -> torch.device:
    """Return the device where the guides will be: training moves modules, and only these."""
    if trains and owned_modules(model):
        return resolve_device(options.get("device", "auto"))
    return device_of(model, default=inputs[0].device)


def _after(seed: int, number: int) -> int:
    """Return another seed: log p(x) is to be independent of the bounds."""
    return (seed + number) % 2**32


def _silent(name: str, what: str, share: float) -> None:
    """Tell nobody."""
