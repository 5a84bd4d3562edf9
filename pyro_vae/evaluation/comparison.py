"""Train pairs where asked, and measure each in the same way on the same data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import InputError, whole_number
from pyro_vae.evaluation.blocks import few_of
from pyro_vae.evaluation.comparison_checks import (
    Pair,
    Trained,
    check_apart,
    check_fit_options,
    check_options,
    check_pairs,
)
from pyro_vae.evaluation.comparison_result import Comparison, Measured
from pyro_vae.evaluation.comparison_training import Report, TrainingData, check_training, trained
from pyro_vae.evaluation.elbo import PerDatum, measure_bounds
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.evaluation.frozen_model import frozen_model, parameters_of
from pyro_vae.evaluation.hmc import AnnealingPath
from pyro_vae.evaluation.importance_sampling import log_marginal
from pyro_vae.evaluation.observed_likelihoods import check_comparable, observed_sites
from pyro_vae.evaluation.options import check_max_memory
from pyro_vae.evaluation.quadrature import latent_on_grid, posterior_divergence
from pyro_vae.infer.settings import check_callables
from pyro_vae.infer.training import FitResult
from pyro_vae.pair.functions import (
    HANDLER_LOCK,
    PairFunction,
    device_of,
    evaluation_mode,
    owned_modules,
    resolve_device,
    seeded,
)
from pyro_vae.pair.inputs import Inputs, as_inputs, check_data
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.weights.particles import PairScorer

Data = Tensor | Sequence[Tensor]

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
    train: TrainingData | None = None,
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
    check_pairs(pairs)
    annealing = check_options(methods, annealing_options, posterior, hold)
    fitting = check_fit_options(fit_options, trains=train is not None)
    check_max_memory(max_memory)
    check_callables(progress=progress)
    as_inputs(x)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    settings = _Settings(
        tuple(methods),
        whole_number("num_samples", num_samples, least=1),
        whole_number("num_elbo_samples", num_elbo_samples, least=1),
        whole_number("num_importance", num_importance, least=1),
        annealing,
        posterior,
        max_memory,
        plate,
        seed,
    )
    report = progress or _silent
    options = {"plate": plate, "seed": seed, "progress": False, **fitting}
    first = next(iter(pairs.values()))
    with HANDLER_LOCK:
        likelihood = _check_likelihoods(pairs, x, settings, hold)
        owned = {name: _looked_at(pair, x, settings, hold) for name, pair in pairs.items()}
        if train is not None:
            check_apart(pairs, owned, hold)
            # Held, the other guides may still be on another device than the model.
            check_training({"": first} if hold == "model" else pairs, train, options, plate)
        shared: Any = nullcontext()
        if hold == "model":
            guides = {name: guide for name, (_, guide) in pairs.items()}
            inputs = as_inputs(x, *first)
            place = _place(first[0], options, inputs, trains=train is not None)
            shown = tuple(value.to(place) for value in _few(first, inputs, settings))
            shared = frozen_model(first[0], guides, shown, place)
        with shared as frozen:
            chosen = {name: (frozen or model, guide) for name, (model, guide) in pairs.items()}
            fits = {} if train is None else trained(chosen, train, options, report)
            measured = {
                name: _measure(name, pair, x, settings, report, owned[name], fits.get(name))
                for name, pair in chosen.items()
            }
    return Comparison(measured, likelihood, settings.num_importance, settings.num_samples, hold, seed)


def _check_likelihoods(
    pairs: Mapping[str, Pair], x: Data, settings: _Settings, hold: str | None
) -> str:
    if hold == "model":
        first = next(iter(pairs.values()))
        pairs = {"the frozen model": first}
    observed = {}
    for name, (model, guide) in pairs.items():
        inputs = as_inputs(x, model, guide)
        check_data(model, inputs)
        with torch.no_grad(), evaluation_mode(model, guide), seeded(settings.seed):
            observed[name] = observed_sites(model, guide, inputs, settings.plate)
    return check_comparable(observed)


def _looked_at(pair: Pair, x: Data, settings: _Settings, hold: str | None) -> Trained:
    """Refuse a guide that can't be measured as asked; return what trains of the pair."""
    model, guide = pair
    few = _few(pair, as_inputs(x, model, guide), settings)
    with torch.no_grad(), seeded(0), evaluation_mode(model, guide):
        if settings.posterior == "quadrature":
            latent_on_grid(poutine.trace(guide).get_trace(*few), len(few[0]))
        in_guide = {id(leaf): leaf.numel() for leaf in parameters_of(guide, few)}
        in_model = {id(leaf): leaf.numel() for leaf in parameters_of(model, few)}
    return Trained(in_guide if hold == "model" else in_guide | in_model, in_guide)


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

    opened = OpenedPair(model, guide, inputs, plate=settings.plate)
    with opened.evaluating(settings.seed):
        bounds = measure_bounds(
            opened,
            num_samples=settings.num_elbo_samples,
            num_importance=settings.num_importance,
            max_memory=settings.max_memory,
            progress=share("bounds"),
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
    shown = _few(pair, inputs, settings)
    start = settings.annealing_options.get("start", "guide")
    with torch.no_grad(), evaluation_mode(*pair), seeded(settings.seed):
        try:
            AnnealingPath(PairScorer(*pair, shown, plate=settings.plate), start)
        except InputError:
            return False
    return True


def _few(pair: Pair, inputs: Inputs, settings: _Settings) -> Inputs:
    """Return a few data to look at a pair with; all of them where it accepts no part."""
    with torch.no_grad(), evaluation_mode(*pair), seeded(0):
        return few_of(*pair, inputs, settings.plate, _SHOWN)


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
