"""The pictures of a run: what is drawn for images and for vectors, and how it is said."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import likelihoods, plots, tasks
from pyro_vae.datasets import Dataset
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.files import write_whole
from pyro_vae.vae import VAE

# Data shown unless told otherwise: as images, and as vectors, whose distribution needs more.
_NUM_SAMPLES, _NUM_RECONSTRUCTIONS = (64, 1000), (12, 500)
# Values of each latent in a manifold, of images and of vectors.
_NUM_STEPS = (16, 40)
# Draws that a posterior mean without closed form rests on.
_MEAN_DRAWS = 100


def sample_picture(
    vae: VAE,
    data: Tensor | None,
    limits: tuple[float, float],
    *,
    number: int | None = None,
    mean: bool | None = None,
    seed: int,
) -> Figure:
    """Draw new data: as a grid of images, or beside ``data`` if they are vectors.

    Args:
        vae: a trained model.
        data: the test part, which vectors are compared with.
        limits: the values shown as white and as black.
        number: how many are drawn; by default what suits the kind of data.
        mean: show the likelihood's means instead of draws; by default what suits the data.
        seed: seed of the draws.
    """
    shape = data_shape_of(vae)
    image = plots.is_image(shape)
    if mean is None:
        # Vectors are compared with data, which carry the likelihood's noise; bits by their share.
        mean = image or isinstance(vae.likelihood, likelihoods.Bernoulli)
    like = torch.zeros(number or _NUM_SAMPLES[not image], *shape, device=_device_of(vae))
    drawn = tasks.generate(vae.model, like, mean=mean, seed=seed).cpu().numpy()
    title = f"{len(drawn)} samples: z from the prior, {'means' if mean else 'draws'} of p(x|z)"
    beside = drawn if data is None else data.cpu().numpy()
    return plots.samples(drawn, beside, title=title, limits=limits)


def reconstruction_picture(
    vae: VAE, data: Tensor, limits: tuple[float, float], *, number: int | None = None, seed: int
) -> Figure:
    """Show the first test data beside their reconstructions; arguments as :func:`sample_picture`."""
    image = plots.is_image(data_shape_of(vae))
    x = data[: number or _NUM_RECONSTRUCTIONS[not image]].to(_device_of(vae))
    rebuilt = tasks.reconstruct(vae.model, vae.guide, x, seed=seed)
    title = f"{len(x)} test data and their reconstructions" + (
        " (z from the guide, mean of p(x|z))" if image else ""
    )
    return plots.reconstructions(x.cpu().numpy(), rebuilt.cpu().numpy(), title=title, limits=limits)


def diagnostics_picture(estimate: LogMarginal) -> Figure:
    """Show the tail index per datum and the mean estimate after fewer samples."""
    curve = estimate.convergence
    return plots.weight_diagnostics(
        estimate.pareto_k.numpy(),
        None if curve is None else curve.num_samples.numpy(),
        None if curve is None else curve.log_prob.mean(1).numpy(),
        title=f"log p(x) of {len(estimate.log_prob)} test data, method {estimate.method}",
    )


def limits_of(dataset: Dataset) -> tuple[float, float]:
    """Return the values shown as white and black: [0, 1], or the data's range if it is another."""
    low, high = dataset.train.min().item(), dataset.train.max().item()
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def data_shape_of(vae: VAE) -> tuple[int, ...]:
    """Return the shape of one datum of a VAE that the commands built."""
    assert isinstance(vae.likelihood, likelihoods.Likelihood)  # the commands build no other
    return vae.likelihood.data_shape


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, figure.savefig)


def latent_picture(vae: VAE, data: Tensor, labels: Tensor | None, *, plane: str, seed: int) -> Figure:
    """Show where test data lie in the latent space: as a scatter of posterior means.

    Args:
        vae: a trained model.
        data: test data.
        labels: their classes, if they have any.
        plane: axes of more than one latent: ``"active"``, the two most active, or ``"pca"``.
        seed: seed of what has to be drawn.
    """
    means = posterior_means(vae, data, seed=seed)
    title = f"Posterior means of {len(means):,} test data"
    on_sphere = _on_sphere(vae)
    if plane == "pca" and means.shape[1] > 1:
        centred = means - means.mean(0)
        _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
        shares = lengths.square() / lengths.square().sum()
        points = centred @ axes[:2].T
        names = [f"principal component {i + 1} ({100 * shares[i]:.0f}%)" for i in range(2)]
        title += f": two principal components of {means.shape[1]} latents"
    else:
        shown = most_active(means, 2)
        points = means[:, list(shown)]
        names = [_name(dimension) for dimension in shown]
        if means.shape[1] > 2:
            title += f": the two most active of {means.shape[1]} latents"
    return plots.latent_scatter(
        points.cpu().numpy(),
        None if labels is None else labels.cpu().numpy(),
        title=title,
        axis_labels=names,
        unit_circle=on_sphere and plane != "pca",
    )


