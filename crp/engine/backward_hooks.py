"""Backward hooks of a user's own: they may read what goes back through a model, and not change it; rules may.

They come onto autograd's graph while the model runs: the model, or a hook on it, puts them on a tensor or on a node of
the graph, and torch those of modules. A handle of torch is made for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle
from zennit.core import Hook

from crp.engine.module_hooks import _owner_of
from crp.errors import StateError
from crp.layers import modules_of
from crp.layers.lasting import Shared
from crp.notices import kind_of

_make_handle = RemovableHandle.__init__
_AccumulateGrad: Any = torch._C._functions.AccumulateGrad
#: Functions of torch that put a hook on a tensor, or on a node of the graph.
_PUTTING_ON = {Tensor.register_hook.__code__, BackwardCFunction._register_hook.__code__}


class _ReadOnly:
    """Backward hook that must write to no gradient, and return none but the one that it got.

    Parameters
    ----------
    hook : callable
        Of the gradient of a tensor; of a node, it takes gradients in tuples, of which the first goes on.
    where : str
        Where it was put on, for the error.
    """

    def __init__(self, hook: Callable[..., Any], where: str) -> None:
        self._hook, self._where = hook, where

    def __call__(self, *gradients: Any) -> Any:
        """Have the hook read; torch calls it in a thread of the device."""
        if isinstance(torch._C._current_autograd_node(), _AccumulateGrad):  # (of a parameter, where nothing goes on)
            return self._hook(*gradients)
        parts = [part if isinstance(part, tuple) else (part,) for part in gradients]
        versions = [(each, each._version) for part in parts for each in part if each is not None]
        returned = self._hook(*gradients)
        is_written = any(each._version != version for each, version in versions)
        own = returned if isinstance(returned, tuple) else (returned,)
        is_same = len(own) == len(parts[0]) and all(map(lambda one, other: one is other, own, parts[0]))
        if is_written or not (returned is None or is_same):
            does = "writes to a gradient" if is_written else f"returns {kind_of(returned)}"
            raise StateError(
                f"a backward hook on {self._where} {does}: relevance would not be what it is called. Let the hook read "
                "and return None, take it off for the call (handle.remove()), put it on where the model is in training "
                "only, or change relevance by a mask or a rule"
            )
        return None


class _ReadingOnly:
    """Context in which a model runs in this thread; hooks that come onto its graph cannot change what goes back."""

    def __init__(self, model: object) -> None:
        self.model = model
        #: Hooks of tensors or nodes, by number, the number of the new one, and where it was put on.
        self._found: list[tuple[Any, int, str]] = []

    def __enter__(self) -> None:
        self._token = _running.set(self)
        _noting.__enter__()

    def __exit__(self, kind: object, *_: object) -> None:
        _noting.__exit__()
        _running.reset(self._token)
        for hooks, number, where in self._found if kind is None else ():
            if number in hooks:  # (it may have been taken off again)
                hooks[number] = _ReadOnly(hooks[number], where)

    def note(self, handle: RemovableHandle, caller: FrameType) -> None:
        """Note what a handle was made for."""
        given = caller.f_locals if caller.f_code in _PUTTING_ON else {}
        if "hook" not in given or _owner_of(given["hook"]) is not None or given["hook"] is Tensor.contiguous:
            return  # (of these, the last one changes no number)
        if isinstance(tensor := given.get("self"), Tensor) and tensor.is_leaf:  # (which nothing goes back through)
            return
        owner = _running_in(caller.f_back)
        if isinstance(owner, Hook):  # (a rule, which has the hook for what it does)
            return
        modules = modules_of(self.model) if isinstance(self.model, nn.Module) else {}
        name = next((name for name, module in modules.items() if module is owner), "")
        where = f"layer {name!r} ({type(owner).__name__})" if name else "the model"
        self._found.append((handle.hooks_dict_ref(), handle.id, where))


def _running_in(frame: FrameType | None) -> object:
    """Innermost module, or rule in zennit's protocol, of which a method is running."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module | Hook):
            return owner
        frame = frame.f_back
    return None


#: The model that runs in this thread.
_running: ContextVar[_ReadingOnly | None] = ContextVar("reading_only", default=None)


def hooks_as_now() -> Callable[[], AbstractContextManager[None]]:
    """What gives a context for a part of the model that will run again, in which hooks may do what they may do now."""
    run = _running.get()
    return nullcontext if run is None else partial(_ReadingOnly, run.model)


def _make_noted_handle(handle: RemovableHandle, *args: Any, **kwargs: Any) -> None:
    _make_handle(handle, *args, **kwargs)
    if (run := _running.get()) is not None:
        run.note(handle, sys._getframe(1))


@Shared
def _noting() -> Iterator[None]:
    """Every handle that torch makes tells of itself."""
    made: Any = RemovableHandle
    made.__init__ = _make_noted_handle
    try:
        yield
    finally:
        made.__init__ = _make_handle
