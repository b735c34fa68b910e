"""What a model and a composite are at a moment, to be compared with what they are later."""

from __future__ import annotations

import operator
from array import array
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode
from zennit.core import Composite

from crp.engine.module_hooks import _ON_ALL_MODULES, HOOKS
from crp.layers import modules_of
from crp.layers.glimpses import glimpse

#: Attributes that torch gives every module: parameters and buffers are compared one by one, and where there are hooks,
#: nothing is.
_OWN = frozenset(vars(nn.Module()))
#: Packages whose names nobody changes.
_SETTLED = stdlib_module_names | {"torch", "triton", "numpy", "zennit", "crp"}
#: Common types of what cannot change without being replaced.
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type, type(None)})
_SEVERAL = (list, tuple, set, frozenset, deque)
_CONTAINERS = (dict, *_SEVERAL)
_BUFFERS = (bytearray, memoryview, array)
#: What stands for something else.
_WRAPPERS = (MethodType, partial, property, staticmethod, classmethod, MappingProxyType, CellType, _lru_cache_wrapper)
#: What has no settings. (What code reads of classes and modules is noted where it runs.)
_WITHOUT_SETTINGS = (type, ModuleType, BuiltinFunctionType, CodeType, Logger)
#: Parts of values that are looked at again and again.
_MOST = 20_000


def is_traced() -> bool:
    """Whether modes of torch (but a default device), or hooks on saved tensors, see each operation."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if not isinstance(mode, DeviceContext)]
    saved_by = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)  # (not in older ones)
    return bool(modes) or saved_by(True) is not None or _get_current_dispatch_mode() is not None


def is_watched(model: nn.Module) -> bool:
    """Whether hooks on a model, or modes of torch, see each of its calls, so that none of them may be left out."""
    on_model = (getattr(module, kind) for module in modules_of(model).values() for kind in HOOKS)
    return is_traced() or any(_ON_ALL_MODULES) or any(on_model)


class State:
    """What values are at a moment; compared by ``==``.

    Values that were replaced, tensors that were written to, and lists, dicts, objects and functions that lead to
    something else make a difference. Writes through ``.data`` into the same memory are noticed where the host has it
    (see `glimpse`). A state that leads to an iterator, or to too much, cannot be known, and equals no other.

    Parameters
    ----------
    *values

    Attributes
    ----------
    functions : set
        Those that values lead to, by `_key_of`.
    """

    def __init__(self, *values: object) -> None:
        # (Objects are kept, so that no other one can take their place in memory.)
        self._objects: list[object] = []
        self._entries: list[object] = []
        self._seen: set[int] = set()
        self._n_left, self._is_known = _MOST, True
        self.functions: set[Hashable] = set()
        self.add(*values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State) or len(self._objects) != len(other._objects):
            return False
        is_known = self._is_known and other._is_known
        return is_known and all(map(operator.is_, self._objects, other._objects)) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def add(self, *values: Any) -> None:
        """Add what values are, and all that they lead to, one after the other."""
        todo, entries, objects = [*reversed(values)], self._entries, self._objects
        while todo and self._is_known:
            value = todo.pop()
            if (kind := type(value)) in _SIMPLE:
                entries += value, kind
            elif isinstance(value, Tensor):
                objects.append(value)
                entries.append(_state_of(value))
            elif isinstance(value, nn.Module):
                objects.append(value)
                for module in modules_of(value).values() if id(value) not in self._seen else ():
                    self._add_module(module)
            else:
                if not isinstance(value, _CONTAINERS) or id(value) in self._seen:
                    objects.append(value)
                if id(value) not in self._seen and not isinstance(value, _WITHOUT_SETTINGS):
                    self._seen.add(id(value))
                    parts = self._parts_of(value)
                    entries.append(len(parts))
                    todo += parts
                    self._n_left -= len(parts)
                    self._is_known = self._n_left > 0 and not hasattr(kind, "__next__")

    def _add_module(self, module: nn.Module) -> None:
        """Add attributes, parameters and buffers of a module, and which its children are."""
        self._seen.add(id(module))
        kind, attributes = type(module), vars(module)
        self._objects += kind, kind.forward, *attributes, *attributes.values(), *attributes["_modules"].values()
        for own in (attributes["_parameters"], attributes["_buffers"]):
            if own:
                self._objects += own.values()
                self._entries += map(_state_of, own.values())
        # (most attributes are simple: the others are few)
        for value in [v for name, v in attributes.items() if name not in _OWN and type(v) not in _SIMPLE]:
            if type(value) is not tuple or not _SIMPLE.issuperset(map(type, value)):
                self.add(value)

    def _parts_of(self, value: Any) -> list[Any]:
        """What a value leads to in one step."""
        if isinstance(value, FunctionType):
            around = [content for cell in value.__closure__ or () for content in get_referents(cell)]
            self.functions.add(_key_of(value.__code__, around))
            self._objects.append(value.__code__)
            return [*around, *filter(None, (value.__defaults__, value.__kwdefaults__, vars(value)))]
        if isinstance(value, _WRAPPERS):
            return get_referents(value)
        if isinstance(value, ContextVar):
            return [value.get(None)]
        if isinstance(value, np.ndarray):
            content = value.flat if value.dtype.hasobject else [hash(value.tobytes())]
            return [str(value.dtype), str(value.shape), *content]
        if isinstance(value, _BUFFERS):
            return [bytes(value)]
        entries = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, _SEVERAL) else ()
        return [*entries, *_attributes(value)]


class ModelState(State):
    """State of all modules of a model, and of the settings of a composite.

    Parameters
    ----------
    model : nn.Module
    composite : zennit.core.Composite
    """

    def __init__(self, model: nn.Module, composite: Composite) -> None:
        settings = {name: value for name, value in vars(composite).items() if not name.startswith("_")}
        for name in ("handles", "hook_refs", "applied"):  # (what changes when it is put on a model)
            settings.pop(name, None)
        super().__init__(model, settings)


def _key_of(code: CodeType, around: Iterable[object]) -> Hashable:
    """Which function it is, from its code and what it takes from around it."""
    return code, *map(id, around)


def weights_of(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Parameters and buffers by name, with their versions, which every write but those through ``.data`` changes."""
    # (torch's own `named_parameters` takes as long as what a GPU does for a small part)
    return {
        f"{name}.{own}" if name else own: (t, 0 if t.is_inference() else t._version)
        for name, module in modules_of(model).items()
        for tensors in (module._parameters, module._buffers)
        for own, t in tensors.items()
        if t is not None
    }


def changed_weights(before: dict[str, tuple[Tensor, int]], after: dict[str, tuple[Tensor, int]]) -> list[str]:
    """Names of those that were replaced, written to or taken away."""
    return [
        name
        for name, (tensor, version) in before.items()
        if name not in after or after[name][0] is not tensor or after[name][1] != version
    ]


def _state_of(tensor: Tensor | None) -> object:
    if tensor is None or tensor.is_inference():
        return None
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride(), glimpse(tensor)


def _package(names: Mapping[str, Any], owner: object = None) -> str:
    """Package of a module's names, or of a class."""
    name = owner.__module__ if isinstance(owner, type) else names.get("__name__")
    return str(name).partition(".")[0]


def _attributes(value: Any) -> list[Any]:
    """Names and values of what an object has of its own, and of what is no method of its class."""
    own, names = getattr(value, "__dict__", None), _names_of(value.__class__)
    of_object = [*own, *own.values()] if isinstance(own, dict) else []
    return of_object + [getattr(value, name, None) for name in names]


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
