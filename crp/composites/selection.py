"""Which operations a rule is for: by kind or function, or by type, name or position of the modules around them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeAlias, TypeGuard

from torch import nn
from torch.nn import functional as F

from crp.layers import LayerNotFoundError
from crp.rules import Rule, Whole
from crp.rules.functions import AFFINE, KINDS, PROPERTIES, Function, canonical, look_up, name_of

Types: TypeAlias = type | tuple[type, ...]

#: Modules that call one affine function and nothing else: that function, and its kind.
_CALLED: dict[type[nn.Module], tuple[Function, str]] = {
    nn.Linear: (look_up(F.linear), "dense"),
    **{
        getattr(nn, f"Conv{transpose.title()}{n}d"): (
            look_up(getattr(F, f"conv{'_' if transpose else ''}{transpose}{n}d")),
            "convolution",
        )
        for transpose in ("", "transpose")
        for n in (1, 2, 3)
    },
}


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
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")

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
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"depths must be 0 <= low < high <= 1, got {self.low} and {self.high}")

    def chooses(self, k: int, total: int) -> bool:
        """Whether the k-th of all, counted from 0, is meant."""
        return self.low <= k / total < self.high


@dataclass(frozen=True)
class Functions:
    """Functions of torch, by their plain names: ``"relu"`` is `F.relu`, `torch.relu_`, `Tensor.relu`."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        given: object = self.names
        if not isinstance(given, tuple | list) or not given or not all(isinstance(name, str) for name in given):
            raise TypeError(f"Functions takes a tuple of plain names, such as ('relu',), not {self.names!r}")


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
        if self.name not in KINDS:
            raise ValueError(f"there is no kind {self.name!r} of operations; there are {', '.join(map(repr, KINDS))}")


@dataclass(frozen=True)
class Having:
    """Functions that have one of these properties in the table of functions."""

    properties: frozenset[str]

    @classmethod
    def of(cls, *properties: str) -> Having:
        """Functions that have one of these."""
        assert set(properties) <= PROPERTIES
        return cls(frozenset(properties))


#: Module type(s), a layer name or pattern (``"features.*"``), a position, a kind, or function(s) of torch (`F.relu`).
Selector: TypeAlias = (
    Types | str | First | Last | Depth | Functions | Kind | Having | Callable[..., Any] | tuple[Callable[..., Any], ...]
)


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of a composite's maps, on a model.

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
    modules : dict of str to bool
        Modules that it means by name or type, and whether each contains no other.
    """

    number: int
    selector: Any
    rule: Rule | None
    first: bool = False
    modules: Mapping[str, bool] = field(default_factory=dict)

    @property
    def position(self) -> First | Depth | None:
        """Position among operations, if the selector is one."""
        return self.selector if isinstance(self.selector, First | Depth) else None

    def means(self, known: Function, kind: str) -> bool:
        """Whether it means an operation by its function, its kind, or the type of module that calls such."""
        selector = self.selector
        if isinstance(selector, Kind):
            return kind == selector.name
        if isinstance(selector, Having):
            return not known.properties.isdisjoint(selector.properties)
        if isinstance(selector, First | Depth):
            return fits(known, kind, selector.types)
        if is_types(selector):
            return fits(known, kind, selector)
        return known.canonical in map(canonical, self.functions)

    def means_module(self, module: type) -> bool:
        """Whether it means what modules of a type of torch call."""
        return any(plain in module.__mro__ and self.means(*called) for plain, called in _CALLED.items())

    @property
    def functions(self) -> list[str]:
        """Names of the functions that it names."""
        selector = self.selector
        if isinstance(selector, Functions):
            return list(selector.names)
        if isinstance(selector, str | First | Depth | Kind | Having) or is_types(selector):
            return []
        return [name_of(function) for function in (selector if isinstance(selector, tuple) else (selector,))]

    def __str__(self) -> str:
        return f"({_shown(self.selector)}, {self.rule!r})"


def fits(known: Function, kind: str, types: Types) -> bool:
    """Whether an affine operation is what modules of these types call."""
    return kind in AFFINE and known.example is not None and issubclass(known.example, types)


def entries_of(
    model_modules: Mapping[str, nn.Module],
    name_map: Sequence[tuple[Sequence[str], Rule | None]],
    first_map: Sequence[tuple[Types, Rule | None]],
    layer_map: Sequence[tuple[Selector, Rule | None]],
) -> list[Entry]:
    """Entries of a composite's maps in their order, with the modules that each means.

    Raises
    ------
    KeyError
        If a name or pattern is of no layer of the model.
    TypeError
        If a module that has no forward shall be one operation.
    """
    found: list[Entry] = []

    def add(selector: Any, rule: Rule | None, names: Sequence[str], first: bool = False) -> None:
        if isinstance(rule, Whole):
            for name in names:
                if _has_no_forward(model_modules[name]):
                    raise TypeError(f"{_shown(selector)}: {name!r} is never called, so that it cannot be one operation")
        found.append(Entry(len(found), selector, rule, first, _with_parts(names, model_modules, rule)))

    for names, rule in name_map:
        for name in names:
            add(name, rule, select(name, model_modules, "name_map"))
    for types, rule in first_map:
        add(types, rule, addressed(types, model_modules), first=True)
    for selector, rule in layer_map:
        add(selector, rule, select(selector, model_modules))
    return found


def select(selector: Selector, modules: Mapping[str, nn.Module], role: str = "layer_map") -> list[str]:
    """Names of the modules that a selector means; none for a kind or function.

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
        return addressed(selector.types, modules)
    return addressed(selector, modules) if is_types(selector) else []


