"""The pictures of a run: what is drawn for images and for vectors, and how it is said."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import likelihoods, plots, runs, tasks
from pyro_vae.datasets import Dataset
from pyro_vae.evaluation.estimate import LogMarginal
from pyro_vae.vae import VAE

# Data shown unless told otherwise: as images, and as vectors, whose distribution needs more.
_NUM_SAMPLES, _NUM_RECONSTRUCTIONS = (64, 1000), (12, 500)


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
    runs.write_whole(path, figure.savefig)


def _device_of(vae: VAE) -> torch.device:
    return next(vae.parameters()).device
