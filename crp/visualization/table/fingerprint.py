"""Fingerprints: sha256 over the content of models, composites, datasets and functions.

Two objects that would compute the same have the same fingerprint, wherever and however often they are built; whatever
decides about a result (a rule's epsilon, a weight, a function's code, a default, a value it closes over) changes it.
Classes and functions of installed libraries count by name; functions that are met as values, such as a rule's
modifiers, by their code. Of the user's own modules, what such a function reads there counts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite, Hook

from crp.errors import InputError
from crp.layers import unwrap
from crp.visualization.table.source import syntax_of

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
#: What zennit's hooks and composites keep of past calls, and of the model that they are on: no part of what they are.
_RUNTIME = frozenset({"stored_tensors", "tensor_handles", "handles", "hook_refs", "active"})
#: What modules note of the last data that they have seen, by type: no part of what they are.
_NOTES = {"MultiScaleRoIAlign": frozenset({"scales", "map_levels"})}
#: Entries of a class of the user's own that count, and names of those that do not.
_IN_CLASS = (types.FunctionType, staticmethod, classmethod, property, int, float, str, tuple)
_CALLED = (types.FunctionType, types.BuiltinFunctionType, functools.partial, type)
_CONTAINERS = (list, dict, set, frozenset, bytes, Tensor, np.ndarray, functools.partial)
_ABOUT_CLASS = frozenset({"__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__"})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
#: Threads that hash the large tensors of a model, and bytes that each copies to the host at once.
_READERS, _PIECE = 8, 1 << 20
_BY_REPR = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice, PurePath)


def fingerprint(value: object) -> str:
    """Fingerprint of any value: a function, a concept, a tensor, a dict of settings.

    Parameters
    ----------
    value : object
        Functions count by name, code, defaults, and the values of their closure and of the globals that they read;
        objects by class and attributes; tensors and arrays by their bytes.

    Returns
    -------
    str
        64 hexadecimal digits.

    Notes
    -----
    A function that changes what it closes over, such as a list that it appends to, changes its fingerprint.
    """
    return _Walk().digest(value).hex()


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a model: its class, its modules with their settings, and all parameters and buffers.

    Settings are the public attributes of a module that are numbers, strings or sequences of these. Of classes of the
    user's own, the code of methods counts. Neither the device nor `torch.compile` and `DataParallel` wrappers matter.
    """
    return _Walk().digest(unwrap(model)).hex()


def fingerprint_composite(composite: Composite | None) -> str:
    """Fingerprint of a composite: its rules and canonizers with all their settings, in order."""
    return fingerprint(composite)


def fingerprint_dataset(dataset: Any, samples: int = 8) -> str:
    """Fingerprint of a dataset: its class, its length, and the content of a few samples, evenly spread.

    Samples are read by index, twice each. Where the two differ, as with random augmentation, only their shape counts; a
    sample that raises counts as that.
    """
    n = len(dataset)
    indices = sorted({int(i) for i in np.linspace(0, n - 1, min(n, samples))}) if n else []
    return fingerprint(("dataset", type(dataset).__qualname__, n, [_sample(dataset, i) for i in indices]))


def _sample(dataset: Any, index: int) -> object:
    try:
        first, second = dataset[index], dataset[index]
    except Exception:
        return "no sample"
    return first if fingerprint(first) == fingerprint(second) else _shape(first)


def _shape(value: object) -> object:
    if isinstance(value, Tensor | np.ndarray):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, list | tuple):
        return [_shape(entry) for entry in value]
    return type(value).__qualname__


