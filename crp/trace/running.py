"""Whether a model runs for its result, or for the record only: in a trace, or on a reference input before the data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

_active: ContextVar[object] = ContextVar("crp_trace", default=None)
_referencing: ContextVar[bool] = ContextVar("referencing", default=False)


def tracing() -> bool:
    """Whether a `trace` is running here; hooks that change values stay inert meanwhile."""
    return _active.get() is not None


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Context in which a model runs for the record only, as in a `trace`; its warnings are silenced."""
    token = _active.set(looking)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _active.reset(token)


def referencing() -> bool:
    """Whether a model runs on a reference input now."""
    return _referencing.get()


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    """Context in which a model runs on a reference input."""
    token = _referencing.set(True)
    try:
        yield
    finally:
        _referencing.reset(token)
