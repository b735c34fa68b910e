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
    """Share as text: ``0.1234`` is ``12.3 %``, ``0.0004`` is ``0.04 %``, and ``0.00001`` is ``< 0.01 %``."""
    size, few = abs(100 * share), "< 0.01" if share > 0 else "> -0.01"
    text = few if 0 < size < 0.005 else f"{100 * share if size else 0:.{1 if size >= 0.95 else 2 if size else 0}f}"
    return f"{text} %".replace("-", "\N{MINUS SIGN}").replace(" ", "\N{NO-BREAK SPACE}")
