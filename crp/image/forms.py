"""Forms in which a picture and its relevance are shown: masked, heatmap, overlay, contour, crop, and the colour bar.

All take a picture (a tensor of shape (channels, height, width) in 0..1, an array or a PIL image) and a heatmap of shape
(height, width), also a coarser one, and give a PIL image of the picture's size.

- *masked*: what does the model see? Only the relevant parts of the picture are there; the clearest form at small sizes.
- *heatmap*: signs and fine structure, on white.
- *overlay*: where on the picture? The picture turns grey and light, relevance has the colours.
- *contour*: the picture with an outline around what is relevant; for several concepts, a colour each.
- *crop*: the part of the picture that holds most of the relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from crp.checks import check_number
from crp.errors import InputError
from crp.flags import check_flags
from crp.image.colours import PERCENTILE, _as_heatmap, as_picture, blurred, clipped, colours_of, resized
from crp.image.pixels import Array, Picture
from crp.kinds import check_kind
from crp.wording import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour of outlines.
YELLOW = (1.0, 0.80, 0.0)
FORMS = ("masked", "heatmap", "overlay", "contour", "crop")


def draw_masked(image: Picture, heatmap: Tensor | Array) -> Image.Image:
    """Picture of which only the relevant parts are left, on near-white."""
    picture = as_picture(image)
    opacity = _positive(heatmap, picture)[..., None] ** 0.55
    return _image(opacity * picture + (1 - opacity) * (0.92 + 0.08 * picture))


def draw_heatmap(heatmap: Tensor | Array, size: tuple[int, int] | None = None) -> Image.Image:
    """Relevance on white; ``size`` is a (height, width) other than the heatmap's."""
    values = _as_heatmap(heatmap)
    if size is not None:
        check_kind("size", size, tuple, "(height, width)")
        for side in size:
            check_number("a side in size", side, 1, whole=True)
    return _image(_on_white(clipped(values if size is None else resized(values, size))[0]))


def draw_overlay(image: Picture, heatmap: Tensor | Array) -> Image.Image:
    """Relevance in colours over the picture, which is grey and light."""
    picture = as_picture(image)
    values = clipped(blurred(_fitted(heatmap, picture), 0.01))[0]
    colour = colours_of(values)[..., :3]
    opacity = 0.85 * np.abs(values)[..., None] ** 0.6
    grey = 0.35 + 0.6 * picture.mean(-1, keepdims=True)
    return _image(opacity * colour + (1 - opacity) * grey)


def draw_contour(
    image: Picture,
    heatmaps: Tensor | Array | Sequence[Tensor | Array],
    colours: Sequence[tuple[float, float, float]] = (YELLOW,),
) -> Image.Image:
    """Picture with an outline around its relevant parts, outside of which it is dimmed.

    Parameters
    ----------
    image : picture
    heatmaps : Tensor or ndarray of shape (height, width), or a sequence of them
        One for each concept.
    colours : sequence of (red, green, blue)
        In 0..1, one for each heatmap, and from the start again where there are fewer.
    """
    picture = as_picture(image)
    check_kind("heatmaps", heatmaps, (Tensor, np.ndarray, Sequence), "a tensor, or a list of them")
    if isinstance(cast(object, colours), str) or not isinstance(colours, Sequence) or not colours:
        raise InputError(f"colours must be a list of (red, green, blue), not {shortened(colours)}")
    several = [heatmaps] if isinstance(heatmaps, Tensor | np.ndarray) and heatmaps.ndim == 2 else heatmaps
    inside = [_positive(cast(Tensor, heatmap), picture) > 0.3 for heatmap in several]
    shown = picture * np.where(np.any(inside, 0), 1.0, 0.55)[..., None]
    width = max(1, round(max(picture.shape) / 112))
    for number, region in enumerate(inside):
        shown[_edge(region, width)] = colours[number % len(colours)]
    return _image(shown)


def draw_crop(image: Picture, heatmap: Tensor | Array, share: float = 0.9) -> Image.Image:
    """Part of the picture that holds a share of the relevance; its colours are those of the whole picture."""
    picture = as_picture(image)
    top, bottom, left, right = relevant_box(_fitted(heatmap, picture), share)
    return _image(picture[top:bottom, left:right])


