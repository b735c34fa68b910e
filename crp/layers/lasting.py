"""Changes of the process that threads share: the first that needs one makes it, the last one undoes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock


class Shared(AbstractContextManager[None]):
    """Context of a change that is there once, as long as any thread is inside; it may be entered any number of times.

    Parameters
    ----------
    change : callable
        Makes the change, yields, and undoes it.
    """

    def __init__(self, change: Callable[[], Iterator[None]]) -> None:
        self._change, self._lock, self._n_inside = contextmanager(change), Lock(), 0
        if hasattr(os, "register_at_fork"):
            free = self._lock.release
            os.register_at_fork(before=self._lock.acquire, after_in_parent=free, after_in_child=free)

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._made = self._change()
                self._made.__enter__()
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._made.__exit__(None, None, None)
