"""Crops, heatmaps and grids of references.

`matplotlib` and `torchvision` are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from zennit.cmap import ColorMap

from crp.checks import check_number
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags
from crp.image.pixels import Picture, imgify
from crp.image.reading import _check_shown, as_shown
from crp.kinds import check_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images: TypeAlias = Tensor | Sequence[Tensor]


def abs_norm(rel: Tensor, stabilize: float = 1e-10) -> Tensor:
    """Divide by the sum of the absolute values; zeros stay zeros, in every dtype.

    Parameters
    ----------
    rel : Tensor
    stabilize : float
        Added to the sum.

    Returns
    -------
    Tensor of the same shape

    Examples
    --------
    >>> abs_norm(torch.tensor([3.0, -1.0]))
    tensor([ 0.7500, -0.2500])
    """
    check_kind("rel", rel, Tensor, "a tensor")
    check_number("stabilize", stabilize)
    return rel / (rel.abs().sum() + max(stabilize, torch.finfo(rel.dtype).tiny))


def max_norm(rel: Tensor, stabilize: float = 1e-10) -> Tensor:
    """Divide by the largest value; by the largest absolute value where none is positive, so that no sign ever changes.

    Parameters
    ----------
    rel : Tensor
    stabilize : float
        Added to the divisor.

    Returns
    -------
    Tensor of the same shape

    Examples
    --------
    >>> max_norm(torch.tensor([2.0, -1.0]))
    tensor([ 1.0000, -0.5000])
    >>> max_norm(torch.tensor([-4.0, -1.0]))
    tensor([-1.0000, -0.2500])
    """
    check_kind("rel", rel, Tensor, "a tensor")
    check_number("stabilize", stabilize)
    largest = rel.max()
    scale = torch.where(largest > 0, largest, rel.abs().max())
    return rel / (scale + max(stabilize, torch.finfo(rel.dtype).tiny))


def get_crop_range(heatmap: Tensor, crop_th: float) -> tuple[int, int, int, int]:
    """Smallest rectangle that holds all pixels above a threshold.

    Parameters
    ----------
    heatmap : Tensor of shape (height, width)
    crop_th : float
        Pixels greater than this count.

    Returns
    -------
    row1, row2, column1, column2 : int
        For ``image[..., row1:row2, column1:column2]``: ends are exclusive. The whole image if no pixel counts.
    """
    check_kind("heatmap", heatmap, Tensor, "a tensor")
    check_number("crop_th", crop_th)
    if heatmap.dim() != 2:
        raise InputError(f"heatmap must have shape (height, width), got {tuple(heatmap.shape)}")
    rows, columns = torch.where(heatmap > crop_th)
    if len(rows) == 0:
        return 0, heatmap.shape[0], 0, heatmap.shape[1]
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


@torch.no_grad()
def vis_opaque_img(
    data_batch: Images,
    heatmaps: Images,
    rf: bool = False,
    alpha: float = 0.3,
    vis_th: float = 0.2,
    crop_th: float = 0.1,
    kernel_size: int = 19,
) -> list[Image.Image]:
    """Draw images whose less relevant regions are darkened.

    The heatmap is blurred and divided by its maximum before it is compared with the thresholds.

    Parameters
    ----------
    data_batch : Tensor of shape (n, channels, height, width)
        Images with 1 or 3 channels, before `FeatureVisualization.preprocess_data`. Values in 0..1, and ``uint8``, are
        shown as they are, those of other images by the range of the whole image.
    heatmaps : Tensor of shape (n, height, width)
    rf : bool
        Whether to crop the image to where the heatmap is above `crop_th`.
    alpha : float
        Brightness of the less relevant regions, between 0 and 1.
    vis_th, crop_th : float
        Thresholds for brightness and cropping, in [0, 1).
    kernel_size : int
        Odd width of the blur in pixels; smaller on images that are smaller than it.

    Returns
    -------
    list of PIL images
        Of different sizes where cropped.
    """
    check_flags(rf=rf)
    check_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise InputError(f"'alpha' must be between [0, 1], got {alpha}")
    _check_threshold("vis_th", vis_th)
    _check_threshold("crop_th", crop_th)
    pictures = []
    for image, heatmap in _pairs(data_batch, heatmaps):
        image, smooth = as_shown(image), _smooth(heatmap, kernel_size)
        dimmed = torch.where(smooth > vis_th, image, image * alpha)
        if rf:
            row1, row2, column1, column2 = get_crop_range(smooth, crop_th)
            dimmed = dimmed[..., row1:row2, column1:column2]
        pictures.append(_whole_range(dimmed))
    return pictures


@torch.no_grad()
def vis_img_heatmap(
    data_batch: Images,
    heatmaps: Images,
    rf: bool = False,
    crop_th: float = 0.1,
    kernel_size: int = 19,
    cmap: str | ColorMap = "bwr",
    vmin: float | None = None,
    vmax: float | None = None,
    symmetric: bool = True,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Draw images and their heatmaps.

    Parameters
    ----------
    data_batch : Tensor of shape (n, channels, height, width)
        Images with 1 or 3 channels, before `FeatureVisualization.preprocess_data`. Values in 0..1, and ``uint8``, are
        shown as they are, those of other images by the range of the whole image.
    heatmaps : Tensor of shape (n, height, width)
    rf : bool
        Whether to crop both to where the blurred heatmap is above `crop_th` of its maximum.
    crop_th : float
        In [0, 1).
    kernel_size : int
        Odd width of the blur in pixels; smaller on images that are smaller than it.
    cmap, vmin, vmax, symmetric
        How the heatmaps are drawn, see `imgify`.

    Returns
    -------
    images, heatmaps : list of PIL images
    """
    check_flags(rf=rf, symmetric=symmetric)
    _check_threshold("crop_th", crop_th)
    images, heats = [], []
    for image, heatmap in _pairs(data_batch, heatmaps):
        image = as_shown(image)
        if rf:
            row1, row2, column1, column2 = get_crop_range(_smooth(heatmap, kernel_size), crop_th)
            image, heatmap = image[..., row1:row2, column1:column2], heatmap[row1:row2, column1:column2]
        images.append(_whole_range(image))
        heats.append(imgify(heatmap, cmap=cmap, vmin=vmin, vmax=vmax, symmetric=symmetric))
    return images, heats


