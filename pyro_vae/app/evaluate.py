"""``pyro-vae evaluate``, and the estimate of log p(x) that it shares with the other commands."""

import json
import math
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from pyro_vae import likelihoods
from pyro_vae.app.names import EvaluateFiles, EvaluateSettings
from pyro_vae.app.output import give_up_output, print_table
from pyro_vae.app.pages import PSEUDO, TERMS, log_prob_name
from pyro_vae.app.pictures import draw_diagnostics, save_picture
from pyro_vae.app.run_folder import Pair, check_picture, load_data_of_run, open_run, pair_of
from pyro_vae.distributed import Processes
from pyro_vae.errors import InputError
from pyro_vae.evaluation.ais import AnnealingOptions
from pyro_vae.evaluation.auto import LOOKS, AutoOptions
from pyro_vae.evaluation.estimate import LogMarginal, concatenate, warn_if_unreliable
from pyro_vae.evaluation.importance_sampling import ImportanceOptions
from pyro_vae.evaluation.methods import log_marginal
from pyro_vae.files import finite_or_none
from pyro_vae.pair.functions import resolve_device
from pyro_vae.pair.inputs import Inputs
from pyro_vae.vae import VAE

# Of the numbers of an estimate, as a table names them.
_LABELS = {
    "log_marginal": "log p(x)", "standard_error": "its error, Monte Carlo",
    "data_standard_error": "its error, over data", "expected_bias": "its expected bias",
    "bits_per_dimension": "bits per dimension", **TERMS,
    "missing": "share of values missing, left out", "num_data": "data points",
    "num_samples": "draws per datum", "median_ess": "median effective sample size",
    "num_annealed": "data points annealed", "num_unreliable": "data points not trusted",
    "acceptance": "acceptance of annealing",
}  # fmt: skip


def evaluate(run: Path, how: EvaluateSettings, files: EvaluateFiles) -> dict[str, Any]:
    """Print and return the estimate of log p(x) of a run's test part, see :func:`as_dict`.

    With both methods, annealing's is under ``annealed``. A picture shows the diagnostics of the
    importance weights. What has been computed is printed whatever becomes of the rest.
    """
    picture = None if files.picture is None else check_picture(files.picture)
    place = resolve_device(files.device)
    vae, settings, _ = open_run(run, place)
    dataset = load_data_of_run(run, settings, files.data_root)
    test, pair = dataset.inputs("test", how.num_data, place), pair_of(vae, settings)
    first = replace(how, method="importance") if how.method == "both" else how
    estimate = estimate_log_marginal(pair, test, first)
    if estimate.pseudo_likelihood:
        warnings.warn(PSEUDO.rstrip("."), stacklevel=2)
    values = as_dict(estimate, vae, test[0])
    try:
        if how.method == "both":
            # The target is importance sampling's; annealing has its chains and steps.
            second = replace(how, method="annealed", target_standard_error=None)
            values["annealed"] = as_dict(estimate_log_marginal(pair, test, second), vae, test[0])
    finally:
        _print_estimate(values, as_json=files.as_json)
    if picture is not None:
        save_picture(draw_diagnostics(estimate), picture)
    return values


def _print_estimate(values: dict[str, Any], *, as_json: bool) -> None:
    """Print an estimate as one JSON object alone on standard output, or as a table."""
    if as_json:
        text = json.dumps(finite_or_none(values))
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except OSError as error:
            give_up_output()
            wanted = "to write the result to the standard output"
            raise InputError(f"expected {wanted}, got: {error.strerror}; it is {text}") from error
        return
    columns = [values, *([values["annealed"]] if "annealed" in values else [])]
    header = ["quantity", *(column["method"] for column in columns)]
    labels = _LABELS | {"log_marginal": log_prob_name(values["pseudo_likelihood"])}
    told = {name: label for name, label in labels.items() if name in values}
    rows = [[label, *(column[name] for column in columns)] for name, label in told.items()]
    print_table("Test part, nats per datum", header, rows, decimals=3, min_width=52)


