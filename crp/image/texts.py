"""Texts with the relevance of their tokens: as HTML, whatever they hold, and as a figure.

`matplotlib` is imported by the function that needs it.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crp.checks import check_number
from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.image.colours import AGAINST, FOR, POWER
from crp.kinds import check_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Opacity of the full colour, under which black letters can be read.
OPACITY = 0.75
#: Columns of a figure, and its size in inches for each column and line.
_COLUMNS, _WIDTH, _HEIGHT = 88, 0.085, 0.23
_FONTS = ("DejaVu Sans Mono", "DejaVu Sans")


@dataclass(frozen=True, eq=False)
class TextHeatmap:
    """A text, token by token, with the relevance of each.

    It shows itself in a notebook. Red is for, blue against, and a token without colour has no relevance.

    Attributes
    ----------
    words : tuple of str
        What each token stands for, with the white space before it.
    relevance : array of shape (tokens,), optional
        Without it, nothing is coloured.
    special : frozenset of int
        Places of tokens that stand for no text, such as the begin; they are framed. Negative places count from the end.
    explained : int, optional
        Place of the token at which the model's prediction of the next one is explained.
    strongest : int, optional
        Place of the token on which a concept is strongest; it is underlined.
    scale : float, optional
        Relevance that has the full colour; by default the largest absolute one.

    Raises
    ------
    ValueError, TypeError, IndexError
        If there are not as many relevances as words, some are complex or not finite, or there is no token at a place.
    """

    words: tuple[str, ...]
    relevance: NDArray[Any] | None = None
    special: frozenset[int] = frozenset()
    explained: int | None = None
    strongest: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_kind("words", self.words, Sequence, "the words of a text")
        check_kind("special", self.special, Iterable, "places in a text")
        if self.scale is not None:
            check_number("scale", self.scale, 0)
        object.__setattr__(self, "special", frozenset(map(self._place, self.special)))
        for name in ("explained", "strongest"):
            if (place := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._place(place))
        if self.relevance is None:
            return
        if (kind := np.asarray(self.relevance).dtype).kind not in "buif":
            raise InputTypeError(f"the relevance of a text must be real numbers to have a colour, not of {kind}")
        values = np.asarray(self.relevance, np.float64)
        object.__setattr__(self, "relevance", values)
        if values.shape != (len(self.words),):
            raise InputError(f"a text of {len(self.words)} tokens has relevance of shape {values.shape}")
        if not np.isfinite(values).all():
            raise InputError("the relevance of a text has values that are not finite, which have no colour")

    def _place(self, place: int) -> int:
        """Place of a token, of which negative ones count from the end."""
        check_number("a place in a text", place, whole=True)
        if not -len(self.words) <= place < len(self.words):
            raise OutOfRangeError(f"a text of {len(self.words)} tokens has none at {place}")
        return place % len(self.words)

    @property
    def strengths(self) -> NDArray[Any]:
        """Relevance in -1..1, of which 1 has the full colour."""
        if self.relevance is None:
            return np.zeros(len(self.words))
        one = float(np.abs(self.relevance).max(initial=0.0)) if self.scale is None else self.scale
        return np.clip(self.relevance / one, -1, 1) if one else np.zeros(len(self.words))

    def scaled_without(self, places: Collection[int] = (0,)) -> TextHeatmap:
        """The same with the colours of the other tokens: the first one often takes up what no other needs."""
        if self.relevance is None:
            return self
        left = np.delete(np.abs(self.relevance), list(places))
        return replace(self, scale=float(left.max(initial=0.0)) or None)

    def window(self, reach: int = 8, around: int | None = None) -> TextHeatmap:
        """The tokens about one, by default the strongest or the one explained, in the colours of the whole text."""
        middle = next((at for at in (around, self.strongest, self.explained) if at is not None), 0)
        start, stop = max(0, middle - reach), min(len(self.words), middle + reach + 1)
        relevance = None if self.relevance is None else self.relevance[start:stop]
        one = None if self.relevance is None else self.scale or float(np.abs(self.relevance).max(initial=0.0)) or None
        explained, strongest = (
            None if at is None or not start <= at < stop else at - start for at in (self.explained, self.strongest)
        )
        special = frozenset(place - start for place in self.special if start <= place < stop)
        return TextHeatmap(self.words[start:stop], relevance, special, explained, strongest, one)

    def __str__(self) -> str:
        return "".join(self.words)

    def _repr_html_(self) -> str:
        return text_html(self)


def readable(word: str) -> str:
    """A token's text without characters that no page may hold, or that would change how others are shown."""
    return "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c == "\N{ZERO WIDTH JOINER}"
        else "\ufffd"
        for c in word
    )


