"""Pictures inside a page: samples and heatmaps as PNG in ``data:`` addresses."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

POSITIVE = np.array([1.0, 0.36, 0.12])
NEGATIVE = np.array([0.20, 0.55, 1.0])
#: Brightness that the sample keeps below its heatmap.
DIM = 0.4
#: Small relevance is shown stronger than it is, to be seen at all.
GAMMA = 0.6


def sample_picture(sample: Tensor, size: int) -> str:
    """Picture of a sample.

    Parameters
    ----------
    sample : Tensor of shape (channels, height, width)
        Three channels are a colour image, others are averaged. Values outside of 0..1 are brought into this range.
    size : int
        Number of pixels on a side, at most; larger pictures are reduced.

    Returns
    -------
    str
        ``data:`` address of a PNG.
    """
    colour = _colour(sample)
    if colour.shape[-1] == 3 and np.ptp(colour, axis=-1).max() == 0:
        colour = colour[..., 0]
    return _address(colour, size)


def heatmap_picture(heatmap: Tensor, sample: Tensor, size: int) -> str:
    """Picture of a heatmap over the dimmed sample: positive relevance is orange, negative blue, the largest strongest.

    Parameters
    ----------
    heatmap : Tensor of shape (height, width)
    sample : Tensor of shape (channels, height, width)
    size : int
        As in `sample_picture`.

    Returns
    -------
    str
        ``data:`` address of a PNG.
    """
    relevance = heatmap.detach().cpu().double().numpy()
    largest = np.abs(relevance).max() or 1.0
    strength = (np.abs(relevance) / largest)[..., None] ** GAMMA
    grey = _colour(sample).mean(-1, keepdims=True) * DIM
    colour = np.where(relevance[..., None] >= 0, POSITIVE, NEGATIVE)
    return _address(grey * (1 - strength) + colour * strength, size)


def _colour(sample: Tensor) -> np.ndarray:
    """Sample as an array of shape (height, width, 3) in 0..1."""
    image = sample.detach().cpu().double()
    if len(image) != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    return image.permute(1, 2, 0).numpy()


def _address(values: np.ndarray, size: int) -> str:
    picture = Image.fromarray((values * 255).round().astype(np.uint8))
    if max(picture.size) > size:
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