def relevant_box(heatmap: Tensor | Array, share: float = 0.9, margin: float = 0.04) -> tuple[int, int, int, int]:
    """Rectangle that holds a share of the positive relevance, blurred, with a margin around it.

    Rows and columns are left out from the ends, as long as no more than the rest of the relevance is outside.

    Parameters
    ----------
    heatmap : Tensor or ndarray of shape (height, width)
    share : float
        Above 0, and at most 1.
    margin : float
        Share of the side.

    Returns
    -------
    top, bottom, left, right : int
        For ``image[..., top:bottom, left:right]``; the whole image where nothing is positive.
    """
    check_number("share", share)
    check_number("margin", margin, 0)
    if not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, not {share}")
    values = blurred(np.clip(_as_heatmap(heatmap), 0, None), 0.02)
    total = values.sum()
    height, width = values.shape
    if total <= 0:
        return 0, height, 0, width
    ends: list[int] = []
    for axis in (1, 0):
        along = np.cumsum(values.sum(axis)) / total
        outside = (1 - share) / 4
        first, last = int(np.searchsorted(along, outside)), int(np.searchsorted(along, 1 - outside))
        extra = max(1, round(margin * len(along)))
        ends += [max(0, first - extra), min(len(along), last + 1 + extra)]
    return ends[0], ends[1], ends[2], ends[3]


def draw_form(form: str, image: Picture, heatmap: Tensor | Array) -> Image.Image:
    """Picture and its relevance in one of the forms `FORMS`.

    Parameters
    ----------
    form : str
    image : Tensor of shape (channels, height, width), ndarray of that shape or with the channels last, or PIL Image
        Values within 0..1 are shown as they are, others are brought there by the whole image's range.
    heatmap : Tensor or ndarray of shape (height, width)

    Returns
    -------
    PIL Image

    Raises
    ------
    ValueError
        If there is no such form.
    """
    drawn: dict[str, Callable[[Picture, Tensor | Array], Image.Image]] = {
        "masked": draw_masked,
        "heatmap": lambda image, heatmap: draw_heatmap(heatmap, as_picture(image).shape[:2]),
        "overlay": draw_overlay,
        "contour": draw_contour,
        "crop": draw_crop,
    }
    if not isinstance(form, str) or form not in drawn:
        raise InputError(f"there is no form {form!r}; there are {', '.join(FORMS)}")
    return drawn[form](image, heatmap)


def plot_form(
    image: Picture, heatmap: Tensor | Array, form: str = "overlay", *, ax: Axes | None = None, bar: bool = True
) -> Figure:
    """Figure of a picture in one form, with a bar that says what the colours are worth.

    Parameters
    ----------
    image, heatmap
        As above.
    form : str
        One of `FORMS`.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    bar : bool
        Whether a colour bar is added, in forms that have colours.

    Returns
    -------
    matplotlib Figure
    """
    check_flags(bar=bar)
    drawn = draw_form(form, image, heatmap)
    ax = axes_or_new(ax)
    ax.imshow(np.asarray(drawn))
    ax.set_axis_off()
    if bar and form in ("heatmap", "overlay"):
        add_colour_bar(ax, clipped(heatmap)[1])
    return cast("Figure", ax.figure)


def add_colour_bar(axes: Axes | Sequence[Axes], one: float) -> None:
    """Add a bar to axes that tells the value of the full colour, ``one``, and that what is larger has it, too."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = check_number("one", one) or 1.0
    shown = ScalarMappable(Normalize(-scale, scale), ListedColormap(_on_white(np.linspace(-1, 1, 256))))
    first: Any = axes[0] if isinstance(axes, Sequence) else axes
    drawn = first.figure.colorbar(shown, ax=axes, shrink=0.85, extend="both", ticks=[-scale, 0, scale])
    drawn.ax.set_yticklabels([f"{-scale:+.3g}\nagainst", "0", f"{scale:+.3g}\nfor"], parse_math=False)
    drawn.set_label(f"relevance; beyond the {PERCENTILE:g}th percentile, full colour", fontsize=8)


def axes_or_new(ax: Axes | None, width: float = 4, height: float = 4) -> Axes:
    """The axes; where there are none, those of a new figure, of a size in inches, that pyplot does not know."""
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_kind("ax", ax, (Axes, type(None)), "matplotlib Axes, or None")
    if ax is not None:
        return ax
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _on_white(relevance: Array) -> Array:
    """Colours of relevance in -1..1 on white: of shape (..., 3), in 0..1."""
    colour: Array = colours_of(relevance)
    return colour[..., :3] * colour[..., 3:] + 1 - colour[..., 3:]


def _fitted(heatmap: Tensor | Array, picture: Array) -> Array:
    """Heatmap in the size of a picture."""
    return resized(_as_heatmap(heatmap), (picture.shape[0], picture.shape[1]))


def _positive(heatmap: Tensor | Array, picture: Array) -> Array:
    """Positive relevance, blurred and divided by its 99th percentile, in 0..1."""
    return clipped(blurred(np.clip(_fitted(heatmap, picture), 0, None), 0.02), 99.0)[0]


def _edge(region: Array, width: int) -> Array:
    """Pixels of a region within ``width`` of its outside."""
    inner = region
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Array = region & ~inner
    return edge


def _image(values: Array) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))