def text_html(text: TextHeatmap) -> str:
    """A text as HTML: a span for each token, coloured by its relevance.

    Parameters
    ----------
    text : TextHeatmap
        Whatever its words hold is shown as text.

    Returns
    -------
    str
        A ``<p>`` with the styles in it, for notebooks and pages of one's own.
    """
    check_kind("text", text, TextHeatmap, "a TextHeatmap")
    spans = []
    for place, (word, strength) in enumerate(zip(text.words, text.strengths, strict=True)):
        red, green, blue = (round(255 * part) for part in (FOR if strength >= 0 else AGAINST))
        style = f"background:rgba({red},{green},{blue},{OPACITY * abs(strength) ** POWER:.3f});unicode-bidi:isolate"
        if place in text.special:
            style += ";outline:1px dotted #777"
        if place == text.strongest:
            style += ";text-decoration:underline"
        if place == text.explained:
            style += ";border-right:2px solid #111"
        known = "" if text.relevance is None else f' title="{text.relevance[place]:.4g}"'
        spans.append(f'<span style="{style}"{known}>{html.escape(readable(word))}</span>')
    style = "white-space:pre-wrap;overflow-wrap:anywhere;background:#fff;color:#111;line-height:1.7"
    return f'<p style="{style}">{"".join(spans)}</p>'


def text_page(texts: Sequence[tuple[str, TextHeatmap]], title: str) -> str:
    """A page with some texts, each under its caption; it needs no network and runs no script."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    body = "".join(f"<h2>{html.escape(readable(caption))}</h2>\n{text_html(text)}\n" for caption, text in texts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{html.escape(readable(title))}</title>\n"
        "<style>body{max-width:70ch;margin:2em auto;padding:0 1em;font:16px/1.5 system-ui,sans-serif;"
        "background:#fff;color:#111}h2{font-size:14px;font-weight:600;color:#555}</style>\n"
        f"</head>\n<body>\n<h1>{html.escape(readable(title))}</h1>\n{body}</body>\n</html>\n"
    )


def plot_texts(texts: TextHeatmap | Sequence[TextHeatmap], captions: Sequence[str] | None = None) -> Figure:
    """Texts below each other, with the relevance of every token, as a figure.

    Parameters
    ----------
    texts : TextHeatmap, or sequence of these
    captions : sequence of str, optional
        One above each text.

    Returns
    -------
    matplotlib.figure.Figure
        Not known to pyplot.

    Raises
    ------
    ValueError
        If there is no text, or there are not as many captions.
    """
    from matplotlib.figure import Figure

    check_kind("texts", texts, (TextHeatmap, Sequence), "a TextHeatmap, or a list of them")
    check_kind("captions", captions, (Sequence, type(None)), "a list of words")
    shown = [texts] if isinstance(texts, TextHeatmap) else list(texts)
    if not shown:
        raise InputError("texts is empty; give at least one")
    if captions is not None and len(captions) != len(shown):
        raise InputError(f"there are {len(captions)} captions for {len(shown)} texts")
    placed = [_placed(text) for text in shown]
    heights = [(lines[-1][1] + 2 if lines else 2) + (captions is not None) for lines in placed]
    figure = Figure(figsize=(_COLUMNS * _WIDTH + 0.4, sum(heights) * _HEIGHT + 0.3))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set(xlim=(0, _COLUMNS), ylim=(sum(heights), 0))
    axes.axis("off")
    top = 0
    for number, (text, pieces) in enumerate(zip(shown, placed, strict=True)):
        if captions is not None:
            axes.text(0, top + 0.5, readable(captions[number]), va="center", size=8, color="#555", parse_math=False)
        _draw(axes, text, pieces, top + (captions is not None))
        top += heights[number]
    return figure


def _draw(axes: Axes, text: TextHeatmap, pieces: Sequence[tuple[int, int, int, str]], top: int) -> None:
    from matplotlib.patches import Rectangle

    for (place, line, column, piece), strength in zip(pieces, text.strengths[[p[0] for p in pieces]], strict=True):
        colour = (*(FOR if strength >= 0 else AGAINST), OPACITY * abs(strength) ** POWER)
        width = _width(piece)
        edge = "#777" if place in text.special else "none"
        box = Rectangle((column, top + line + 0.05), width, 0.9, facecolor=colour, edgecolor=edge, linestyle=":")
        axes.add_patch(box)
        axes.text(column, top + line + 0.5, piece, va="center", size=8.6, family=_FONTS, parse_math=False)
        if place == text.strongest:
            axes.plot([column, column + width], [top + line + 0.97] * 2, color="#111", linewidth=1.2)
        if place == text.explained:
            axes.plot([column + width] * 2, [top + line, top + line + 1], color="#111", linewidth=1.2)


def _placed(text: TextHeatmap) -> list[tuple[int, int, int, str]]:
    """Token, line, column and letters of each piece of a text that stands on one line."""
    found: list[tuple[int, int, int, str]] = []
    line = column = 0
    for place, word in enumerate(text.words):
        parts = readable(word).replace("\t", "    ").split("\n")
        for number, part in enumerate(parts):
            # (an end of the line is shown, as it is a token like others)
            rest = part + ("\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" if number < len(parts) - 1 else "")
            if column and column + _width(rest) > _COLUMNS:
                line, column = line + 1, 0
            while rest:
                fits = next((n for n in range(len(rest), 1, -1) if column + _width(rest[:n]) <= _COLUMNS), 1)
                found.append((place, line, column, rest[:fits]))
                column += _width(rest[:fits])
                rest = rest[fits:]
                if rest:
                    line, column = line + 1, 0
            if number < len(parts) - 1:
                line, column = line + 1, 0
    return found


def _width(piece: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in piece)
