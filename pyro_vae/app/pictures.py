"""The pictures of a run: what is drawn for images and for vectors, and how it is labelled."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import likelihoods, plots, tasks
from pyro_vae.app import names
from pyro_vae.app.run_folder import check_picture, load_data_of_run, open_run, pair_of
from pyro_vae.data_scale import without_missing
from pyro_vae.datasets import Dataset
from pyro_vae.errors import InputError, check_room
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.files import write_whole
from pyro_vae.pair.inputs import Inputs
from pyro_vae.plots.images import channel_axis
from pyro_vae.plots.style import Limits
from pyro_vae.vae import VAE

# Draws that a posterior mean without closed form rests on.
_MEAN_DRAWS = 100

# Test data points that drawn vectors are shown beside: more change no picture, and fill the memory.
_BESIDE = 2_000


class Subject:
    """A trained VAE as the subject of a picture; ``load`` is called when the data are wanted."""

    def __init__(
        self, vae: VAE, settings: names.TrainSettings, load: Callable[[], Dataset], limits: Limits,
        how: names.PictureSettings,
    ) -> None:  # fmt: skip
        assert isinstance(vae.likelihood, likelihoods.Likelihood)  # the commands build no other
        self.vae, self.limits, self.seed = vae, limits, how.seed
        self.settings, self.pair, self._condition = settings, pair_of(vae, settings), how.condition
        self.num_classes = getattr(vae, "num_classes", None)
        self.data_shape = vae.likelihood.data_shape
        self.is_image = plots.is_image(self.data_shape)
        self.device = next(vae.parameters()).device
        self._load = functools.cache(load)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set; where a condition is asked for, the test data of that class or near it."""
        data = self._load()
        if self.condition is None:
            return data
        distance = (data.given["test"][0] - self.condition).abs()
        of_class = None if self.num_classes is None else int((distance == 0).sum())
        rows, labels = distance.argsort(stable=True)[:of_class], data.test_labels
        if not len(rows):
            raise InputError(f"expected a class of the test data, got {self._condition!r}")
        given = {"test": tuple(value[rows] for value in data.given["test"])}
        labels = None if labels is None else labels[rows]
        return replace(data, test=data.test[rows], test_labels=labels, given=given)

    @property
    def is_on_sphere(self) -> bool:
        """Whether the latents lie on a sphere."""
        return getattr(self.vae.variational_family, "latent_support", None) == "unit sphere"

    @cached_property
    def condition(self) -> float | None:
        """The condition that was asked for, as a number; None: any."""
        text, name = self._condition, self.settings.condition
        if text is None:
            return None
        if name is None:
            raise InputError("expected --condition of a run that was trained with one: leave it out")
        known = self._load().words.get(name) or tuple(map(str, range(self.num_classes or 0)))
        with suppress(ValueError):
            return float(known.index(text) if known else text)
        told = f"one of {', '.join(known)}" if known else "a number"
        raise InputError(f"expected --condition as {told}, got {text!r}")

    def inputs(self, number: int | None = None) -> tuple[Tensor, ...]:
        """Return what the pair is given of the first test data, by default of all, at the VAE."""
        return self.dataset.inputs("test", number, self.device)

    def like(self, number: int) -> tuple[Tensor, ...]:
        """Return zeros for new data to be like, given as test data are, images each class in turn."""
        like = torch.zeros(number, *self.data_shape, device=self.device)
        _, *given = self.dataset.inputs("test") if self.vae.num_inputs > 1 else (like,)
        given = [value[torch.arange(number) % len(value)].to(self.device) for value in given]
        if self.condition is not None:
            given[0] = like.new_full((number,), self.condition)
        elif self.num_classes is not None and self.is_image:
            given[0] = torch.arange(number, device=self.device) * self.num_classes // number
        return (like, *given)

    def run(self, task: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Return what a task does with model, guide and what is given."""
        return task(*self.pair, *given, seed=self.seed, **options)

    def means(self, x: Inputs) -> Tensor:
        """Return E[z given x], ``(N, latent_dim)``; a picture bears what draws leave uncertain."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no closed form")
            return tasks.encode(self.pair[1], x, num_draws=_MEAN_DRAWS, seed=self.seed)

    def either(self, for_images: int, for_vectors: int) -> int:
        """Return a number that suits the kind of data: a distribution of vectors needs more."""
        return for_images if self.is_image else for_vectors


