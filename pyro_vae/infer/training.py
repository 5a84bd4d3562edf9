"""Training: stochastic variational inference over any model/guide pair."""

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.datasets import Dataset
from pyro_vae.distributed import Processes
from pyro_vae.errors import InputError
from pyro_vae.files import checksum_of
from pyro_vae.infer.bounds import TraceBound
from pyro_vae.infer.callbacks import Callbacks
from pyro_vae.infer.checkpoint import Checkpoints
from pyro_vae.infer.compiled import StepCapture, uncompiled
from pyro_vae.infer.diagnosis import diagnose
from pyro_vae.infer.settings import FitSettings, Schedule, check_callables, default_warmup_epochs
from pyro_vae.infer.stock_bound import bound_of, name_of, objective_named
from pyro_vae.infer.trainer import Trainer, TrainingObjective
from pyro_vae.infer.validation import EarlyStopping, global_rate, validate
from pyro_vae.pair.contract import Serves
from pyro_vae.pair.functions import PairFunction, place_pair
from pyro_vae.pair.inputs import as_inputs, check_data
from pyro_vae.pair.opened import OpenedPair
from pyro_vae.pair.precision import compute_in
from pyro_vae.sources import DataLike, gather
from pyro_vae.summary import Summary, shown

HISTORY = (
    *("train_elbo", "train_rate", "train_distortion", "train_bound", "global_rate"),
    *("validation_elbo", "validation_rate", "validation_distortion"),
    *("beta", "gradient_norm", "seconds", "data_per_second"),
)


@shown
@dataclass(frozen=True)
class FitResult:
    """The result of :func:`fit`, besides the trained parameters.

    Attributes:
        history: one array ``(epochs,)`` per quantity, per datum and in nats where it is a bound:
            ``train_elbo``, ``train_rate``, ``train_distortion``, ``validation_elbo``,
            ``validation_rate``, ``validation_distortion`` (NaN without validation data). The ELBO is
            minus rate minus distortion whatever the beta and the objective; ``train_bound`` is minus
            the objective's own loss (with beta in it under ``Trace_ELBO``). Under
            ``TraceEnum_ELBO`` what the model alone enumerates is summed out of both; where the guide
            enumerates there is no draw to split: ``train_elbo``, ``train_rate`` and
            ``train_distortion`` are NaN, and ``train_bound`` has the pair's own scales in it too.
            ``global_rate`` is that of the latents outside the data plate, of which ``train_rate``
            contains 1/N: nats for the whole data set, at the epoch's end, in closed form where
            there is one; NaN where there is none of them, or one joint draw with others. ``beta`` is
            that of the coming step; ``gradient_norm`` the mean over the steps of the norm of the
            gradient of the mean loss per datum, before clipping; ``seconds`` those of the training
            steps, a compilation included; ``data_per_second`` training data points over them.
        best_epoch: epoch (from 1) whose parameters were kept; the last one without early stopping.
        stopped_early: whether the validation ELBO stopped improving, or a callback ended the run,
            before the last epoch.
        device: where it was trained.
        batch_size: data points per step.
        learning_rate: the optimiser's step size as it was asked for, before schedules and groups.
        num_parameters: how many numbers were trained.
        compiled: whether the steps were replayed from a captured graph, as recorded or compiled.
        compile_choice: how the steps were taken, and why.
        skipped_steps: steps that were left out because their loss or gradient was not finite.
        warnings: what went wrong all the same, one line each with what to try: posterior collapse,
            exploding gradients, a learned sigma that runs to 0.
    """

    history: dict[str, np.ndarray] = field(repr=False)
    best_epoch: int
    stopped_early: bool
    device: str
    batch_size: int
    learning_rate: float
    num_parameters: int
    compiled: bool
    compile_choice: str
    skipped_steps: int
    warnings: tuple[str, ...]

    def _summary(self) -> Summary:
        kept, last = self.best_epoch - 1, len(self.history["train_elbo"])
        title = f"{last} epochs on {self.device}, {self.seconds:.1f} s of training"
        rows = {f"epoch {self.best_epoch}, kept": "nats per data point"}
        for name in ("train_elbo", "train_rate", "train_distortion", "validation_elbo"):
            if np.isfinite(value := self.history[name][kept]):
                rows[name.replace("_", " ").replace("elbo", "ELBO")] = f"{value:.2f}"
        rows["parameters"] = f"{self.num_parameters:,}"
        rows["steps"] = self.compile_choice
        if self.skipped_steps:
            rows["steps skipped"] = f"{self.skipped_steps}"
        return title, rows | {f"warning {n}": text for n, text in enumerate(self.warnings, 1)}

    @property
    def seconds(self) -> float:
        """Seconds spent in training epochs (validation not counted)."""
        return float(self.history["seconds"].sum())


