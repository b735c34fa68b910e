"""What a model and a composite are at a moment, to be compared with what they are later."""

from __future__ import annotations

import operator
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import _lru_cache_wrapper, lru_cache, partial
from gc import get_referents
from logging import Logger
from sys import stdlib_module_names
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode
from zennit.core import Composite, Hook

from crp.engine.module_hooks import _ON_ALL_MODULES, _hooks_of
from crp.layers import modules_of
from crp.layers.devices import MOVING
from crp.layers.marks import TensorMark
from crp.layers.state import version_of

#: Attributes that torch gives every module: parameters and buffers are compared one by one, and where there are hooks,
#: nothing is.
_OWN = frozenset(vars(nn.Module()))
#: Packages whose names nobody changes.
_SETTLED = stdlib_module_names | {"torch", "triton", "numpy", "zennit", "crp"}
#: Common types of what cannot change without being replaced.
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type, type(None)})
_SEVERAL = (list, tuple, set, frozenset, deque)
_BUFFERS = (bytearray, memoryview, array)
#: What stands for something else.
_WRAPPERS = (MethodType, partial, property, staticmethod, classmethod, MappingProxyType, CellType, _lru_cache_wrapper)
#: What has no settings. (What code reads of classes and modules is noted where it runs.)
_WITHOUT_SETTINGS = (type, ModuleType, BuiltinFunctionType, CodeType, Logger)
#: Parts of values that are looked at again and again.
_MOST = 20_000
#: Finds what an object leads to in one step.
_Reader: TypeAlias = Callable[[Any], list[Any]]


def is_traced() -> bool:
    """Whether modes of torch (but a default device), or hooks on saved tensors, see each operation."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if not isinstance(mode, DeviceContext)]
    saved_by = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)  # (not in older ones)
    return bool(modes) or saved_by(True) is not None or _get_current_dispatch_mode() is not None


def is_watched(model: nn.Module) -> bool:
    """Whether hooks on a model, or modes of torch, see each of its calls, so that none of them may be left out."""
    modules = modules_of(model).values()
    is_moved = any(MOVING in module.__dict__ for module in modules)
    return is_traced() or is_moved or any(_ON_ALL_MODULES) or any(map(any, map(_hooks_of, modules)))


class State:
    """What values are, and all that they lead to, at a moment.

    It holds no longer where one is replaced, where a tensor is written to, and where a list, dict, object or function
    leads to something else. Writes through ``.data`` into the same memory are noticed where the host has it (see
    `TensorMark`). What leads to an iterator, a scripted module, a tensor without memory of its own, or too much,
    cannot be known: it never holds.

    Attributes
    ----------
    functions : set
        Those that values lead to, by `_key_of`.
    """

    def __init__(self, *values: object) -> None:
        self._values: list[Any] = []
        self._tensors: list[tuple[TensorMark, Tensor]] = []
        # What may change, how it is read, and what was read. (Kept, so that nothing else can take its place in memory.)
        self._read: list[tuple[Any, _Reader, list[Any]]] = []
        self._seen: set[int] = set()
        self._n_left, self._is_known = _MOST, True
        self.functions: set[Hashable] = set()
        self.add(*values)

    def holds(self, *values: object) -> bool:
        """Whether values are those that were added, and lead to the same as then."""
        if not (self._is_known and _are_same(values, self._values)):
            return False
        same = all(_are_same(reader(value), parts) for value, reader, parts in self._read)
        return same and all(mark.is_of(tensor) for mark, tensor in self._tensors)

    def leads_to(self, kinds: tuple[type, ...]) -> bool:
        """Whether values lead to an object of some kinds, or to more than can be known."""
        return not self._is_known or any(isinstance(value, kinds) for value, _, _ in self._read)

    def add(self, *values: object) -> None:
        """Add what values are, and all that they lead to."""
        self._values += values
        todo = [*values]
        while todo and self._is_known:
            value = todo.pop()
            kind: Any = type(value)
            if kind in _SIMPLE or id(value) in self._seen:
                continue
            if isinstance(value, torch.jit.ScriptModule):  # (what it holds is outside of Python)
                self._is_known = False
                break
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                try:
                    self._tensors.append((TensorMark(value), value))
                except RuntimeError:  # (it has no memory of its own, as sparse ones, and those of exported programs)
                    self._is_known = False
                    break
            if (reader := _reader_of(kind)) is None:
                continue
            parts = reader(value)
            if not _is_constant(kind):
                self._read.append((value, reader, parts))
            if isinstance(value, FunctionType):
                self.functions.add(_key_of(value.__code__, _around(value)))
            elif isinstance(value, nn.Module):
                self._seen |= {id(kind.forward), *(id(value.__dict__.get(name)) for name in _OWN)}
            elif isinstance(value, Hook):  # (what a pass leaves in a rule)
                self._seen |= {id(vars(value).get(name)) for name in ("stored_tensors", "tensor_handles")}
            todo += parts
            self._n_left -= len(parts)
            self._is_known = self._n_left > 0 and not hasattr(kind, "__next__")


def reads_of(model: nn.Module, composite: Composite) -> list[object]:
    """What an attribution reads beside data: a model, and the settings of a composite."""
    settings = {name: value for name, value in vars(composite).items() if not name.startswith("_")}
    for name in ("handles", "hook_refs", "applied"):  # (what changes when it is put on a model)
        settings.pop(name, None)
    return [model, *settings, *settings.values()]


def _are_same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether values are the same objects, or equal numbers, words and the like."""
    if len(now) != len(before):
        return False
    return all(map(operator.is_, now, before)) or all(
        a is b or (type(a) is type(b) and type(a) in _SIMPLE and a == b) for a, b in zip(now, before, strict=True)
    )


