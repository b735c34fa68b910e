"""Where in a model its forward pass is: the innermost module, tracked for accounts and reports only, or looked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from crp.layers import OfThread, modules_of, referencing


class Places:
    """Modules of a model that are running.

    Parameters
    ----------
    model : nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._running: list[tuple[str, int]] = []
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []

    @property
    def now(self) -> tuple[str, int]:
        """Name of the innermost module that runs, and which of its calls it is; ``""`` is the model itself."""
        return self._running[-1] if self._running else ("", 0)

    def track(self) -> None:
        """Begin to follow a forward pass, in this thread."""
        for name, module in self.model.named_modules():
            if module is not self.model:
                self._handles += _hook(module, OfThread(partial(self._enter, name)), OfThread(self._leave))

    def stop(self) -> None:
        """End of the forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()
        self._calls.clear()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if not referencing():
            self._calls[name] = self._calls.get(name, -1) + 1
            self._running.append((name, self._calls[name]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not referencing() and self._running:
            self._running.pop()

    def names(self) -> dict[int, str]:
        """Names of all modules, by `id`."""
        return {id(module): name for name, module in modules_of(self.model).items()}

    def scripted(self) -> list[str]:
        """Names of scripted and traced parts."""
        return [name for name, module in self.model.named_modules() if isinstance(module, torch.jit.ScriptModule)]


def _hook(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any], **keywords: Any) -> list[Any]:
    """Hooks that run before and after each call of a module, after errors, too; they must be removed."""
    # (scripted modules say that they cannot be hooked, but torch runs hooks of them)
    keywords = {"prepend": True} | keywords
    return [
        nn.Module.register_forward_pre_hook(module, before, **keywords),
        nn.Module.register_forward_hook(module, after, always_call=True),
    ]


def _lasting(*contexts: AbstractContextManager[Any]) -> SimpleNamespace:
    """Handle of contexts that last until it is removed."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return SimpleNamespace(remove=stack.pop_all().close)


def innermost_module(names: Mapping[int, str]) -> str:
    """Name of the innermost module whose forward is running; slow, for messages."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            return names[id(owner)]
        frame = frame.f_back
    return ""
