"""What a composite was built with: enough to show it, to describe it, and to build it again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from zennit.canonizers import Canonizer

from crp.errors import InputTypeError, StateError
from crp.wording import shortened


class _Remembered:
    """Base of what keeps the arguments that it was built with."""

    #: Name in the registry.
    name: ClassVar[str] = ""
    #: Arguments that differ from the defaults; with `name`, all that is needed to build the composite again.
    keywords: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Name and keywords, as JSON can hold them; `get` builds the composite again from them.

        Raises
        ------
        TypeError
            If the composite is not in the registry, or a keyword is no number, string, tensor or list of these.
        """
        if not self.name:
            raise InputTypeError(f"{type(self).__name__} is not in the registry; give it a name with register()")
        return {"name": self.name, "keywords": {key: _plain(key, value) for key, value in self.keywords.items()}}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.keywords.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self.keywords), ()


class _Setting:
    """Attribute of a composite that is set once: tables, pickles and messages tell what it was built with."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, composite: Any, value: Any) -> None:
        if self._name in vars(composite):
            kind = type(composite).__name__
            raise StateError(
                f"{self._name} of this {kind} cannot change, as it is what it was built with; make another one"
            )
        vars(composite)[self._name] = value


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Constructor that keeps its arguments in ``keywords``; the outermost one wins."""
    signature = inspect.signature(init)
    open_ended = {name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD}

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:  # (which does not say of what)
            known = ", ".join(list(signature.parameters)[1:])
            raise InputTypeError(f"{type(self).__name__}: {error}; it takes {known}") from None
        if "keywords" not in vars(self):
            named = list(bound.arguments.items())[1:]
            given = {k: v for k, v in named if v is not signature.parameters[k].default and k not in open_ended}
            # (a list that the caller goes on to change shall not change what is told of the composite)
            self.keywords = {k: list(v) if isinstance(v, list) else v for k, v in given.items()}
            for name in open_ended:
                self.keywords |= bound.arguments.get(name, {})
        for name in bound.arguments.keys() & {"first_map", "layer_map", "name_map"}:
            _check_pairs(name, bound.arguments[name])
        init(self, *args, **kwargs)

    return wrapper


def _check_pairs(name: str, pairs: object) -> None:
    """Raise a TypeError if a map is no list, or an entry of it no pair."""
    entries = pairs if isinstance(pairs, Sequence) and not isinstance(pairs, str) else [pairs]
    if wrong := [entry for entry in entries if not isinstance(entry, tuple | list) or len(entry) != 2]:
        raise InputTypeError(
            f"{name} is a list of pairs (what, rule), such as [(nn.Linear, Epsilon())]; {wrong[0]!r} is no pair"
        )


def _check_canonizers(canonizers: object) -> None:
    """Raise a TypeError if these are neither "auto", nor None, nor a list of canonizers."""
    if (isinstance(canonizers, str) and canonizers != "auto") or not isinstance(canonizers, Sequence | None):
        raise InputTypeError(f'canonizers must be "auto", a list of canonizers or None, not {canonizers!r}')
    for canonizer in () if isinstance(canonizers, str | None) else canonizers:
        if not isinstance(canonizer, Canonizer):
            raise InputTypeError(f"canonizers are instances, such as MergeBatchNorm(); {shortened(canonizer)} is none")


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(key, entry) for entry in value]
    raise InputTypeError(
        f"the keyword {key!r} of the composite is of {type(value).__name__}, which cannot be described by value"
    )