class _Walk:
    """One walk over a value; everything below it is hashed once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, bytes]] = {}
        self._path: dict[int, int] = {}

    def digest(self, value: object) -> bytes:
        """Digest of any value."""
        if type(value) in _PLAIN:
            return _hash(type(value).__name__, repr(value).encode())
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if id(value) in self._path:  # a cycle counts by the number of steps back to where it begins
            return _hash("cycle", str(len(self._path) - self._path[id(value)]).encode())
        self._path[id(value)] = len(self._path)
        try:
            result = self._digest(value)
        finally:
            del self._path[id(value)]
        self._known[id(value)] = (value, result)  # (keeping the value keeps its id from being used again)
        return result

    def _all(self, kind: str, values: Iterable[object]) -> bytes:
        return _hash(kind, *map(self.digest, values))

    def _mapping(self, items: Mapping[Any, Any]) -> bytes:
        return _hash("mapping", *sorted(self.digest(key) + self.digest(entry) for key, entry in items.items()))

    def _digest(self, value: Any) -> bytes:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return self._all("objects", [value.shape, value.tolist()])
            return _hash("array", f"{value.dtype} {value.shape}".encode(), np.ascontiguousarray(value).data)
        if isinstance(value, np.generic):
            return _hash("number", f"{value.dtype}".encode(), value.tobytes())
        if isinstance(value, Enum):
            return _hash("enum", f"{type(value).__qualname__}.{value.name}".encode())
        if isinstance(value, _BY_REPR):
            return _hash("repr", type(value).__name__.encode(), str(value).encode())
        if isinstance(value, Image.Image):
            return _hash("image", f"{value.mode} {value.size}".encode(), value.tobytes())
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, types.ModuleType):
            return _hash("module", value.__name__.encode())
        if isinstance(value, type):
            return self._class(value)
        return (self._function(value) if callable(value) else None) or self._container(value)

    def _container(self, value: Any) -> bytes:
        if type(value) in (list, tuple):
            return self._all(type(value).__name__, value)
        if type(value) in (set, frozenset):
            return _hash("set", *sorted(map(self.digest, value)))
        if type(value) is dict:
            return self._mapping(value)
        return self._object(value)

    def _function(self, value: Any) -> bytes | None:
        """Digest of a function, method or partial, by its parts; None for other callable objects."""
        if isinstance(value, functools.partial):
            return self._all("partial", [value.func, value.args, value.keywords])
        if isinstance(value, types.MethodType):
            return self._all("method", [value.__self__, value.__func__])
        if isinstance(value, types.FunctionType):
            return _hash(
                "function",
                value.__qualname__.encode(),
                self._code(value.__code__),
                *map(self.digest, (value.__defaults__, value.__kwdefaults__)),
                *(self.digest(_content(cell)) for cell in value.__closure__ or ()),
                *([] if _is_library(value.__module__) else self._surroundings(value)),
            )
        name = getattr(value, "__qualname__", None)
        if isinstance(name, str) and not hasattr(value, "__dict__"):  # built in
            owner = getattr(value, "__self__", None)
            bound = b"" if owner is None or isinstance(owner, types.ModuleType) else self.digest(owner)
            return _hash("builtin", f"{getattr(value, '__module__', None)}.{name}".encode(), bound)
        return None

    def _code(self, code: types.CodeType) -> bytes:
        """Digest of a function's source; where there is none, of its bytecode, which versions of Python differ in."""
        syntax = syntax_of(code)
        if syntax is not None:
            return _hash("source", syntax.encode("utf-8", "surrogatepass"))
        constants = [self._code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return _hash(
            "code",
            code.co_code,
            getattr(code, "co_exceptiontable", b""),
            *map(self.digest, (constants, code.co_names, code.co_freevars, counts)),
        )

    def _surroundings(self, function: types.FunctionType) -> list[bytes]:
        """Digests of what a function reads in its module and in others of the user's own, and of its attributes."""
        own = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        found = self._named(function.__globals__, _names(function.__code__))
        return [*found, self._mapping(own)] if own else found

    def _named(self, known: Mapping[str, Any], names: set[str]) -> list[bytes]:
        found = []
        for name in sorted(names & known.keys()):
            value = known[name]
            if isinstance(value, types.ModuleType):
                if not _is_library(value.__name__):  # (less its name, as modules may name each other)
                    found += [_hash(name, part) for part in self._named(vars(value), names - {name})]
                continue
            if callable(value) and _is_library(getattr(value, "__module__", None)):
                value = getattr(value, "__qualname__", type(value).__qualname__)
            found.append(_hash(name, self.digest(value)))
        return found

    def _class(self, value: type) -> bytes:
        if _is_library(value.__module__):
            return _hash("class", f"{value.__module__}.{value.__qualname__}".encode())
        entries = {
            name: _function_in(entry)
            for name, entry in vars(value).items()
            if (isinstance(entry, _IN_CLASS) and name not in _ABOUT_CLASS)
            or (isinstance(entry, _CONTAINERS) and not name.startswith("__"))
        }
        bases = [base for base in value.__bases__ if base is not object]
        return _hash("class", value.__qualname__.encode(), self._mapping(entries), *map(self.digest, bases))

    def _module(self, module: nn.Module) -> bytes:
        kinds = {kind: self._kind(kind) for kind in {type(m) for m in module.modules()}}
        parts = [
            self._all("module", [name, kinds[type(m)], _ADDRESS.sub("", m.extra_repr()), _settings(m) | _functions(m)])
            for name, m in module.named_modules(remove_duplicate=False)
        ]
        state = {name: entry for name, entry in module.state_dict().items() if entry is not None}
        state |= {name: buffer for name, buffer in module.named_buffers() if name not in state}
        self._read([entry for entry in state.values() if isinstance(entry, Tensor) and entry.numel() > _PIECE])
        return _hash("network", *parts, *(_hash(name, self.digest(state[name])) for name in sorted(state)))

    def _kind(self, kind: type) -> object:
        """Name of a module's class; of one of the user's own with the code of its methods."""
        own = [vars(base).items() for base in kind.__mro__ if not _is_library(base.__module__)]
        methods = [(name, inspect.unwrap(_function_in(entry))) for entries in own for name, entry in entries]
        codes = [(name, self._code(m.__code__)) for name, m in methods if isinstance(m, types.FunctionType)]
        return (kind.__qualname__, codes) if codes else kind.__qualname__

    def _read(self, tensors: list[Tensor]) -> None:
        """Hash large tensors side by side, the largest first: neither hashing nor copying holds the interpreter."""
        by_size = sorted(tensors, key=Tensor.numel, reverse=True)
        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
            for tensor, result in zip(by_size, readers.map(_tensor, by_size), strict=True):
                self._known[id(tensor)] = (tensor, result)

    def _object(self, value: Any) -> bytes:
        """Class and state of an object."""
        kind = self.digest(type(value))
        if isinstance(value, Composite) and "keywords" in vars(value):
            return _hash("composite", kind, self._mapping(value.keywords))
        if isinstance(value, Hook | Composite | Canonizer):
            return _hash("rule", kind, self._mapping({k: v for k, v in vars(value).items() if k not in _RUNTIME}))
        try:
            _, arguments, *rest = value.__reduce_ex__(4)
            parts = [arguments, *(entry if k == 0 else list(entry or ()) for k, entry in enumerate(rest[:3]))]
        except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError):
            with contextlib.suppress(TypeError):
                return _hash("object", kind, self._mapping(vars(value)))
            parts = [_ADDRESS.sub("", repr(value))]
        return _hash("object", kind, *map(self.digest, parts))


