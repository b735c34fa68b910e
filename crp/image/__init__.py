"""Pictures of images, heatmaps and references.

`matplotlib` and `torchvision` are imported by the functions that need them.
"""

from __future__ import annotations

import pkgutil
from typing import Any, Dict, Iterable, List, Tuple, Union  # noqa: F401, UP035

import numpy as np  # noqa: F401
import torch  # noqa: F401
from PIL import Image  # noqa: F401

from crp.image.colours import AGAINST, FOR
from crp.image.figures import get_crop_range, max_norm, plot_grid, vis_img_heatmap, vis_opaque_img
from crp.image.forms import (
    FORMS,
    add_colour_bar,
    draw_contour,
    draw_crop,
    draw_form,
    draw_heatmap,
    draw_masked,
    draw_overlay,
    plot_form,
    relevant_box,
)
from crp.image.graphs import PictureNode, plot_graph
from crp.image.pixels import imgify, overlay, to_data_uri, to_png_bytes
from crp.image.reading import as_viewed
from crp.image.texts import TextHeatmap, plot_texts, text_html

# The last two rows hold what scripts get from zennit-crp's ``from crp.image import *``.
__all__ = [
    "AGAINST",
    "FOR",
    "FORMS",
    "PictureNode",
    "TextHeatmap",
    "add_colour_bar",
    "as_viewed",
    "draw_contour",
    "draw_crop",
    "draw_form",
    "draw_heatmap",
    "draw_masked",
    "draw_overlay",
    "get_crop_range",
    "imgify",
    "max_norm",
    "overlay",
    "plot_form",
    "plot_graph",
    "plot_grid",
    "plot_texts",
    "relevant_box",
    "text_html",
    "to_data_uri",
    "to_png_bytes",
    "vis_img_heatmap",
    "vis_opaque_img",
    *("Any", "Dict", "Image", "Iterable", "List", "Tuple", "Union", "gaussian_blur", "gridspec", "np", "plt", "torch"),
    "zimage",
]

_LAZY = {
    "gaussian_blur": "torchvision.transforms.functional:gaussian_blur",
    "gridspec": "matplotlib.gridspec",
    "plt": "matplotlib.pyplot",
    "zimage": "zennit.image",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_LAZY[name])