def draw(run: Path, what: names.Picture, settings: names.PictureSettings) -> Path:
    """Draw a picture of a finished run, write it, by default into its folder, and return the file."""
    num_steps = vars(what).get("num_steps")
    if num_steps is not None and not isinstance(what, names.Complete) and not 2 <= num_steps <= 200:
        raise InputError(f"expected --num-steps from 2 to 200, got {num_steps}")
    vae, trained, limits = open_run(run, torch.device("cpu"))
    draw_figure, name = _PICTURES[type(what)]
    name = name.format(**vars(what)).replace(":", "-")
    path = check_picture(settings.output or run / f"{name}-seed-{settings.seed}.png")
    load = functools.partial(load_data_of_run, run, trained, settings.data_root)
    save_picture(draw_figure(Subject(vae, trained, load, limits, settings), what), path)
    return path


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower()))


def limits_of(dataset: Dataset) -> Limits:
    """Return the values shown as white and black: [0, 1], or the data's range if it is another."""
    ends = [part.aminmax() for part in without_missing(dataset.train)]
    low, high = min(end.min.item() for end in ends), max(end.max.item() for end in ends)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def draw_samples(subject: Subject, what: names.Sample) -> Figure:
    """Draw new data: as a grid of images, or beside the test data if they are vectors."""
    mean = what.mean
    if mean is None:
        # Vectors are compared with data, which carry the likelihood's noise; bits by their share.
        mean = subject.is_image or isinstance(subject.vae.likelihood, likelihoods.Bernoulli)
    number = what.num or subject.either(64, 1000)
    drawn = tasks.generate(subject.vae.model, subject.like(number), mean=mean, seed=subject.seed)
    beside = drawn if subject.is_image else subject.inputs(_BESIDE)[0]
    title = f"{number} samples: z from the prior, {'means' if mean else 'draws'} of p(x|z)"
    return plots.samples(_array(drawn), _array(beside), title=title, limits=subject.limits)


def draw_reconstructions(subject: Subject, what: names.Reconstruct) -> Figure:
    """Show the first test data points beside their reconstructions."""
    x, *given = subject.inputs(what.num or subject.either(12, 500))
    rebuilt = subject.run(tasks.reconstruct, (x, *given))
    title = f"{len(x)} test data points and their reconstructions"
    title += " (z from the guide, mean of p(x|z))" * subject.is_image
    return plots.reconstructions(_array(x), _array(rebuilt), title=title, limits=subject.limits)


def draw_diagnostics(estimate: LogMarginal) -> Figure:
    """Show the tail index per datum and the mean estimate after fewer samples."""
    curve = estimate.convergence
    shown = () if curve is None else (curve.num_samples.numpy(), curve.log_prob.mean(1).numpy())
    title = f"log p(x) of {len(estimate.log_prob)} test data points, method {estimate.method}"
    pareto_k, limit = estimate.pareto_k.numpy(), estimate.pareto_k_limit.min().item()
    return plots.weight_diagnostics(pareto_k, *(shown or (None, None)), title=title, limit=limit)


