"""The attribution graph as a figure: from a class on the left to the concepts of lower layers on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from crp.checks import check_number
from crp.errors import NameNotFoundError
from crp.image.colours import AGAINST, FOR
from crp.image.forms import axes_or_new
from crp.image.pixels import Picture, imgify
from crp.kinds import check_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PictureNode(NamedTuple):
    """A node of an attribution graph: what is written at it, and its picture, if there is one."""

    label: str
    picture: Picture | None = None


def plot_graph(
    columns: Sequence[Mapping[Any, PictureNode]],
    edges: Mapping[tuple[Any, Any], float],
    *,
    titles: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure:
    """Figure of an attribution graph; save it as SVG or PDF to enlarge it without loss.

    Parameters
    ----------
    columns : sequence of mapping of key to PictureNode
        Columns from left to right, such as the class, the concepts of a high layer and those of a lower one.
    edges : mapping of (key, key) to float
        Relevance from a node to one of the next column. Widths show absolute values, colours the sign.
    titles : sequence of str
        Of the columns.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib Figure

    Raises
    ------
    KeyError
        If an edge names a node that no column has.
    """
    check_kind("columns", columns, Sequence, "a list of dicts of nodes")
    check_kind("titles", titles, Sequence, "a list of words")
    check_kind("edges", edges, Mapping, "a dict of numbers by (key, key)")
    places: dict[Any, tuple[float, float]] = {}
    tallest = max((len(column) for column in columns), default=1)
    for x, column in enumerate(columns):
        for y, key in enumerate(column):
            places[key] = (2.2 * x, -(y + (tallest - len(column)) / 2) * 1.3)
    for edge, value in edges.items():
        if unknown := [key for key in edge if key not in places]:
            raise NameNotFoundError(f"the edge {edge} names {unknown[0]!r}, which is in no column")
        check_number(f"the relevance of the edge {edge}", value)
    ax = axes_or_new(ax, 2.2 * len(columns), 1.3 * tallest + 0.5)
    _draw_edges(ax, places, edges)
    for x, column in enumerate(columns):
        if x < len(titles):
            ax.text(2.2 * x, 0.9, titles[x], ha="center", va="bottom", fontsize=9, color="0.35", parse_math=False)
        for key, node in column.items():
            _draw_node(ax, places[key], node)
    ax.set_xlim(-0.8, 2.2 * (len(columns) - 1) + 0.8)
    ax.set_ylim(-1.3 * (tallest - 1) - 0.9, 1.2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return cast("Figure", ax.figure)


def _draw_edges(ax: Axes, places: Mapping[Any, tuple[float, float]], edges: Mapping[tuple[Any, Any], float]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    largest = max((abs(value) for value in edges.values()), default=0.0) or 1.0
    for (start, end), value in edges.items():
        (x0, y0), (x1, y1) = places[start], places[end]
        middle = (x0 + x1) / 2
        path = Path([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Path.MOVETO, *[Path.CURVE4] * 3])
        colour = FOR if value >= 0 else AGAINST
        ax.add_patch(PathPatch(path, fill=False, edgecolor=colour, alpha=0.5, linewidth=0.4 + 9 * abs(value) / largest))


def _draw_node(ax: Axes, place: tuple[float, float], node: PictureNode) -> None:
    x, y = place
    if node.picture is None:
        box = {"facecolor": "white", "edgecolor": "0.8", "boxstyle": "round"}
        ax.text(x, y, node.label, ha="center", va="center", fontsize=11, bbox=box, parse_math=False, zorder=3)
        return
    picture = np.asarray(imgify(node.picture))
    ax.imshow(picture, extent=(x - 0.5, x + 0.5, y - 0.5, y + 0.5), zorder=3, cmap="gray")
    ax.text(x, y - 0.55, node.label, ha="center", va="top", fontsize=8, parse_math=False, zorder=3)