def plot_grid(
    ref_c: Mapping[Any, Any],
    cmap_dim: int | None = 1,
    cmap: str | ColorMap = "bwr",
    vmin: float | None = None,
    vmax: float | None = None,
    symmetric: bool = True,
    resize: int | None = None,
    padding: bool = True,
    figsize: tuple[float, float] | None = (6, 6),
) -> Figure:
    """Plot references as `FeatureVisualization.get_max_reference` returns them: a row of pictures for each concept.

    Parameters
    ----------
    ref_c : dict of concept id to pictures
        A value is a sequence of tensors, arrays or PIL images, or a tuple of such sequences, drawn below each other.
    cmap_dim : int, optional
        Which sequence of a tuple is drawn as heatmaps, with `cmap`, `vmin`, `vmax` and `symmetric`; None for none of
        them. Has no effect on PIL images.
    cmap, vmin, vmax, symmetric, resize, padding
        See `imgify`.
    figsize : (width, height), optional
        In inches.

    Returns
    -------
    matplotlib Figure
        pyplot's current one; shown only in an interactive session with a window or a notebook.
    """
    check_flags(symmetric=symmetric, padding=padding)
    if not (cmap_dim is None or (type(cmap_dim) is int and cmap_dim >= 0)):
        raise InputError(f"'cmap_dim' must be 0, 1 or None, got {cmap_dim!r}")
    check_kind("'ref_c'", ref_c, Mapping, "a dict of pictures, such as {17: pictures}")
    if not ref_c:
        raise InputError("'ref_c' is empty: there is nothing to plot")
    heatmap = {"cmap": cmap, "vmin": vmin, "vmax": vmax, "symmetric": symmetric}
    rows: dict[Any, list[list[Image.Image]]] = {}
    for key, value in ref_c.items():
        rows[key] = []
        for number, pictures in enumerate(_sequences(key, value)):
            colours = [heatmap if number == cmap_dim else _plain(picture) for picture in pictures]
            drawn = [imgify(p, resize=resize, padding=padding, **c) for p, c in zip(pictures, colours, strict=True)]
            rows[key].append(drawn)

    figure = _new_figure(figsize)
    outer = figure.add_gridspec(len(rows), 1, left=0.06, right=0.99, bottom=0.01, top=0.99, hspace=0.1)
    for row, (key, sequences) in enumerate(rows.items()):
        columns = max(1, *map(len, sequences))
        inner = outer[row].subgridspec(len(sequences), columns, wspace=0.05, hspace=0.05)
        for number, sequence in enumerate(sequences):
            for column, picture in enumerate(sequence):
                axes = figure.add_subplot(inner[number, column])
                axes.set_xticks([])
                axes.set_yticks([])
                axes.imshow(picture)
                if number == column == 0:
                    axes.set_ylabel(str(key), parse_math=False)
    if hasattr(sys, "ps1") and getattr(figure.canvas, "required_interactive_framework", None):
        figure.show()
    return figure