def addressed(types: Types, modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules of these types whose operations the types alone do not mean."""
    return [
        name
        for name, module in modules.items()
        if isinstance(module, types) and (type(module) not in _CALLED or "forward" in vars(module))
    ]


def is_counted(module: nn.Module, types: Types) -> bool:
    """Whether a call of a module counts for a position among these types, and not what it calls."""
    return isinstance(module, types) and not any(
        issubclass(plain, types) for plain in type(module).__mro__ if plain in _CALLED
    )


def _with_parts(names: Sequence[str], modules: Mapping[str, nn.Module], rule: Rule | None) -> dict[str, bool]:
    """Modules, and what is in those that are never called themselves; whether each contains no other."""
    found = {name: not modules[name]._modules for name in names}
    if isinstance(rule, Whole):
        return found
    todo = list(names)
    while todo:
        name = todo.pop()
        module = modules[name]
        if isinstance(module, nn.Sequential) or _has_no_forward(module):
            for child, part in module._modules.items():
                full = f"{name}.{child}" if name else child
                if part is not None and full in modules and full not in found:
                    found[full] = False
                    todo.append(full)
    return found


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _shown(selector: object) -> str:
    if isinstance(selector, type):
        return selector.__name__
    if isinstance(selector, tuple):
        return f"({', '.join(map(_shown, selector))})"
    return repr(selector) if not callable(selector) else name_of(selector)


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
    if isinstance(selector, str | First | Depth | Functions | Kind | Having) or is_types(selector):
        return
    if not given or not all(_is_function(f) for f in given):
        raise TypeError(
            "a rule is mapped by module types, a layer name or pattern, First, Last or Depth, a Kind, or functions of "
            f"torch; not by {selector!r}"
        )


def _is_function(value: object) -> bool:
    """Whether torch could tell us of calls: functions of one's own are seen by what they call."""
    if isinstance(value, FunctionType):
        return value.__module__.partition(".")[0] == "torch"
    return callable(value) and not isinstance(value, type | nn.Module) and hasattr(value, "__name__")


def pushes(entries: Sequence[Entry]) -> Iterator[tuple[str, list[tuple[Entry, bool]]]]:
    """For each module, the entries that mean it, each with whether the module contains no other."""
    found: dict[str, list[tuple[Entry, bool]]] = {}
    for entry in entries:
        for name, alone in entry.modules.items():
            found.setdefault(name, []).append((entry, alone))
    yield from found.items()
