"""What Python does in a computation beside calling torch: it looks up names, reads values of tensors, and warns."""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Collection, Hashable, Iterator, Mapping
from types import CodeType, FrameType, ModuleType
from typing import Any

import numpy as np
from torch import nn

from crp.engine.model_state import _SETTLED, State, _key_of, _package
from crp.engine.recordings import NotReplayableError
from crp.layers.state import random_numbers

#: Functions through which values are read, and which no operation of torch tells of.
_READING = {
    *("numpy", "tolist", "_to_dlpack", "_to_dlpack_versioned", "apply_", "map_", "map2_"),
    *("tensor_split", "_pack_padded_sequence", "_pad_packed_sequence"),  # (places and lengths, by the host)
}
_WARNING = {"warn", "warn_explicit"}
#: Functions of these packages through which other threads are at work, which nothing here sees.
_OF_THREADS = {"threading": ("wait", "join"), "concurrent": ("submit",)}


#: What a name stands for that is not there.
_Missing = type("_Missing", (), {})


class NamesRead:
    """Context that notes which names Python looks up, so as to tell later whether they stand for the same.

    Names are those of modules and of classes, and what follows them, as in ``settings.SCALE``. Of the packages that
    the computation is built on, nothing is noted, and nothing of what only the model can tell.

    Parameters
    ----------
    functions : collection
        Those that the model leads to (`State.functions`).

    Raises
    ------
    NotReplayableError
        At its end, if values of tensors were read, random numbers drawn, or threads at work; if there was a warning,
        which a replay would not give again, a name stands for something else already, or a function takes something
        from around it that nobody can look at later.
    """

    def __init__(self, functions: Collection[Hashable] = ()) -> None:
        self._functions = functions
        self._places: dict[tuple[int, str], Mapping[str, Any]] = {}
        self._state = State()
        self._seen: set[tuple[CodeType, type]] = set()
        self._made: set[object] = set()  # code of functions that are made meanwhile
        self._called: dict[Hashable, str] = {}
        self._why: str | None = None

    def __enter__(self) -> NamesRead:
        if sys.getprofile() is not None:
            raise NotReplayableError("a profiler sees each call")
        self._random, self._collects = random_numbers(), gc.isenabled()
        gc.disable()  # (others are called when garbage is collected, wherever that is)
        sys.setprofile(self._see)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        sys.setprofile(None)
        before, self._random = self._random, []  # (which hold tensors)
        if self._collects:
            gc.enable()
        unknown = [name for key, name in self._called.items() if key not in {*self._functions, *self._state.functions}]
        if unknown:
            self._why = f"{unknown[0]} takes something from around it"
        elif not all(map(np.array_equal, random_numbers(), before)):
            self._why = "random numbers were drawn"
        elif not self.are_same():
            self._why = "a name stands for something else than when it was read, or for what cannot be looked at"
        if kind is None and self._why is not None:
            raise NotReplayableError(self._why)

    def are_same(self) -> bool:
        """Whether all names stand for what they stood for."""
        return self._state.holds(*(names.get(name, _Missing) for (_, name), names in self._places.items()))

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        code = frame.f_code
        if event == "c_call" and called.__name__ in _READING | _WARNING:
            self._why = f"{code.co_name} calls {called.__name__}()"
        if event != "call":
            return
        if (package := _package(frame.f_globals)) in _SETTLED:
            # (since Python 3.14, functions that warn are in Python)
            if code.co_name in _WARNING or code.co_name in _OF_THREADS.get(package, ()):
                self._why = f"{code.co_name}() was called"
            return
        self._made |= {*code.co_consts} if any(isinstance(one, CodeType) for one in code.co_consts) else set()
        if {*code.co_freevars} - {"__class__"} and code not in self._made:
            around = [frame.f_locals[free] for free in code.co_freevars if free in frame.f_locals]
            self._called[_key_of(code, around)] = code.co_name
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        kind = owner if isinstance(owner, type) else type(owner)
        if (code, kind) not in self._seen:
            self._seen.add((code, kind))
            self._note_names_in(code, frame.f_globals, kind)

    def _note_names_in(self, code: CodeType, names: Mapping[str, Any], kind: type) -> None:
        """Note names that a function looks up, and those of the class of its first argument."""
        inner = {code.co_name, *code.co_names, *(one for one in code.co_consts if isinstance(one, str))}
        # (special methods, which no code names, may be functions of another name)
        of_classes = (entry for one in kind.__mro__ for entry in vars(one).items())
        inner |= {name for name, value in of_classes if getattr(value, "__code__", None) is code}
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._note(names, names, step.argval, inner, {id(names)})
            elif step.opname == "IMPORT_NAME":
                for name in _names_of_module(step.argval, str(names.get("__package__") or "")):
                    self._note(sys.modules, sys.modules, name, inner, set())
        self._note_names_of(kind, inner, set())

    def _note(self, owner: object, names: Mapping[str, Any], name: str, inner: Collection[str], done: set[int]) -> None:
        """Note what a name stands for, and, where that is a module or class, ``inner`` names of it, too."""
        value = names.get(name, _Missing)
        if (id(owner), name) not in self._places:
            self._places[id(owner), name] = names
            self._state.add(value)
            if isinstance(value, nn.Module):
                self._why = f"{name} is beside the model"
        if isinstance(value, ModuleType | type) and id(value) not in done:
            self._note_names_of(value, inner, done)

    def _note_names_of(self, owner: ModuleType | type, inner: Collection[str], done: set[int]) -> None:
        """Note names of a module, or of a class and its bases, up to the first that has them."""
        done.add(id(owner))
        owners = [one for one in getattr(owner, "__mro__", [owner]) if _package(vars(one), one) not in _SETTLED]
        for name in {name for one in owners for name in vars(one).keys() & {*inner}}:
            for one in owners:
                self._note(one, vars(one), name, inner, done)
                if name in vars(one):
                    break


def _names_of_module(name: str, package: str) -> Iterator[str]:
    """Names under which a module may be known that a package imports."""
    above = package.split(".")
    for length in range(len(above) + 1):
        full = ".".join([*above[:length], name]).strip(".")
        if full in sys.modules and full.partition(".")[0] not in _SETTLED:
            yield full
