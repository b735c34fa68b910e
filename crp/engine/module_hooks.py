"""Hooks of modules: those of one module and, by functions of `torch.nn.modules.module`, of all of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from crp.layers import OfThread
from crp.layers.interrupts import atomic

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: Hooks of a module by number, in the order of `HOOKS`.
_hooks_of: Callable[[nn.Module], tuple[dict[int, Any], ...]] = attrgetter(*HOOKS)
#: Hooks on all modules by number, in the order of `HOOKS`.
_ON_ALL_MODULES: tuple[dict[int, Any], ...] = tuple(vars(torch_module)[f"_global{kind}"] for kind in HOOKS)


class _OfOtherThreads(OfThread):
    """Hook of a module that acts in all threads but the one that has made it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns, in other threads."""
        return None if get_ident() == self._thread else self._hook(*args, **kwargs)


@atomic
def _changed_hooks(
    modules: Iterable[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Context in which others act in place of hooks on these modules and on all."""
    groups = [*_ON_ALL_MODULES, *chain.from_iterable(map(_hooks_of, modules))]
    own = [(hooks, number, hook) for hooks in groups for number, hook in [*hooks.items()]]
    try:
        for hooks, number, hook in own:
            hooks[number] = change(hook)
        yield
    finally:
        for hooks, number, hook in own:
            if number in hooks:  # (it may have been taken off meanwhile)
                hooks[number] = hook


def _owner_of(hook: Any) -> object | None:
    """What a hook of this package or of zennit belongs to; None for those of others."""
    while isinstance(hook, partial | OfThread):
        hook = hook.func if isinstance(hook, partial) else hook._hook
    owner = getattr(hook, "__self__", hook)
    module = getattr(owner, "__module__", None) or ""
    return owner if module.partition(".")[0] in ("crp", "zennit") else None