def fit(
    model: PairFunction, guide: PairFunction, data: Dataset | DataLike, *, epochs: int = 100,
    batch_size: int = 128, learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    parameter_groups: Mapping[str, Mapping[str, Any]] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None, ema: float | None = None,
    objective: ELBO | str | None = None, beta: float = 1.0, warmup_epochs: int | None = 0,
    validation: DataLike | None = None, patience: int | None = None,
    schedule: Schedule = "constant", gradient_clip: float | None = None, precision: str = "float32",
    compile: bool | str = "auto", on_nonfinite: str = "stop", nonfinite_limit: int = 20,
    transform: Callable[..., Tensor | Sequence[Tensor]] | None = None,
    device: str | torch.device = "auto", seed: int | None = None, plate: str | None = "data",
    checkpoint: str | Path | None = None, checkpoint_every: int | None = None,
    checkpoint_minutes: float | None = 1.0, resume: bool = False,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None, callbacks: Sequence[Any] = (),
    progress: bool | None = None,
) -> FitResult:  # fmt: skip
    """Train a model/guide pair by stochastic variational inference, by default with Adam.

    The loss of a batch is the objective's, divided by the batch's number of data points: an unbiased
    estimate of the mean loss per datum whatever the size of the last batch. With beta, distortion +
    beta * rate is minimised.

    Where torch.distributed has a process group, all its processes train the pair together, each by
    the same call with all the data: a batch of ``batch_size`` is shared out, gradients are summed,
    and parameters start from those of rank 0 and stay the same everywhere, to the bit. Stopping and
    skipping are decided on the sums, noise differs between processes, ``on_epoch`` is called in each,
    and the mean that :class:`pyro_vae.infer.FreeBits` takes is over a process's share. On CUDA each
    process sets its device before.

    Args:
        model: the generative function of the pair.
        guide: the variational function of the pair.
        data: a :class:`pyro_vae.datasets.Dataset` (its validation part is used), a tensor
            ``(N, ...)``, a tuple of tensors passed as ``model(*x)``, or what gives such: a pandas
            table of numbers, a ``torch.utils.data.Dataset``, a ``DataLoader`` or another iterable of
            batches, read once and kept (on the disk from 128 MiB on).
        epochs: passes over the training data.
        batch_size: data points per step; the last batch of an epoch may be smaller. A pair that ties
            parameters to data points is trained by ``batch_size=len(x)``: on all of them at once, in
            their own order.
        learning_rate: the optimiser's step size.
        optimizer: a class of ``torch.optim``, or a ``functools.partial`` of one that sets its options
            beside ``learning_rate``; or a function from a list of parameters to an optimiser with
            options of its own, asked for one parameter at a time. By default Adam. With others than
            Adam and AdamW each step waits for the device.
        parameter_groups: options of some parameters, by patterns (``*``, ``?``) of their names in
            ``named_parameters`` behind their module's name in Pyro: ``{"*variational_family.*":
            {"lr": 1e-4}, "*.bias": {"weight_decay": 0.0}}``. Of several that match later ones
            take precedence.
        scheduler: a function from the optimiser to a scheduler of ``torch.optim.lr_scheduler``, in
            place of ``schedule``. It moves after every step, a ``ReduceLROnPlateau`` after every
            epoch by minus the validation ELBO (without validation by minus ``train_bound``).
        ema: factor, such as 0.999, of an exponential moving average of the parameters, in which each
            step weighs so much less than the one after it. Validation, early stopping and
            ``on_epoch`` see the averaged parameters, and they are what the run leaves. Buffers are
            not averaged.
        objective: an objective of :mod:`pyro_vae.infer`, by its name on the command line too
            (``"iwae"``), or any Pyro ELBO; by default the ELBO with the closed-form rate of every
            latent that has one, as in :class:`pyro_vae.infer.AnalyticKL`, and that of
            ``Trace_ELBO()`` for latents that are not reparameterised. Pyro's
            ``TraceMeanField_ELBO`` runs as :class:`pyro_vae.infer.AnalyticKL`; its other ELBOs run
            eagerly, but for ``TraceTailAdaptive_ELBO`` and the ``Jit`` ones, which are refused.
        beta: weight of the latent terms, at least 0.
        warmup_epochs: epochs over which the weight rises linearly from 0 to ``beta``, step by step.
            Without it a pair on little data can settle on ignoring its latents (posterior collapse).
            None: a tenth of the epochs and more in short runs, as ``pyro-vae train`` and
            :class:`pyro_vae.VAETransformer` have it by default.
        validation: data to evaluate after every epoch, as the model sees them.
        patience: stop after this many epochs without a better validation ELBO (after the warm-up) and
            put the best parameters back. None trains to the end and keeps the last ones.
        schedule: ``constant``, ``cosine`` (down to 0 at the end of the last epoch), or a function
            from the fraction of the steps that is done, in [0, 1), to a multiplier of the learning
            rate.
        gradient_clip: greatest global norm of the gradient of the mean loss per datum.
        precision: ``float32``; ``tf32``, in which CUDA rounds the factors of matrix products; or
            ``bfloat16``, in which linear and convolutional layers multiply. Draws and
            log-probabilities are float32 in all of them, and so is validation.
        compile: capture loss and gradients as one graph and compile it (see
            :class:`pyro_vae.infer.CompiledTrace_ELBO`, and what it says is baked in). ``auto`` does
            so on CUDA; on a CPU it goes by the steps of the whole run: eager below 1,500, the graph
            as it was recorded below 5,000, else compiled. A pair that can't be captured runs
            eagerly, with a warning if compiling was asked for.
        on_nonfinite: what to do where the loss or the gradient's norm is not finite; the step is not
            applied in any case. ``stop`` raises, ``skip`` goes on with the next batch.
        nonfinite_limit: steps that may be skipped before the run stops after all: parameters that
            have gone astray fail in every batch, a stray batch is a handful.
        transform: called with the tensors of every training batch, on the device; returns what both
            functions of the pair are given. It is part of the captured step. A dynamically binarised
            Dataset brings its own. With it the data may be what the likelihood does not take (bytes
            under a Bernoulli): what it returns for the first batch is checked instead.
        device: ``auto`` takes CUDA where there is one. Modules and methods of modules are moved
            there; plain functions stay where their parameters are.
        seed: seed of everything random in the run; the generators' state is restored afterwards.
            None draws from the global state.
        plate: name of the data plate. What stands outside it (topics, weights, hyper-parameters)
            counts once for the whole data set: B / N of it in a batch of B of N data points, unless
            the plate itself says for how many data points a batch stands. None: the whole data set
            is one datum, every step takes all of it, and what is per datum is its total.
        checkpoint: folder for the run's state: parameters, optimiser, schedules, place in the epoch,
            history, best values so far and every random generator. The last two are kept. SIGINT and
            SIGTERM then end the run at the next step's boundary, with
            :class:`pyro_vae.infer.Interrupted`, and a step that stops the run as not
            finite leaves the state before it (generators excepted), unless it is the first one. Of
            several processes the first one writes for all, and a signal to one of them ends all.
        checkpoint_every: epochs after which one is written.
        checkpoint_minutes: minutes after which one is written, in the middle of an epoch too; 0 after
            every step, None not by time.
        resume: continue from the newest checkpoint, or start if there is none. The other options, the
            data and the number of processes must be those the run was begun with: functions and
            callbacks are taken from the call, and of ``optimizer`` and ``scheduler`` names, classes
            and the groups' options are compared. On a CPU without compilation the weights and the
            history are then those of a run that was never interrupted, bit for bit, but for
            ``seconds`` and ``data_per_second``.
        on_epoch: called with (epoch from 1, that epoch's metrics); once more for an epoch if the run
            was killed before that was on the disk.
        callbacks: objects with some of the methods of :class:`pyro_vae.infer.Callback`, called at the
            start, every so many steps, after each epoch and at the end; they may end the run.
        progress: show a line of progress on standard error; by default on a terminal and in Jupyter.

    Returns:
        history and settings of the run.

    Raises:
        InputError: options or data out of range, a pair that breaks the contract (a latent outside
            the data plate, or missing from the guide), parameters that Pyro does not know, parameters
            for each data point in batches of a part of them, a loss or gradient that is not finite
            (its epoch and batch are named), or a checkpoint of another run.

    Source:
        Kingma, Welling 2014, algorithm 1; beta: Higgins et al. 2017; warm-up: Bowman et al. 2016,
        Sonderby et al. 2016; Adam: Kingma, Ba 2015; cosine: Loshchilov, Hutter 2017.

    Example:
        >>> import torch, pyro_vae as pv
        >>> prior, encoder = pv.priors.StandardNormal(2), pv.networks.MLPEncoder((4,), (8,))
        >>> likelihood = pv.likelihoods.Bernoulli(pv.networks.MLPDecoder(2, (8,)), (4,))
        >>> vae = pv.VAE(prior, likelihood, pv.guides.MeanFieldNormal(encoder, 2))
        >>> result = pv.fit(vae.model, vae.guide, torch.ones(16, 4), epochs=2, seed=0)
        >>> result.history["train_elbo"].shape
        (2,)
    """
    given = dict(locals())
    if isinstance(objective, str):
        objective = objective_named(objective)
    told = given | {"objective": objective, "warmup_epochs": warmup_epochs or 0}
    settings = FitSettings(**{each.name: told[each.name] for each in fields(FitSettings)})
    check_callables(transform=transform, on_epoch=on_epoch)
    processes = Processes.current()
    watchers = Callbacks(callbacks, processes)
    when = checkpoint_every, checkpoint_minutes
    checkpoints = Checkpoints(checkpoint, *when, resume=resume, processes=processes)
    if objective is None and resume and checkpoints.kept("objective") == name_of(TraceBound()):
        settings = replace(settings, objective=TraceBound())  # an earlier version's default
    begun = checkpoints.kept("compiled")
    pair, to_validate, training, capture, place = _open(given, settings, processes, begun)
    settings = training.settings
    held_out = None if to_validate is None else to_validate.inputs
    record = settings.record() | {  # plain values, by which a checkpoint knows the run again
        "objective": name_of(training.bound),
        "device": place.type,  # one CUDA device may take over from another
        "compiled": capture.record,
        "transform": training.transform is not None,
    }
    kept = checkpoint is not None, checkpoint_every, resume
    processes.check_same(data=pair.inputs, validation_data=held_out, checkpoints=kept, **record)
    with (
        pair.training(settings.seed),
        compute_in(settings.precision, place),
        epoch_progress(settings.epochs, progress if processes.is_first else False) as bar,
        checkpoints,
    ):
        processes.draw_apart()
        step = capture.step if capture.gear != "eager" else None
        how: dict[str, Any] = {"device": place, "captured_step": step, "processes": processes}
        shuffle = _takes_any_batch(pair, training, processes)
        trainer = Trainer(pair, training, settings, shuffle=shuffle, **how)
        rows: list[dict[str, float]] = []
        best = EarlyStopping(settings.patience, settings.warmup_epochs)
        if checkpoint is not None:
            tensors = {f"train {i}": value.cpu() for i, value in enumerate(pair.inputs)}
            tensors |= {f"validation {i}": value.cpu() for i, value in enumerate(held_out or ())}
            checkpoints.begin({**record, "data": checksum_of("", tensors)}, trainer, best, rows)
        watchers.tell("on_begin", record)

        def after_step(summary: Tensor, num_data: int) -> bool:
            watchers.after_step(trainer.count, lambda: trainer.metrics_of(summary, num_data))
            checkpoints.after_step()
            return watchers.end_run

        resumed = len(rows)
        for epoch in range(resumed + 1, settings.epochs + 1):
            if best.is_over(len(rows)) or watchers.end_run:
                break
            row = trainer.run_epoch(epoch, after_step=after_step)
            trainer.updates.swap_averages()
            row |= validate(to_validate, processes)
            row["global_rate"] = global_rate(trainer)
            rows.append(row)
            best.take_in(epoch, row["validation_elbo"], trainer)
            # Known only now: the first step finds out what can be captured.
            if epoch == resumed + 1 and not bar.disable:
                bar.write(capture.outcome, file=sys.stderr)
            elbo = describe_progress("ELBO", row["train_elbo"], row["validation_elbo"], ".2f")
            parts = f"rate {row['train_rate']:.2f}  distortion {row['train_distortion']:.2f}"
            bar.set_description_str(f"{elbo}  {parts}", refresh=False)
            bar.update(epoch - bar.n)
            if on_epoch is not None:
                on_epoch(epoch, row)
            watchers.tell("on_epoch", epoch, row)
            trainer.updates.swap_averages()
            trainer.updates.end_epoch(row)
            checkpoints.after_step(epoch)
        checkpoints.finish()
        trainer.updates.swap_averages()
        best.restore(trainer)
        found = diagnose(rows, model, guide, trainer.shown, settings)
    result = FitResult(
        history={name: np.array([row.get(name, math.nan) for row in rows]) for name in HISTORY},
        best_epoch=best.epoch, stopped_early=len(rows) < settings.epochs, device=str(place),
        batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        num_parameters=sum(parameter.numel() for parameter in trainer.updates.leaves),
        compiled=capture.num_graphs > 0, compile_choice=capture.outcome,
        skipped_steps=trainer.skipped, warnings=found,
    )  # fmt: skip
    watchers.tell("on_end", result)
    return result


