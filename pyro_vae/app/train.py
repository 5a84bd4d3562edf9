"""``pyro-vae train``: from settings to a run folder."""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae import datasets, plots
from pyro_vae.app import evaluate, pictures, run_folder
from pyro_vae.app.names import EvaluateSettings, PictureSettings, Reconstruct, Sample, TrainSettings
from pyro_vae.app.options import in_options
from pyro_vae.app.output import print_line, print_table
from pyro_vae.app.pages import TERMS, log_prob_name, write_run_page
from pyro_vae.app.run_folder import FREE, METRICS, Checkpointing, load_data_of_run, pair_of
from pyro_vae.app.settings import as_record, build_vae, check_settings, fit_options, tell_defaults
from pyro_vae.datasets import Dataset
from pyro_vae.distributed import Processes
from pyro_vae.errors import InputError, check_same
from pyro_vae.evaluation.comparison_training import frozen_model
from pyro_vae.evaluation.elbo import PerDatum
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.evaluation.representation_quality import ACTIVE_VARIANCE, unit_variances
from pyro_vae.files import check_in_place, expand_path, is_regular
from pyro_vae.infer.training import FitResult, fit
from pyro_vae.infer.validation import bound_terms
from pyro_vae.pair.functions import PairFunction, resolve_device, seeded
from pyro_vae.runs.description import describe, known_to
from pyro_vae.runs.files import CHECKPOINTS, CONFIG, check_schema, own_folder, read_config, write_json
from pyro_vae.runs.folder import locked, new_run
from pyro_vae.runs.weights import save_weights
from pyro_vae.vae import VAE

# The estimate at the end of a training run is a first look: at most so many data and samples.
_QUICK_DATA, _QUICK_SAMPLES = 1000, 500
_SEED = 0  # of what is drawn from the trained model


def train(
    settings: TrainSettings, output: Path | None, *, checkpointing: Checkpointing | None = None
) -> Path:
    """Train a VAE, evaluate it, and write a run folder, by default a new one; return the folder.

    Several processes (see :func:`pyro_vae.fit`) do so together, in one folder; the first one writes.
    After an ``Interrupted``, :func:`resume` goes on with it.
    """
    settings, processes = check_settings(settings), Processes.current()
    folder = processes.decide(lambda: _new_folder(output, settings))
    resolve_device(settings.device)
    # One process fetches or unpacks what is missing, and the others find it.
    dataset = processes.first_before_others(lambda: run_folder.load_data(settings))
    if dataset.is_mapped:
        size = sum(getattr(dataset, part).nbytes for part in datasets.PARTS) / 2**30
        print_line(f"data: {size:.1f} GiB, read from the disk batch by batch, split in their order")
    _train_to_the_end(settings, dataset, folder, checkpointing or Checkpointing())
    return folder


def resume(folder: Path, given: Mapping[str, Any]) -> Path:
    """Resume a run that was interrupted or killed; it ends as if it had not been.

    Settings that are given once more must be the run's own.
    """
    processes, folder = Processes.current(), expand_path(folder)
    run_folder.check_single(folder)
    run, settings = run_folder.read_run(folder)
    if run.get("checkpoints") is None:
        wanted = f"a run that `pyro-vae train` began in {folder}"
        raise InputError(f"expected {wanted}, got one of several: repeat the command that began them")
    kinds: dict[str, Any] = {"every": int | None, "minutes": float | int | None}
    check_schema(run["checkpoints"], kinds, f"{folder / CONFIG}: checkpoints")
    when = Checkpointing(**{name: run["checkpoints"][name] for name in kinds})
    told = check_settings(replace(settings, **given))
    check_same(vars(settings), vars(told), str(folder), "leave it out, or train anew", FREE)
    if _is_finished(folder, processes):
        return folder
    if (begun := run.get("processes", 1)) != processes.size:
        wanted = f"as many processes as {folder} was begun with, {begun}"
        advice = "start as many by torchrun, or one without it"
        raise InputError(f"expected {wanted}, got {processes.size}: {advice}")
    where = given.get("data_root")
    dataset = processes.first_before_others(lambda: load_data_of_run(folder, told, where))
    with ExitStack() as stack:
        processes.decide(lambda: stack.enter_context(locked(folder)))
        if _is_finished(folder, processes):  # by another process, which held the lock till now
            return folder
        _train_to_the_end(told, dataset, folder, when, resumed=True)
    return folder