def _draw_latent(subject: Subject, what: names.Latent) -> Figure:
    x = subject.inputs(what.num or 5000)
    means = subject.means(x)
    if what.view == "manifold":
        return _draw_manifold(subject, x, means, what.num_steps or subject.either(16, 40))
    labels = subject.dataset.test_labels
    title = f"Posterior means of {len(means):,} test data points"
    pca = what.plane == "pca" and means.shape[1] > 1
    if pca:
        centred = means - means.mean(0)
        _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
        shares = lengths.square() / lengths.square().sum()
        points = centred @ axes[:2].T
        axis_labels = [f"principal component {i + 1} ({100 * shares[i]:.0f}%)" for i in range(2)]
        title += f": two principal components of {means.shape[1]} latents"
    else:
        chosen = _most_active(means, 2)
        points = means[:, list(chosen)]
        axis_labels = [_name(dimension) for dimension in chosen]
        if means.shape[1] > 2:
            title += f": the two most active of {means.shape[1]} latents"
    real = labels is None or labels.is_floating_point()
    classes = None if labels is None or real else labels[: len(means)].numpy()
    how: Any = {"axis_labels": axis_labels, "unit_circle": subject.is_on_sphere and not pca}
    return plots.latent_scatter(_array(points), classes, title=title, **how)


def _draw_manifold(subject: Subject, x: Inputs, means: Tensor, num_steps: int) -> Figure:
    """Show what a grid over the two most active latents decodes to."""
    latent_dim = means.shape[1]
    title = "Mean of p(x|z) at the prior's quantiles"
    if latent_dim == 1:
        walk = subject.run(tasks.traverse, [value[:1] for value in x], num_steps=num_steps)
        decoded = walk.data[:, :, 0], walk.values[0], walk.values[0, :1]
        axis_labels = _name(0), ""
    else:
        chosen = _most_active(means, 2)
        sheet = subject.run(tasks.manifold, x, dimensions=chosen, num_steps=num_steps)
        decoded = sheet.data, sheet.first, sheet.second
        axis_labels = _name(chosen[0]), _name(chosen[1])
        if sheet.on_sphere:
            title = "Mean of p(x|z) around the sphere"
            ends = " to ".join(axis_labels)
            axis_labels = f"longitude from {ends} (degrees)", "latitude (degrees)"
        if latent_dim > 2 + sheet.on_sphere:
            title += f": the two most active of {latent_dim} latents, others at the mean"
    shown = map(_array, decoded)
    return plots.manifold(*shown, title=title, axis_labels=axis_labels, limits=subject.limits)


def _draw_traversal(subject: Subject, what: names.Traverse) -> Figure:
    x = subject.inputs()
    if not 1 <= what.datum <= len(x[0]):
        raise InputError(f"expected a test datum from 1 to {len(x[0])}, got {what.datum}")
    means = subject.means(x)
    chosen = _most_active(means, what.num)
    datum = [value[what.datum - 1 : what.datum] for value in x]
    walk = subject.run(tasks.traverse, datum, dimensions=chosen, num_steps=what.num_steps)
    many = len(chosen) < means.shape[1]
    which = f"the {len(chosen)} most active latents" if many else "each latent"
    title = f"Test datum {what.datum}: {which} from the prior's 2.5% to 97.5% quantile"
    shown = _array(walk.data[:, :, 0]), _array(walk.values), [*map(_name, chosen)]
    return plots.traversals(*shown, title=title, limits=subject.limits)


def _draw_interpolations(subject: Subject, what: names.Interpolate) -> Figure:
    """Show the way from each of the first test data to the datum ``num`` further on."""
    x = subject.inputs(2 * what.num)
    half = len(x[0]) // 2
    if not half:
        raise InputError("expected at least 2 test data points to walk between, got 1")
    start, end = ([value[at : at + half] for value in x] for at in (0, half))
    way = subject.run(tasks.interpolate, start, end, num_steps=what.num_steps)
    line = "great circle" if subject.is_on_sphere else "straight line"
    title = f"Mean of p(x|z) along the {line} between the codes of test data"
    shown = map(_array, (start[0], way, end[0]))
    return plots.interpolations(*shown, title=title, limits=subject.limits)


