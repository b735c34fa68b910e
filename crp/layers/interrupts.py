"""Contexts that an interrupt does not leave half-way: it waits while something is put on or taken off.

Python runs the handler of a signal (Ctrl-C, say) between any two steps of the main thread. `KeyboardInterrupt` may then
come inside of ``__enter__`` or ``__exit__``, and what was to be undone stays. While an `atomic` context is open, the
handlers of a process are asked later wherever the interrupted step is part of an ``__enter__``, an ``__exit__`` or a
function that is `undivided`; anywhere else they run at once.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

from crp.errors import StateError

T = TypeVar("T")
P = ParamSpec("P")

#: What is not divided by an interrupt: entering and leaving of contexts by their name, and functions that say so.
#: (Exceptions in ``__del__`` are lost.)
_NAMES = frozenset({"__enter__", "__exit__", "__del__"})
_UNDIVIDED: set[CodeType] = set()
#: Signals whose handlers raise exceptions in common programs.
_NUMBERS = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1"))
_SIGNALS = [int(number) for number in _NUMBERS if number is not None]
# (without the conversions to enumerations around these, which would take most of the time)
_plain: Any = sys.modules.get("_signal", signal)
_get_handler: Callable[[int], Any] = _plain.getsignal
_set_handler: Callable[[int, Any], Any] = _plain.signal


class _Waiting:
    """Signals of this process that wait, and the handlers whose place is taken meanwhile.

    Attributes
    ----------
    depth : int
        Atomic contexts of the main thread that are open.
    handlers : dict of int to callable
        The program's own, by signal.
    signals : list of int
        Those that came at a bad moment.
    """

    depth: ClassVar[int] = 0
    handlers: ClassVar[dict[int, Callable[[int, FrameType | None], Any]]] = {}
    signals: ClassVar[list[int]] = []


def _receive(number: int, frame: FrameType | None) -> None:
    """Handler while atomic contexts are open."""
    if _Waiting.depth and _is_undivided(frame):
        _Waiting.signals.append(number)
    else:
        _Waiting.handlers[number](number, frame)


def _is_undivided(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in _NAMES or frame.f_code in _UNDIVIDED:
            return True
        frame = frame.f_back
    return False


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _begin() -> None:
    _Waiting.depth += 1
    if _Waiting.depth > 1:
        return
    try:
        _Waiting.signals.clear()
        for number in _SIGNALS:
            handler = _get_handler(number)
            if callable(handler) and handler is not _receive:
                _Waiting.handlers[number] = handler
                _set_handler(number, _receive)
    except BaseException:  # an interrupt that came before
        _put_handlers_back()
        _Waiting.depth -= 1
        raise


def _end() -> None:
    try:
        if _Waiting.depth == 1:
            _put_handlers_back()
    finally:
        _Waiting.depth -= 1
    if _Waiting.signals and not (_Waiting.depth and _is_undivided(sys._getframe(2))):
        raise_waiting()


def _put_handlers_back() -> None:
    try:
        for number, handler in _Waiting.handlers.items():
            if _get_handler(number) is _receive:  # (the program may have set another one meanwhile)
                _set_handler(number, handler)
    except BaseException:  # an interrupt by a handler that is back
        for number, handler in _Waiting.handlers.items():
            if _get_handler(number) is _receive:
                _set_handler(number, handler)
        raise


def raise_waiting() -> None:
    """Let signals that wait have their effect now, in the main thread."""
    if _Waiting.signals and _is_main():
        number = _Waiting.signals[0]
        _Waiting.signals.clear()
        _Waiting.handlers[number](number, sys._getframe(1))


class _Atomic(AbstractContextManager[T]):
    """Context that no interrupt divides; see `atomic`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._is_main = False
        self._is_used = False

    def __enter__(self) -> T:
        if self._is_used:
            raise StateError("this context was entered before; make another one for each `with`")
        self._is_used = True
        self._is_main = _is_main()
        if not self._is_main:
            return cast(T, self._inner.__enter__())
        _begin()
        try:
            value = self._inner.__enter__()
            if _Waiting.signals and not _is_undivided(sys._getframe(1)):
                self._inner.gen.close()
                raise_waiting()
        except BaseException:
            _end()
            raise
        return cast(T, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return cast("bool | None", self._inner.__exit__(kind, error, traceback))
        finally:
            if self._is_main:
                _end()


def atomic(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Like `contextlib.contextmanager`, for a context that interrupts neither enter nor leave half-way.

    An interrupt while the context is entered or left waits for the end of that, and is raised then; one that comes
    while it is entered leaves it again first. In the ``with`` block, interrupts act as ever.
    """
    usual = contextmanager(function)

    @functools.wraps(function)
    def context(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Atomic(usual(*args, **kwargs))

    return context


def undivided(function: Callable[P, T]) -> Callable[P, T]:
    """Let interrupts wait while a function runs inside of an atomic context.

    They are raised as soon as one is entered or left.
    """
    _UNDIVIDED.add(function.__code__)
    return function
