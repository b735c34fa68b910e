"""Lists in messages."""

from __future__ import annotations

import pytest

from crp.wording import first_few


@pytest.mark.parametrize(
    ("n_words", "n", "kind", "wanted"),
    [
        (0, 2, "", ""),
        (2, 2, "layers", "w0, w1"),
        (3, 2, "", "w0, w1 and 1 more"),
        (5, 2, "layers", "w0, w1 and 3 more layers"),
    ],
)
def test_the_first_few_words(n_words, n, kind, wanted):
    assert first_few([f"w{i}" for i in range(n_words)], n, kind) == wanted
