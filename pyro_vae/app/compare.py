"""``pyro-vae compare``: families, priors and likelihoods in several runs each, on equal terms."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from safetensors.torch import save as serialised
from torch import Tensor

from pyro_vae import plots
from pyro_vae.app.names import CompareSettings, EvaluateSettings, TrainSettings
from pyro_vae.app.output import plus_minus, print_line, print_table
from pyro_vae.app.pages import log_prob_name, write_comparison_page
from pyro_vae.app.pictures import save_picture
from pyro_vae.app.run_folder import pair_of
from pyro_vae.app.settings import as_record, check_settings, tell_defaults
from pyro_vae.app.study import Study, open_study, write_rows
from pyro_vae.errors import InputError, expecting
from pyro_vae.evaluation.comparison import compare
from pyro_vae.evaluation.comparison_result import Comparison, Measured
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.files import UNREADABLE, parse_json, read_tensors, write_whole
from pyro_vae.runs.files import RUNS, own_file, write_json
from pyro_vae.vae import VAE

_Axes = Mapping[str, tuple[str, ...]]
_MEASURED = "measured.safetensors"
_ESTIMATE = "estimate."  # begins the names of its tensors in there
_QUANTITIES = ("elbo", "iwae", "log_prob", "annealed", "rate", "distortion")
_SEED = 0  # of the draws that measure, the same for every run
# Draws for ELBO, rate and distortion, whose error falls faster than that of log p(x).
_ELBO_SAMPLES = 1000
_IMPORTANCE = 50


def compare_families(
    settings: TrainSettings, how: EvaluateSettings, combined: CompareSettings, output: Path
) -> Comparison:
    """Train every combination with every seed, measure all on the same data, write the results.

    Of the settings, prior, likelihood and guide are not used. Runs differ in initial weights and
    training, not in data. With ``hold="model"`` the first guide's VAE is trained, and then every
    guide against its frozen model.
    """
    if how.method == "annealed":
        raise InputError("expected method auto, importance or both, got annealed: both includes it")
    seeds, hold = combined.seeds, combined.hold
    texts = {axis: getattr(combined, f"{axis}s") for axis in ("prior", "likelihood", "guide")}
    axes = {axis: tuple(map(str.strip, text.split(","))) for axis, text in texts.items()}
    _check_axes(axes, hold)
    members = _combine(settings, axes, seeds)
    first = next(iter(members.values()))
    measuring = ("method", "num_samples", "num_data", "num_chains", "num_steps", "max_annealed")
    varied = axes | {"seeds": seeds, "hold": hold}
    asked = asdict(first[0]) | varied | {name: getattr(how, name) for name in measuring}
    with open_study(output, asked, first[0]) as study:
        found, likelihood = [], ""
        for index in range(seeds):
            held = None
            if hold == "model":
                held = study.run(f"model-{_folder_name(first[index])}", first[index])[0]
            chosen = {name: own[index] for name, own in members.items()}
            of_seed, likelihood = _run(study, chosen, how, held)
            found.append(of_seed)
        runs = {name: [each[name][0] for each in found] for name in members}
        seconds = {name: [each[name][1] for each in found] for name in members}
        comparison = Comparison(runs, likelihood, _IMPORTANCE, how.num_samples, hold, _SEED)
        data = study.dataset
        told = [tell_defaults(own[0], data.train, data.validation) for own in members.values()]
        used = _merge([as_record(each) for each in told]) | {"device": str(study.device)}
        used |= {name: value for name, value in varied.items() if value is not None}
        used |= {name: value for name, value in as_record(how).items() if name in measuring}
        _write(study, comparison, seconds, used)
    return comparison


def _run(
    study: Study, chosen: Mapping[str, TrainSettings], how: EvaluateSettings, held: VAE | None
) -> tuple[dict[str, tuple[Measured, float]], str]:
    """Train one run of each and measure all, or read what an earlier call found; with seconds."""
    names = {name: _folder_name(settings) for name, settings in chosen.items()}
    trained = {n: study.run(names[n], settings, held=held) for n, settings in chosen.items()}
    folders = {name: study.folder / RUNS / folder for name, folder in names.items()}
    missing = [name for name, folder in folders.items() if own_file(folder, _MEASURED) is None]
    if missing and how.method == "auto":
        missing = list(folders)  # what one does not clear is annealed in all
    if missing:
        annealing = {"num_chains": how.num_chains, "num_steps": how.num_steps}
        if how.method == "auto":
            annealing["max_annealed"] = how.max_annealed
        methods = {"auto": ("auto",), "both": ("importance", "annealed")}
        comparison = compare(
            {name: pair_of(trained[name][0], chosen[name]) for name in missing},
            study.dataset.inputs("test", how.num_data, study.device), num_samples=how.num_samples,
            num_elbo_samples=_ELBO_SAMPLES, num_importance=_IMPORTANCE,
            methods=methods.get(how.method, ("importance",)),
            annealing_options=None if how.method == "importance" else annealing,
            hold="model" if held is not None else None, seed=_SEED,
        )  # fmt: skip
        for name, measured in comparison.pairs.items():
            save_measured(measured, comparison.likelihood, folders[name])
    found, likelihood = {}, ""
    for name, (_, metrics) in trained.items():
        measured, likelihood = load_measured(folders[name])
        seconds, epochs = metrics["training_seconds"], len(metrics["history"]["train_elbo"])
        per_epoch = seconds / epochs if epochs else math.nan
        found[name] = replace(measured, seconds_per_epoch=per_epoch), seconds
    return found, likelihood


def _merge(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings of several runs as one record; what differs, such as components, as a list."""
    found: dict[str, list[Any]] = {}
    for name, value in (item for record in records for item in record.items()):
        if value not in found.setdefault(name, []):
            found[name].append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _write(study: Study, comparison: Comparison, seconds: Any, settings: dict[str, Any]) -> None:
    folder, rows = study.folder, comparison.to_dict()["pairs"]
    singles = [
        {
            "name": name,
            "seed": settings["seed"] + index,
            **measured.means(comparison.quantities),
            "unreliable_share": measured.unreliable_share,
            "median_ess": measured.median_ess,
            "training_seconds": seconds[name][index],
        }
        for name, own in comparison.runs.items()
        for index, measured in enumerate(own)
    ]
    figures = _figures(comparison, Path(settings["dataset"]).name)
    for name, figure in figures.items():
        save_picture(figure, folder / f"{name}.png")
    write_rows([{"name": name, **row} for name, row in rows.items()], folder / "comparison.csv")
    write_rows(singles, folder / "runs.csv")
    made = study.describe(settings)
    write_comparison_page(folder, comparison, singles, figures, made)
    about = {name: getattr(comparison, name) for name in ("likelihood", "ranked_by", "num_samples")}
    write_json(folder / "comparison.json", {**about, "families": rows, "runs": singles, **made})
    _print(folder, comparison, rows)