def _draw_completions(subject: Subject, what: names.Complete) -> Figure:
    """Show test data with a part hidden, their completions, and the truth."""
    hide_part(what.missing, subject.data_shape, 1, seed=subject.seed)  # refused before data are read
    x, *given = subject.inputs(what.num or subject.either(8, 200))
    hidden = hide_part(what.missing, subject.data_shape, len(x), seed=subject.seed)
    hidden = hidden.to(x.device) | x.isnan()
    by_importance = what.method == "importance"
    each = max(what.num_draws, what.num_samples * by_importance)
    check_room("completions", 8 * x.numel() * each, "lower num, num_draws or num_samples")
    own = "num_samples" if by_importance else "num_steps"
    how: Any = {name: getattr(what, name) for name in ("method", "num_draws", own)}
    pair = subject.vae.model, subject.vae.guide
    completed = tasks.complete(*pair, (x, *given), hidden, seed=subject.seed, **how)
    told = [f"{len(x)} test data points, {hidden.double().mean():.0%} hidden", completed.method]
    if completed.acceptance is not None:
        told.append(f"mean acceptance {completed.acceptance.mean():.2f}")
    if completed.ess is not None:
        told.append(f"median ESS {completed.ess.median():.0f}")
    if what.missing == "nan" and not subject.is_image:  # there is no truth to compare with
        return plots.samples(_array(completed.draws[0]), _array(x), title=", ".join(told))
    filled = completed.mean, completed.standard_deviation, completed.draws
    shown = map(_array, (x, hidden, *filled))
    return plots.completions(*shown, title=", ".join(told), limits=subject.limits)


# How each picture is drawn, and of what its file's default name is made.
_PICTURES: dict[type, tuple[Callable[[Subject, Any], Figure], str]] = {
    names.Sample: (draw_samples, "samples"),
    names.Reconstruct: (draw_reconstructions, "reconstructions"),
    names.Complete: (_draw_completions, "completions-{missing}"),
    names.Latent: (_draw_latent, "latent-{view}"),
    names.Traverse: (_draw_traversal, "traversal-{datum}"),
    names.Interpolate: (_draw_interpolations, "interpolations"),
}


def hide_part(missing: str, data_shape: Sequence[int], number: int, *, seed: int) -> Tensor:
    """Return what is hidden of this many data points, boolean ``(number, *data_shape)``.

    A half of an image, of a vector ``left`` (its first half) or ``right``; ``random:SHARE``, each
    pixel by itself with that probability, all its channels together; or ``nan``, none.
    """
    image = plots.is_image(data_shape)
    channel = channel_axis(data_shape) if image else None
    plane = [size for axis, size in enumerate(data_shape) if axis != channel]
    word, _, text = missing.partition(":")
    if word == "random":
        share = math.nan
        with suppress(ValueError):
            share = float(text)
        if not 0 < share < 1:
            raise InputError(f"expected a share between 0 and 1 after random:, got {text!r}")
        hidden = torch.rand(number, *plane, generator=torch.Generator().manual_seed(seed)) < share
    else:
        halves = {"nan": -1, "left": -1, "right": -1} | ({"upper": -2, "lower": -2} if image else {})
        if missing not in halves:
            told = f"{', '.join(halves)} or random:SHARE"
            raise InputError(f"expected as missing {told}, got {missing!r}")
        hidden, size = torch.zeros(number, *plane, dtype=torch.bool), plane[halves[missing]]
        start = 0 if missing in ("left", "upper") else size // 2
        hidden.narrow(halves[missing], start, -(-size // 2)).fill_(missing != "nan")
    if channel is not None:
        hidden = hidden.unsqueeze(channel + 1)
    return hidden.expand(number, *data_shape).clone()


def _most_active(means: Tensor, number: int) -> tuple[int, ...]:
    """Return the latents whose posterior means ``(N, D)`` vary most, in their own order."""
    order = means.var(0, correction=0).argsort(descending=True, stable=True)
    return tuple(sorted(order[:number].tolist()))


def _name(dimension: int) -> str:
    return f"z[{dimension}]"


def _array(values: Tensor) -> Any:
    return values.cpu().numpy()
