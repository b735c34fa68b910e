"""Composites on a model, and the model as it was found afterwards."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from zennit.core import BasicHook, Composite

from crp.layers import modules_of, uncompiled, without_parameter_gradients
from crp.notices import warn

_locks: weakref.WeakKeyDictionary[object, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def check_composite(composite: object) -> None:
    """Raise a `TypeError` if it is neither a composite nor None."""
    if composite is not None and not isinstance(composite, Composite):
        raise TypeError(
            f"composite must be None, or a composite of crp.composites or zennit, such as EpsilonPlusFlat(), "
            f"not {composite!r}"
        )


@contextmanager
def attached(composite: Composite, model: nn.Module) -> Iterator[nn.Module]:
    """Model with the composite's rules and canonizers on it, in evaluation mode, its parameters outside autograd.

    Threads that share a model or a composite take turns. Leaving, also by an exception, leaves the model as it was
    found.

    Raises
    ------
    RuntimeError
        In inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "attribution needs gradients, which torch.inference_mode() forbids; use torch.no_grad() instead"
        )
    states: list[AbstractContextManager[object]] = [_lock(model), _lock(composite), _evaluating(model)]
    ours = getattr(composite, "isolates", False)
    if not ours:
        states += [without_parameter_gradients(model), uncompiled(model)]
    if composite.canonizers:
        states.append(_restored_on_error(model))
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state)
        try:
            with composite.context(model) as modified, nullcontext() if ours else _called_once(modified):
                yield modified
        finally:
            composite.remove()  # the context does not, where registering itself failed


def _lock(owner: object) -> threading.RLock:
    with _locks_guard:
        return _locks.setdefault(owner, threading.RLock())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in modules_of(model).values() if module.training]
    if training:
        warn(
            f"the model is in training mode ({len(training)} modules); it is explained in evaluation mode. "
            "Call model.eval() first to say so."
        )
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _called_once(model: nn.Module) -> Iterator[None]:
    # zennit's rules know the input of a module's last call only; ours know each.
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in modules_of(model).items()
        if any(isinstance(getattr(hook, "__self__", None), BasicHook) for hook in module._forward_hooks.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    repeated = [name for name, count in calls.items() if count > 1]
    if repeated:
        warn(
            f"layers {repeated} are called more than once, which zennit's rules do not support: relevance is wrong. "
            "Those of crp.composites do."
        )


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    # A canonizer that raises half-way never hands out what would undo its first half.
    states = [
        (vars(module), dict(vars(module)), {k: v.copy() for k, v in vars(module).items() if isinstance(v, dict | set)})
        for module in model.modules()
    ]
    values = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        yield
    except BaseException:
        for attributes, before, collections in states:
            attributes.clear()
            attributes.update(before)
            for name, entries in collections.items():
                attributes[name].clear()
                attributes[name].update(entries)
        for tensor, data in values:
            tensor.data = data
        raise
