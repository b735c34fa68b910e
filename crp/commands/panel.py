"""One picture of an explanation: input, heatmap, overlay, and a bar that says what the colours are worth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from crp.image.colours import clipped
from crp.image.forms import add_colour_bar, draw_heatmap, draw_overlay
from crp.visualization.table.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(image: Tensor, heatmap: Tensor, title: str, caption: str, path: Path) -> None:
    """Write the picture, in the forms and colours of `crp.image`.

    Parameters
    ----------
    image : Tensor of shape (channels, height, width)
        In 0..1.
    heatmap : Tensor of shape (height, width)
        Of the image, or coarser.
    title, caption : str
        Above and below.
    path : path
        Its suffix decides the format.
    """
    from matplotlib.figure import Figure

    picture = image.permute(1, 2, 0).squeeze(-1).numpy()
    height, width = image.shape[-2:]
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 3))
    drawn = (picture, draw_heatmap(heatmap, (height, width)), draw_overlay(image, heatmap))
    for one, name, content in zip(axes, ("input", "heatmap", "overlay"), drawn, strict=True):
        one.set_title(name, fontsize=10)
        one.set_axis_off()
        one.imshow(np.asarray(content), cmap="gray", vmin=0, vmax=1)
    add_colour_bar(axes, clipped(heatmap)[1])
    figure.suptitle(title, fontsize=12, parse_math=False)
    figure.supxlabel(caption, fontsize=8, parse_math=False)
    _write_figure(figure, path, dpi=120)


def _write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure, in the format that its suffix says, as a whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=dpi)
    write_atomic(path, content.getvalue())
