"""Which layers a rule is for: by type, by name, by position, or by function."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from torch import nn

from crp.layers import LayerNotFoundError
from crp.rules.calls import name_of

Types: TypeAlias = type | tuple[type, ...]


@dataclass(frozen=True)
class First:
    """The first ``n`` layers of the given types, in the order of ``model.named_modules()``.

    Parameters
    ----------
    types : type or tuple of types
    n : int
    """

    types: Types
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")

    def __call__(self, layers: list[str]) -> list[str]:
        """Choose among the layers of these types."""
        return layers[: self.n]


@dataclass(frozen=True)
class Last(First):
    """The last ``n`` layers of the given types, in the order of ``model.named_modules()``.

    Parameters
    ----------
    types : type or tuple of types
    n : int
    """

    def __call__(self, layers: list[str]) -> list[str]:
        """Choose among the layers of these types."""
        return layers[-self.n :]


@dataclass(frozen=True)
class Depth:
    """Layers of the given types at a depth in ``[low, high)``; the k-th of n has depth ``(k - 1) / n``.

    Parameters
    ----------
    low, high : float
        Between 0 and 1.
    types : type or tuple of types
    """

    low: float
    high: float
    types: Types

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"depths must be 0 <= low < high <= 1, got {self.low} and {self.high}")

    def __call__(self, layers: list[str]) -> list[str]:
        """Choose among the layers of these types."""
        return [name for k, name in enumerate(layers) if self.low <= k / len(layers) < self.high]


@dataclass(frozen=True)
class Functions:
    """Functions of torch, by their plain names: ``"relu"`` is `F.relu`, `torch.relu_`, `Tensor.relu`."""

    names: tuple[str, ...]


#: Module type(s), a layer name or pattern (``"features.*"``), a position, or function(s) of torch (`F.relu`).
Selector: TypeAlias = (
    Types | str | First | Last | Depth | Functions | Callable[..., Any] | tuple[Callable[..., Any], ...]
)


def select(selector: Selector, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the layers that a selector means; none for a function.

    Raises
    ------
    ValueError, KeyError
        If a name or pattern means no layer of the model.
    """
    if isinstance(selector, str):
        # (the names of layers have no special characters)
        found = [selector] if selector in modules else fnmatch.filter(modules, selector)
        if not found:
            raise LayerNotFoundError(selector, modules, "layer_map")
        return found
    if isinstance(selector, First | Depth):
        return selector([name for name, module in modules.items() if isinstance(module, selector.types)])
    if is_types(selector):
        return [name for name, module in modules.items() if isinstance(module, selector)]
    return []


def functions(selector: Selector) -> list[str]:
    """Plain names of the functions that a selector means; none for anything else."""
    if isinstance(selector, Functions):
        return list(selector.names)
    if isinstance(selector, str | First | Depth) or is_types(selector):
        return []
    return [name_of(f) for f in (selector if isinstance(selector, tuple) else (selector,))]


def is_types(selector: object) -> TypeGuard[Types]:
    """Whether a selector is a module type, or a tuple of these."""
    kinds = selector if isinstance(selector, tuple) else (selector,)
    return all(isinstance(kind, type) for kind in kinds)


def check_selector(selector: object) -> None:
    """Raise a TypeError if it is none."""
    given = selector if isinstance(selector, tuple) else (selector,)
    if isinstance(selector, str | First | Depth | Functions) or is_types(selector) or all(callable(f) for f in given):
        return
    raise TypeError(
        "a rule is mapped by module types, a layer name or pattern, First, Last or Depth, or functions of torch; "
        f"not by {selector!r}"
    )
