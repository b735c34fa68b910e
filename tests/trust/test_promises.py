"""The page of promises says what the tests promise."""

from __future__ import annotations

from collections import Counter

from promises import PAGE, ROOT, promises, with_tables


def test_the_page_is_what_the_tests_make() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "python tests/shared/promises.py writes the page again"
    assert all(f"| {promise.sentence} | `{promise.test}`" in page for promise in promises())


def test_each_promise_is_a_sentence_at_a_test_that_runs() -> None:
    counts = Counter(promise.sentence for promise in promises())
    assert len(counts) >= 50 and set(counts.values()) == {1}
    assert [one for one in promises() if not one.test.split("::")[1].startswith("test_") or "|" in one.sentence] == []


def test_every_file_of_trust_shows_a_promise() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "trust").glob("test_*.py")}
    assert files - {promise.test.split("::")[0] for promise in promises()} == {"tests/trust/test_promises.py"}