def _hash(kind: str, *parts: Any) -> bytes:
    result = hashlib.sha256(kind.encode())
    for part in parts:
        _add(result, part)
    return result.digest()


def _add(result: Any, part: Any) -> None:
    result.update(memoryview(part).nbytes.to_bytes(8, "little"))
    result.update(part)


def _tensor(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        raise InputError(f"a tensor of shape {tuple(tensor.shape)} on the meta device has no content to fingerprint")
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    result = hashlib.sha256(b"tensor")
    _add(result, f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    tensor = tensor.resolve_conj().resolve_neg()
    content = (tensor if tensor.is_contiguous() else tensor.cpu().contiguous()).reshape(-1).view(torch.uint8)
    result.update(content.numel().to_bytes(8, "little"))
    for piece in torch.split(content, _PIECE):  # (from a GPU, a piece is hashed while it is in the processor's cache)
        result.update(piece.cpu().numpy().data)
    return result.digest()


def _settings(module: nn.Module) -> dict[str, object]:
    """Attributes of a module that are numbers, strings or sequences of these, such as a stride."""
    notes = _NOTES.get(type(module).__name__, ())
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and name not in notes and _is_plain(value)
    }


def _function_in(entry: Any) -> Any:
    """Function behind a static method, a class method or a property; any other entry of a class as it is."""
    return getattr(entry, "__func__", getattr(entry, "fget", entry))


def _functions(module: nn.Module) -> dict[str, object]:
    """Functions that a module holds, as an activation, or a method set on it: a library's own in a module of one's own.

    (What a library's modules hold of a library is told by their settings.)
    """
    is_own, found = not _is_library(type(module).__module__), dict[str, object]()
    for name, value in vars(module).items():
        function = getattr(value, "__func__", value)
        is_library = _is_library(getattr(function, "__module__", None))
        if isinstance(function, _CALLED) and not name.startswith("_") and (is_own or not is_library):
            known = getattr(function, "__qualname__", "")
            found[name] = f"{function.__module__}.{known}" if is_library and known else function
    return found


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _names(code: types.CodeType) -> set[str]:
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*nested)


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether a module is installed, rather than the user's own."""
    root = (module or "").partition(".")[0]
    if root == "__main__":  # its file may be that of pytest or of a notebook's kernel
        return False
    origin = getattr(sys.modules.get(root), "__file__", None) or ""
    return root == "crp" or root in sys.stdlib_module_names or "site-packages" in origin or "dist-packages" in origin
