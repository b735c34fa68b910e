"""Pictures of images, heatmaps and references.

`matplotlib` and `torchvision` are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np  # noqa: F401
import torch  # noqa: F401
from PIL import Image  # noqa: F401

from crp.image.figures import get_crop_range, max_norm, plot_grid, vis_img_heatmap, vis_opaque_img
from crp.image.pixels import imgify, overlay, to_data_uri, to_png_bytes

# The last row holds what scripts get from zennit-crp's ``from crp.image import *``.
__all__ = [
    "get_crop_range",
    "imgify",
    "max_norm",
    "overlay",
    "plot_grid",
    "to_data_uri",
    "to_png_bytes",
    "vis_img_heatmap",
    "vis_opaque_img",
    *("Image", "gaussian_blur", "np", "plt", "torch", "zimage"),
]

_LAZY = {
    "gaussian_blur": ("torchvision.transforms.functional", "gaussian_blur"),
    "plt": ("matplotlib.pyplot", None),
    "zimage": ("zennit.image", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
