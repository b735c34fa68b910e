"""The page of promises: a promise stands at the test that shows it, and the tables are made of the tests.

``@pytest.mark.promise(area, sentence)`` marks such a test. ``python tests/shared/promises.py`` writes the page again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "tutorials" / "promises.md"

#: The tables, in their order.
AREAS = ("Model", "Threads and processes", "Input", "Results", "Tables", "Commands")

#: The tables stand between these two lines of the page; the rest of the page is written by hand.
BEGIN, END = "<!-- made by tests/shared/promises.py -->\n", "<!-- by hand from here on -->\n"


class Promise(NamedTuple):
    """What is promised, and the test that shows it."""

    area: str
    sentence: str
    test: str
    is_slow: bool


def promises() -> list[Promise]:
    """All promises in the order of the page; the tests are read and not imported."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    found = [one for path, source in sources.items() if "mark.promise(" in source for one in _of_file(path, source)]
    return sorted(found, key=lambda promise: AREAS.index(promise.area))


def _of_file(path: Path, source: str) -> Iterator[Promise]:
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        is_slow = any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise":
                area, sentence = map(ast.literal_eval, mark.args)
                yield Promise(area, sentence, f"{path.relative_to(ROOT).as_posix()}::{node.name}", is_slow)


def with_tables(page: str) -> str:
    """The page with the tables as the tests make them."""
    lines = []
    for area, of_area in groupby(promises(), key=lambda promise: promise.area):
        lines += [f"## {area}", "", "| promise | shown by |", "|---|---|"]
        lines += [f"| {one.sentence} | `{one.test}`{' (slow)' * one.is_slow} |" for one in of_area]
        lines.append("")
    tables = "\n".join(lines)
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{tables}\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
