"""Which layers a rule is for: by type, by name, by position, or by function."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from torch import nn

from crp.layers import LayerNotFoundError
from crp.rules.calls import name_of

if TYPE_CHECKING:
    from crp.rules import Rule

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
        _check_types(self.types, f"{type(self).__name__} chooses among layers of types")
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
        _check_types(self.types, "Depth chooses among layers of types")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"depths must be 0 <= low < high <= 1, got {self.low} and {self.high}")

    def __call__(self, layers: list[str]) -> list[str]:
        """Choose among the layers of these types."""
        return [name for k, name in enumerate(layers) if self.low <= k / len(layers) < self.high]


@dataclass(frozen=True)
class Functions:
    """Functions of torch, by their plain names: ``"relu"`` is `F.relu`, `torch.relu_`, `Tensor.relu`."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        given: object = self.names
        if not isinstance(given, tuple | list) or not given or not all(isinstance(name, str) for name in given):
            raise TypeError(f"Functions takes a tuple of plain names, such as ('relu',), not {self.names!r}")


#: Module type(s), a layer name or pattern (``"features.*"``), a position, or function(s) of torch (`F.relu`).
Selector: TypeAlias = (
    Types | str | First | Last | Depth | Functions | Callable[..., Any] | tuple[Callable[..., Any], ...]
)


def select(selector: Selector, modules: Mapping[str, nn.Module], role: str = "layer_map") -> list[str]:
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
            raise LayerNotFoundError(selector, modules, role)
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


def treatable(
    layers: Sequence[str], selector: Selector, rule: Rule | None, modules: Mapping[str, nn.Module]
) -> Sequence[str]:
    """Of the layers that a pattern means, those that a rule can treat; others are not asked.

    Raises
    ------
    TypeError
        If it can treat none of them.
    """
    if rule is None or not isinstance(selector, str) or selector in modules:
        return layers
    found, refusal = [], None
    for layer in layers:
        try:
            rule.check(modules[layer])
        except TypeError as error:
            refusal = error
        else:
            found.append(layer)
    if not found:
        raise TypeError(f"no layer of {selector!r} can have its rule: {refusal}")
    return found


def is_types(selector: object) -> TypeGuard[Types]:
    """Whether a selector is a module type, or a tuple of these."""
    kinds = selector if isinstance(selector, tuple) else (selector,)
    return bool(kinds) and all(isinstance(kind, type) for kind in kinds)


def check_map(layer_map: Sequence[Any], first_map: Sequence[Any], name_map: Sequence[Any]) -> None:
    """Raise a TypeError if an entry is no pair, or not for what its map is for."""
    for name, pairs in (("layer_map", layer_map), ("first_map", first_map), ("name_map", name_map)):
        if not isinstance(pairs, Sequence) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
            raise TypeError(f"{name} is a list of pairs (what, rule), not {pairs!r}")
    for selector, _ in layer_map:
        _check_selector(selector)
    for types, _ in first_map:
        _check_types(types, "first_map maps module types")
    for names, _ in name_map:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"name_map maps lists of layer names, such as (['fc'], rule), not {names!r}")


def _check_types(types: object, what: str) -> None:
    if not is_types(types):
        raise TypeError(f"{what}, such as nn.Linear or (nn.Linear, nn.Conv2d), not {types!r}")


def _check_selector(selector: object) -> None:
    given = selector if isinstance(selector, tuple) else (selector,)
    if isinstance(selector, str | First | Depth | Functions) or is_types(selector):
        return
    if not given or not all(_is_function(f) for f in given):
        raise TypeError(
            "a rule is mapped by module types, a layer name or pattern, First, Last or Depth, or functions of torch; "
            f"not by {selector!r}"
        )


def _is_function(value: object) -> bool:
    """Whether torch could tell us of calls: functions of one's own are seen by what they call."""
    if isinstance(value, FunctionType):
        return value.__module__.partition(".")[0] == "torch"
    return callable(value) and not isinstance(value, type | nn.Module) and hasattr(value, "__name__")
