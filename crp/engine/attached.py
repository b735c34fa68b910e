"""Composites on a model, and the model as it was found afterwards."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from zennit.core import BasicHook, Composite, Hook

from crp.engine.encoding import propagation_of
from crp.layers import ByChainRule, modules_of, uncompiled, unwrap, without_parameter_gradients
from crp.notices import warn

#: Which composites are on which module.
_placed_on: weakref.WeakKeyDictionary[Composite, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_placed_guard = threading.Lock()
#: Composites that a call has put on a model, and not a user's own hand.
_of_calls: weakref.WeakSet[Composite] = weakref.WeakSet()
_locks: weakref.WeakKeyDictionary[object, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def note_placed(composite: Composite, module: nn.Module) -> None:
    """Remember that a composite is on a module now; a composite says so when it is registered."""
    with _placed_guard:
        _placed_on[composite] = weakref.ref(module)


def note_removed(composite: Composite) -> None:
    """Forget where a composite was."""
    with _placed_guard:
        _placed_on.pop(composite, None)


def placed() -> list[tuple[Composite, nn.Module | None]]:
    """All composites that are on a module, each with it."""
    with _placed_guard:
        return [(composite, module()) for composite, module in _placed_on.items()]


def check_composite(composite: object) -> None:
    """Raise a `TypeError` if it is neither a composite nor None."""
    if composite is not None and not isinstance(composite, Composite):
        raise TypeError(
            f"composite must be None, or a composite of crp.composites or zennit, such as EpsilonPlusFlat(), "
            f"not {composite!r}"
        )


def composite_on(model: nn.Module, composite: Composite | None = None) -> Composite | None:
    """Composite to explain a model by: the one that is given, or that a user's own hand has put on the model.

    Parameters
    ----------
    model : nn.Module
    composite : zennit.core.Composite, optional
        It may be on the model already.

    Returns
    -------
    zennit.core.Composite or None
        None also where a composite of zennit is on the model, which need not be known: it propagates relevance itself,
        as what has no composite does.

    Raises
    ------
    RuntimeError
        If there are two, or one is on a part of the model, or on a module that the model is a part of.
    """
    check_composite(composite)
    with _locks_guard:
        by_hand = [(other, module) for other, module in placed() if other not in _of_calls]
    chosen = composite
    for other, module in by_hand:
        if module is model and chosen in (None, other):
            chosen = other
        elif module is model:
            raise RuntimeError(_TWO.format(f"{_kind(other)} is on the model", _kind(chosen)))
        elif module is not None and _are_nested(module, model):
            raise RuntimeError(
                f"{_kind(other)} is on a part of the model, or on a module that the model is a part of; put it on the "
                "model itself that is explained, or leave its context"
            )
    if propagation_of(chosen).encoding == "multiplier" and (rules := rules_by_hand(model, chosen)):
        raise RuntimeError(_TWO.format(f"the rule {_kind(rules[0])} is on a layer of the model", _kind(chosen)))
    return chosen


def check_alone(model: nn.Module, composite: Composite | None, method: str) -> None:
    """Raise a `RuntimeError` if a composite is on the model that is not the one of the method."""
    model = unwrap(model)
    if composite is None:
        for other in (composite_on(model), *rules_by_hand(model)):
            if other is not None:
                raise RuntimeError(
                    f"{_kind(other)} is on the model, and {method} would use what it makes of the gradient; leave its "
                    "context, and give the composite to the method"
                )


_TWO = "{} already, and {} would come on top of it; leave the context of the former first, or use it alone"


def _kind(thing: object) -> str:
    return type(thing).__name__


def _are_nested(module: nn.Module, model: nn.Module) -> bool:
    return any(part is model for part in module.modules()) or any(part is module for part in model.modules())


def _rules_on(module: nn.Module) -> list[Hook]:
    """Rules in zennit's protocol that hook a module, each once."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    owners += [getattr(owner, "rule", None) for owner in owners]  # (ours hook a module by what brings them to it)
    return list({id(owner): owner for owner in owners if isinstance(owner, Hook)}.values())


