"""Walk through the latents and decode what is met: interpolations, traversals, the manifold."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import InputError, check_counts, real_number, whole_number
from pyro_vae.evaluation.latent_codes import choose_site, mean_codes
from pyro_vae.pair.contract import check_rows
from pyro_vae.pair.functions import PairFunction
from pyro_vae.pair.inputs import as_inputs, tile_inputs
from pyro_vae.pair.opened import OpenedFunction, OpenedPair, open_pair
from pyro_vae.pair.sites import Latents, value_axis
from pyro_vae.summary import shown
from pyro_vae.tasks.generation import decode_latents

# Draws of the prior whose quantiles a walk follows: a normal's at 2.5 % is then known to 0.03.
_PRIOR_DRAWS = 10_000
# Draws that a code without a mean in closed form rests on.
_CODE_DRAWS = 200


@shown
class Traversal(NamedTuple):
    """Data decoded while one latent coordinate moves and the others stay.

    Attributes:
        dimensions: the coordinates that were moved, D of them, counted from 0.
        values: the values they were given, ``(D, num_steps)``.
        data: the decoded means, ``(D, num_steps, N, *data_shape)``.
    """

    dimensions: tuple[int, ...]
    values: Tensor
    data: Tensor


@shown
class Manifold(NamedTuple):
    """Data decoded over two latent coordinates.

    Attributes:
        dimensions: the two coordinates, counted from 0.
        first: values of the first, ``(num_steps,)``; on a sphere the longitude in degrees, turning
            from the first coordinate to the second.
        second: values of the second, ``(num_steps,)``; on a sphere the latitude in degrees.
        data: the decoded means, ``(num_steps, num_steps, *data_shape)``, second coordinate first;
            on a circle, which has no latitude, ``(1, num_steps, *data_shape)``.
        on_sphere: whether the coordinates are longitude and latitude.
    """

    dimensions: tuple[int, int]
    first: Tensor
    second: Tensor
    data: Tensor
    on_sphere: bool


def interpolate(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor],
    to: Tensor | Sequence[Tensor], *, num_steps: int = 9, observed: str | None = None,
    plate: str = "data", seed: int | None = 0,
) -> Tensor:  # fmt: skip
    """Decode the way from the codes of some data to those of others, ``(num_steps, N, *data_shape)``.

    The way of each latent site is straight, on a sphere the shorter arc of the great circle.

    Args:
        model, guide, plate, seed: as in :func:`pyro_vae.log_marginal`.
        x: data to start from ``(N, ...)``, or a tuple of tensors; they give the conditions.
        to: as many data points to end at.
        num_steps: points on the way, both ends included.
        observed: as in :func:`pyro_vae.tasks.decode`.

    Raises:
        InputError: fewer than 2 steps, unequally many starts and ends, or a discrete latent.

    Source:
        White 2016, "Sampling Generative Networks", section 2 (the great circle).
    """
    pair, ends = open_pair(model, guide, x, plate=plate), as_inputs(to, model, guide)
    check_counts(num_steps=num_steps, least=2)
    if pair.num_data != len(ends[0]):
        wanted = "as many data points to end at as to start from"
        raise InputError(f"expected {wanted}, got {len(ends[0])} for {pair.num_data}")
    with pair.evaluating(seed):
        encoder = pair.alone(guide)
        codes = mean_codes(encoder, _CODE_DRAWS)
        last = mean_codes(encoder._replace(inputs=ends), _CODE_DRAWS)
        ways = {}
        for name, code in codes.items():
            start, end = code.continuous(name), last[name].continuous(name)
            shares = torch.linspace(0, 1, num_steps, dtype=start.dtype, device=start.device)
            shares = shares.view(-1, *[1] * start.dim())
            way = start + shares * (end - start)
            if code.support == "sphere":
                way = _great_circle(start, end, shares)
            ways[name] = way.flatten(0, 1)
        return _decode(pair.alone(model), num_steps, ways, observed)


def traverse(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    dimensions: Sequence[int] | None = None, num_steps: int = 9, coverage: float = 0.95,
    site: str | None = None, observed: str | None = None, plate: str = "data", seed: int | None = 0,
) -> Traversal:  # fmt: skip
    """Move one latent coordinate through the prior's range and decode; the others stay at the code.

    The values are the prior's quantiles, evenly spaced in probability. On a sphere the coordinate
    moves along the meridian through the code: the others shrink together so that the length stays 1.

    Args:
        model, guide, plate, seed: as in :func:`pyro_vae.log_marginal`.
        x: data whose codes are moved ``(N, ...)``, or a tuple of tensors.
        dimensions: coordinates of the (flattened) latent to move, from 0; by default every one.
        num_steps: values per coordinate.
        coverage: probability under the prior between the first value and the last.
        site, observed: as in :func:`pyro_vae.tasks.encode` and :func:`pyro_vae.tasks.decode`.

    Raises:
        InputError: options out of range, or a latent that can't be moved.
    """
    pair = open_pair(model, guide, x, plate=plate)
    check_counts(num_steps=num_steps, least=2)
    with pair.evaluating(seed):
        walker = _Walker(pair, site, observed)
        moved = walker.choose(range(walker.size) if dimensions is None else dimensions)
        values = walker.quantiles(num_steps, coverage)[list(moved)]
        rows = zip(moved, values, strict=True)
        codes = [[walker.with_coordinate(index, value) for value in row] for index, row in rows]
        data = torch.stack([walker.decode(each) for each in codes])
    return Traversal(moved, values, data)


def manifold(
    model: PairFunction, guide: PairFunction, x: Tensor | Sequence[Tensor], *,
    dimensions: tuple[int, int] = (0, 1), num_steps: int = 16, coverage: float = 0.98,
    site: str | None = None, observed: str | None = None, plate: str = "data", seed: int | None = 0,
) -> Manifold:  # fmt: skip
    """Decode a grid over two latent coordinates; the others stay at the mean code of the data.

    The grid follows the prior's quantiles, evenly spaced in probability. On a sphere it is one of
    longitude and latitude over the two coordinates and the mean direction of the others.

    Args:
        model, guide, num_steps, coverage, site, observed, plate, seed: as in
            :func:`pyro_vae.tasks.traverse`.
        x: data ``(N, ...)`` whose mean code is taken; the first gives conditions and other sites.
        dimensions: the two coordinates of the (flattened) latent, from 0.

    Raises:
        InputError: options out of range, or a latent of fewer than two coordinates.

    Source:
        Kingma, Welling 2014, "Auto-Encoding Variational Bayes", appendix A.
    """
    pair = open_pair(model, guide, x, plate=plate)
    check_counts(num_steps=num_steps, least=2)
    with pair.evaluating(seed):
        walker = _Walker(pair, site, observed)
        chosen = walker.choose(dimensions)
        if len(chosen) != 2 or chosen[0] == chosen[1]:
            raise InputError(f"expected two different dimensions, got {dimensions}")
        right, up = chosen
        walker.stay_at_mean()
        if walker.support == "sphere":
            first, second, codes = walker.globe(right, up, num_steps)
        else:
            values = walker.quantiles(num_steps, coverage)
            first, second = values[right], values[up]
            high = [walker.with_coordinate(up, height) for height in second]
            codes = [walker.with_coordinate(right, v, each) for each in high for v in first]
        data = walker.decode(codes)[:, 0].unflatten(0, (len(second), len(first)))
    return Manifold((right, up), first, second, data, walker.support == "sphere")


class _Walker:
    """The codes of some data points, of which one site's are moved and decoded."""

    def __init__(self, pair: OpenedPair, site: str | None, observed: str | None) -> None:
        self.model, self.observed = pair.alone(pair.model), observed
        codes = mean_codes(pair.alone(pair.guide), _CODE_DRAWS)
        self.site = choose_site(codes, site)
        self.support = codes[self.site].support
        codes[self.site].continuous(self.site)
        self.codes = {name: code.decodable() for name, code in codes.items()}
        self.shape = self.codes[self.site].shape[1:]
        self.flat = self.codes[self.site].reshape(pair.num_data, -1)
        self.size = self.flat.shape[1]

    def choose(self, dimensions: Iterable[int]) -> tuple[int, ...]:
        """Return coordinates as whole numbers; refuse none, and what the latent doesn't have."""
        if isinstance(dimensions, str) or not isinstance(dimensions, Iterable):
            raise InputError(f"expected dimensions as whole numbers, e.g. (0, 1), got {dimensions!r}")
        chosen = tuple(whole_number("each of the dimensions", each) for each in dimensions)
        if not chosen:
            raise InputError("expected at least one of the latent's dimensions, got none")
        if max(chosen) >= self.size:
            raise InputError(
                f"expected dimensions from 0 to {self.size - 1} of latent {self.site!r}, got "
                f"{next(each for each in chosen if each >= self.size)}"
            )
        return chosen

    def stay_at_mean(self) -> None:
        """Go on with one code, the mean over the data, under the first datum's conditions."""
        self.flat = self.flat.mean(0, keepdim=True)
        if self.support == "sphere":
            self.flat = _unit(self.flat, self.axis(0))
        self.codes = {name: value[:1] for name, value in self.codes.items()}
        self.model = self.model.first()

    def axis(self, dimension: int) -> Tensor:
        return torch.eye(self.size).to(self.flat)[dimension]

    def quantiles(self, num_steps: int, coverage: float) -> Tensor:
        """Return the prior's quantiles of each coordinate, ``(size, num_steps)``."""
        if not 0 < real_number("coverage", coverage) < 1:
            raise InputError(f"expected a coverage between 0 and 1, got {coverage}")
        edge = (1 - coverage) / 2
        probabilities = torch.linspace(edge, 1 - edge, num_steps, dtype=torch.float64)
        model = self.model.repeat(math.ceil(_PRIOR_DRAWS / self.model.num_data))
        site = model.trace(explain="model").nodes[self.site]
        check_rows("model", site, model.plate, model.num_data)
        drawn = site["value"].movedim(value_axis(site, model.plate), 0).reshape(model.num_data, -1)
        return drawn.double().quantile(probabilities.to(drawn.device), dim=0).T.to(drawn.dtype)

    def with_coordinate(self, dimension: int, value: Tensor, flat: Tensor | None = None) -> Tensor:
        """Return the codes ``(N, size)`` with one coordinate moved, within the support."""
        moved = (self.flat if flat is None else flat).clone()
        if self.support == "sphere":
            moved[:, dimension] = 0
            others = _unit(moved, self.axis((dimension + 1) % self.size))
            moved = others * (1 - value.square()).clamp(min=0).sqrt()
        moved[:, dimension] = value
        return moved

    def globe(self, first: int, second: int, num_steps: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return longitudes, latitudes and the codes at each pair of them."""
        up = self.flat.clone()
        up[:, [first, second]] = 0
        others = [axis for axis in range(self.size) if axis not in (first, second)]
        # Even in longitude without meeting itself, and in the latitude's sine: in a sphere's area.
        height = (torch.arange(num_steps).to(up) + 0.5) / num_steps * 2 - 1
        longitude = math.pi * height
        if others:
            up = _unit(up, self.axis(others[0]))
        else:
            height = height.new_zeros(1)
        codes = []
        for sine in height:
            for angle in longitude:
                codes.append(up * sine)
                level = (1 - sine.square()).sqrt()
                codes[-1][:, first], codes[-1][:, second] = level * angle.cos(), level * angle.sin()
        return longitude.rad2deg(), height.asin().rad2deg(), codes

    def decode(self, flat: Sequence[Tensor]) -> Tensor:
        """Decode several codes of each datum, ``(len(flat), N, *data_shape)``."""
        tiled = tile_inputs(tuple(self.codes.values()), len(flat))
        latents = dict(zip(self.codes, tiled, strict=True))
        latents[self.site] = torch.cat(list(flat)).reshape(-1, *self.shape)
        return _decode(self.model, len(flat), latents, self.observed)


def _decode(model: OpenedFunction, count: int, latents: Latents, observed: str | None) -> Tensor:
    """Decode ``count`` latents of each data point, ``(count, N, *data_shape)``."""
    data = decode_latents(model.repeat(count), latents, observed)
    return data.unflatten(0, (count, model.num_data))


def _great_circle(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Walk the shorter arc between unit vectors; between opposite ones some half circle."""
    cosine = (start * end).sum(-1, keepdim=True)
    # Any direction at right angles to the start serves where start and end leave none.
    axis = torch.zeros_like(start).scatter(-1, start.abs().argmin(-1, keepdim=True), 1.0)
    axis = axis - (axis * start).sum(-1, keepdim=True) * start
    sideways = _unit(end - cosine * start, axis / axis.norm(dim=-1, keepdim=True))
    angle = torch.atan2((end * sideways).sum(-1, keepdim=True), cosine)
    return (share * angle).cos() * start + (share * angle).sin() * sideways


def _unit(vector: Tensor, fallback: Tensor) -> Tensor:
    """Return the direction of each row, or the fallback's where a row has hardly any length."""
    length = vector.norm(dim=-1, keepdim=True)
    tiny = length < 10 * torch.finfo(vector.dtype).eps
    return torch.where(tiny, fallback, vector / torch.where(tiny, 1.0, length))
