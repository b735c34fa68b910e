"""A reference as a page shows it: a picture with its heatmap, or the tokens of a text in the colours of theirs."""

from __future__ import annotations

from typing import NamedTuple

#: The whole of a picture: left, top and side, as shares of the longer side.
WHOLE = (0.0, 0.0, 1.0)


class Shown(NamedTuple):
    """A picture: its file, its cell in a file of heatmaps, link, what is written below, and its crop."""

    picture: str
    maps: str
    cell: int
    cells: int
    href: str
    value: str
    lines: list[tuple[str, str]]
    alt: str
    crop: tuple[float, float, float]


class ShownText(NamedTuple):
    """A text, or a window of it.

    Attributes
    ----------
    tokens : list of (str, str)
        Each with the classes of its style.
    at : int
        Place of the token in the middle of a shorter window.
    href, value, lines
        Link, and what is written below, as of a picture.
    """

    tokens: list[tuple[str, str]]
    at: int
    href: str
    value: str
    lines: list[tuple[str, str]]

    @property
    def short(self) -> list[tuple[str, str]]:
        """The few tokens about the one in the middle."""
        return self.tokens[max(0, self.at - 2) : self.at + 3]

    @property
    def word(self) -> str:
        """The token in the middle, for a drawing: in quotes, and not too long."""
        word = repr(self.tokens[self.at][0]) if self.tokens else ""
        return word if len(word) <= 14 else f"{word[:13]}…"


AnyShown = Shown | ShownText
