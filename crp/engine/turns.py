"""Turns of threads at models: what two models share is one thread's at a time, and a fork keeps nobody else's turn."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator
from threading import get_ident

from torch import nn

from crp.errors import StateError
from crp.layers import modules_of
from crp.layers.interrupts import atomic, raise_waiting

#: Seconds between two looks at interrupts, while a thread waits.
_LOOK = 0.05


class _Turns:
    """Which thread has which objects. A thread gets all that it asks for at once, or waits.

    A thread that has an object may ask for it again. Two threads that wait for each other get an error.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        #: Thread and number of its turns, by `id` of the object.
        self._held: dict[int, tuple[int, int]] = {}
        #: What a thread waits for, by `id`.
        self._waiting: dict[int, list[int]] = {}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=lambda: self._change.acquire(),
                after_in_parent=lambda: self._change.release(),
                after_in_child=self._only_this_thread,
            )

    @atomic
    def taken(self, objects: Iterable[object], wait: bool = True) -> Iterator[None]:
        """Context in which these objects are this thread's.

        Raises
        ------
        RuntimeError
            If another thread has one, and waits for this one or ``wait`` is False.
        """
        keys = list(dict.fromkeys(map(id, objects)))
        self._take(keys, get_ident(), wait)
        try:
            yield
        finally:
            self._give_back(keys)

    def _take(self, keys: list[int], thread: int, wait: bool) -> None:
        held = self._held
        while True:
            with self._change:
                others = {held[key][0] for key in keys if key in held} - {thread} if held else set()
                if not others:
                    self._waiting.pop(thread, None)
                    for key in keys:
                        held[key] = (thread, held[key][1] + 1) if key in held else (thread, 1)
                    return
                if not wait or self._is_circle(thread, others):
                    self._waiting.pop(thread, None)
                    raise StateError(
                        "another thread is at work on the model, or on one that shares layers with it"
                        + (", and waits for this thread: call them in the same order" if wait else "; wait for it")
                    )
                self._waiting[thread] = keys
                self._change.wait(_LOOK)
            try:
                raise_waiting()
            except BaseException:
                self._waiting.pop(thread, None)
                raise

    def _give_back(self, keys: list[int]) -> None:
        with self._change:
            for key in keys:
                thread, turns = self._held.pop(key, (0, 0))
                if turns > 1:
                    self._held[key] = (thread, turns - 1)
            if self._waiting:
                self._change.notify_all()

    def _is_circle(self, thread: int, others: set[int]) -> bool:
        """Whether a thread that waits for others would wait for itself."""
        seen, todo = set[int](), list(others)
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo.extend(self._held[key][0] for key in self._waiting.get(other, ()) if key in self._held)
        return thread in seen

    def _only_this_thread(self) -> None:
        """In the child of a fork, where no other thread goes on."""
        self._change = threading.Condition()
        self._waiting.clear()
        for key in [key for key, (thread, _) in self._held.items() if thread != get_ident()]:
            del self._held[key]


TURNS = _Turns()


def parts_of(model: nn.Module, modules: Collection[nn.Module] | None = None) -> list[object]:
    """What of a model a thread must have alone: its modules, and parameters, which other modules may share."""
    modules = modules_of(model).values() if modules is None else modules
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    return [*modules, *parameters]