def rules_by_hand(model: nn.Module, composite: Composite | None = None) -> list[Hook]:
    """Rules on a model's layers, put there by a user's own hand, that are not this composite's."""
    if not _rules_beside(model, composite):
        return []
    with _lock(model):  # (what is still there is not of a call in another thread)
        return _rules_beside(model, composite)


def _rules_beside(model: nn.Module, composite: Composite | None) -> list[Hook]:
    rules = [rule for module in modules_of(model).values() if module._forward_hooks for rule in _rules_on(module)]
    return [rule for rule in rules if composite is None or rule not in composite.hook_refs]


def is_on(composite: Composite, model: nn.Module) -> bool:
    """Whether a user's own hand has put a composite on the model."""
    with _locks_guard:
        if composite in _of_calls:
            return False
    for other, module in placed():
        if other is composite:
            return module is model
    hooks = composite.hook_refs  # (those of zennit do not say where they are)
    return len(hooks) > 0 and any(rule in hooks for part in modules_of(model).values() for rule in _rules_on(part))


@contextmanager
def attached(composite: Composite | None, model: nn.Module) -> Iterator[nn.Module]:
    """Model with the composite's rules and canonizers on it, in evaluation mode, its parameters outside autograd.

    Threads that share a model or a composite take turns. Leaving, also by an exception, leaves the model as it was
    found: a composite that a user's own hand had put on it stays.

    Parameters
    ----------
    composite : zennit.core.Composite or None
        None adds nothing.
    model : nn.Module

    Raises
    ------
    RuntimeError
        In inference mode, or if another composite is on the model.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "attribution needs gradients, which torch.inference_mode() forbids; use torch.no_grad() instead"
        )
    composite = composite_on(model, composite)
    if composite is not None:
        _check_chain_rule(model, composite)
    composite = composite or Composite()
    states: list[AbstractContextManager[object]] = [_lock(model), _lock(composite), _evaluating(model)]
    isolates = propagation_of(composite).isolates
    if not isolates:
        states += [without_parameter_gradients(model), uncompiled(model)]
    is_placed = is_on(composite, model)
    if composite.canonizers and not is_placed:
        states.append(_restored_on_error(model))
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state)
        with (
            nullcontext(model) if is_placed else _put(composite, model) as modified,
            nullcontext() if isolates else _called_once(modified),
        ):
            yield modified


def _check_chain_rule(model: nn.Module, composite: Composite) -> None:
    """Refuse parts of a model that need the ordinary chain rule, under composites that propagate relevance itself."""
    exempt = [name for name, module in modules_of(model).items() if isinstance(module, ByChainRule)]
    if exempt and propagation_of(composite).encoding != "multiplier":
        raise TypeError(
            f"layer {exempt[0]!r} needs the ordinary chain rule, and {_kind(composite)} propagates relevance itself. "
            "Use one of crp.composites"
        )


@contextmanager
def _put(composite: Composite, model: nn.Module) -> Iterator[nn.Module]:
    with _locks_guard:
        _of_calls.add(composite)
    try:
        with composite.context(model) as modified:
            yield modified
    finally:
        composite.remove()  # the context does not, where registering itself failed
        with _locks_guard:
            _of_calls.discard(composite)


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
    # zennit's rules keep the input of a module's last call only, so that relevance of earlier calls would be wrong.
    calls: Counter[str] = Counter()
    rules = {name: (module, _rules_on(module)) for name, module in modules_of(model).items()}
    for name, (_, of_layer) in rules.items():
        if len(of_layer) > 1:
            raise RuntimeError(
                f"layer {name!r} has {len(of_layer)} rules, {' and '.join(map(_kind, of_layer))}: one composite comes "
                "on top of another; leave the context of the first, or use it alone"
            )
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, (module, of_layer) in rules.items()
        if any(isinstance(rule, BasicHook) for rule in of_layer)
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
    # A canonizer that raises an error half-way returns nothing by which its first half could be undone.
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
