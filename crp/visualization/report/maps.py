"""Heatmaps as one small file for a page's references: side by side, each in a square of the same size.

The file is a palette PNG: a pixel is one of 255 steps of relevance from -1 to 1, and the palette gives it the colours
and the opacity of `crp.image`. Pages lay it over white, over the grey picture, or turn it into a mask. What else was
found out while it was drawn stands in the file, as text, so that neither is there without the other.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from crp.image.colours import blurred, clipped, colours_of, resized
from crp.image.forms import relevant_box
from crp.visualization.table.manifest import Array

_STEPS = 127
_TEXT = "crp"


def square_map(heatmap: Array, size: int) -> Array:
    """Relevance in -1..1 as a square of ``size`` pixels, the shorter side of a heatmap in its middle."""
    small = shrunk(heatmap, size)
    found = np.zeros((size, size))
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    found[top : top + small.shape[0], left : left + small.shape[1]] = clipped(small)[0]
    return found


def shrunk(heatmap: Array, size: int) -> Array:
    """Heatmap whose longer side has ``size`` pixels."""
    largest = max(heatmap.shape)
    height, width = (max(1, round(length * size / largest)) for length in heatmap.shape)
    return resized(heatmap, (height, width))


def crop_of(heatmap: Array) -> tuple[float, float, float]:
    """Square part of the picture that holds most of the relevance: left, top and side, as shares of the longer side."""
    height, width = heatmap.shape
    largest = max(height, width)
    top, bottom, left, right = relevant_box(blurred(heatmap, 0.01))
    side = min(1.0, max(bottom - top, right - left, 0.2 * largest) / largest)
    middle = [
        ((left + right) / 2 + (largest - width) / 2) / largest,
        ((top + bottom) / 2 + (largest - height) / 2) / largest,
    ]
    x, y = (min(max(m - side / 2, 0.0), 1 - side) for m in middle)
    return round(x, 3), round(y, 3), round(side, 3)


def as_steps(square: Array) -> Array:
    """Relevance in -1..1 as pixels of the palette, uint8."""
    return (np.round(square * _STEPS) + _STEPS).astype(np.uint8)


def encode_maps(maps: Sequence[Array], facts: Mapping[str, Any]) -> bytes:
    """Content of the file of some square maps, with facts that JSON can hold."""
    return encode_steps([as_steps(one) for one in maps or [np.zeros((1, 1))]], facts)


def encode_steps(steps: Sequence[Array], facts: Mapping[str, Any]) -> bytes:
    """The same, of pixels."""
    image = Image.fromarray(np.concatenate(steps, axis=1))
    palette = (colours_of(np.arange(-_STEPS, _STEPS + 1) / _STEPS) * 255).round().astype(np.uint8)
    image.putpalette(palette[:, :3].tobytes())
    text = PngInfo()
    text.add_text(_TEXT, json.dumps(facts), zip=True)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=palette[:, 3].tobytes(), pnginfo=text, optimize=False)
    return buffer.getvalue()


def read_facts(path: Path) -> dict[str, Any] | None:
    """Facts in a file of maps; None where there is none that can be read."""
    try:
        with Image.open(path) as image:
            image.load()
            facts = json.loads(image.info[_TEXT])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None
    return facts if isinstance(facts, dict) else None