def _figures(comparison: Comparison, data: str) -> dict[str, Figure]:
    names = list(comparison.pairs)
    labels = {comparison.ranked_by: "log p(x)", "elbo": "ELBO"}
    differences = [[comparison.difference(name, each) for name in names] for each in labels]
    parts = ("by_run", "mean", "half_width")
    shown = ([[getattr(each, part) for each in row] for row in differences] for part in parts)
    runs = f"mean over {comparison.num_runs} runs, 95% interval; small dots: single runs"
    title, told = f"{data}: {runs}", list(labels.values())
    figures = {"differences": plots.families_and_runs(names, *shown, labels=told, title=title)}
    if len(names) > 1:
        best = comparison.best()
        figures["per-datum"] = comparison.scatter(next(n for n in names if n != best), best)
    return figures


def _print(folder: Path, comparison: Comparison, rows: Mapping[str, Mapping[str, Any]]) -> None:
    quantity = comparison.ranked_by
    label = log_prob_name(comparison.likelihood == "pseudo-likelihood")
    shown = []
    for name, row in rows.items():
        difference, half_width = (row[f"{quantity}_difference{end}"] for end in ("", "_half_width"))
        values = row[quantity], row[f"{quantity}_run_deviation"]
        to_best = plus_minus(difference, half_width, 3)
        shown.append([name, *values, to_best, row["elbo"], row["verdict"]])
    header = ["", label, "between runs", "minus the best (95%)", "ELBO", "verdict"]
    print_table("Test part, nats per datum", header, shown, decimals=3)
    print_line(f"comparison: {folder}")


