"""What a model and a composite are at a moment, to be compared with what they are later."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode
from zennit.core import Composite

from crp.layers import modules_of

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
#: Attributes that torch gives every module: parameters and buffers are compared one by one, and where there are hooks,
#: nothing is.
_OWN = frozenset(vars(nn.Module()))
#: What can change without being replaced.
_CHANGEABLE = (list, dict, set, Tensor)
#: What has attributes, but no settings.
_NO_SETTINGS = (nn.Module, type, ModuleType, FunctionType, MethodType)
#: How deep settings in objects are looked at: numbers, words, and entries of their lists and dicts.
_DEPTH = 2
#: Common types of what cannot.
_PLAIN = frozenset({bool, int, float, str, tuple, type(None)})


def is_traced() -> bool:
    """Whether modes of torch, or hooks on all modules, see each operation or call."""
    of_all = (vars(torch_module).get(f"_global{name}") for name in _HOOKS)
    return any(of_all) or torch._C._len_torch_function_stack() > 0 or _get_current_dispatch_mode() is not None


def is_watched(model: nn.Module) -> bool:
    """Whether hooks on a model, or modes of torch, see each of its calls, so that none of them may be left out."""
    return is_traced() or any(getattr(module, name) for module in modules_of(model).values() for name in _HOOKS)


class ModelState:
    """Attributes, parameters and buffers of all modules, and settings of a composite; compared by ``==``.

    Values that were replaced, tensors that were written to, lists, dicts and objects with other entries, and another
    ``forward`` of a class make a difference.
    Writes through ``.data`` into the same memory are not noticed; a computation that reads the memory sees them.

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
                    self._tensors += _settings(value) if isinstance(value, Tensor) or value else ()
                elif id(value) not in seen and not isinstance(value, _NO_SETTINGS) and getattr(value, "__dict__", None):
                    seen.add(id(value))  # (modules share one, such as the configuration of Hugging Face's)
                    self._tensors += _settings(vars(value), _DEPTH)
        settings = {name: value for name, value in vars(composite).items() if not name.startswith("_")}
        for name in ("handles", "hook_refs", "applied"):  # (what changes when it is put on a model)
            settings.pop(name, None)
        self._tensors += _settings(settings)

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
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape


def _settings(value: Any, depth: int = 6) -> Iterator[object]:
    """Numbers, words and tensors' states in nested containers and objects; other things by their identity."""
    if value is None or isinstance(value, bool | int | float | str | type):
        yield value
    elif isinstance(value, Tensor):
        yield id(value), _state_of(value)
    elif depth == 0 or (callable(value) and not hasattr(value, "__dict__")):
        yield id(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield str(key)
            yield from _settings(entry, depth - 1)
    elif isinstance(value, list | tuple | set):
        yield len(value)
        for entry in value:
            yield from _settings(entry, depth - 1)
    else:
        yield id(value)
        if not isinstance(value, nn.Module):
            for name, entry in vars(value).items() if hasattr(value, "__dict__") else ():
                if not name.startswith("_"):
                    yield name
                    yield from _settings(entry, depth - 1)
