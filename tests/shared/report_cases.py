"""A small report, and its pages as a parser reads them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from zennit.composites import EpsilonPlus

from crp.visualization.report import write_report

EVIL = "<script>alert('x')</script>\" onload=\"y' & {{ 7 * 6 }} ../../../etc/passwd \u202e \U0001f9ea " + "x" * 300
NAMES = ["apple", "pear", "plum"]


class Parsed(HTMLParser):
    """Elements of a page: (tag, attributes), and its text outside of style and script."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("style", "script"):
            self.text += data

    def all(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]


def report(fv, folder: Path, **keywords) -> Path:
    keywords = {"composite": EpsilonPlus(), "n_references": 3, "class_names": NAMES, "verbose": False} | keywords
    return write_report(fv, path=folder, **keywords).parent
