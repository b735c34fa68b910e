"""Arrays turned into pictures.

Pictures are RGB, or RGBA where they are padded: colours are looked up here, because palette images made from arrays
cannot be read in every version of Pillow.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import zennit.image as zimage
from PIL import Image
from torch import Tensor
from zennit.cmap import ColorMap

from crp.checks import check_number
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags
from crp.image.reading import _check_shown, _in_eight_bits
from crp.values import check_form
from crp.wording import counted, shortened

Array: TypeAlias = np.ndarray[Any, Any]
Picture: TypeAlias = Image.Image | Tensor | Array
Bound: TypeAlias = float | Array | None
#: Modes of Pillow that files and pages show as they are.
_PLAIN = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})


def imgify(
    image: Picture,
    cmap: str | ColorMap = "bwr",
    vmin: Bound = None,
    vmax: Bound = None,
    symmetric: bool = False,
    level: float = 1.0,
    grid: bool | tuple[int, int] = False,
    gridfill: Any = None,
    resize: int | None = None,
    padding: bool = False,
) -> Image.Image:
    """Turn an array into a picture.

    Parameters
    ----------
    image : Tensor, ndarray or PIL image
        Of shape (height, width), or with 1 or 3 channels on the first or last axis; where both would do, channels are
        the first axis of a tensor and the last one of an array. ``uint8`` is shown as it is, everything else is brought
        to the range of the colours. A PIL image is only resized and padded.
    cmap : str or ColorMap
        Colours of arrays with one channel: a name of `zennit.image.CMAPS`, or the source of a colour map.
    vmin, vmax : float, optional
        Values of the first and last colour instead of the array's least and greatest; one is for both if symmetric.
    symmetric : bool
        Whether the range goes from minus to plus the greatest absolute value, so that 0 has the middle colour.
    level : float
        Contrast of the colour map.
    grid : bool or (rows, columns)
        Whether the first axis counts images, each with its own range, to be laid out in a grid, which has a place for
        each.
    gridfill : number, optional
        Value of the places that are left over.
    resize : int, optional
        Length in pixels to which the longer side is brought.
    padding : bool
        Whether to add transparent borders that make the picture a square.

    Returns
    -------
    PIL image
        In mode RGB, or RGBA if padded.
    """
    check_flags(symmetric=symmetric, padding=padding, grid=isinstance(grid, tuple | list) or grid)
    check_number("level", level)
    if isinstance(image, Image.Image):
        picture = image if image.mode in _PLAIN else _in_eight_bits(image)
    elif isinstance(image, Tensor | np.ndarray):
        picture = Image.fromarray(_colours(image, cmap, vmin, vmax, symmetric, level, grid, gridfill))
    else:
        raise InputTypeError(f"image must be a PIL.Image, torch.Tensor or np.ndarray, got {type(image).__name__}")
    if resize is not None:
        check_number("resize", resize, 1, whole=True)
        width, height = (max(1, side * resize // max(picture.size)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    if padding:
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return picture


def overlay(
    image: Picture,
    heatmap: Tensor | Array,
    cmap: str | ColorMap = "bwr",
    alpha: float = 0.8,
    vmin: float | None = None,
    vmax: float | None = None,
    resize: int | None = None,
) -> Image.Image:
    """Lay a heatmap over the grey picture of an image: the greater a relevance, the less of the image is seen.

    Parameters
    ----------
    image : Tensor of shape (channels, height, width), ndarray or PIL image
        Values in 0..1 are shown as they are, those of other images by their range.
    heatmap : Tensor or ndarray of shape (height, width)
    cmap, vmin, vmax
        See `imgify`; the range is symmetric.
    alpha : float
        How much the heatmap covers where it is greatest, between 0 and 1.
    resize : int, optional
        Length in pixels to which the longer side is brought.

    Returns
    -------
    PIL image
        In mode RGB.
    """
    check_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise InputError(f"'alpha' must be between [0, 1], got {alpha}")
    within = isinstance(image, Tensor | np.ndarray) and bool(image.min() >= 0 and image.max() <= 1)
    low, high = (0.0, 1.0) if within else (None, None)
    drawn = _in_eight_bits(image) if isinstance(image, Image.Image) else imgify(image, "gray", low, high)
    below = drawn.convert("L").convert("RGB")
    above = imgify(heatmap, cmap=cmap, vmin=vmin, vmax=vmax, symmetric=True)
    if below.size != above.size:
        raise InputError(f"image and heatmap must have one size, got {below.size} and {above.size} (width, height)")
    strength = np.abs(_array(heatmap))
    greatest = max((abs(float(bound)) for bound in (vmin, vmax) if bound is not None), default=0.0)
    weight = alpha * np.clip(strength / (greatest or strength.max() or 1.0), 0, 1)
    mask = Image.fromarray((weight * 255).round().astype(np.uint8))
    return imgify(Image.composite(above, below, mask), resize=resize)


def to_png_bytes(image: Picture) -> bytes:
    """Content of a PNG file of the picture; arrays are drawn by `imgify` first."""
    buffer = io.BytesIO()
    imgify(image).save(buffer, format="PNG")
    return buffer.getvalue()


def to_data_uri(image: Picture) -> str:
    """Address that holds the picture itself, for ``<img src="...">``."""
    return "data:image/png;base64," + base64.b64encode(to_png_bytes(image)).decode("ascii")


def _array(image: Tensor | Array) -> Array:
    """Array that numpy can calculate with."""
    if not isinstance(image, Tensor):
        return image
    check_form(image, "the image")
    image = image.detach().cpu().resolve_conj().resolve_neg()
    return (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).numpy()


def _channels_last(image: Tensor | Array, grid: bool) -> Array:
    """Array of shape ([n,] height, width, 1 or 3)."""
    array = _array(image)
    _check_shown(array, "image")
    axes = array.ndim - int(grid)
    shape = array.shape[int(grid) :]
    if axes == 2:
        return array[..., None]
    if axes == 3:
        first, last = shape[0] in (1, 3), shape[2] in (1, 3)
        if first and (isinstance(image, Tensor) or not last):
            return np.moveaxis(array, -3, -1)
        if last:
            return array
    expected = "(height, width), or (channels, height, width) with 1 or 3 channels on the first or last axis"
    several = ", after the axis of the grid" if grid else ", or grid=True for several images"
    raise InputError(f"image must have shape {expected}{several}; got {array.shape}")


def _colours(
    image: Tensor | Array,
    cmap: str | ColorMap,
    vmin: Bound,
    vmax: Bound,
    symmetric: bool,
    level: float,
    grid: bool | tuple[int, int],
    gridfill: Any,
) -> Array:
    """Bytes of shape (height, width, 3)."""
    array = _channels_last(image, bool(grid))
    if array.dtype != np.uint8:
        array = _to_bytes(array, vmin, vmax, symmetric, tuple(range(1 if grid else 0, array.ndim)))
    if grid:
        _check_grid(grid, len(array))
        array = zimage.gridify(array, shape=None if isinstance(grid, bool) else grid, fill_value=gridfill)
    if array.shape[-1] == 1:
        try:
            array = zimage.palette(cmap, level)[array[..., 0]]
        except (RuntimeError, TypeError):  # (a word that is no name is read as the source of a colour map)
            raise InputError(f"cmap must be one of {', '.join(sorted(zimage.CMAPS))}, not {cmap!r}") from None
    return np.ascontiguousarray(array)


def _check_grid(grid: bool | Sequence[int], n_images: int) -> None:
    """Raise an `InputError` if a grid is not of rows and columns, or has fewer places than there are images."""
    if isinstance(grid, bool):
        return
    if len(grid) != 2:
        raise InputError(f"grid must be (rows, columns), not {grid!r}")
    for name, number in zip(("rows", "columns"), grid, strict=True):
        check_number(f"the number of {name} in grid", number, 1, whole=True)
    if math.prod(grid) < n_images:
        raise InputError(f"grid {tuple(grid)} has {counted(math.prod(grid), 'place')} for {n_images} images")


def _to_bytes(array: Array, vmin: Bound, vmax: Bound, symmetric: bool, axes: tuple[int, ...]) -> Array:
    """Map [vmin, vmax] to 0...255; where the range is a single value, to the middle if symmetric, else to 0."""
    for name, bound in (("vmin", vmin), ("vmax", vmax)):
        given = np.asarray(0 if bound is None else bound)
        if given.dtype.kind not in "uif" or not (given.size and np.isfinite(given).all()):
            raise InputError(f"{name} must be a finite number, not {shortened(bound)}")
    array = array.astype(np.float64)
    least, greatest = zimage.interval_norm_bounds(array, symmetric=symmetric, dim=axes)
    low, high = (least if vmin is None else np.asarray(vmin)), (greatest if vmax is None else np.asarray(vmax))
    if symmetric and (vmin is None) != (vmax is None):
        high = np.abs(low if vmax is None else high)
        low = -high
    flat = low == high
    share = np.where(flat, 0.5 * symmetric, (array - low) / np.where(flat, 1, high - low))
    result: Array = (share * 255).clip(0, 255).astype(np.uint8)
    return result
