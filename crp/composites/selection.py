"""Which operations a rule is for: by kind or function, or by type, name or position of the modules around them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import FunctionType
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F
from zennit.core import Hook

from crp.checks import check_number
from crp.errors import InputError, InputTypeError
from crp.layers import ByChainRule, LayerNotFoundError
from crp.rules import Rule, Whole, lift
from crp.rules.functions import AFFINE, KINDS, PROPERTIES, Function, canonical, check_names, look_up
from crp.rules.spellings import name_of

Types: TypeAlias = type | tuple[type, ...]

_AFFINE = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
#: Modules that call one affine function and nothing else, and that function.
_CALLED = {look_up(function).example: look_up(function) for function in _AFFINE}


@dataclass(frozen=True)
class First:
    """The first ``n`` operations of the given types, in the order of execution.

    Parameters
    ----------
    types : type or tuple of types
        Of modules; those of convolutions and dense layers mean the functions that these call, too.
    n : int
    """

    types: Types
    n: int = 1

    def __post_init__(self) -> None:
        _check_types(self.types, f"{type(self).__name__} chooses among layers of types")
        check_number("n", self.n, 1, whole=True)

    def chooses(self, k: int, total: int) -> bool:
        """Whether the k-th of all, counted from 0, is meant."""
        return k < self.n


@dataclass(frozen=True)
class Last(First):
    """The last ``n`` operations of the given types, in the order of execution.

    Parameters
    ----------
    types : type or tuple of types
    n : int
    """

    def chooses(self, k: int, total: int) -> bool:
        """Whether the k-th of all, counted from 0, is meant."""
        return k >= total - self.n


@dataclass(frozen=True)
class Depth:
    """Operations of the given types at a depth in ``[low, high)``; the k-th of n has depth ``(k - 1) / n``.

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
        check_number("low", self.low)
        check_number("high", self.high)
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"depths must be 0 <= low < high <= 1, got {self.low} and {self.high}")

    def chooses(self, k: int, total: int) -> bool:
        """Whether the k-th of all, counted from 0, is meant."""
        return self.low <= k / total < self.high


@dataclass(frozen=True)
class Functions:
    """Functions of torch, by their plain names: ``"relu"`` is `F.relu`, `torch.relu_`, `Tensor.relu`."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        value: object = self.names
        if not isinstance(value, tuple | list) or not value or not all(isinstance(name, str) for name in value):
            raise InputTypeError(f"Functions takes a tuple of plain names, such as ('relu',), not {self.names!r}")
        check_names(self.names)


@dataclass(frozen=True)
class Kind:
    """Operations of a kind, whether a module or a function makes the call.

    Parameters
    ----------
    name : str
        ``"convolution"``, ``"dense"`` (sums of weighted inputs without a kernel: `F.linear`, ``x @ w``, …),
        ``"activation"``, ``"normalization"``, ``"pooling"``, ``"embedding"``; or ``"product"``, of several operands
        that depend on the model's input.

    Raises
    ------
    ValueError
        If there is no such kind.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in KINDS:
            raise InputError(f"there is no kind {self.name!r} of operations; there are {', '.join(map(repr, KINDS))}")


@dataclass(frozen=True)
class Having:
    """Functions that have a property in the table of functions, one of `PROPERTIES`."""

    name: str

    def __post_init__(self) -> None:
        assert self.name in PROPERTIES


#: Module type(s), a layer name or pattern (``"features.*"``), a position, a kind, or function(s) of torch (`F.relu`).
Selector: TypeAlias = (
    Types | str | First | Last | Depth | Functions | Kind | Having | Callable[..., Any] | tuple[Callable[..., Any], ...]
)


#: Role of the entry that modules bring themselves.
OF_MODULE = "ByChainRule"


