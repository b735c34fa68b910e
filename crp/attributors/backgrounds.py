"""What replaces a removed pixel: a blurred image, a constant, or noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from crp.checks import check_number
from crp.concepts.ids import as_numbers
from crp.errors import InputError, InputTypeError
from crp.notices import kind_of

_Named = Literal["blur", "median", "mean", "noise"]
Background: TypeAlias = str | float | Tensor | Callable[[Tensor], Tensor]


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; at the border, the weights of the pixels that exist sum to 1.

    Parameters
    ----------
    images : Tensor of shape (..., height, width)
    sigma : float
        Standard deviation in pixels; 0 changes nothing.

    Returns
    -------
    Tensor of the same shape

    Examples
    --------
    >>> blur(torch.ones(1, 1, 4, 4), 2.0).mean().item()
    1.0
    """
    if sigma == 0:
        return images
    rows, columns = (_gaussian(n, sigma, images) for n in images.shape[-2:])
    with torch.autocast(images.device.type, enabled=False):  # (which would round the image)
        return rows @ images @ columns.T


def median(images: Tensor, width: int = 11) -> Tensor:
    """Median filter over windows of ``width`` x ``width`` pixels; border pixels are repeated outwards.

    Parameters
    ----------
    images : Tensor of shape (batch, channels, height, width)
    width : int
        Odd.

    Returns
    -------
    Tensor of the same shape
    """
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise InputError(f"width must be an odd number of pixels, not {width!r}")
    padded = F.pad(images, [width // 2] * 4, mode="replicate")
    windows = padded.unfold(2, width, 1).unfold(3, width, 1)
    return windows.flatten(4).median(4).values


def _check_background(background: object) -> None:
    """Raise an error that lists what a background can be."""
    if isinstance(background, Tensor) or callable(background):
        return
    if isinstance(background, bool) or not (background in get_args(_Named) or isinstance(background, int | float)):
        raise InputError(
            f"a background must be one of {', '.join(map(repr, get_args(_Named)))}, a number, a tensor, or a function "
            f"of the data; not {background!r}"
        )


def make_background(
    background: Background, data: Tensor, sigma: float = 10.0, generator: torch.Generator | None = None
) -> Tensor:
    """Image to fade into.

    Parameters
    ----------
    background : str, float, Tensor or callable
        ``"blur"``, ``"median"`` (11 x 11 pixels), ``"mean"`` (each channel's average colour), ``"noise"`` (Gaussian,
        with each channel's mean and standard deviation, the same draw for every image), a number, a tensor that
        broadcasts to the data, or a function of the data.
    data : Tensor of shape (batch, channels, height, width)
        Other shapes can be filled with means, numbers, tensors and functions.
    sigma : float
        Of the blur, in pixels.
    generator : torch.Generator, optional
        Of the noise, on the CPU.

    Returns
    -------
    Tensor of the data's shape
    """
    _check_background(background)
    check_number("sigma", sigma, 0)
    if background in ("blur", "median") and isinstance(background, str):
        if data.dim() != 4:
            raise InputError(f"{background!r} needs images of shape (batch, channels, height, width), not {data.shape}")
        return blur(data, sigma) if background == "blur" else median(data)
    if isinstance(background, str):
        axes = tuple(range(2, data.dim())) or (1,)
        mean = data.mean(axes, keepdim=True)
        if background == "mean":
            return mean.expand_as(data)
        deviation = (data - mean).square().mean(axes, keepdim=True).sqrt()
        draw = torch.randn((1, *data.shape[1:]), generator=generator, dtype=data.dtype)
        return mean + deviation * draw.to(data.device)
    filled = background(data) if callable(background) else background
    if not isinstance(filled, Tensor | float | int):
        raise InputTypeError(f"a background must give a tensor or a number, not {kind_of(filled)}")
    filled = torch.from_numpy(as_numbers("the background", filled)).to(data)
    try:
        return filled.expand_as(data)
    except RuntimeError:
        raise InputError(
            f"the background has shape {tuple(filled.shape)}, which does not broadcast to {tuple(data.shape)}"
        ) from None


def _gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    """Matrix of shape (size, size) that blurs one axis; rows sum to 1."""
    position = torch.arange(size, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    weights = torch.where((position[:, None] - position).abs() <= math.ceil(4 * sigma), weights, 0)
    return weights / weights.sum(1, keepdim=True)
