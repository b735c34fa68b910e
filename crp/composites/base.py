"""Composites: which rule goes on which layer, and which canonizers come before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite as ZennitComposite
from zennit.core import Hook

from crp.canonizers import for_model
from crp.rules import lift
from crp.rules.base import Entry

Canonizers = Literal["auto"] | Sequence[Canonizer] | None
#: ``[(module types, rule), ...]``; the first match wins, and None is the ordinary chain rule.
LayerMap = Sequence[tuple[type | tuple[type, ...], Hook | None]]
NameMap = Sequence[tuple[Sequence[str], Hook | None]]


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Constructor that keeps its arguments in ``keywords``; the outermost one wins."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Composite, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        outermost = "keywords" not in vars(self)
        if outermost:
            self.keywords = {
                k: v for k, v in list(bound.arguments.items())[1:] if v is not signature.parameters[k].default
            }
        init(self, *args, **kwargs)

    return wrapper


class Composite(ZennitComposite):  # type: ignore[misc]
    """Maps layers to rules; a zennit composite whose rules propagate multipliers, ``R = a * m``.

    Inside its `context`, a model predicts as before (up to rounding), and the gradient of its input is the input's
    relevance.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
        ``"auto"`` is what the model needs (`crp.canonizers.for_model`); a list replaces it; None or ``[]`` is none.
    layer_map : list of (types, rule)
        Rules by module type.
    first_map : list of (types, rule)
        The same for the model's first layer of any of these types.
    name_map : list of (names, rule)
        Rules by layer name; these come first.

    Notes
    -----
    The first match wins: names, then the first layer, then types. A rule of None leaves a layer to the ordinary chain
    rule. Rules are those of `crp.rules`, or zennit's `BasicHook`.
    """

    encoding: ClassVar[str] = "multiplier"
    #: Name in the registry.
    name: ClassVar[str] = ""
    #: Arguments that differ from the defaults; with `name`, all that is needed to build the composite again.
    keywords: dict[str, Any]

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        layer_map: LayerMap = (),
        first_map: LayerMap = (),
        name_map: NameMap = (),
    ) -> None:
        if isinstance(canonizers, str) != (canonizers == "auto") or not isinstance(canonizers, Sequence | None):
            raise TypeError(f'canonizers must be "auto", a list of canonizers or None, not {canonizers!r}')
        self.auto = isinstance(canonizers, str)
        self.layer_map = [(types, hook and lift(hook)) for types, hook in layer_map]
        self.first_map = [(types, hook and lift(hook)) for types, hook in first_map]
        self.name_map = [(tuple(names), hook and lift(hook)) for names, hook in name_map]
        self._entry = Entry()
        super().__init__(self.mapping, [] if self.auto or canonizers is None else list(canonizers))

    def mapping(self, ctx: dict[str, Any], name: str, module: nn.Module) -> Hook | None:
        """Rule for a layer, or None."""
        for names, hook in self.name_map:
            if name in names:
                return hook
        if not ctx.get("first_layer_visited"):
            for types, hook in self.first_map:
                if isinstance(module, types):
                    ctx["first_layer_visited"] = True
                    return hook
        return next((hook for types, hook in self.layer_map if isinstance(module, types)), None)

    def register(self, module: nn.Module) -> None:
        """Put canonizers and rules on a model; `context` does it for the length of a ``with`` block."""
        self.remove()
        try:
            for canonizer in for_model(module) if self.auto else self.canonizers:
                self.handles += canonizer.apply(module)
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            context: dict[str, Any] = {}
            for name, child in module.named_modules():
                template = self.module_map(context, name, child)
                if template is not None:
                    hook = template.copy()
                    hook.multiplier, hook.entry = True, self._entry
                    self.hook_refs.add(hook)
                    try:
                        self.handles.append(hook.register(child))
                    except TypeError as error:
                        raise TypeError(f"layer {name!r}: {error}") from error
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off the model again."""
        # In reverse: what came last may stand on what came first.
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()
        self.hook_refs.clear()
        self._entry.clear()

    def describe(self) -> dict[str, Any]:
        """Name and keywords, as JSON can hold them; `get` builds the composite again from them.

        Raises
        ------
        TypeError
            If the composite is not in the registry, or a keyword is no number, string, tensor or list of these.
        """
        if not self.name:
            raise TypeError(f"{type(self).__name__} is not in the registry; give it a name with register()")
        return {"name": self.name, "keywords": {key: _plain(key, value) for key, value in self.keywords.items()}}

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn the multiplier of the model's inputs into relevance."""

        def enter(value: Any) -> Any:
            return self._entry.enter(value) if isinstance(value, Tensor) and value.requires_grad else value

        return tuple(enter(value) for value in args), {key: enter(value) for key, value in kwargs.items()}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.keywords.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self.keywords), ()


Composite.__init__ = _remembering(Composite.__init__)  # type: ignore[method-assign]

C = TypeVar("C", bound=type[Composite])
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


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(key, entry) for entry in value]
    raise TypeError(
        f"the keyword {key!r} of the composite holds a {type(value).__name__}, which cannot be described by value"
    )