def _combine(settings: TrainSettings, axes: _Axes, seeds: int) -> dict[str, list[TrainSettings]]:
    """Return the settings of every combination's runs, checked before anything is trained."""
    varied = [axis for axis, names in axes.items() if len(names) > 1] or ["guide"]
    members = {}
    for chosen in itertools.product(*axes.values()):
        combination: dict[str, Any] = dict(zip(axes, chosen, strict=True))
        own = replace(settings, **combination, data_seed=settings.split_seed)
        checks = [check_settings(replace(own, seed=settings.seed + index)) for index in range(seeds)]
        members[" / ".join(combination[axis] for axis in varied)] = checks
    return members


def _check_axes(axes: _Axes, hold: str | None) -> None:
    for axis, names in axes.items():
        if len(set(names)) < len(names) or "" in names:
            raise InputError(f"expected each {axis} once, got {','.join(names)!r}: leave one out")
    if hold not in (None, "model"):
        raise InputError(f"expected --hold model, got {hold!r}")
    if len(axes["likelihood"]) > 1 and "bernoulli" in axes["likelihood"]:
        wanted = "likelihoods whose log p(x) can be subtracted"
        got = "bernoulli, a probability of bits, beside densities"
        raise InputError(f"expected {wanted}, got {got}: compare them in two runs")
    if hold == "model" and (len(axes["prior"]) > 1 or len(axes["likelihood"]) > 1):
        raise InputError("expected one prior and one likelihood to hold, got more: give one of each")
    if hold == "model" and axes["prior"] == ("vamp",):
        wanted = "a prior that does not contain the guide to hold"
        raise InputError(f'expected {wanted}, got vamp: use pv.compare with hold="model"')


def _folder_name(settings: TrainSettings) -> str:
    return f"{settings.prior}-{settings.likelihood}-{settings.guide}-seed-{settings.seed}"


def save_measured(measured: Measured, likelihood: str, folder: Path) -> None:
    """Write numbers per datum, plain numbers and the likelihood's kind into a run folder."""
    tensors: dict[str, Tensor] = {}
    for name in _QUANTITIES:
        quantity: PerDatum | None = getattr(measured, name)
        if quantity is not None:
            tensors[name], tensors[f"{name}_standard_error"] = quantity.value, quantity.standard_error
    for name, value in vars(measured.estimate).items():
        if isinstance(value, Tensor):
            tensors[_ESTIMATE + name] = value
    plain = ("exact_kl", "num_parameters", "num_guide_parameters", "seconds_per_1000")
    numbers = json.dumps({name: getattr(measured, name) for name in plain})
    notes = {"plain": numbers, "likelihood": likelihood, "method": measured.estimate.method}
    # Contiguous copies: safetensors refuses views that share memory.
    content = serialised({name: value.clone() for name, value in tensors.items()}, notes)
    write_whole(folder / _MEASURED, content)


def load_measured(folder: Path) -> tuple[Measured, str]:
    """Read what :func:`save_measured` wrote."""
    path = folder / _MEASURED
    what = f"the numbers of a comparison in {path}"
    with expecting(what, *UNREADABLE, RecursionError, advice="delete it"):
        tensors, notes = read_tensors(path)  # a regular file, as the caller has seen
        own = [name for name in tensors if name.startswith(_ESTIMATE)]
        estimate: dict[str, Any] = {name.removeprefix(_ESTIMATE): tensors[name] for name in own}
        there = [name for name in _QUANTITIES if name in tensors]
        parts = ((name, tensors[name], tensors[f"{name}_standard_error"]) for name in there)
        quantities: dict[str, Any] = {name: PerDatum(*values) for name, *values in parts}
        measured = Measured(
            **{"annealed": None, "posterior_divergence": None, "fit": None, **quantities},
            **parse_json(notes["plain"], finite=False),
            estimate=LogMarginal(**estimate, method=notes.get("method", "importance")),
        )
        return measured, notes["likelihood"]
