"""What the name of a layer means: what it puts out, or what it is called with, in which of its calls; and hooks there.

``"conv"`` is the output of a layer and ``"conv.input"`` what it is called with; ``"conv#1"`` and ``"conv.input#1"`` are
those of its second call. Heads of attention stand side by side in the input of its output projection, as in
``"attn.proj.input"``, and neurons of an MLP in the input of its last layer. `nn.MultiheadAttention` has these names,
too: ``"attn.out_proj.input"`` and ``"attn.out_proj"``, (batch, token, channel), though it never calls that layer. So
has the attention of torchvision's Swin: ``"attn.proj.input"`` and ``"attn.proj"``, (batch * windows, token, channel).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from crp.errors import InputTypeError
from crp.kinds import check_kind
from crp.layers import OfThread
from crp.layers.interrupts import atomic

#: Names of output projections that attention has and does not call.
PROJECTIONS = ("out_proj", "proj")
#: What is called with a module, its arguments and keywords, and what is there: returns what shall be, or None.
PlaceHook: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class Address(NamedTuple):
    """What the name of a layer means.

    Attributes
    ----------
    layer : str
        Name in ``model.named_modules()``.
    is_input : bool
        Whether what the layer is called with is meant, and not what it returns.
    number : int or None
        Of the call, where one is named.
    """

    layer: str
    is_input: bool = False
    number: int | None = None

    @classmethod
    def of(cls, name: str, known: Collection[str]) -> Address:
        """Read a name; one that means nothing in ``known`` is the name of a layer that the model lacks."""
        check_kind("a layer", name, str, "named as in model.named_modules()")
        if name in known:
            return cls(name)
        begin, _, digits = name.rpartition("#")
        stem, number = (begin, int(digits)) if begin and digits.isdigit() else (name, None)
        if stem in known:
            return cls(stem, False, number)
        layer, _, last = stem.rpartition(".")
        return cls(layer, True, number) if layer and last == "input" and layer in known else cls(name)

    @property
    def place(self) -> str:
        """The name without the number of a call."""
        return f"{self.layer}.input" if self.is_input else self.layer


def attention_around(layer: str, modules: Mapping[str, Any]) -> str | None:
    """Name of the attention whose output projection a layer is, which it never calls; None for others.

    An `nn.MultiheadAttention`, or one of torchvision's Swin. ``modules`` are those of a model, or their types.
    """
    around, _, name = layer.rpartition(".")
    around_kind, kind = (one if isinstance(one, type) else type(one) for one in map(modules.get, (around, layer)))
    is_one = name in PROJECTIONS and name == _projection_of(around_kind) and issubclass(kind, nn.Linear)
    return around if is_one else None


def _projection_of(kind: type) -> str | None:
    """Name of the output projection that attention of this type has and does not call; None for other types."""
    if issubclass(kind, nn.MultiheadAttention):
        return "out_proj" if kind.forward is nn.MultiheadAttention.forward else None
    swin = sys.modules.get("torchvision.models.swin_transformer")
    if swin is None or not issubclass(kind, swin.ShiftedWindowAttention):
        return None
    known = (swin.ShiftedWindowAttention.forward, swin.ShiftedWindowAttentionV2.forward)
    return "proj" if kind.forward in known else None  # type: ignore[attr-defined]


@atomic
def hooked_at(modules: Mapping[str, nn.Module], hooks: Mapping[tuple[str, bool], PlaceHook]) -> Iterator[None]:
    """Hooks on what layers return, or are called with, inside of the context, for calls of this thread.

    Parameters
    ----------
    modules : mapping of str to nn.Module
        Of a model.
    hooks : mapping of (str, bool) to callable
        Name of a layer, and whether its input is meant: the first tensor that it is called with.
    """
    handles: list[RemovableHandle] = []
    projections: dict[str, _Projection] = {}
    # (the methods of `nn.Module`, as scripted modules say that they cannot be hooked, but torch runs hooks of them)
    before, after = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook

    def put(register: Callable[..., RemovableHandle], layer: str, hook: Callable[..., Any], **options: Any) -> None:
        handles.append(register(modules[layer], OfThread(hook), **options))

    try:
        for (layer, is_input), hook in hooks.items():
            if (around := attention_around(layer, modules)) is not None:
                if around not in projections:
                    is_fused = isinstance(modules[around], nn.MultiheadAttention)
                    one = projections[around] = _Projection() if is_fused else _OfWindows(modules[layer])
                    put(before, around, one.enter)
                    # (modes of rules are left and entered by other hooks, around these)
                    put(after, around, one.leave, always_call=True, prepend=True)
                projections[around].hooks[is_input] = partial(hook, modules[layer])
            elif is_input:
                # (before the hooks of rules, which stand between this place and the layer)
                put(before, layer, partial(_on_input, hook, f"{layer}.input"), with_kwargs=True, prepend=True)
            else:
                put(after, layer, hook, with_kwargs=True)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in projections.values():
            one.close()


def _on_input(
    hook: PlaceHook, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: hand the first tensor to a hook."""
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    key = next((key for key, value in arguments.items() if isinstance(value, Tensor)), None)
    if key is None:
        raise InputTypeError(f"{name!r}: {type(module).__name__} is called without a tensor; name another layer")
    replaced = hook(module, (arguments[key],), {}, arguments[key])
    if replaced is None:
        return None
    arguments[key] = replaced
    return tuple(arguments[number] for number in range(len(args))), {name: arguments[name] for name in kwargs}


