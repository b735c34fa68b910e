"""Composites by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from crp.composites.base import Composite

C = TypeVar("C", bound="type[Composite]")
_registry: dict[str, type[Composite]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator that puts a composite in the registry under ``name``."""

    def decorator(cls: C) -> C:
        _registry[name] = cls
        cls.name = name
        return cls

    return decorator


def get(name: str, **keywords: Any) -> Composite:
    """Composite of the registry.

    Parameters
    ----------
    name : str
        One of `names`.
    **keywords
        Its arguments; lists of numbers may stand for tensors.

    Raises
    ------
    KeyError
        If there is no such composite.
    """
    if name not in _registry:
        raise KeyError(f"there is no composite {name!r}; there are {', '.join(names())}")
    return _registry[name](**keywords)


def names() -> list[str]:
    """Names of all registered composites."""
    return sorted(_registry)


def classes() -> dict[str, type[Composite]]:
    """All registered composites, by name."""
    return {name: _registry[name] for name in names()}