def train_run(
    settings: TrainSettings, dataset: Dataset, folder: Path, *, start: VAE | None = None,
    held: VAE | None = None, checkpointing: Checkpointing | None = None, resumed: bool = False,
) -> tuple[VAE, dict[str, Any]]:  # fmt: skip
    """Train into a new run folder, or resume the one there; return VAE and ``metrics.json``.

    The folder's lock is held to the end; of a run that is resumed, the caller holds it.
    Nothing is left of a run that fails before its first checkpoint, or without checkpointing. The
    weights begin as those of ``start``, of the same shape; prior and likelihood of ``held`` are taken
    over and stay as they are while the guide alone is trained. The settings are those that
    :func:`check_settings` returned, and name the data.
    """
    device, processes = resolve_device(settings.device), Processes.current()
    settings = tell_defaults(settings, dataset.train, dataset.validation)
    with ExitStack() as stack, seeded(settings.seed):
        vae = build_vae(settings, dataset)
        if start is not None:
            vae.load_state_dict(start.state_dict())
        for part in () if held is None else ("prior", "likelihood"):
            getattr(vae, part).load_state_dict(getattr(held, part).state_dict())
        start_of = "training data" if start is None else "weights of the run before"
        record = {
            **({} if checkpointing is None else {"checkpoints": asdict(checkpointing)}),
            "start": start_of if held is None else f"{start_of}; prior and likelihood held",
            "device": str(device),
            # What a run must know about itself from its first second on.
            "settings": as_record(settings),
            "num_data": {part: len(getattr(dataset, part)) for part in datasets.PARTS},
            "checksums": dataset.checksums,
            "limits": (limits := pictures.limits_of(dataset)),
            "processes": processes.size,
            **run_folder.describe_origin(),
        }
        begin = _check_same_model if resumed else new_run
        config = describe(vae, record)
        processes.decide(lambda: stack.enter_context(begin(folder, config)))
        begun = folder.stat() if processes.is_first else None
        how: dict[str, Any] = {"device": device, "resume": resumed}
        if checkpointing is not None:
            how["checkpoint"] = own_folder(folder, CHECKPOINTS)
            how |= {f"checkpoint_{name}": value for name, value in asdict(checkpointing).items()}
        vae.to(device)
        model: PairFunction = vae.model
        with ExitStack() as frozen:
            if held is not None:
                first = tuple(value.nan_to_num() for value in dataset.inputs("test", 1, device))
                model = frozen.enter_context(frozen_model(model, {"guide": vae.guide}, first, device))
            model, guide = pair_of(vae, settings, model)
            result = fit(model, guide, dataset, **fit_options(settings), **how)
        if processes.is_first:
            save_weights(vae, folder)
        subject = pictures.Subject(vae, settings, lambda: dataset, limits, PictureSettings())
        metrics, estimate = _measure(subject, result, processes)
        if begun is not None:
            check_in_place(folder, begun)
            drawn = _write_pictures(subject, result, folder)
            drawn["diagnostics"] = pictures.draw_diagnostics(estimate)
            # What began the run is in its folder; a version that knew less may have done so.
            made = record | read_config(folder)["run"] | {"settings": record["settings"]}
            write_run_page(folder, made, metrics, drawn)
            write_json(folder / METRICS, metrics)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return vae, metrics


def _new_folder(output: Path | None, settings: TrainSettings) -> Path:
    if output is None:
        name = f"{Path(settings.dataset).stem}-{settings.prior}-{settings.guide}"
        paths = (Path("runs") / f"{name}{end}" for end in chain([""], (f"-{n}" for n in count(2))))
        output = next(path for path in paths if not path.exists())
    output = expand_path(output)
    run_folder.check_new_folder(output)
    return output


def _train_to_the_end(
    settings: TrainSettings, dataset: Dataset, folder: Path, when: Checkpointing, **how: Any
) -> None:
    """Train and print what came of it; note with an interruption how to resume the run."""
    try:
        metrics = train_run(settings, dataset, folder, checkpointing=when, **how)[1]
    except KeyboardInterrupt as interruption:
        if (folder / CONFIG).exists():
            interruption.add_note(f"`pyro-vae train --resume {shlex.quote(str(folder))}`")
        raise
    _print_summary(folder, metrics)


