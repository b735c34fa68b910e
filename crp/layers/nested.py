"""Tensors in nested sequences, mappings and dataclasses, such as what a model is called with and returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors, in their order."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = value if isinstance(value, list | tuple) else ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif hasattr(type(value), "__dataclass_fields__"):
        parts = [getattr(value, entry.name) for entry in fields(value)]
    for part in parts:
        yield from tensors_in(part)


def changed(value: Any, change: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Any:
    """The same with every tensor changed, or all of other kinds.

    Lists, tuples and dicts are made anew; other mappings, and dataclasses, are copied where an entry is another one.
    """
    if isinstance(value, kind):
        return change(value)
    if hasattr(type(value), "_fields"):  # a named tuple
        return type(value)(*(changed(item, change, kind) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(changed(item, change, kind) for item in value)
    if type(value) is dict:
        return {key: changed(item, change, kind) for key, item in value.items()}
    is_mapping = isinstance(value, Mapping)
    if not (is_mapping or hasattr(type(value), "__dataclass_fields__")):
        return value
    entries = value if is_mapping else {entry.name: getattr(value, entry.name) for entry in fields(value)}
    others = {key: other for key, item in entries.items() if (other := changed(item, change, kind)) is not item}
    if not others:
        return value
    made = copy.copy(value)
    put = made.__setitem__ if is_mapping else partial(object.__setattr__, made)  # (it may be frozen)
    for key, other in others.items():
        put(key, other)
    return made
