"""Words of messages."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(value: object) -> str:
    """A value as Python writes it, on one line and no longer than 60 letters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def first_few(words: Sequence[str], n: int, kind: str = "") -> str:
    """The first ``n`` words, and how many more there are: ``"a, b and 3 more"``, or ``"a, b and 3 more layers"``."""
    more = f" and {len(words) - n} more {kind}".rstrip() if len(words) > n else ""
    return ", ".join(words[:n]) + more