def _is_finished(folder: Path, processes: Processes) -> bool:
    """Say whether a run is finished, and print that it is."""
    if not processes.decide(lambda: is_regular(folder / METRICS)):
        return False
    if processes.is_first:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    print_line(f"finished before: {folder}")
    return True


@contextmanager
def _check_same_model(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Refuse to resume a run of another model."""
    begun = read_config(folder).get("model")
    if begun != known_to(begun, json.loads(json.dumps(config["model"]))):
        wanted = f"the model that {folder} describes"
        advice = f"its {CONFIG} was changed, or another version wrote it"
        raise InputError(f"expected {wanted}, its settings build another one: {advice}")
    yield


def _measure(
    subject: pictures.Subject, result: FitResult, processes: Processes
) -> tuple[dict[str, Any], LogMarginal]:
    """Return what ``metrics.json`` holds, and the estimate of log p(x) in it."""
    pair, test, first = subject.pair, subject.inputs(), subject.inputs(_QUICK_DATA)
    with seeded(processes.own_seed(_SEED)):
        bound = bound_terms(*pair, test, processes=processes)
    quick = EvaluateSettings("importance", num_samples=_QUICK_SAMPLES, seed=_SEED)
    estimate = evaluate.estimate_log_marginal(pair, first, quick)
    told = ("best_epoch", "device", "num_parameters", "compiled", "compile_choice")
    # NaN of a single datum.
    terms = {name: getattr(estimate, name) for name in TERMS}
    errors = {name: PerDatum(value, value).data_standard_error for name, value in terms.items()}
    metrics = {
        "history": {name: curve.tolist() for name, curve in result.history.items()},
        **{name: getattr(result, name) for name in told},
        "training_seconds": result.seconds,
        "warnings": list(result.warnings),
        # The bound is the whole test part's; log p(x) is a first look at its first data.
        "test": {**bound, "num_data": len(test[0])},
        "test_log_marginal": evaluate.as_dict(estimate, subject.vae, first[0]),
        "test_data_standard_errors": errors,
        "active_units": int((unit_variances(pair[1], first) > ACTIVE_VARIANCE).sum()),
        "pseudo_likelihood": estimate.pseudo_likelihood,
    }
    return metrics, estimate


def _write_pictures(subject: pictures.Subject, result: FitResult, folder: Path) -> dict[str, Figure]:
    """Write the pictures of a run, each under its name; return them."""
    drawn = {"samples": pictures.draw_samples(subject, Sample())}
    drawn["reconstructions"] = pictures.draw_reconstructions(subject, Reconstruct())
    if len(result.history["train_elbo"]):
        title = f"Training: {Path(subject.dataset.name).name}, {result.num_parameters:,} parameters"
        drawn["training"] = plots.training_curves(result.history, title=title)
    for name, figure in drawn.items():
        pictures.save_picture(figure, folder / f"{name}.png")
    return drawn


def _print_summary(folder: Path, metrics: dict[str, Any]) -> None:
    bound, estimate = metrics["test"], metrics["test_log_marginal"]
    draws = f"{estimate['num_data']:,} x {estimate['num_samples']}"
    rows = [[log_prob_name(metrics["pseudo_likelihood"]), estimate["log_marginal"], draws]]
    rows += [[label, bound[key], f"{bound['num_data']:,} x 1"] for key, label in TERMS.items()]
    print_table("Test part, nats per datum", ["quantity", "mean", "data x samples"], rows)
    epochs = len(metrics["history"]["train_elbo"])
    bits = estimate.get("bits_per_dimension")
    for line in (
        *([] if bits is None else [f"bits per dimension: {bits:.3f}"]),
        f"standard error of log p(x): {estimate['data_standard_error']:.2f} over data, "
        f"{estimate['standard_error']:.3f} Monte Carlo",
        f"{epochs} epochs in {metrics['training_seconds']:.1f} s on {metrics['device']}",
        f"training step: {metrics['compile_choice']}",
        *(f"warning: {in_options(text)}" for text in metrics["warnings"]),
        f"run folder: {folder}",
    ):
        print_line(line)
