"""log p(x) by a method of choice: importance sampling, annealing, or each where it is needed."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from pyro_vae.errors import InputError, check_choice, check_optional_counts
from pyro_vae.evaluation.ais import AnnealingOptions, anneal
from pyro_vae.evaluation.auto import AutoOptions, anneal_alike
from pyro_vae.evaluation.estimate import LogMarginal, Report, warn_if_unreliable
from pyro_vae.evaluation.importance_sampling import ImportanceOptions, sample_importance
from pyro_vae.infer.settings import check_callables
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.opened import OpenedPair, Progress, open_pair
from pyro_vae.pair.precision import check_precision, compute_in, multiply_in


def log_marginal(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    num_samples: int = 5000, method: str = "importance", target_standard_error: float | None = None,
    max_samples: int | None = None, num_chains: int = 32, num_steps: int = 1000,
    num_leapfrog_steps: int = 5, num_transitions: int = 1, start: str = "both",
    schedule: str = "adaptive", max_annealed: int = 100, max_memory: int | None = None,
    keep_draws: int | None = None, compile: bool | None = None, precision: str = "float32",
    plate: str | None = "data", seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    running_mean: Callable[[float], None] | None = None,
) -> LogMarginal:  # fmt: skip
    r"""Estimate log p(x) per datum: by importance sampling from the guide, or by annealing from it.

    .. math:: \log p(x) \approx \log \frac1K \sum_k p(x, z_k) / q(z_k | x), \quad z_k \sim q(z | x)

    Runs without gradients of parameters and with the pair's modules in eval mode, which is restored.
    Samples are streamed in chunks, so memory does not grow with their number. The
    annealed estimate moves chains to the posterior in small steps: a pilot comes from the guide and
    the prior and fits where the fresh chains that count start. ``"auto"``, the recommended method,
    anneals what importance sampling and a second look from the prior do not clear.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair; its cost per datum is paid once.
        x: data ``(N, ...)`` on the pair's device, or a tuple of tensors passed as ``model(*x)``.
        num_samples: draws per datum, K; with ``target_standard_error`` those of the pilot.
        method: ``"importance"``, ``"annealed"`` or ``"auto"``: draws of the guide can't show what the
            guide misses, and chains from the prior can.
        target_standard_error: nats. A pilot of ``num_samples`` draws then decides how many fresh ones
            each datum gets. The pilot is thrown away: to stop at a value one has seen would bias it.
        max_samples: maximum of fresh draws per datum for it; by default 20 times ``num_samples``.
        num_chains: annealing: chains per datum.
        num_steps: annealing: intermediate distributions; with the adaptive schedule their maximum.
        num_leapfrog_steps: annealing: maximum of gradient evaluations per transition.
        num_transitions: annealing: transitions at each intermediate distribution.
        start: annealing: ``"guide"``, ``"prior"``, or ``"both"``, where pilots from each arrive.
        schedule: annealing: ``"adaptive"`` by the weights' spread, ``"sigmoid"`` or ``"linear"``.
        max_annealed: auto: maximum of data points to anneal; up to four times as many are looked at.
        max_memory: bytes that a chunk may need; by default 128 MiB on a CPU, 4 GiB on a GPU (or a
            quarter of a smaller one's). More data than fit are taken block by block.
        keep_draws: draws per datum kept for ``to_arviz``; by default 8 MiB, or every chain's end.
        compile: whether to capture and compile the model's score (importance sampling only). None
            does so for work long enough to pay for it, and from a tenth of that on replays the graph
            as it was recorded; a pair that can't be captured runs as it is.
        precision: of the layers' products, as in :func:`pyro_vae.fit`: the networks are so rounded.
        plate: name of the data plate. None: the whole data set is one datum (see
            :func:`pyro_vae.log_weights`) and the estimate that of its joint evidence, all latents in
            one weight, shared and local ones alike: with many local ones it takes annealing, or
            ``joint`` of :func:`pyro_vae.evaluation.predictive_log_prob`.
        seed: seed of the draws; the generators' state is restored afterwards.
        progress: called with (data points done, N) as the work proceeds.
        running_mean: called beside ``progress`` with the mean estimate over the data begun so far.

    Raises:
        InputError: a pair whose weights would be wrong (see :func:`pyro_vae.log_weights`), an option
            out of range or without effect, or a NaN from the pair.

    Warns:
        UserWarning: how many data points can't be trusted (of importance sampling: with a Pareto k
            above min(0.7, 1 - 1 / log10 S), or not known), or missed ``target_standard_error``.

    Source:
        Burda, Grosse, Salakhutdinov 2016, equation 8; delta-method error and effective sample size:
        Owen 2013, "Monte Carlo theory, methods and examples", sections 9.2 and 9.3.
    """
    check_choice("method", method, ("importance", "annealed", "auto"))
    options: ImportanceOptions | AnnealingOptions | AutoOptions
    options = ImportanceOptions(num_samples, target_standard_error, max_samples, compile)
    if method == "annealed" and (compile or target_standard_error is not None):
        name, advice = "target_standard_error", "set num_chains and num_steps instead"
        if compile:
            name, advice = "compile=True", "leave it out"
        raise InputError(f"expected method='importance' with {name}, got 'annealed': {advice}")
    if method != "importance":
        numbers = num_chains, num_steps, num_leapfrog_steps, num_transitions
        annealing = AnnealingOptions(*numbers, start, schedule)
        options = annealing if method == "annealed" else AutoOptions(options, annealing, max_annealed)
    check_optional_counts(max_memory=max_memory)
    check_optional_counts(keep_draws=keep_draws, least=0)
    check_callables(progress=progress, running_mean=running_mean)
    pair = open_pair(model, guide, x, plate=plate, serves=Serves.WHOLE | Serves.SUMMED)
    report = Report(pair.num_data, progress, running_mean)
    check_precision(precision)
    with pair.evaluating(seed), compute_in(precision, pair.device), multiply_in(precision):
        how: dict[str, Any] = {"max_memory": max_memory, "keep_draws": keep_draws}
        estimate = estimate_log_prob(pair, options, report=report, **how)
    warn_if_unreliable(estimate, stacklevel=2)
    return estimate


def estimate_log_prob(
    pair: OpenedPair, options: ImportanceOptions | AnnealingOptions | AutoOptions, *,
    max_memory: int | None = None, keep_draws: int | None = None, progress: Progress | None = None,
    report: Report | None = None,
) -> LogMarginal:  # fmt: skip
    """Estimate log p(x) of an open pair by the method that the options are of; warn of nothing."""
    report = report or Report(pair.num_data, progress)
    how: dict[str, Any] = {"max_memory": max_memory, "keep_draws": keep_draws, "report": report}
    if isinstance(options, ImportanceOptions):
        return sample_importance(pair, options, **how)
    if isinstance(options, AnnealingOptions):
        return anneal(pair, options, **how)
    first = sample_importance(pair, options.importance, **how)
    one, run = {"": pair}, lambda *_: nullcontext()
    return anneal_alike(one, {"": first}, options, run, max_memory=max_memory)[""]
