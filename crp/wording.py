"""Words of messages."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(words: Sequence[str], n: int, kind: str = "") -> str:
    """The first ``n`` words, and how many more there are: ``"a, b and 3 more"``, or ``"a, b and 3 more layers"``."""
    more = f" and {len(words) - n} more {kind}".rstrip() if len(words) > n else ""
    return ", ".join(words[:n]) + more
