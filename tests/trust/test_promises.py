"""The page of promises names tests that are there."""

from __future__ import annotations

import re

import pytest
from house_plan import ROOT

PAGE = (ROOT / "tutorials" / "promises.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "shown by" not in line]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def test_every_promise_names_a_test():
    assert len(ROWS) >= 15
    assert [row for row in ROWS if not re.search(r"`tests/[\w/]+\.py::test_\w+`", row)] == []


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_tests_that_are_named_are_there(file, name):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", source, flags=re.MULTILINE)
    is_slow = re.search(rf"@pytest\.mark\.slow\n(@.*\n)*def {name}\(", source) is not None
    assert is_slow == (f"slow: `{file}::{name}`" in PAGE)


def test_every_test_of_trust_is_named_in_the_page_or_a_detail():
    """Files of promises that the page forgets are found by this."""
    files = {path.name for path in (ROOT / "tests" / "trust").glob("test_*.py")} - {"test_promises.py"}
    assert {file.rpartition("/")[2] for file, _ in NAMED} >= files
