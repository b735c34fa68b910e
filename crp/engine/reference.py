"""Whether a model runs on a reference input: for the record only, before it runs on the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_referencing: ContextVar[bool] = ContextVar("referencing", default=False)


def referencing() -> bool:
    """Whether a model runs on a reference input now."""
    return _referencing.get()


@contextmanager
def on_reference() -> Iterator[None]:
    """Context in which a model runs on a reference input."""
    token = _referencing.set(True)
    try:
        yield
    finally:
        _referencing.reset(token)
