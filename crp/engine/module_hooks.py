"""Hooks of modules that act for a while in one thread only, in others only, or only to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import get_ident
from typing import Any

from torch import nn
from zennit.core import Hook

from crp.errors import StateError
from crp.layers.interrupts import atomic

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class OfThread:
    """Hook of a module that acts in one thread, and does nothing in others that call the model meanwhile."""

    def __init__(self, hook: Callable[..., Any], thread: int) -> None:
        self._hook, self._thread = hook, thread
        self.__self__ = getattr(hook, "__self__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns, in its thread."""
        return self._hook(*args, **kwargs) if get_ident() == self._thread else None


class _OfOtherThreads(OfThread):
    """Hook of a module that acts in all threads but one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns, in other threads."""
        return None if get_ident() == self._thread else self._hook(*args, **kwargs)


class _ReadOnly(OfThread):
    """Backward hook that must write to no gradient, and return none, which torch would send on in its place."""

    def __init__(self, hook: Callable[..., Any], layer: str) -> None:
        super().__init__(hook, get_ident())
        self._layer = layer

    def __call__(self, module: nn.Module, *gradients: Any) -> None:
        """Have the hook read; torch calls it in a thread of the device."""
        versions = [(each, each._version) for part in gradients for each in part if each is not None]
        returned = self._hook(module, *gradients)
        if returned is not None or any(each._version != version for each, version in versions):
            does = "writes to a gradient" if returned is None else f"returns a {type(returned).__name__}"
            where = f"layer {self._layer!r} ({type(module).__name__})" if self._layer else "the model"
            raise StateError(
                f"a backward hook on {where} {does}: relevance would not be what it is called. Let the hook read and "
                "return None, take it off for the call (handle.remove()), or change relevance by a mask or a rule"
            )


@atomic
def _reading_only(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context in which backward hooks on modules, by their names, must not change what goes back; but zennit's do."""
    own = [
        (hooks, number, hook, name)
        for name, module in modules.items()
        for hooks in (module._backward_pre_hooks, module._backward_hooks)
        for number, hook in hooks.items()
        if not isinstance(getattr(hook, "__self__", None), Hook)
    ]
    try:
        for hooks, number, hook, name in own:
            hooks[number] = _ReadOnly(hook, name)
        yield
    finally:
        for hooks, number, hook, _ in own:
            if number in hooks:  # (it may have been taken off meanwhile)
                hooks[number] = hook