@lru_cache(maxsize=1024)
def _reader_of(kind: type) -> _Reader | None:
    """How to find what an object of a class leads to in one step; None where it has no settings."""
    readers: list[tuple[Any, _Reader | None]] = [
        (nn.Module, _of_module),
        (_WITHOUT_SETTINGS, None),
        (FunctionType, _of_function),
        (_WRAPPERS, get_referents),
        (ContextVar, lambda variable: [variable.get(None)]),
        (np.ndarray, _of_array),
        (_BUFFERS, lambda value: [bytes(value)]),
        (dict, lambda value: [*value, *value.values(), *_attributes(value)]),
        (_SEVERAL, lambda value: [*_attributes(value), *get_referents(value)]),  # (whose class may refuse a length)
        (object, _attributes if _names_of(kind) or not kind.__dictoffset__ else _own_attributes),
    ]
    plain: dict[type, _Reader] = {dict: lambda value: [*value, *value.values()], **dict.fromkeys(_SEVERAL, list)}
    return plain.get(kind) or next(reader for kinds, reader in readers if issubclass(kind, kinds))


@lru_cache(maxsize=1024)
def _is_constant(kind: type) -> bool:
    """Whether objects of a class lead to the same for ever; what they lead to may change."""
    settings = getattr(kind, "__dataclass_params__", None)
    return kind in (tuple, frozenset) or (settings is not None and settings.frozen and _package({}, kind) in _SETTLED)


def _of_module(module: nn.Module) -> list[Any]:
    attributes, kind = vars(module), type(module)
    parts = [kind, kind.forward, *attributes, *attributes.values()]
    for own in (attributes["_parameters"], attributes["_buffers"], attributes["_modules"]):
        if own:
            parts += own
            parts += own.values()
    return parts


def _of_function(function: FunctionType) -> list[Any]:
    more = filter(None, (function.__defaults__, function.__kwdefaults__, vars(function)))
    return [function.__code__, *_around(function), *more]


def _of_array(array: np.ndarray[Any, Any]) -> list[Any]:
    content = array.flat if array.dtype.hasobject else [hash(array.tobytes())]
    return [str(array.dtype), str(array.shape), *content]


def _around(function: FunctionType) -> list[Any]:
    """What a function takes from around it."""
    return [content for cell in function.__closure__ or () for content in get_referents(cell)]


def _key_of(code: CodeType, around: Iterable[object]) -> Hashable:
    """Which function it is, from its code and what it takes from around it."""
    return code, *map(id, around)


class _Parts:
    """Modules, parameters and buffers of a model, by which it is told later which of them have changed.

    Writes through ``.data`` are noticed as by a `TensorMark`.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Callable[[Any], bool]] = {}

    def note(self, model: nn.Module) -> None:
        """Note what a model has now."""
        changed, noted = {*self.changed(model)}, self._noted
        parts = _parts_by_name(model).items()
        self._noted = {name: _recognizer(part) if name in changed else noted[name] for name, part in parts}

    def changed(self, model: nn.Module) -> list[str]:
        """Names of those that were replaced, written to, added or taken away since then."""
        noted, parts = self._noted, _parts_by_name(model)
        return [name for name in noted | parts if not (name in noted and name in parts and noted[name](parts[name]))]


def _parts_by_name(model: nn.Module) -> dict[str, object]:
    # (torch's own `named_parameters` takes as long as what a GPU does for a small part)
    modules = modules_of(model)
    parts = dict[str, object](modules)
    for name, module in modules.items():
        for own, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                parts[f"{name}.{own}" if name else own] = tensor
    return parts


def _recognizer(part: Any) -> Callable[[Any], bool]:
    """What tells later whether something is this part, and nobody has written to it."""
    version = version_of(part) if isinstance(part, Tensor) else None
    if version is not None:
        with suppress(RuntimeError):  # (sparse ones have no memory of their own)
            return TensorMark(part).is_of
    return lambda other: other is part and (version is None or version_of(other) == version)


def _package(names: Mapping[str, Any], owner: object = None) -> str:
    """Package of a module's names, or of a class."""
    name = owner.__module__ if isinstance(owner, type) else names.get("__name__")
    return str(name).partition(".")[0]


def _attributes(value: Any) -> list[Any]:
    """Names and values of what an object has of its own, and of what is no method of its class."""
    own, names = getattr(value, "__dict__", None), _names_of(value.__class__)
    of_object = [*own, *own.values()] if isinstance(own, dict) else []
    return of_object + [getattr(value, name, None) for name in names]


def _own_attributes(value: Any) -> list[Any]:
    """The same for an object of a class that has nothing else."""
    return [*vars(value), *vars(value).values()]


@lru_cache(maxsize=256)
def _names_of(kind: type) -> tuple[str, ...]:
    """Names of slots, and of what a class of others has beside methods and properties."""
    of_bases = [(vars(base).items(), _package({}, base) in _SETTLED) for base in kind.__mro__]
    return tuple(
        name
        for items, is_settled in of_bases
        for name, value in items
        if name[:2] != "__"
        and (isinstance(value, MemberDescriptorType) or not (is_settled or hasattr(value, "__get__")))
    )
