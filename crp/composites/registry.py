"""Composites by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from crp.errors import InputError, InputTypeError, NameNotFoundError
from crp.layers import nearest
from crp.wording import shortened

if TYPE_CHECKING:
    from crp.composites.base import Composite

C = TypeVar("C", bound="type[Composite]")
_registry: dict[str, type[Composite]] = {}
#: What composites are called elsewhere.
ALIASES = {
    "lrp": "epsilon_plus_flat",
    "input_x_gradient": "gradient_x_input",
    "vanilla_gradient": "gradient",
    "guided_backpropagation": "guided_backprop",
    "z_plus": "zplus",
}


def register(name: str) -> Callable[[C], C]:
    """Class decorator that puts a composite in the registry under ``name``.

    Raises
    ------
    ValueError
        If the name is that of another class. (A class may be defined anew, as by running a cell of a notebook again.)
    """

    def decorator(cls: C) -> C:
        other = _registry.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"{name!r} is the name of {other.__module__}.{other.__qualname__}; choose another")
        _registry[name] = cls
        cls.name = name
        return cls

    return decorator


def get(name: str, **keywords: Any) -> Composite:
    """Composite of the registry.

    Parameters
    ----------
    name : str
        One of `names`, in any case, with or without underscores, or what it is called elsewhere, such as ``"LRP"``.
    **keywords
        Its arguments; lists of numbers may stand for tensors.

    Raises
    ------
    KeyError
        If there is no such composite.
    TypeError
        If the name is no string, or there is no such keyword.
    """
    if not isinstance(name, str):
        raise InputTypeError(f"name must be the name of a composite, such as 'epsilon_plus', not {shortened(name)}")
    found = find_known(name, _registry, ALIASES)
    if found is None:
        raise NameNotFoundError(
            f"there is no composite {name!r}{nearest(name, names())}; there are {', '.join(names())} "
            "(crp.explain has other methods)"
        )
    return _registry[found](**keywords)


def find_known(name: str, known: Iterable[str], aliases: Mapping[str, str]) -> str | None:
    """Known name that differs from the one that was typed in case and punctuation at most, or that has it as an alias.

    ``"EpsilonPlusFlat"``, ``"epsilon-plus-flat"``.
    """
    own = {one: one for one in known}
    of_plain = {_plain(other): one for other, one in {**aliases, **own}.items()}
    return own.get(name) or of_plain.get(_plain(name))


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold().replace("++", "pp").replace("*", "x") if c.isalnum())


def names() -> list[str]:
    """Names of all registered composites."""
    return sorted(_registry)


def classes() -> dict[str, type[Composite]]:
    """All registered composites, by name."""
    return {name: _registry[name] for name in names()}
