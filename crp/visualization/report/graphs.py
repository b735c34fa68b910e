"""Drawings on pages: attribution graphs, nodes in columns with curves between them, and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from crp.visualization.report.tiles import AnyShown
from crp.visualization.table.manifest import Array

#: Height of a row, place of the first node in it, and what is below the last.
_ROW, _FIRST, _REST = 78, 33, 20
#: Half of the width of a letter, and what is beside a word.
_HALF_LETTER, _GAP = 4, 5


class DrawnNode(NamedTuple):
    """What is shown at a node: a label, a link with its name, and a tile or a picture (a ``data:`` address)."""

    label: str
    href: str = ""
    tile: AnyShown | None = None
    picture: str = ""
    name: str = ""


class _Edge(NamedTuple):
    """A curve between two nodes, which are drawn over its ends."""

    x0: float
    y0: float
    x1: float
    y1: float
    x2: float
    width: float
    against: bool


def draw_columns(
    columns: Sequence[Mapping[Any, DrawnNode]],
    edges: Mapping[tuple[Any, Any], float],
    places: Sequence[float],
    width: float,
) -> dict[str, Any]:
    """Graph for the template.

    Parameters
    ----------
    columns : sequence of mapping of key to DrawnNode
        From left to right.
    edges : mapping of (key, key) to float
        From a node to one of the next column; of an absolute value up to 1, which is the thickest.
    places, width : sequence of float, and float
        Where columns are, of the whole width; further to the right where words of the first one need it.
    """
    words = {
        key: _HALF_LETTER * len(node.label) + _GAP  # (half of the width that a word needs)
        for column in columns
        for key, node in column.items()
        if not (node.tile or node.picture)
    }
    left = max([0.0, *(words[key] - places[0] for key in columns[0] if key in words)])
    places, width = [left + place for place in places], left + width
    rows = max(map(len, columns))
    at = {
        key: (x, _FIRST + _ROW * (row + (rows - len(column)) / 2))
        for x, column in zip(places, columns, strict=True)
        for row, key in enumerate(column)
    }
    nodes = [(*at[key], node) for column in columns for key, node in column.items()]
    curves = []
    for (start, end), value in edges.items():
        (x0, y0), (x2, y1) = at[start], at[end]
        if start in words:  # (behind the word, which would be hard to read on a thick curve)
            x0 += min(words[start], (x2 - x0) / 2)
        curves.append(_Edge(x0, y0, (x0 + x2) / 2, y1, x2, round(1 + 9 * min(abs(value), 1), 1), value < 0))
    return {"width": width, "height": _REST + _ROW * rows, "nodes": nodes, "edges": curves}


def _draw_histogram(counts: Array, low: str, high: str, ticks: Sequence[float] = ()) -> dict[str, Any]:
    """Histogram for the template, of roots of counts; ``low`` and ``high`` name its ends, ticks are shares of it."""
    heights = (np.sqrt(counts / max(counts.max(), 1)) * 92).tolist()
    bars = [(round(i * 420 / len(heights), 1), round(96 - h, 1), round(h, 1)) for i, h in enumerate(heights) if h]
    return {"low": low, "high": high, "bars": bars, "ticks": [round(420 * tick, 1) for tick in ticks]}