def _sequences(key: object, value: Any) -> tuple[Sequence[Picture], ...]:
    """Rows of pictures of one concept."""
    parts = value if isinstance(value, tuple) and value and _is_row(value[0]) else (value,)
    for part in parts:
        if not _is_row(part):
            raise InputError(
                f"'ref_c'[{key!r}] must be a sequence of torch.Tensor, np.ndarray or PIL images, or a tuple of such "
                f"sequences, got {type(part).__name__}"
            )
    return tuple(parts)


def _is_row(value: object) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 2
    return isinstance(value, Sequence) and not isinstance(value, str)


def _plain(picture: Picture) -> dict[str, Any]:
    """Pictures with one channel are grey; an array without channels is taken for a heatmap."""
    return {"cmap": "gray"} if getattr(picture, "ndim", 0) == 3 else {}


def _new_figure(figsize: tuple[float, float] | None) -> Figure:
    """Figure that a notebook shows once; it is pyplot's current one, as scripts save it."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=figsize)
    vars(figure)["_ipython_display_"] = partial(_display, figure)
    return figure


def _display(figure: Figure) -> None:
    """Show the figure in a notebook, which then need not do so at the end of the cell."""
    import matplotlib.pyplot as plt

    notebook = importlib.import_module("IPython.display")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    notebook.display(notebook.Image(buffer.getvalue()))
    plt.close(figure)


def _whole_range(image: Tensor) -> Image.Image:
    """Picture of an image, or of a part of one, whose colours go from 0 to 1."""
    eight_bits = image.detach().cpu().double().mul(255).round().to(torch.uint8)
    return imgify(eight_bits, cmap="gray")


def _check_threshold(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < 1:
        raise InputError(f"'{name}' must be between [0, 1), got {value}")


def _pairs(data_batch: Images, heatmaps: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Images with their heatmaps, one by one."""
    for name, several in (("data_batch", data_batch), ("heatmaps", heatmaps)):
        check_kind(name, several, (Tensor, np.ndarray, Sequence), "a tensor, or a list of tensors")
    if len(data_batch) != len(heatmaps):
        raise InputError(
            f"there must be one heatmap for each image, got {len(data_batch)} images, {len(heatmaps)} heatmaps"
        )
    for image, heatmap in zip(data_batch, heatmaps, strict=True):
        if not isinstance(image, Tensor) or not isinstance(heatmap, Tensor):
            kinds = f"{type(image).__name__} and {type(heatmap).__name__}"
            raise InputTypeError(f"an image and its heatmap must be tensors, not {kinds}")
        _check_shown(heatmap, "the heatmap")
        if image.dim() != 3 or image.shape[1:] != heatmap.shape:
            raise InputError(
                "an image must have shape (channels, height, width) and its heatmap (height, width), "
                f"got {tuple(image.shape)} and {tuple(heatmap.shape)}"
            )
        yield image, heatmap


def _smooth(heatmap: Tensor, kernel_size: int) -> Tensor:
    """Blurred heatmap whose maximum is 1; the blur reaches no further than the image."""
    from torchvision.transforms.functional import gaussian_blur

    check_number("kernel_size", kernel_size, 1, whole=True)
    if kernel_size % 2 == 0:
        raise InputError(f"'kernel_size' must be odd, got {kernel_size}")
    width = min(kernel_size, 2 * min(heatmap.shape) - 1)
    values = heatmap if heatmap.dtype in (torch.float32, torch.float64) else heatmap.float()
    return max_norm(gaussian_blur(values[None], kernel_size=[width, width])[0])