class _Projection(TorchFunctionMode):
    """Hands what goes into the output projection of a `nn.MultiheadAttention`, and what comes out, to hooks.

    Attributes
    ----------
    hooks : dict of bool to callable
        For the input (True) and the output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooks: dict[bool, Callable[..., Any]] = {}
        self._depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """See the functions that the module calls; forward pre-hook."""
        self._depth += 1
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """See no more, also after an error; forward hook."""
        if self._depth:
            self._depth -= 1
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave what an interrupt did not let end."""
        while self._depth and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._depth -= 1
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call a function, the attention as one that tells what goes into its projection."""
        if func is not F.multi_head_attention_forward and func is not _projecting():
            return func(*args, **(kwargs or {}))
        n_samples = args[0].shape[1] if args[0].dim() == 3 else 1  # (of the query)
        # (the mode that was entered last is asked first, and has made it a call that tells)
        later = _running.get() if func is _projecting() else ()
        token = _running.set((partial(self._replaced_in, n_samples), *later))
        try:
            return _projecting()(*args, **(kwargs or {}))
        finally:
            _running.reset(token)

    def _replaced_in(self, n_samples: int, is_input: bool, value: Tensor) -> Tensor:
        """What a hook makes of (tokens * samples, channels), which it sees as (samples, tokens, channels)."""
        seen = value.unflatten(0, (-1, n_samples)).transpose(0, 1)  # type: ignore[no-untyped-call]
        replaced = self._replaced(is_input, seen)
        return value if replaced is seen else replaced.transpose(0, 1).flatten(0, 1)

    def _replaced(self, is_input: bool, value: Tensor) -> Tensor:
        """What a hook makes of the projection's input or output; the value itself, where it makes nothing of it."""
        replaced = self.hooks[is_input]((), {}, value) if is_input in self.hooks else None
        return value if replaced is None else replaced


class _OfWindows(_Projection):
    """The same for attention of torchvision's Swin, which hands the weight of its projection to a function.

    Parameters
    ----------
    projection : nn.Module
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self._layer = projection

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call a function, `F.linear` with that weight as one that tells what goes in and comes out."""
        kwargs = kwargs or {}
        if func is not F.linear or len(args) < 2 or args[1] is not self._layer.weight:
            return func(*args, **kwargs)
        value = self._replaced(True, args[0])
        return self._replaced(False, func(value, *args[1:], **kwargs))


#: What is told of the output projection of the `nn.MultiheadAttention` that is running: its input (True), and output.
_running: ContextVar[tuple[Callable[[bool, Tensor], Tensor], ...]] = ContextVar("running")


@cache
def _projecting() -> FunctionType:
    """`F.multi_head_attention_forward` that asks `_running` for its output projection, the last layer that it calls."""
    copy = rebound(F.multi_head_attention_forward, linear=_linear)
    copy.__globals__["multi_head_attention_forward"] = copy
    return copy


def _linear(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    for tell in _running.get():
        value = tell(True, value)
    value = F.linear(value, weight, bias)
    for tell in _running.get():
        value = tell(False, value)
    return value


def rebound(function: Callable[..., Any], **names: Any) -> FunctionType:
    """Copy of a function that is written in Python, for which some global names mean something else.

    Raises
    ------
    TypeError
        If it is not written in Python.
    """
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType):
        name = getattr(function, "__name__", function)
        raise InputTypeError(f"{name}() is not written in Python, so that no rule can see what it calls")
    copy = FunctionType(
        plain.__code__, {**plain.__globals__, **names}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy
