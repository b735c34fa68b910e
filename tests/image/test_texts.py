"""Texts as HTML and as figures: colours, white space, and that hostile texts stay text."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from crp.errors import CRPError
from crp.image import TextHeatmap, plot_texts, text_html
from crp.image.texts import _COLUMNS, _placed, _width, readable, text_page

#: What a text may hold to break a page, a figure or the order of letters.
HOSTILE = (
    "<script>alert(1)</script>", "</p></span>", ' " onmouseover="alert(1)', "&lt;", "$x^2$", "\u202egnp.exe",
    "\x00\x1b[31m",    "\ud800", "{{ page.title }}", "<!--", "\u05d0\u05d1", "e\u0301", "\n", "\t", "日本",
)  # fmt: skip


class Seen(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_text_is_spans_with_signed_colours_and_its_white_space() -> None:
    text = TextHeatmap(("<s>", "The", "  cat\n", " sat"), np.array([0, 2.0, -1, 0.5]), frozenset({0}), 3, 1)
    seen = Seen(text_html(text))
    assert [tag for tag, _ in seen.tags] == ["p"] + ["span"] * 4 and "".join(seen.text) == "<s>The  cat\n sat"
    styles = [str(attributes["style"]) for tag, attributes in seen.tags if tag == "span"]
    assert "rgba(204,23,28,0.750)" in styles[1] and "rgba(33,89,191" in styles[2] and ",0.000)" in styles[0]
    assert "dotted" in styles[0] and "underline" in styles[1] and "border-right" in styles[3]
    assert [a.get("title") for t, a in seen.tags if t == "span"] == ["0", "2", "-1", "0.5"]
    assert "pre-wrap" in str(seen.tags[0][1]["style"]) and text._repr_html_() == text_html(text)
    assert all("title" not in attributes for _, attributes in Seen(text_html(TextHeatmap(("a", "b")))).tags)


def test_hostile_texts_stay_text() -> None:
    text = TextHeatmap(HOSTILE, np.linspace(-1, 1, len(HOSTILE)))
    page = text_page([(HOSTILE[0], text)], HOSTILE[1])
    page.encode("utf-8")
    seen = Seen(page)
    names = {tag for tag, _ in seen.tags}
    assert names == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span"}
    spans = [attributes for tag, attributes in seen.tags if tag == "span"]
    assert len(spans) == len(HOSTILE) and all(set(one) == {"style", "title"} for one in spans)
    assert "".join(map(readable, HOSTILE)) in "".join(seen.text)
    assert not {"\x00", "\x1b", "\u202e", "\ud800"} & set(page)
    assert "unicode-bidi:isolate" in str(spans[0]["style"])


@pytest.mark.filterwarnings("ignore:Glyph")  # (of letters that the fonts at hand lack)
def test_figures_show_every_letter_within_the_columns() -> None:
    long = "x" * 200
    text = TextHeatmap((*HOSTILE, long, *[" word"] * 40), np.linspace(-1, 1, len(HOSTILE) + 41), frozenset({1}), 2, 3)
    pieces = _placed(text)
    shown = "".join(piece for *_, piece in pieces)
    whole = "".join(map(readable, text.words)).replace("\t", "    ").replace("\n", "↵")
    assert shown == whole
    of_long = [(line, len(piece)) for place, line, _, piece in pieces if place == len(HOSTILE)]
    assert [length for _, length in of_long] == [88, 88, 24]
    assert [piece for place, *_, piece in pieces if place > len(HOSTILE)] == [" word"] * 40, "words are not divided"
    assert pieces[-1][1] == of_long[-1][0] + 2, "lines are full"
    assert [_width(one) for one in ("日本", "e\u0301", "ab")] == [4, 1, 2]
    assert all(column >= 0 and column + _width(piece) <= _COLUMNS for _, _, column, piece in pieces)
    for one, other in pairwise(pieces):
        assert other[1] > one[1] or (other[1] == one[1] and other[2] == one[2] + _width(one[3]))
    figure = plot_texts([text, TextHeatmap(("a",))], ["$one$", "<two>"])
    figure.savefig(io.BytesIO(), format="svg")
    drawn = [one.get_text() for one in figure.axes[0].texts]
    assert drawn[0] == "$one$" and drawn[-1] == "a" and len(drawn) == len(pieces) + 3
    assert not any(one.get_parse_math() for one in figure.axes[0].texts)
    heights = [one.get_position()[1] for one in figure.axes[0].texts]
    assert heights == sorted(heights) and heights[-1] > heights[-2] > heights[-3], "below each other"
    faces = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert faces[0][2] > faces[0][0] and faces[len(pieces) - 1][0] > faces[len(pieces) - 1][2]


def test_figures_mark_tokens_where_they_stand() -> None:
    text = TextHeatmap(("<s>", "The\n", "cat", " sat"), np.array([0, 2.0, -1, 0.5]), frozenset({0}), 3, 1)
    (axes,) = plot_texts([TextHeatmap(("up",)), text]).axes
    boxes, words = axes.patches[1:], axes.texts[1:]
    for box, word in zip(boxes, words, strict=True):
        x, y = word.get_position()
        assert box.get_x() == x and box.get_width() == len(word.get_text())
        assert box.get_y() < y < box.get_y() + box.get_height()
    assert [box.get_edgecolor()[3] for box in boxes] == [1, 0, 0, 0]
    under, behind = ([line.get_xdata(), line.get_ydata()] for line in axes.lines)
    (the, right), (low, also_low) = under
    assert (the, right) == (boxes[1].get_x(), boxes[1].get_x() + boxes[1].get_width())
    assert low == also_low and words[1].get_position()[1] < low < words[2].get_position()[1]
    (end, also_end), (top, bottom) = behind
    assert end == also_end == boxes[3].get_x() + boxes[3].get_width()
    assert (top + bottom) / 2 == words[3].get_position()[1]


@pytest.mark.parametrize("words", [(), ("a", "b")], ids=["empty", "zeros"])
def test_texts_without_relevance_have_no_colour(words: tuple[str, ...]) -> None:
    text = TextHeatmap(words, np.zeros(len(words)))
    assert text_html(text).count(",0.000)") == len(words)
    assert [patch.get_facecolor()[3] for patch in plot_texts(text).axes[0].patches] == [0] * len(words)


def test_figures_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        plot_texts([])
    with pytest.raises(ValueError, match="2 captions for 1 texts"):
        plot_texts(TextHeatmap(("a",)), ["b", "c"])


def test_places_of_a_text_count_from_the_end_as_well() -> None:
    words, relevance = ("<s>", "a", "b", "</s>"), [0, 2.0, -1, 0.5]
    wanted = text_html(TextHeatmap(words, np.array(relevance), frozenset({0, 3}), explained=3, strongest=2))
    assert text_html(TextHeatmap(words, relevance, frozenset({0, -1}), explained=-1, strongest=-2)) == wanted


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"explained": 4}, "a text of 4 tokens has none at 4"),
        ({"strongest": -5}, "a text of 4 tokens has none at -5"),
        ({"special": frozenset({0, 9})}, "a text of 4 tokens has none at 9"),
        ({"scale": -1.0}, "scale must be a number of at least 0, not -1.0"),
        ({"scale": float("nan")}, "scale must be a number of at least 0, not nan"),
        ({"relevance": np.ones(4) + 1j}, "must be real numbers to have a colour, not of complex128"),
        ({"relevance": np.ones(3)}, r"a text of 4 tokens has relevance of shape \(3,\)"),
        ({"relevance": np.full(4, np.nan)}, "values that are not finite, which have no colour"),
    ],
)
def test_what_a_text_has_not_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(CRPError, match=message):
        TextHeatmap(("<s>", "a", "b", "</s>"), **{"relevance": np.ones(4), **keywords})
