"""Parts of a model that run more than once in one pass, as those between activation checkpoints do."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar

from crp.layers.interrupts import atomic


class _Repetition:
    """A run of a part whose tensors are not those of the pass.

    Attributes
    ----------
    is_watched : bool
        Whether a hook wanted to keep, or change, what a layer inside puts out.
    """

    def __init__(self) -> None:
        self.is_watched = False


_repetition: ContextVar[_Repetition | None] = ContextVar("repetition", default=None)


@atomic
def repeated() -> Iterator[_Repetition]:
    """Context in which a part runs whose tensors are not those of the pass."""
    repetition = _Repetition()
    token = _repetition.set(repetition)
    try:
        yield repetition
    finally:
        _repetition.reset(token)


def watch() -> bool:
    """Whether a part runs now whose tensors are not those of the pass, so that a hook must leave them alone.

    Once a hook has asked, the part runs once more, with tensors of the pass.
    """
    repetition = _repetition.get()
    if repetition is None:
        return False
    repetition.is_watched = True
    return True
