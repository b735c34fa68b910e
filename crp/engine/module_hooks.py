"""Hooks of modules that act for a while in one thread only, in others only, or only to read.

A hook is of one module or, by functions of `torch.nn.modules.module`, of all modules of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from zennit.core import Hook

from crp.errors import StateError
from crp.layers.interrupts import atomic

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: Hooks on all modules by number, in the order of `HOOKS`.
_ON_ALL_MODULES: tuple[dict[int, Any], ...] = tuple(vars(torch_module)[f"_global{kind}"] for kind in HOOKS)


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
    """Backward hook that must write to no gradient of these layers, and return none, which torch would send on."""

    def __init__(self, hook: Callable[..., Any], names: Mapping[nn.Module, str]) -> None:
        super().__init__(hook, get_ident())
        self._names = names

    def __call__(self, module: nn.Module, *gradients: Any) -> Any:
        """Have the hook read; torch calls it in a thread of the device."""
        versions = [(each, each._version) for part in gradients for each in part if each is not None]
        returned = self._hook(module, *gradients)
        if (layer := self._names.get(module)) is None:  # (a hook on all modules acts as ever on those of other models)
            return returned
        if returned is not None or any(each._version != version for each, version in versions):
            does = "writes to a gradient" if returned is None else f"returns a {type(returned).__name__}"
            where = f"layer {layer!r} ({type(module).__name__})" if layer else "the model"
            raise StateError(
                f"a backward hook on {where} {does}: relevance would not be what it is called. Let the hook read and "
                "return None, take it off for the call (handle.remove()), or change relevance by a mask or a rule"
            )
        return None


def _reading_only(modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
    """Context in which backward hooks on modules, by their names, must not change what goes back; but zennit's do."""
    names = {module: name for name, module in modules.items()}

    def change(hook: Callable[..., Any]) -> Callable[..., Any]:
        return hook if isinstance(getattr(hook, "__self__", None), Hook) else _ReadOnly(hook, names)

    return _changed_hooks(modules.values(), HOOKS[2:], change)


@atomic
def _changed_hooks(
    modules: Iterable[nn.Module], kinds: Iterable[str], change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Context in which others act in place of hooks of these kinds, on these modules and on all."""
    of_all = dict(zip(HOOKS, _ON_ALL_MODULES, strict=True))
    groups = [hooks for kind in kinds for hooks in (of_all[kind], *(getattr(module, kind) for module in modules))]
    own = [(hooks, number, hook) for hooks in groups for number, hook in hooks.items()]
    try:
        for hooks, number, hook in own:
            hooks[number] = change(hook)
        yield
    finally:
        for hooks, number, hook in own:
            if number in hooks:  # (it may have been taken off meanwhile)
                hooks[number] = hook
