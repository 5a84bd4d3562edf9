"""``pyro-vae compare``: families, priors and likelihoods in several runs each, on equal terms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae.app.comparison_page import write_comparison_page
from pyro_vae.app.measured import MEASURED, load_measured, save_measured
from pyro_vae.app.names import EvaluateSettings, TrainSettings
from pyro_vae.app.pages import log_prob_name
from pyro_vae.app.pictures import save_picture
from pyro_vae.app.report import plus_minus, print_line, print_table
from pyro_vae.app.run import RUNS, describe_origin, load_data
from pyro_vae.app.settings import (
    as_record,
    check_counts,
    check_evaluation,
    check_settings,
    tell_defaults,
)
from pyro_vae.app.study import Study, check_study_folder, open_study, write_rows
from pyro_vae.errors import InputError
from pyro_vae.evaluation.comparison import compare
from pyro_vae.evaluation.comparison_result import Comparison, Measured
from pyro_vae.pair.functions import resolve_device
from pyro_vae.runs.files import write_json
from pyro_vae.vae import VAE

_SEED = 0  # of the draws that measure, the same for every run

# Draws for ELBO, rate and distortion, whose error falls faster than that of log p(x).
_ELBO_SAMPLES = 1000
_IMPORTANCE = 50


def compare_families(
    settings: TrainSettings,
    how: EvaluateSettings,
    *,
    guides: str,
    priors: str,
    likelihoods: str,
    seeds: int,
    hold: str | None,
    output: Path,
) -> Comparison:
    """Train every combination with every seed, measure all on the same data, write what was found.

    Args:
        settings: what to train on what, and how; prior, likelihood and guide are not used.
        how: how log p(x) is estimated; ``both`` adds annealing.
        guides: names of variational families between commas.
        priors: names of priors between commas.
        likelihoods: names of likelihoods between commas.
        seeds: runs of each combination; they differ in initial weights and training, not in data.
        hold: ``"model"`` trains the first guide's VAE and then every guide against its frozen model.
        output: the folder; a comparison of the same settings that was begun there is continued.

    Raises:
        InputError: names, numbers or combinations out of range, or a folder that holds something
            else.
    """
    check_evaluation(how)
    _check_how(how, seeds)
    members = _combine(settings, guides, priors, likelihoods, seeds, hold)
    resolve_device(settings.device)
    first = next(iter(members.values()))
    measuring = ("method", "num_samples", "num_data", "num_chains", "num_steps")
    axes = {
        "guide": _split(guides),
        "prior": _split(priors),
        "likelihood": _split(likelihoods),
        "seeds": seeds,
        "hold": hold,
    }
    asked = asdict(first[0]) | axes | {name: getattr(how, name) for name in measuring}
    check_study_folder(output)
    dataset = load_data(first[0])
    with open_study(output, asked, dataset) as study:
        runs: dict[str, list[Measured]] = {name: [] for name in members}
        seconds: dict[str, list[float]] = {name: [] for name in members}
        likelihood = ""
        for index in range(seeds):
            held = _train_held(study, first[index]) if hold == "model" else None
            for name, own in members.items():
                found, likelihood, training_seconds = _run(study, own[index], how, held)
                runs[name].append(found)
                seconds[name].append(training_seconds)
        comparison = Comparison(runs, likelihood, _IMPORTANCE, how.num_samples, hold, _SEED)
        told = [tell_defaults(own[0], len(dataset.train)) for own in members.values()]
        used = _merge([as_record(each) for each in told])
        used["device"] = str(resolve_device(settings.device))
        used |= {name: value for name, value in axes.items() if value is not None}
        used |= {name: value for name, value in as_record(how).items() if name in measuring}
        _write(study, comparison, seconds, used)
        _print(study.folder, comparison)
    return comparison


def _run(
    study: Study, settings: TrainSettings, how: EvaluateSettings, held: VAE | None
) -> tuple[Measured, str, float]:
    """Train and measure one run, or read what an earlier call found.

    Returns:
        what was measured, the kind of the likelihood, and the seconds of the training.
    """
    name = _folder_name(settings)
    vae, metrics = study.run(name, settings, held=held)
    folder = study.folder / RUNS / name
    if not (folder / MEASURED).is_file():
        device = resolve_device(settings.device)
        annealing = {"num_chains": how.num_chains, "num_steps": how.num_steps}
        comparison = compare(
            {name: (vae.model, vae.guide)},
            study.dataset.test[: how.num_data].to(device),
            num_samples=how.num_samples,
            num_elbo_samples=_ELBO_SAMPLES,
            num_importance=_IMPORTANCE,
            methods=("importance", "annealed") if how.method == "both" else ("importance",),
            annealing_options=annealing if how.method == "both" else None,
            hold="model" if held is not None else None,
            seed=_SEED,
        )
        save_measured(comparison.pairs[name], comparison.likelihood, folder)
    measured, likelihood = load_measured(folder)
    seconds, epochs = metrics["training_seconds"], len(metrics["history"]["train_elbo"])
    per_epoch = seconds / epochs if epochs else math.nan
    return replace(measured, seconds_per_epoch=per_epoch), likelihood, seconds


def _train_held(study: Study, settings: TrainSettings) -> VAE:
    """Return the VAE whose model is held in the runs of this seed: that of the first guide."""
    return study.run(f"model-{_folder_name(settings)}", settings)[0]


def _merge(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings of several runs as one record; what differs, such as components, as a list."""
    found: dict[str, list[Any]] = {}
    for name, value in (item for record in records for item in record.items()):
        if value not in found.setdefault(name, []):
            found[name].append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _write(
    study: Study,
    comparison: Comparison,
    seconds: Mapping[str, Sequence[float]],
    settings: dict[str, Any],
) -> None:
    folder, rows = study.folder, comparison.to_dict()["pairs"]
    singles = _single_runs(comparison, seconds, settings["seed"])
    figures = _figures(comparison, Path(settings["dataset"]).name)
    for name, figure in figures.items():
        save_picture(figure, folder / f"{name}.png")
    write_rows([{"name": name, **row} for name, row in rows.items()], folder / "comparison.csv")
    write_rows(singles, folder / "runs.csv")
    made = {"settings": settings, "checksums": study.dataset.checksums, **describe_origin()}
    write_comparison_page(folder, comparison, rows, singles, figures, made)
    about = {name: getattr(comparison, name) for name in ("likelihood", "ranked_by", "num_samples")}
    write_json(folder / "comparison.json", {**about, "families": rows, "runs": singles, **made})


