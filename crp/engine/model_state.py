"""What a model and a composite are at a moment, to be compared with what they are later."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
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
#: What can change without being replaced.
_CHANGEABLE = (list, dict, set, deque, Tensor, np.ndarray)
#: What has attributes, but no settings.
_NO_SETTINGS = (nn.Module, type, ModuleType, FunctionType, MethodType)
#: How deep settings in objects are looked at: numbers, words, and entries of their lists and dicts.
_DEPTH = 4
#: Common types of what cannot.
_PLAIN = frozenset({bool, int, float, str, tuple, type(None)})
_SIMPLE = _PLAIN - {tuple} | {type}


def is_traced() -> bool:
    """Whether modes of torch (but a default device) see each operation."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if not isinstance(mode, DeviceContext)]
    return bool(modes) or _get_current_dispatch_mode() is not None


def is_watched(model: nn.Module) -> bool:
    """Whether hooks on a model, or modes of torch, see each of its calls, so that none of them may be left out."""
    on_model = (getattr(module, kind) for module in modules_of(model).values() for kind in HOOKS)
    return is_traced() or any(_ON_ALL_MODULES) or any(on_model)


class ModelState:
    """Attributes, parameters and buffers of all modules, and settings of a composite; compared by ``==``.

    Values that were replaced, tensors that were written to, lists, dicts and objects with other entries, and another
    ``forward`` of a class make a difference.
    Writes through ``.data`` into the same memory are noticed where the host has it (see `glimpse`).

    Parameters
    ----------
    model : nn.Module
    composite : zennit.core.Composite
    """

    def __init__(self, model: nn.Module, composite: Composite) -> None:
        # (The values are kept, so that no other object can take their place in memory.)
        self._values: list[object] = []
        self._tensors: list[object] = []
        seen: set[int] = set()
        for module in modules_of(model).values():
            attributes = vars(module)
            self._values += (type(module).forward, *attributes.values())
            for own in (attributes["_parameters"], attributes["_buffers"]):
                if own:
                    self._values += own.values()
                    self._tensors += map(_state_of, own.values())
            # (most attributes are of these types: the others are few)
            for value in [v for name, v in attributes.items() if name not in _OWN and type(v) not in _PLAIN]:
                if isinstance(value, _CHANGEABLE):
                    self._tensors += settings_in(value) if isinstance(value, Tensor | np.ndarray) or value else ()
                elif id(value) not in seen and not isinstance(value, _NO_SETTINGS) and (own := _attributes(value)):
                    seen.add(id(value))  # (modules share one, such as the configuration of Hugging Face's)
                    self._tensors += settings_in({name: getattr(value, name, None) for name in own}, _DEPTH)
        settings = {name: value for name, value in vars(composite).items() if not name.startswith("_")}
        for name in ("handles", "hook_refs", "applied"):  # (what changes when it is put on a model)
            settings.pop(name, None)
        self._tensors += settings_in(settings)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelState) or len(self._values) != len(other._values):
            return False
        return all(map(operator.is_, self._values, other._values)) and self._tensors == other._tensors

    __hash__ = None  # type: ignore[assignment]


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
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, glimpse(tensor)


def settings_in(value: Any, depth: int = 6) -> list[object]:
    """Numbers, words and tensors' states in nested containers and objects; other things by their identity."""
    found: list[object] = []
    _collect(value, depth, found, set())
    return found


def _collect(value: Any, depth: int, found: list[object], seen: set[int]) -> None:
    entries: Any = ()
    if type(value) in _SIMPLE:
        found.append(value)
    elif isinstance(value, dict):
        found += map(str, value)
        entries = value.values()
    elif isinstance(value, list | tuple | set | deque):
        entries = value
    elif isinstance(value, Tensor):
        found += id(value), _state_of(value)
    elif isinstance(value, np.ndarray):
        found += value.dtype, value.shape, hash(value.tobytes())
    else:
        found.append(value if isinstance(value, bool | int | float | str | type) else id(value))
        if depth > 0 and id(value) not in seen and not isinstance(value, type):
            seen.add(id(value))  # (rules stand in several places)
            names = [name for name in _attributes(value) if name[:1] != "_"]
            found += names
            entries = [getattr(value, name, None) for name in names]
            if isinstance(value, nn.Module):  # (in a list, which hides it from the model)
                entries += [*value.parameters(), *value.buffers()]
    if entries:
        found.append(len(entries))
    for entry in entries if depth > 0 else ():
        if type(entry) in _SIMPLE:  # (nearly all are)
            found.append(entry)
        else:
            _collect(entry, depth - 1, found, seen)


def _attributes(value: Any) -> Sequence[str]:
    """Names of what an object has of its own, in its ``__dict__`` or in slots."""
    return [*getattr(value, "__dict__", ()), *_slots_of(value.__class__)]


@lru_cache(maxsize=256)
def _slots_of(kind: type) -> tuple[str, ...]:
    each = (kind.__dict__.get("__slots__", ()) for kind in kind.__mro__)
    names = [name for slots in each for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name[:2] != "__")
