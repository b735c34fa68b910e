"""Words of messages."""

from collections.abc import Sequence


def shortened(value: object) -> str:
    """A value as Python writes it, on one line and no longer than 60 letters."""
    return text if len(text := " ".join(repr(value).split())) <= 60 else f"{text[:60]}…"


def first_few(words: Sequence[str], n: int, kind: str = "") -> str:
    """The first ``n`` words, and how many more there are: ``"a, b and 3 more"``, or ``"a, b and 3 more layers"``."""
    return ", ".join(words[:n]) + (f" and {len(words) - n} more {kind}".rstrip() if len(words) > n else "")


def counted(n: int, thing: str, things: str = "") -> str:
    """A number of things: ``"1 layer"``, or ``"2 layers"``; ``things`` are given where they are no thing and an s."""
    return f"{n} {thing if n == 1 else things or thing + 's'}"


def percent(share: float) -> str:
    """Share as text: ``0.1234`` is ``12.3 %``, and ``0.0004`` is ``0.04 %``."""
    value = 100 * share
    digits = 1 if abs(value) >= 0.95 else 2 if abs(value) >= 0.005 else 0
    return f"{value if digits else 0:.{digits}f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")
