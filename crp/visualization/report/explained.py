"""The explanation of one picture as a page: a file of its own, in the style of the atlas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from crp.image.colours import resized
from crp.image.forms import draw_masked
from crp.image.pixels import to_data_uri
from crp.visualization.report.graphs import DrawnNode, draw_columns
from crp.visualization.report.maps import crop_of, encode_maps, square_map
from crp.visualization.report.picture_drawing import picture_file
from crp.visualization.report.render import SingleRenderer
from crp.visualization.report.tiles import WHOLE, Shown
from crp.visualization.table.files import write_atomic
from crp.visualization.table.manifest import Array
from crp.wording import percent

#: Pixels on a side of the picture and of its heatmaps, at most.
_SIDE, _MAP_SIDE = 448, 224
#: Pixels on a side of a picture in the graph, at most.
_NODE_SIDE = 92
_PICTURE, _MAPS = "picture", "maps.png"


class ExplainedConcept(NamedTuple):
    """A concept's part in an explanation.

    Attributes
    ----------
    label : str
    share : float
        Of the absolute relevance of all concepts of the layer.
    heatmap : Tensor of shape (height, width)
        Of the relevance that flows through it.
    """

    label: str
    share: float
    heatmap: Tensor


class ExplainedGraph(NamedTuple):
    """The attribution graph of a picture.

    Attributes
    ----------
    columns : sequence of mapping of key to (str, Tensor or None)
        From the class to lower layers: what is written at a node, and the heatmap of the relevance through it.
    edges : mapping of (key, key) to float
        Relevance between nodes.
    layers : sequence of str
        Of the columns behind the first.
    """

    columns: Sequence[Mapping[Any, tuple[str, Tensor | None]]]
    edges: Mapping[tuple[Any, Any], float]
    layers: Sequence[str]


class ExplainedPicture(NamedTuple):
    """What the page of a picture shows.

    Attributes
    ----------
    name : str
        Such as the picture's file.
    image : Tensor of shape (channels, height, width)
        In 0..1.
    heatmap : Tensor of shape (height, width)
        Of the image, or coarser.
    target : str
        What is explained.
    prediction : sequence of (str, float)
        Classes and their probabilities.
    said : str
        Sentence about the prediction.
    method, model : str
    layer : str
        Of the concepts.
    concepts : sequence of ExplainedConcept
    graph : ExplainedGraph, optional
    """

    name: str
    image: Tensor
    heatmap: Tensor
    target: str
    prediction: Sequence[tuple[str, float]]
    said: str
    method: str
    model: str
    layer: str = ""
    concepts: Sequence[ExplainedConcept] = ()
    graph: ExplainedGraph | None = None


def write_explained(shown: ExplainedPicture, path: Path) -> Path:
    """Write the page of a picture into one file that needs no other, and return its path."""
    height, width = shown.image.shape[-2:]
    maps = [_shares(one, (height, width)) for one in (shown.heatmap, *(part.heatmap for part in shown.concepts))]
    crops = [crop_of(one) for one in maps]
    # (what sets a concept apart, as on the pages of samples)
    maps += [one - maps[0] for one in maps[1:]]
    with TemporaryDirectory(prefix="crp-page-") as place:
        folder = Path(place)
        content, suffix = picture_file(shown.image, _SIDE)
        write_atomic(folder / f"{_PICTURE}.{suffix}", content)
        size = min(_MAP_SIDE, max(height, width))
        write_atomic(folder / _MAPS, encode_maps([square_map(one, size) for one in maps], {}))
        title = f"Why {shown.target}? {shown.name}"
        renderer = _LonePage(folder, f"{shown.model}, {shown.method}.", max(height, width) <= 64, True, path, title)
        whole = Shown(f"{_PICTURE}.{suffix}", _MAPS, 0, len(maps), "", "", [], shown.name, WHOLE)
        renderer.page("index.html", "explained.html", title, page=_content(shown, whole, crops))
        return renderer.finish()


class _LonePage(SingleRenderer):
    """Renderer of a page that belongs to no atlas: there is nothing else to go to, or to search."""

    alone = True


def _content(shown: ExplainedPicture, whole: Shown, crops: Sequence[tuple[float, float, float]]) -> dict[str, object]:
    n = len(shown.concepts)
    largest = max((abs(one.share) for one in shown.concepts), default=0.0) or 1.0
    concepts = [
        {
            "label": f"{shown.layer} · {one.label}",
            "share": one.share,
            "width": abs(one.share) / largest,
            "here": whole._replace(cell=cell, crop=crops[cell]),
            "apart": whole._replace(cell=cell + n),
        }
        for cell, one in enumerate(shown.concepts, start=1)
    ]
    part = percent(sum(one.share for one in shown.concepts))
    carried = f" {n} concept{'s carry' if n > 1 else ' carries'} {part} of the relevance in {shown.layer}." if n else ""
    return {
        "title": f"Why {shown.target}?",
        "name": shown.name,
        "lead": f"{shown.said}. Relevance by {shown.method}.{carried}",
        "whole": whole,
        "layer": shown.layer,
        "concepts": concepts,
        "prediction": shown.prediction,
        "graph": None if shown.graph is None else _drawn(shown.graph, shown.image),
        "graph_note": ""
        if shown.graph is None
        else f"From the class to {' to '.join(shown.graph.layers)}; widths are "
        "shares of its relevance, and blue ones speak against it.",
    }


def _drawn(graph: ExplainedGraph, image: Tensor) -> dict[str, Any]:
    """Graph for the template, with pictures that show what each concept sees."""
    columns = [
        {key: DrawnNode(label[:18], picture=_thumbnail(image, heatmap)) for key, (label, heatmap) in column.items()}
        for column in graph.columns
    ]
    most = max(map(abs, graph.edges.values()), default=0.0) or 1.0
    places = [45 + 120 * number for number in range(len(columns))]
    edges = {ends: value / most for ends, value in graph.edges.items()}
    return draw_columns(columns, edges, places, places[-1] + 45)


def _thumbnail(image: Tensor, heatmap: Tensor | None) -> str:
    """Masked picture as an address that holds it."""
    if heatmap is None:
        return ""
    drawn = draw_masked(image, heatmap.detach().cpu().double())
    drawn.thumbnail((_NODE_SIDE, _NODE_SIDE))
    return to_data_uri(drawn)


def _shares(heatmap: Tensor, shape: tuple[int, int]) -> Array:
    """Heatmap in the shape of the picture, each pixel's share of its absolute relevance."""
    values = resized(heatmap.detach().cpu().double().numpy(), shape)
    shares: Array = values / (np.abs(values).sum() or 1.0)
    return shares
