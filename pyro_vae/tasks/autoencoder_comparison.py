"""The deterministic autoencoder beside a VAE: reconstruction, random latents, holes between codes."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.autoencoder import Autoencoder
from pyro_vae.errors import InputError, check_counts
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import as_inputs
from pyro_vae.pair.opened import OpenedFunction
from pyro_vae.pair.sites import latent_sites
from pyro_vae.summary import shown
from pyro_vae.tasks.generation import decode, encode

# Rows whose distances to all codes are held at once.
_BLOCK = 1024


@shown
class Side(NamedTuple):
    """What one of the two gives: S random latents, N held-out data, M the least; a G x G grid."""

    reconstructions: Tensor  # held-out data decoded from their (mean) codes, (N, *data_shape)
    error: Tensor  # their root-mean-square error per datum, (N,)
    error_of_draws: Tensor  # the same from drawn codes; an autoencoder has no other code to draw
    held_out_distance: Tensor  # from the first held-out codes to the nearest training code, (M,)
    random_distance: Tensor  # from a random latent to the nearest training code, (S,)
    random: Tensor  # the random latents decoded, (S, *data_shape)
    random_data_distance: Tensor  # root-mean-square, of those to the nearest training datum, (S,)
    grid: Tensor  # decoded latents between four held-out codes, (G, G, *data_shape)
    grid_distance: Tensor  # from these latents to the nearest training code, (G, G)

    @property
    def hole_ratio(self) -> float:
        """Median distance of random latents over that of held-out codes; 1: there are no holes."""
        # By 0, of held-out data that are training data, it is infinite or not known.
        return (self.random_distance.median() / self.held_out_distance.median()).item()


@shown
class AutoencoderComparison(NamedTuple):
    """An autoencoder and a VAE on the same data.

    Attributes:
        autoencoder, vae: what each does.
        held_out: the held-out data, ``(N, *data_shape)``.
        held_out_data_distance: distance of the first of them to the nearest training datum, ``(M,)``.
    """

    autoencoder: Side
    vae: Side
    held_out: Tensor
    held_out_data_distance: Tensor

    def table(self) -> dict[str, dict[str, float]]:
        """Return the numbers by row, each for ``autoencoder`` and ``vae``.

        Errors are root mean squares over data and values, distances are medians.
        """
        reference = self.held_out_data_distance.median().item()
        columns = {}
        for name, side in (("autoencoder", self.autoencoder), ("vae", self.vae)):
            held_out = side.held_out_distance.median()
            columns[name] = {
                "reconstruction error": side.error.square().mean().sqrt().item(),
                "reconstruction error, drawn code": side.error_of_draws.square().mean().sqrt().item(),
                "nearest-code distance, held-out": held_out.item(),
                "nearest-code distance, random": side.random_distance.median().item(),
                "random / held-out": side.hole_ratio,
                "largest on the grid / held-out": (side.grid_distance.max() / held_out).item(),
                "decoded random latent to nearest datum": side.random_data_distance.median().item(),
                "held-out datum to nearest datum": reference,
            }
        rows = columns["vae"]
        return {row: {name: column[row] for name, column in columns.items()} for row in rows}


def compare_autoencoder(
    autoencoder: Autoencoder, model: PairFunction, guide: PairFunction, train: Tensor,
    held_out: Tensor, *, num_random: int = 1000, grid_size: int = 8, observed: str | None = None,
    plate: str = "data", seed: int | None = None,
) -> AutoencoderComparison:  # fmt: skip
    """Measure an autoencoder and a VAE side by side on the same data.

    An autoencoder has no prior. Its random latents come from the normal distribution with mean and
    covariance of its training codes, the kindest choice; the VAE's come from its prior. The VAE's
    codes are draws of the guide, one per datum, for they are what its prior must match.

    Args:
        autoencoder: a trained autoencoder.
        model: the generative function of a trained pair with one latent, a vector.
        guide, plate, seed: as in :func:`pyro_vae.log_marginal`.
        train: training data ``(M, *data_shape)``, M at least 2.
        held_out: other data ``(N, *data_shape)``, N at least 4; the first four are the grid's
            corners, and at most ``num_random`` of them are used for distances.
        num_random: random latents, S.
        grid_size: latents along each side of the grid, G.
        observed: as in :func:`pyro_vae.tasks.decode`.

    Raises:
        InputError: too few data points or random latents, or a pair with several latents.
    """
    check_counts(num_random=num_random)
    check_counts(grid_size=grid_size, least=2)
    given = [as_inputs(data, model) for data in (train, held_out)]
    if number := next((len(each) for each in given if len(each) != 1), None):
        mend = "an autoencoder has no conditions"
        raise InputError(f"expected one tensor of data, got {number}: {mend}")
    (train,), (held_out,) = given
    if len(train) < 2 or len(held_out) < 4:
        wanted = "at least 2 training data points and 4 held-out ones"
        raise InputError(f"expected {wanted}, got {len(train)} and {len(held_out)}")
    with OpenedFunction(model, (train,), plate).evaluating(seed, guide, autoencoder):
        measure = functools.partial(_measure, train, held_out, grid_size)
        codes, held = autoencoder.encode(train), autoencoder.encode(held_out)
        random = _fitted_normal(codes, num_random)
        deterministic = measure(autoencoder.decode, codes, held, held, random)

        def decoded(z: Tensor) -> Tensor:
            like = train.new_zeros(len(z), *train.shape[1:])
            return decode(model, z, like, observed=observed, plate=plate)

        means = encode(guide, held_out, plate=plate)
        if means.dim() != 2 or not means.is_floating_point():
            what, advice = "a pair with one latent, a vector", "its codes can't be interpolated"
            raise InputError(f"expected {what}, got one of shape {tuple(means.shape[1:])}: {advice}")
        alone = OpenedFunction(model, (train.new_zeros(num_random, *train.shape[1:]),), plate)
        prior = latent_sites(alone.trace(explain="model"))[0]["value"]
        drawn, held = (encode(guide, x, mean=False, plate=plate)[0] for x in (train, held_out))
        variational = measure(decoded, drawn, means, held, prior)
        reference = _nearest(held_out[:num_random].flatten(1), train.flatten(1))
    reference = reference / math.sqrt(train[0].numel())
    return AutoencoderComparison(deterministic, variational, held_out.cpu(), reference.cpu())


def _measure(
    train: Tensor, held_out: Tensor, grid_size: int, decoded: PairFunction, codes: Tensor,
    means: Tensor, draws: Tensor, random: Tensor,
) -> Side:  # fmt: skip
    """Measure one side on the data, given its decoder, its codes and its random latents."""
    grid = _between(means[:4], grid_size).flatten(0, 1)
    rebuilt, images, corners = decoded(means), decoded(random), decoded(grid)
    off = [(each - held_out).flatten(1) for each in (rebuilt, decoded(draws))]
    errors = [each.square().mean(1).sqrt() for each in off]
    near = _nearest(draws[: len(random)], codes), _nearest(random, codes)
    data = _nearest(images.flatten(1), train.flatten(1)) / math.sqrt(train[0].numel())
    grids = [v.unflatten(0, (grid_size, grid_size)) for v in (corners, _nearest(grid, codes))]
    return Side(*(value.cpu() for value in (rebuilt, *errors, *near, images, data, *grids)))


def _fitted_normal(codes: Tensor, number: int) -> Tensor:
    """Draw from the normal distribution with the codes' mean and covariance."""
    centred = codes - codes.mean(0)
    # Any mixture of the centred codes by independent standard normals has just their covariance.
    noise = torch.randn(number, len(codes), device=codes.device, dtype=codes.dtype)
    return codes.mean(0) + noise @ centred / math.sqrt(len(codes) - 1)


def _between(corners: Tensor, size: int) -> Tensor:
    """Return a grid of points between four, linear along both sides, ``(size, size, ...)``."""
    share = torch.linspace(0, 1, size, device=corners.device, dtype=corners.dtype)
    share = share.view(-1, *(1 for _ in corners.shape[1:]))
    left = corners[0] + share * (corners[2] - corners[0])
    right = corners[1] + share * (corners[3] - corners[1])
    return left[:, None] + share * (right - left)[:, None]


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return each point's distance to the nearest of the others."""
    return torch.cat([torch.cdist(block, others).min(1).values for block in points.split(_BLOCK)])
