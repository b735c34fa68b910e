"""The report's page as plain data, and its HTML.

The page holds all its pictures, refers to nothing outside of itself and runs no script; its content security policy
would not allow either. Whatever it shows is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

#: (class, layer, concept): a concept's place in the report.
Place = tuple[int, str, int]


class Tile(NamedTuple):
    """A sample beside its heatmap: ``data:`` addresses of both pictures, what is written below, and in the tip."""

    sample: str
    heatmap: str
    caption: str
    tip: str


class Link(NamedTuple):
    """Share of a concept in another class; ``anchor`` is empty where it has no card there."""

    name: str
    share: float
    anchor: str


class ConceptCard(NamedTuple):
    """A concept in the section of a class; ``share`` is its part of the class's relevance in this layer."""

    anchor: str
    layer: str
    concept: int
    share: float
    most_relevant: list[Tile]
    most_active: list[Tile]
    elsewhere: list[Link]


class LayerSection(NamedTuple):
    """The most relevant concepts of a layer for a class, and the share of the relevance that they have together.

    It is folded unless ``open``.
    """

    layer: str
    open: bool
    cards: list[ConceptCard]
    share: float
    n_concepts: int


class ClassSection(NamedTuple):
    """A class: mean heatmap over some of its samples, and its concepts by layer, the layers from output to input."""

    anchor: str
    name: str
    n_rows: int
    n_mean: int
    mean: Tile
    layers: list[LayerSection]


class Finding(NamedTuple):
    """Something to be said at the top of the report.

    Attributes
    ----------
    title : str
    text : sequence of str
        Paragraphs.
    figures : sequence of (str, str)
        Numbers to be shown large, each with what it is.
    tiles : sequence of (str, sequence of Tile)
        Groups of pictures with their headings; see `crp.visualization.report.write.make_tile`.
    concept : (int, str, int), optional
        Class, layer and concept that it is about: the report shows this concept's card, however small its share.
    """

    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()
    tiles: Sequence[tuple[str, Sequence[Tile]]] = ()
    concept: Place | None = None


class Page(NamedTuple):
    """All that the report shows; ``pixelated`` where pictures are smaller than on the screen."""

    title: str
    lead: str
    pixelated: bool
    findings: list[tuple[Finding, str]]
    classes: list[ClassSection]
    provenance: list[tuple[str, str]]
    skipped: list[tuple[int, str]]


def render(page: Page) -> str:
    """HTML of the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("crp.visualization.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    style = environment.get_template("report.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return environment.get_template("report.html").render(
        page=page, style=Markup(style), policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    )


def percent(share: float) -> str:
    """Share as text: ``0.1234`` is ``12.3 %``."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
