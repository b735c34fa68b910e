"""One picture of an explanation: input, heatmap, overlay, and a bar that says what the colours are worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(image: Tensor, heatmap: Tensor, title: str, caption: str, path: Path) -> None:
    """Write the picture; the middle of the colours is 0.

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = image.permute(1, 2, 0).squeeze(-1).numpy()
    grey = image.mean(0).numpy()
    values = heatmap.detach().cpu().double()
    largest = float(values.abs().max()) or 1.0
    height, width = grey.shape
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)
    colours: dict[str, Any] = {"cmap": "bwr", "vmin": -largest, "vmax": largest, "extent": frame}

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(1, 3))
    for one, name in zip(axes, ("input", "heatmap", "overlay"), strict=True):
        one.set_title(name, fontsize=10)
        one.set_axis_off()
    axes[0].imshow(shown, cmap="gray", vmin=0, vmax=1)
    drawn = axes[1].imshow(values.numpy(), **colours)
    axes[2].imshow(grey, cmap="gray", vmin=0, vmax=1)
    strength = torch.nn.functional.interpolate((values.abs() / largest)[None, None], (height, width), mode="nearest")
    large = torch.nn.functional.interpolate(values[None, None], (height, width), mode="nearest")[0, 0]
    axes[2].imshow(large.numpy(), alpha=np.sqrt(strength[0, 0].numpy()) * 0.85, **colours)
    figure.colorbar(drawn, ax=axes, shrink=0.85, label="relevance")
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=120)