def _figures(comparison: Comparison, data: str) -> dict[str, Figure]:
    names = list(comparison.pairs)
    labels = {comparison.ranked_by: "log p(x)", "elbo": "ELBO"}
    differences = [[comparison.difference(name, each) for name in names] for each in labels]
    figures = {
        "differences": plots.families_and_runs(
            names,
            [[each.by_run for each in row] for row in differences],
            [[each.mean for each in row] for row in differences],
            [[each.half_width for each in row] for row in differences],
            labels=list(labels.values()),
            title=f"{data}: mean over {comparison.num_runs} runs, 95% interval; small dots: single "
            "runs",
        )
    }
    if len(names) > 1:
        best = comparison.best()
        other = next(name for name in names if name != best)
        figures["per-datum"] = comparison.scatter(other, best)
    return figures


def _single_runs(
    comparison: Comparison, seconds: Mapping[str, Sequence[float]], first_seed: int
) -> list[dict[str, Any]]:
    """Return one row of numbers per run."""
    return [
        {
            "name": name,
            "seed": first_seed + index,
            **measured.means(comparison.quantities),
            "unreliable_share": measured.unreliable_share,
            "median_ess": measured.median_ess,
            "training_seconds": seconds[name][index],
        }
        for name, own in comparison.runs.items()
        for index, measured in enumerate(own)
    ]


def _print(folder: Path, comparison: Comparison) -> None:
    quantity = comparison.ranked_by
    label = log_prob_name(comparison.likelihood == "pseudo-likelihood")
    rows = []
    for name, pair in comparison.pairs.items():
        difference = comparison.difference(name, quantity)
        rows.append(
            [
                name,
                f"{comparison.per_datum(name, quantity).mean:.3f}",
                plus_minus(comparison.run_deviation(name, quantity), None, 3),
                plus_minus(difference.mean, difference.half_width, 3),
                f"{pair.elbo.mean:.3f}",
                comparison.verdict(name),
            ]
        )
    header = ["", label, "between runs", "to the best (95%)", "ELBO", "verdict"]
    print_table("Test part, nats per datum", header, rows)
    print_line(f"comparison: {folder}")


def _combine(
    settings: TrainSettings, guides: str, priors: str, likelihoods: str, seeds: int, hold: str | None
) -> dict[str, list[TrainSettings]]:
    """Return the settings of every combination's runs, checked before anything is trained."""
    axes = {
        "prior": _split(priors),
        "likelihood": _split(likelihoods),
        "guide": _split(guides),
    }
    for axis, names in axes.items():
        if len(set(names)) < len(names) or "" in names:
            raise InputError(f"expected each {axis} once, between commas, got {','.join(names)!r}")
    _check_axes(axes, hold)
    varied = [axis for axis, names in axes.items() if len(names) > 1] or ["guide"]
    members = {}
    for chosen in itertools.product(*axes.values()):
        combination: dict[str, Any] = dict(zip(axes, chosen, strict=True))
        own = replace(settings, **combination, data_seed=settings.split_seed)
        checks = [check_settings(replace(own, seed=settings.seed + index)) for index in range(seeds)]
        members[" / ".join(combination[axis] for axis in varied)] = checks
    return members


def _check_axes(axes: dict[str, tuple[str, ...]], hold: str | None) -> None:
    if hold not in (None, "model"):
        raise InputError(f"expected --hold model, got {hold!r}")
    if len(axes["likelihood"]) > 1 and "bernoulli" in axes["likelihood"]:
        raise InputError(
            "expected likelihoods whose log p(x) can be subtracted, got bernoulli, a probability of "
            "bits, beside densities: compare them apart"
        )
    if hold == "model":
        if len(axes["prior"]) > 1 or len(axes["likelihood"]) > 1:
            raise InputError(
                "expected one prior and one likelihood to hold, got several: give one each"
            )
        if axes["prior"] == ("vamp",):
            raise InputError(
                "expected a prior that is no part of a guide to hold, got vamp: use pv.compare with "
                'hold="model"'
            )


def _check_how(how: EvaluateSettings, seeds: int) -> None:
    check_counts({"seeds": seeds})
    if how.method == "annealed":
        raise InputError("expected the method importance or both, got annealed: both has it")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _folder_name(settings: TrainSettings) -> str:
    return f"{settings.prior}-{settings.likelihood}-{settings.guide}-seed-{settings.seed}"
