"""What Python does in a computation beside calling torch: it looks up names, reads values of tensors, and warns."""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Collection, Mapping
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from crp.engine.model_state import settings_in
from crp.engine.recordings import NotReplayableError

#: Packages whose names nobody changes.
_SETTLED = sys.stdlib_module_names | {"torch", "triton", "numpy", "zennit", "crp"}
#: Functions through which Python reads values, and which no operation of torch tells of.
_READING = {"numpy", "tolist", "_to_dlpack"}
_WARNING = {"warn", "warn_explicit"}
#: Packages of objects that hold no settings of a computation.
_WITHOUT_SETTINGS = {"logging", "functools", "torch"}
#: Entries of one name's value that are looked at again and again.
_MOST = 1000


class NamesRead:
    """Context that notes which names Python looks up, so as to tell later whether they stand for the same.

    Names are those of modules and of classes, and what follows them, as in ``settings.SCALE``. Of the packages that
    the computation is built on, nothing is noted, and nothing of what only the model can tell.

    Raises
    ------
    NotReplayableError
        At its end, if values of tensors were read, there was a warning, which a replay would not give again, or a name
        cannot be looked up later.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], tuple[Mapping[str, Any], object, list[object]]] = {}
        self._seen: set[tuple[CodeType, type]] = set()
        self._why: str | None = None

    def __enter__(self) -> NamesRead:
        if sys.getprofile() is not None:
            raise NotReplayableError("a profiler sees each call")
        self._last, self._collects = sys._getframe(1), gc.isenabled()
        gc.disable()  # (others are called when garbage is collected, wherever that is)
        sys.setprofile(self._see)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        sys.setprofile(None)
        del self._last
        if self._collects:
            gc.enable()
        if kind is None and self._why is not None:
            raise NotReplayableError(self._why)

    def are_same(self) -> bool:
        """Whether all names stand for what they stood for."""
        return all(
            names.get(name) is value and _settings(value) == settings
            for (_, name), (names, value, settings) in self._values.items()
        )

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        code = frame.f_code
        if event == "c_call" and called.__name__ in _READING | _WARNING:
            self._why = f"{code.co_name} calls {called.__name__}()"
        if event != "call":
            return
        if _package(frame.f_globals) in _SETTLED:
            if code.co_name in _WARNING:  # (since Python 3.14, they are functions in Python)
                self._why = "there was a warning"
            return
        for free in {*code.co_freevars} - {"__class__"}:
            self._why = self._why or _why_unknown(frame, free, self._last)
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        kind = owner if isinstance(owner, type) else type(owner)
        if (code, kind) not in self._seen:
            self._seen.add((code, kind))
            self._note(frame.f_globals, frame.f_globals, _names_looked_up(code), code.co_names, set())
            for base in kind.__mro__:
                if _package({}, base) not in _SETTLED:
                    self._note(base, vars(base), code.co_names, code.co_names, set())

    def _note(
        self, owner: object, names: Mapping[str, Any], read: Collection[str], then: Collection[str], done: set[int]
    ) -> None:
        """Note what names of a module or class stand for, and, where that is one itself, ``then`` its names."""
        done.add(id(owner))
        for name in names.keys() & {*read}:
            value = names[name]
            if (id(owner), name) not in self._values:
                settings = _settings(value)
                self._values[id(owner), name] = names, value, settings
                if isinstance(value, nn.Module) or len(settings) > _MOST:
                    self._why = f"{name} is beside the model"
            is_followed = isinstance(value, ModuleType | type) and id(value) not in done
            if is_followed and _package(vars(value), value) not in _SETTLED:
                self._note(value, vars(value), then, then, done)


def _names_looked_up(code: CodeType) -> set[str]:
    """Names that a function looks up in its module; ``co_names`` has attributes, too."""
    return {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _settings(value: object) -> list[object]:
    has_none = isinstance(value, ModuleType | type | FunctionType) or _package({}, type(value)) in _WITHOUT_SETTINGS
    return [] if has_none and not isinstance(value, Tensor) else settings_in(value)


def _package(names: Mapping[str, Any], owner: object = None) -> str:
    """Package of a module's names, or of a class."""
    name = owner.__module__ if isinstance(owner, type) else names.get("__name__")
    return str(name).partition(".")[0]


def _why_unknown(frame: FrameType, free: str, last: FrameType) -> str | None:
    """Why a variable that a function takes from around it may be another later; None where it cannot.

    It belongs to a function that runs inside of what is recorded (which ends at the frame ``last``), that runs around
    it, or that has ended and left the variable behind.
    """
    around: FrameType | None = frame.f_back
    is_inside = True
    while around is not None:
        is_inside = is_inside and around is not last
        if free in around.f_code.co_cellvars:
            break
        around = around.f_back
    if around is not None and is_inside:
        return None
    settled = isinstance(frame.f_locals.get(free), FunctionType | ModuleType | type | bool | int | float | str | None)
    return None if settled and around is None else f"{free} comes from around {frame.f_code.co_name}"
