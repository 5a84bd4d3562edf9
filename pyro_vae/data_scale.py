"""The scale of data: their moments block by block, a unit for each value, and what to say of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of a block: data that are mapped from a file pass through memory a block at a time.
_BLOCK = 1 << 22
# A deviation below this share of the mean is rounding: float32 has seven digits.
_ROUNDING = 1e-6
# Means and deviations beyond which networks that expect numbers near 1 start far from the data.
_LARGE, _SMALL = 10.0, 0.01


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each value of a datum over the data, NaN left out.

    Of data ``(N, *data_shape)`` both are ``data_shape`` in float64; 0 where every value is missing.
    """
    blocks = x.split(max(1, _BLOCK // max(1, x[0].numel())))
    count = sum((~block.isnan()).sum(0) for block in blocks).clamp(min=1)
    mean = sum(block.double().nansum(0) for block in blocks) / count
    squares = sum((block.double() - mean).square().nansum(0) for block in blocks)
    return mean, (squares / count).sqrt()


def without_missing(x: Tensor) -> Iterator[Tensor]:
    """Yield whole data as they are; others block by block, with an observed value in place of NaN."""
    if not x.amin().isnan():
        yield x
        return
    blocks = x.split(max(1, _BLOCK // max(1, x[0].numel())))
    medians = (block.nanmedian() for block in blocks)
    observed = next((median for median in medians if not median.isnan()), x.new_tensor(torch.nan))
    for block in blocks:
        yield torch.where(block.isnan(), observed, block)


def location_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what to subtract from data and then to divide them by, both ``data_shape``.

    The scale is one for all values of images and sequences, and each column's own in a table,
    ``(N, columns)``; of a column that does not vary it is 1.
    """
    mean, deviation = moments(x)
    varies = deviation > _ROUNDING * mean.abs()
    if x.ndim > 2:
        deviation = deviation.square().mean().sqrt().expand_as(mean)
        varies = varies.any()
    return mean, torch.where(varies, deviation, torch.ones_like(mean))


def describe_scale(x: Tensor) -> str | None:
    """Describe the range of numbers far from 1, and what to do; None where they are near it."""
    x = x.detach().masked_fill(~x.isfinite(), torch.nan)
    mean, deviation = moments(x)
    if not torch.maximum(mean.abs(), deviation).max() > _LARGE and not deviation.max() < _SMALL:
        return None
    low, high = x.nan_to_num(nan=torch.inf).min(), x.nan_to_num(nan=-torch.inf).max()
    return (
        f"the data run from {low:.3g} to {high:.3g}, with deviations from {deviation.min():.2g} to "
        f"{deviation.max():.2g}: standardise them (standardize of VAE, VAETransformer and "
        "the command line, or (x - mean) / deviation)"
    )
