"""The one colour scheme, on pages, in figures and on the command line: red is for, blue against, 0 has no colour.

Colours and strengths were chosen side by side on photographs at 224 pixels; red and blue of this lightness stay apart
for colour-blind readers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from crp.errors import InputError
from crp.image.pixels import Array
from crp.image.reading import _check_shown, _in_eight_bits, as_shown

#: Colours of relevance for and against, in 0..1.
FOR = (0.80, 0.09, 0.11)
AGAINST = (0.13, 0.35, 0.75)
#: Relevance beyond this percentile of its absolute values has the full colour.
PERCENTILE = 99.5
#: Opacity is the absolute relevance to this power, so that small relevance can be seen.
POWER = 0.7


def clipped(heatmap: Tensor | Array, percentile: float = PERCENTILE) -> tuple[NDArray[Any], float]:
    """Relevance divided by a percentile of its absolute values and clipped to -1..1, and the value that became 1.

    Parameters
    ----------
    heatmap : Tensor or ndarray
    percentile : float
        In 0..100.

    Returns
    -------
    relevance : array of the same shape, float64
    one : float
        What 1 stands for; where the percentile is 0, the largest absolute value, and 0 for a heatmap of zeros.

    Raises
    ------
    ValueError
        If a value is not finite.
    """
    values = _as_array(heatmap)
    strength = np.abs(values)
    one = float(np.percentile(strength, percentile) or strength.max(initial=0.0))
    return (np.clip(values / one, -1, 1) if one else values), one


def colours_of(relevance: Array) -> NDArray[Any]:
    """Colours with opacity of relevance in -1..1: of shape (..., 4), in 0..1."""
    colour = np.where(relevance[..., None] >= 0, FOR, AGAINST)
    return np.concatenate([colour, np.abs(relevance)[..., None] ** POWER], -1)


def _as_heatmap(values: Tensor | Array) -> NDArray[Any]:
    """Heatmap as an array of float64, of shape (height, width); an error for anything else."""
    array = _as_array(values)
    if array.ndim != 2:
        raise InputError(f"a heatmap has the shape (height, width), not {array.shape}")
    return array


def _as_array(values: Tensor | Array, what: str = "the heatmap") -> NDArray[Any]:
    """Tensor or array as an array of float64; what has no colour is refused by its name."""
    _check_shown(values if isinstance(values, Tensor) else np.asarray(values), what)
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, np.float64)


def as_picture(image: Tensor | Array | Image.Image) -> NDArray[Any]:
    """Picture as an array of shape (height, width, 3) in 0..1.

    Parameters
    ----------
    image : Tensor or ndarray of shape (channels, height, width), or with 1 or 3 channels last, or PIL image
        Three channels are colours; the mean of others is grey. Values within 0..1 are shown as they are, others are
        brought there by the whole image's range.
    """
    if isinstance(image, Image.Image):
        return np.asarray(_in_eight_bits(image).convert("RGB"), np.float64) / 255
    values = _as_array(image, "the picture")
    if getattr(image, "dtype", None) in (torch.uint8, np.dtype(np.uint8)):
        values = values / 255
    if values.ndim != 3:
        raise InputError(f"a picture has the shape (channels, height, width), not {values.shape}")
    if values.shape[-1] in (1, 3) and len(values) not in (1, 3):
        values = np.moveaxis(values, -1, 0)
    if len(values) != 3:
        values = np.repeat(values.mean(0, keepdims=True), 3, 0)
    return np.moveaxis(as_shown(values), 0, -1)


def resized(values: Array, size: tuple[int, int]) -> NDArray[Any]:
    """Map of another (height, width): interpolated where larger, averaged where smaller."""
    if values.shape == size:
        return np.asarray(values, np.float64)
    data = torch.from_numpy(np.array(values, np.float64))[None, None]
    found = F.interpolate(data, size, mode="bilinear", antialias=True)
    result: NDArray[Any] = found[0, 0].numpy()
    return result


def blurred(values: Array, share: float) -> NDArray[Any]:
    """Map smoothed by a Gaussian whose standard deviation is a share of the longer side.

    Where that is less than a pixel, hardly anything is smoothed: pixels of a map so small are seen one by one.
    """
    sigma = share * max(values.shape)
    reach = min(int(3 * sigma + 0.5), min(values.shape) - 1)
    height, width = values.shape
    # (a Gaussian is a product of one along each axis, which takes less time than a window of both)
    result: NDArray[Any] = (
        _smoothing(height, sigma, reach) @ values.astype(np.float64) @ _smoothing(width, sigma, reach).T
    )
    return result


@lru_cache(8)
def _smoothing(n: int, sigma: float, reach: int) -> Array:
    """Matrix of shape (n, n) that smooths n values by a Gaussian of ``2 * reach + 1`` weights; ends reflect."""
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    rows = np.repeat(np.arange(n), len(offsets))
    columns = np.abs(rows + np.tile(offsets, n))
    columns = np.where(columns >= n, 2 * (n - 1) - columns, columns)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (rows, columns), np.tile(weights / weights.sum(), n))
    return matrix