def _open(
    given: Mapping[str, Any], settings: FitSettings, processes: Processes, begun: bool | str | None
) -> tuple[OpenedPair, OpenedPair | None, TrainingObjective, StepCapture, torch.device]:
    """Check the data, move the pair to its device and the data into its types, once for the run.

    Of what :func:`fit` was given return the pair on the data for training, before any transform, and
    on those for validation.
    """
    model, guide, data, device = (given[name] for name in ("model", "guide", "data", "device"))
    validation, transform = given["validation"], given["transform"]
    is_given = transform is None  # what a transform returns is checked in the first step
    if isinstance(data, Dataset):
        if validation is None and len(data.validation):
            validation = data.inputs("validation")
        if data.binarize == "dynamic":
            draw, after = data.draw, transform
            transform = draw if after is None else lambda x, *given: after(draw(x), *given)
        data = data.inputs("train")
    if settings.plate is None and processes.are_several:
        raise InputError("expected one process with plate=None, got several: one datum has no shares")
    read = partial(as_inputs, share_rows=settings.plate is not None)
    inputs = read(gather(data, model))
    held_out = None if validation is None else read(gather(validation, model))
    if settings.patience is not None and held_out is None:
        raise InputError("expected validation data for patience, got none: pass validation=")
    if is_given:
        check_data(model, inputs, to_train=True)
    if held_out is not None:
        check_data(model, held_out)
    place = place_pair(model, guide, device, inputs[0].device)
    inputs = tuple(each.detach() for each in read(inputs, model, guide, are_given=is_given))
    plain_objective, own_beta = uncompiled(settings.objective)
    bound = bound_of(plain_objective)
    serves = Serves.WHOLE | Serves.SHARED | (Serves.SUMMED if bound.sums_out else Serves.NOTHING)
    pair = OpenedPair(model, guide, inputs, plate=settings.plate, serves=serves)
    to_validate = None if held_out is None else pair.on(read(held_out, model, guide))
    settings = replace(settings, beta=settings.beta * own_beta)
    per_epoch = -(-pair.num_data // settings.batch_size)  # steps
    if given["warmup_epochs"] is None:
        settings = replace(settings, warmup_epochs=default_warmup_epochs(settings.epochs, per_epoch))
    share = processes.are_several
    objective = TrainingObjective(bound, settings, transform=transform, is_share=share)
    steps = settings.epochs * per_epoch
    capture = StepCapture(objective, settings, device=place, num_steps=steps, begun=begun)
    return pair, to_validate, objective, capture, place


def _takes_any_batch(pair: OpenedPair, training: TrainingObjective, processes: Processes) -> bool:
    """Tell whether the data may be shuffled; refuse to take parts of what only takes all of them."""
    if pair.plate is None:
        return False
    if training.transform is not None or pair.num_data < 3 or pair.takes_any_batch():
        return True
    if training.settings.batch_size >= pair.num_data and not processes.are_several:
        return False
    with pair.put_back(), torch.no_grad():
        # What it is refused for as a whole is said first.
        pair.part().inspect(pair.num_data, may_subsample=True)
    advice = "in one process" if processes.are_several else "by batch_size=len(x)"
    raise InputError(
        "expected a pair that takes any part of its data in any order, got one that ties something "
        "of its own, such as parameters or one joint draw of all latents, to each of the "
        f"{pair.num_data} data points: train it on all of them at once {advice}, or let a network "
        "make the parameters from x"
    )


def epoch_progress(epochs: int, show: bool | None) -> Any:
    """Return a progress line on standard error: epoch, time left and metrics, updated in place.

    It is shown on a terminal and in a notebook, there as a widget where these are installed.
    """
    if sys.stderr is None:  # as a process without a terminal may have it
        show = False
    elif show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a notebook has no widgets: a line does as well
        from tqdm.auto import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread beside the training's

    shape = "epoch {n_fmt}/{total_fmt} {remaining} {desc}"
    return Bar(total=epochs, disable=not show, dynamic_ncols=True, bar_format=shape)


def describe_progress(name: str, train: float, validation: float, digits: str) -> str:
    """Return a number of both parts of the data as a line of progress shows it."""
    text = f"{name} {train:{digits}}"
    return text if math.isnan(validation) else f"{text} (validation {validation:{digits}})"