def estimate_log_marginal(pair: Pair, x: Inputs, how: EvaluateSettings) -> LogMarginal:
    """Return the estimate of log p(x); a terminal shows how far it is, with the mean.

    Several processes share the data out, and each returns the whole estimate, without draws.
    """
    processes = Processes.current()
    if not processes.are_several or not len(x[0]):
        return _estimate(pair, x, how, show=True)
    own, part = tuple(processes.share(value) for value in x), None
    if len(own[0]):
        with warnings.catch_warnings():
            # Told below, once and of all the data.
            warnings.filterwarnings("ignore", r"\d+ of \d+ data")
            how = replace(how, seed=processes.own_seed(how.seed))
            part = replace(_estimate(pair, own, how, show=processes.is_first), draws=None)
    whole = concatenate([part for part in processes.gather(part) if part is not None])
    warn_if_unreliable(whole, stacklevel=2)
    return whole


def _estimate(pair: Pair, x: Inputs, how: EvaluateSettings, *, show: bool) -> LogMarginal:
    options = asdict(how)
    del options["num_data"]  # x is as many as that already
    console = Console(stderr=True)
    hidden = not (show and console.is_terminal)
    if how.method == "auto" and show:
        console.print(_tell_budget(len(x[0]), how), soft_wrap=True, highlight=False)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("log p(x)", total=len(x[0]))
        options["progress"] = lambda done, _: bar.update(task, completed=done)
        told = "log p(x) {:.2f}".format
        options["running_mean"] = lambda mean: bar.update(task, description=told(mean))
        return log_marginal(*pair, x, **options)


def _tell_budget(num_data: int, how: EvaluateSettings) -> str:
    """Say what the default method may cost, before it starts."""
    sampling = ImportanceOptions(how.num_samples, how.target_standard_error)
    annealing = AnnealingOptions(num_chains=how.num_chains, num_steps=how.num_steps)
    options = AutoOptions(sampling, annealing, how.max_annealed)
    looks, annealed = (min(num_data, n * how.max_annealed) for n in (LOOKS, 1))
    return (
        f"log p(x) of {num_data:,} data points by importance sampling; up to {looks:,} are looked at "
        f"from the prior and up to {annealed:,} annealed, mostly a tenth of at most "
        f"{options.most_gradients(num_data):,} gradient evaluations (--max-annealed)"
    )


def as_dict(estimate: LogMarginal, vae: VAE, x: Tensor) -> dict[str, Any]:
    """Return the estimate's means per datum, in nats, as ``evaluate`` reports them.

    ``log_marginal`` has its ``standard_error`` (Monte Carlo), ``data_standard_error`` and
    ``expected_bias``; beside it are ``elbo``, ``rate``, ``distortion``, and how the weights were; of
    levels and categories also ``bits_per_dimension``, the length of a code for each value; where
    some of the data x are missing also ``missing``, their share.
    """
    likelihood, missing = vae.likelihood, x.isnan().sum().item() / x.numel()
    more = {"missing": missing} if missing else {}
    if isinstance(likelihood, likelihoods.DiscretizedLogistic | likelihoods.Categorical):
        bits = likelihood.bits_per_dimension(estimate.mean)
        more["bits_per_dimension"] = bits / (1 - missing or math.nan)
    return {
        **more,
        "log_marginal": estimate.mean,
        "standard_error": estimate.mean_standard_error,
        "data_standard_error": estimate.data_standard_error,
        "expected_bias": estimate.mean_expected_bias,
        "pseudo_likelihood": estimate.pseudo_likelihood,
        **{name: getattr(estimate, name).mean().item() for name in TERMS},
        "num_samples": int(estimate.num_samples.max()),
        "num_data": len(estimate.log_prob),
        "num_unreliable": estimate.num_unreliable,
        "median_ess": estimate.ess.median().item(),
        "num_annealed": estimate.methods.count("annealed"),
        "acceptance": None if estimate.acceptance is None else estimate.acceptance.nanmean().item(),
        "method": estimate.method,
    }