def manifold_picture(
    vae: VAE, data: Tensor, limits: tuple[float, float], *, num_steps: int | None = None, seed: int
) -> Figure:
    """Show what a grid over the two most active latents decodes to; arguments as the others'."""
    x = data.to(_device_of(vae))
    means = posterior_means(vae, x, seed=seed)
    num_steps = num_steps or _NUM_STEPS[not plots.is_image(data_shape_of(vae))]
    if means.shape[1] == 1:
        walk = tasks.traverse(vae.model, vae.guide, x[:1], num_steps=num_steps, seed=seed)
        return plots.manifold(
            walk.data[:, :, 0].cpu().numpy(),
            walk.values[0].cpu().numpy(),
            walk.values[0, :1].cpu().numpy(),
            title="Mean of p(x|z) at the prior's quantiles",
            axis_labels=(_name(0), ""),
            limits=limits,
        )
    first, second = most_active(means, 2)
    sheet = tasks.manifold(
        vae.model, vae.guide, x, dimensions=(first, second), num_steps=num_steps, seed=seed
    )
    names = _name(first), _name(second)
    where = "at the prior's quantiles"
    if sheet.on_sphere:
        where = "around the sphere"
        names = f"longitude from {names[0]} to {names[1]} (degrees)", "latitude (degrees)"
    title = f"Mean of p(x|z) {where}"
    if means.shape[1] > 2 + sheet.on_sphere:
        title += f": the two most active of {means.shape[1]} latents, others at the mean"
    return plots.manifold(
        sheet.data.cpu().numpy(),
        sheet.first.cpu().numpy(),
        sheet.second.cpu().numpy(),
        title=title,
        axis_labels=names,
        limits=limits,
    )


def traversal_picture(
    vae: VAE,
    data: Tensor,
    datum: int,
    limits: tuple[float, float],
    *,
    number: int,
    num_steps: int,
    seed: int,
) -> Figure:
    """Show what each of the most active latents does to one test datum.

    Args:
        vae: a trained model.
        data: test data, by which the latents' activity is judged.
        datum: which of them is changed.
        limits: the values shown as white and as black.
        number: how many latents at most.
        num_steps: values per latent.
        seed: seed of what has to be drawn.
    """
    x = data.to(_device_of(vae))
    means = posterior_means(vae, x, seed=seed)
    chosen = most_active(means, number)
    walk = tasks.traverse(
        vae.model,
        vae.guide,
        x[datum : datum + 1],
        dimensions=chosen,
        num_steps=num_steps,
        seed=seed,
    )
    many = len(chosen) < means.shape[1]
    which = f"the {len(chosen)} most active latents" if many else "each latent"
    title = f"Test datum {datum + 1}: {which} from the prior's 2.5% to 97.5% quantile"
    return plots.traversals(
        walk.data[:, :, 0].cpu().numpy(),
        walk.values.cpu().numpy(),
        [_name(dimension) for dimension in chosen],
        title=title,
        limits=limits,
    )


def interpolation_picture(
    vae: VAE,
    data: Tensor,
    limits: tuple[float, float],
    *,
    number: int,
    num_steps: int,
    seed: int,
) -> Figure:
    """Show the way from each of the first test data to the datum ``number`` further on."""
    x = data[: 2 * number].to(_device_of(vae))
    start, end = x[: len(x) // 2], x[len(x) // 2 :][: len(x) // 2]
    way = tasks.interpolate(vae.model, vae.guide, start, end, num_steps=num_steps, seed=seed)
    line = "great circle" if _on_sphere(vae) else "straight line"
    title = f"Mean of p(x|z) along the {line} between the codes of test data"
    return plots.interpolations(
        start.cpu().numpy(), way.cpu().numpy(), end.cpu().numpy(), title=title, limits=limits
    )


def completion_picture(
    data: Tensor, missing: Tensor, completed: tasks.Completion, limits: tuple[float, float]
) -> Figure:
    """Show test data with a part hidden, their completions, and the truth.

    Args:
        data: the data ``(N, *data_shape)``.
        missing: what was hidden of them.
        completed: what :func:`pyro_vae.tasks.complete` made of them.
        limits: the values shown as white and as black.
    """
    told = [f"{len(data)} test data, {100 * missing.double().mean():.0f}% hidden"]
    told.append(completed.method)
    if completed.acceptance is not None:
        told.append(f"mean acceptance {completed.acceptance.mean():.2f}")
    if completed.ess is not None:
        told.append(f"median ESS {completed.ess.median():.0f}")
    return plots.completions(
        data.cpu().numpy(),
        missing.cpu().numpy(),
        completed.mean.cpu().numpy(),
        completed.standard_deviation.cpu().numpy(),
        completed.draws.cpu().numpy(),
        title=", ".join(told),
        limits=limits,
    )


def posterior_means(vae: VAE, data: Tensor, *, seed: int) -> Tensor:
    """Return E[z given x], ``(N, latent_dim)``; a picture bears what draws leave uncertain."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no closed form")
        return tasks.encode(vae.guide, data.to(_device_of(vae)), num_draws=_MEAN_DRAWS, seed=seed)


def most_active(means: Tensor, number: int) -> tuple[int, ...]:
    """Return the latents whose posterior means ``(N, D)`` vary most, in their own order."""
    order = means.var(0, correction=0).argsort(descending=True, stable=True)
    return tuple(sorted(order[:number].tolist()))


def _on_sphere(vae: VAE) -> bool:
    return getattr(vae.variational_family, "latent_support", None) == "unit sphere"


def _name(dimension: int) -> str:
    return f"latent {dimension + 1}"


def _device_of(vae: VAE) -> torch.device:
    return next(vae.parameters()).device