@dataclass(frozen=True, eq=False)
class MapEntry:
    """One entry of a composite's maps.

    Attributes
    ----------
    number : int
        Its place; the first entry that matches wins.
    selector : object
        As it was given.
    rule : Rule or None
        None is the ordinary chain rule.
    first : bool
        Whether it is for operations that read the model's input.
    role : str
        What errors call its map.
    """

    number: int
    selector: Any
    rule: Rule | None
    first: bool = False
    role: str = "layer_map"

    @cached_property
    def position(self) -> First | Depth | None:
        """Position among operations, if the selector is one."""
        return self.selector if isinstance(self.selector, First | Depth) else None

    @cached_property
    def types(self) -> Types | None:
        """Types of modules that it means, whatever their position; None if it means none by their type."""
        types = self.selector if self.position is None else self.position.types
        return types if _is_types(types) else None

    @property
    def is_address(self) -> bool:
        """Whether it may mean modules."""
        return isinstance(self.selector, str) or self.types is not None

    def modules(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Names of the modules that it means by name, pattern or type.

        Modules are left out if the entry means their operations already, as ``nn.Conv2d`` means `F.conv2d`.

        Raises
        ------
        KeyError
            If a name or pattern means no layer of the model.
        TypeError
            If a module that is never called shall be one operation.
        """
        selector = self.selector
        if isinstance(selector, str):
            # (the names of layers have no special characters)
            names = [selector] if selector in modules else fnmatch.filter(modules, selector)
            if not names:
                raise LayerNotFoundError(selector, modules, self.role)
        elif self.types is not None:
            names = [name for name, module in modules.items() if _is_addressed(module, self.types)]
        else:
            return []
        never = [name for name in names if _has_no_forward(modules[name])] if isinstance(self.rule, Whole) else []
        if never:
            raise InputTypeError(f"{self}: {never[0]!r} is never called, so that it cannot be one operation")
        return names

    def means(self, known: Function, kind: str) -> bool:
        """Whether it means an operation by its function, its kind, or the type of module that calls such."""
        selector = self.selector
        if isinstance(selector, Kind):
            return kind == selector.name
        if isinstance(selector, Having):
            return known.has(selector.name)
        if self.types is not None:  # (an affine operation that modules of these call)
            return kind in AFFINE and known.example is not None and _is_one_of(known.example, self.types)
        return known.canonical in map(canonical, self.functions)

    def means_module(self, module: type) -> bool:
        """Whether it means what modules of a type of torch call."""
        return any(plain in module.__mro__ and self.means(called, called.kind) for plain, called in _CALLED.items())

    @cached_property
    def functions(self) -> list[str]:
        """Names of the functions that it names."""
        selector = self.selector
        if isinstance(selector, Functions):
            return list(selector.names)
        if isinstance(selector, Kind | Having) or self.is_address:
            return []
        return [name_of(function) for function in (selector if isinstance(selector, tuple) else (selector,))]

    def __str__(self) -> str:
        return f"({_shown(self.selector)}, {self.rule!r})"


def _lifted(rule: Hook | None) -> Rule | None:
    """Rule in which multipliers travel, with settings that stay; None is the ordinary chain rule."""
    if rule is None:
        return None
    lifted = lift(rule)
    lifted.fix()
    return lifted


def _entries_of(
    name_map: Sequence[tuple[Sequence[str], Rule | None]],
    first_map: Sequence[tuple[Types, Rule | None]],
    at_input: Sequence[tuple[Types, Rule | None]],
    layer_map: Sequence[tuple[Selector, Rule | None]],
) -> list[MapEntry]:
    """Entries of a composite's maps in the order in which they are asked."""
    entries: list[tuple[Any, Rule | None, bool, str]] = []
    entries += [(name, rule, False, "name_map") for names, rule in name_map for name in names]
    entries += [(types, rule, True, "first_map") for types, rule in first_map]
    entries += [(types, rule, True, "at_input") for types, rule in at_input]
    entries += [(selector, rule, False, "layer_map") for selector, rule in layer_map]
    return [MapEntry(number, *entry) for number, entry in enumerate(entries)]


def _by_chain_rule_first(entries: Sequence[MapEntry]) -> list[MapEntry]:
    """Entries of a composite, after one that leaves the ordinary chain rule to modules that ask for it."""
    first = MapEntry(0, (ByChainRule,), None, role=OF_MODULE)
    return [first, *(replace(entry, number=entry.number + 1) for entry in entries)]


def _addresses(entries: Sequence[MapEntry], modules: Mapping[str, nn.Module]) -> dict[str, list[tuple[MapEntry, bool]]]:
    """By module, the entries that mean it, and whether it contains no other module.

    Entries of a container that is never called itself stand for what is in it.
    """
    by_module: dict[str, list[tuple[MapEntry, bool]]] = {}
    for entry in (entry for entry in entries if entry.is_address):
        names = entry.modules(modules)
        known = {name: not modules[name]._modules for name in names}
        todo = [] if isinstance(entry.rule, Whole) else names
        while todo:
            name = todo.pop()
            if isinstance(modules[name], nn.Sequential) or _has_no_forward(modules[name]):
                parts = [f"{name}.{child}" if name else child for child in modules[name]._modules]
                parts = [part for part in parts if part in modules and part not in known]
                known.update(dict.fromkeys(parts, False))
                todo += parts
        for name, alone in known.items():
            by_module.setdefault(name, []).append((entry, alone))
    return by_module


def _is_addressed(module: nn.Module, types: Types) -> bool:
    """Whether a module is of these types, and more than the one function that the types mean already."""
    return _is_one_of(type(module), types) and (type(module) not in _CALLED or "forward" in vars(module))


def _is_one_of(kind: type, types: Types) -> bool:
    known: bool = _is_subclass(kind, types)
    return known


@lru_cache(maxsize=4096)
def _is_subclass(kind: type, types: Types) -> bool:
    return issubclass(kind, types)


def _is_counted(module: type, types: Types) -> bool:
    """Whether a call of a module of a type counts for a position among these types, and not what it calls."""
    return _is_one_of(module, types) and not any(
        _is_one_of(plain, types) for plain in module.__mro__ if plain in _CALLED
    )


def _has_no_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _shown(selector: object) -> str:
    if isinstance(selector, type):
        return selector.__name__
    if isinstance(selector, tuple):
        return f"({', '.join(map(_shown, selector))})"
    return repr(selector) if not callable(selector) else name_of(selector)


def _is_types(selector: object) -> TypeGuard[Types]:
    """Whether a selector is a module type, or a tuple of these."""
    kinds = selector if isinstance(selector, tuple) else (selector,)
    return bool(kinds) and all(isinstance(kind, type) for kind in kinds)


def _check_map(layer_map: Sequence[Any], first_map: Sequence[Any], name_map: Sequence[Any]) -> None:
    """Raise a TypeError if an entry is not for what its map is for."""
    for selector, _ in layer_map:
        _check_selector(selector)
    for types, _ in first_map:
        _check_types(types, "first_map maps module types")
    for names, _ in name_map:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputTypeError(f"name_map maps lists of layer names, such as (['fc'], rule), not {names!r}")


def _check_types(types: object, what: str) -> None:
    if not _is_types(types):
        raise InputTypeError(f"{what}, such as nn.Linear or (nn.Linear, nn.Conv2d), not {types!r}")


def _check_selector(selector: object) -> None:
    members = selector if isinstance(selector, tuple) else (selector,)
    if isinstance(selector, str | First | Depth | Functions | Kind | Having) or _is_types(selector):
        return
    if not members or not all(_is_function(f) for f in members):
        raise InputTypeError(
            "a rule is mapped by module types, a layer name or pattern, First, Last or Depth, a Kind, or functions of "
            f"torch; not by {selector!r}"
        )


def _is_function(value: object) -> bool:
    """Whether calls of it can be seen: of a Python function outside torch, only the torch functions inside are."""
    if isinstance(value, FunctionType):
        return value.__module__.partition(".")[0] == "torch"
    return callable(value) and not isinstance(value, type | nn.Module) and hasattr(value, "__name__")
