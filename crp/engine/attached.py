"""What is put on a model for a call: listed, for one thread only, and taken off whatever happens."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn
from zennit.core import BasicHook, Composite, Hook

from crp.engine.door import _check_merged, check_weights
from crp.engine.encoding import propagation_of
from crp.engine.last_calls import _Unsupported
from crp.engine.module_hooks import _ON_ALL_MODULES, _hooks_of
from crp.engine.turns import TURNS, parts_of
from crp.errors import InputTypeError, StateError
from crp.layers import (
    ByChainRule,
    OfThread,
    evaluating,
    hooked,
    modules_of,
    uncompiled,
    unwrap,
    without_parameter_gradients,
)
from crp.layers.interrupts import atomic
from crp.notices import warn
from crp.wording import first_few


class _Placed(NamedTuple):
    """A composite on a module, the thread that has put it there, and whether a call did and not a user's own hand."""

    composite: Composite
    module: nn.Module
    thread: int
    by_call: bool


@dataclass(eq=False)
class _Use:
    """A model that a call has in its hands now."""

    model: nn.Module
    composite: Composite
    thread: int
    #: `id` of its modules and parameters.
    parts: set[int]
    #: Takes off what was put on.
    undo: ExitStack


#: Which composites are on which module: weak references to both, by `id` of the composite.
_placed_on: dict[int, tuple[weakref.ref[Composite], weakref.ref[nn.Module], int, bool]] = {}
#: Composites that a call has put on a model, and not a user's own hand.
_of_calls: weakref.WeakSet[Composite] = weakref.WeakSet()
#: Models in the hands of calls; and those of threads that a fork has left behind.
USES: list[_Use] = []
LEFT_BEHIND: list[_Use] = []


def note_placed(composite: Composite, module: nn.Module) -> None:
    """Remember that a composite is on a module now; a composite says so when it is registered."""
    key = id(composite)
    gone = weakref.ref(composite, lambda _: _placed_on.pop(key, None))
    _placed_on[key] = (gone, weakref.ref(module), get_ident(), composite in _of_calls)


def note_removed(composite: Composite) -> None:
    """Forget where a composite was."""
    _placed_on.pop(id(composite), None)


def placed() -> list[_Placed]:
    """All composites that are on a module."""
    known = [(composite(), module(), thread, by_call) for composite, module, thread, by_call in [*_placed_on.values()]]
    return [_Placed(c, m, thread, by_call) for c, m, thread, by_call in known if c is not None and m is not None]


def check_composite(composite: object) -> None:
    """Raise a `TypeError` if it is neither a composite nor None."""
    if composite is not None and not isinstance(composite, Composite):
        what = "a composite of crp.composites or zennit, such as EpsilonPlusFlat()"
        raise InputTypeError(f"composite must be None, or {what}, not {composite!r}")


def composite_on(
    model: nn.Module, composite: Composite | None = None, modules: dict[str, nn.Module] | None = None
) -> Composite | None:
    """Composite to explain a model by: the one that is given, or that a user's own hand has put on the model.

    Parameters
    ----------
    model, modules : nn.Module, and its `modules_of` where they are known
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
        If there are two; or one is on a part of the model, or on a module that the model is a part of; or another
        thread has put it there, where alone it acts.
    """
    check_composite(composite)
    _clear_left_behind()
    chosen = composite
    for other, module, thread, by_call in placed():
        if by_call or not (module is model or _are_nested(module, model)):
            continue
        if module is not model:
            raise StateError(
                f"{_kind(other)} is on a part of the model, or on a module that the model is a part of; put it on the "
                "model itself that is explained, or leave its context"
            )
        if chosen not in (None, other):
            raise StateError(_TWO.format(f"{_kind(other)} is on the model", _kind(chosen)))
        if thread != get_ident():
            raise StateError(
                f"another thread has put {_kind(other)} on the model, and it acts in that thread only; leave its "
                "context, and give the composite to the call"
            )
        chosen = other
    if propagation_of(chosen).encoding == "multiplier" and (rules := _rules_by_hand(model, chosen, modules)):
        raise StateError(_TWO.format(f"the rule {_kind(rules[0])} is on a layer of the model", _kind(chosen)))
    return chosen


def check_alone(model: nn.Module, composite: Composite | None, method: str) -> None:
    """Raise a `RuntimeError` if a composite is on the model that is not the one of the method."""
    model = unwrap(model)
    if composite is None:
        for other in (composite_on(model), *_rules_by_hand(model)):
            if other is not None:
                raise StateError(
                    f"{_kind(other)} is on the model, and {method} would use what it makes of the gradient; leave its "
                    "context, and give the composite to the method"
                )


def check_free(composite: Composite, model: nn.Module) -> None:
    """Raise a `RuntimeError` if other rules are on a model that a user's own hand puts a composite on."""
    if composite in _of_calls:  # (which has looked)
        return
    for other in placed():
        if other.composite is not composite and (other.module is model or _are_nested(other.module, model)):
            raise StateError(_TWO.format(f"{_kind(other.composite)} is on the model", _kind(composite)))
    if rules := _rules_by_hand(model, composite):
        raise StateError(_TWO.format(f"the rule {_kind(rules[0])} is on a layer of the model", _kind(composite)))


_TWO = "{} already, and {} would come on top of it; leave the context of the former first, or use it alone"


def _kind(thing: object) -> str:
    return type(thing).__name__


def _are_nested(module: nn.Module, model: nn.Module) -> bool:
    return any(part is model for part in module.modules()) or any(part is module for part in model.modules())


def _rules_on(module: nn.Module) -> list[Hook]:
    """Rules in zennit's protocol that hook a module, each once."""
    # (a call in another thread may put hooks on meanwhile)
    owners = [getattr(hook, "__self__", None) for hook in [*module._forward_hooks.values()]]
    owners += [getattr(owner, "rule", None) for owner in owners]  # (ours hook a module by what brings them to it)
    return list({id(owner): owner for owner in owners if isinstance(owner, Hook)}.values())


def _rules_by_hand(
    model: nn.Module, composite: Composite | None = None, modules: dict[str, nn.Module] | None = None
) -> list[Hook]:
    """Rules on a model's layers, put there by a user's own hand, that are not this composite's."""
    modules = modules_of(model) if modules is None else modules
    if not _rules_beside(modules, composite):
        return []
    with TURNS.taken(parts_of(model)):  # (what is still there is not of a call in another thread)
        return _rules_beside(modules, composite)


def _rules_beside(modules: dict[str, nn.Module], composite: Composite | None) -> list[Hook]:
    hooked_ones = [module for module in modules.values() if module._forward_hooks]
    rules = [rule for module in hooked_ones for rule in _rules_on(module)]
    return [rule for rule in rules if composite is None or rule not in composite.hook_refs]


def is_on(composite: Composite | None, model: nn.Module) -> bool:
    """Whether a user's own hand has put a composite on the model."""
    if composite is None or composite in _of_calls:
        return False
    if (place := _placed_on.get(id(composite))) is not None:
        return place[1]() is model
    hooks = composite.hook_refs  # (those of zennit do not say where they are)
    return len(hooks) > 0 and any(rule in hooks for part in modules_of(model).values() for rule in _rules_on(part))


# --- put on, and taken off ------------------------------------------------------------------------------------------


@atomic
def put_on(composite: Composite | None, model: nn.Module, tell: Callable[[str], None] = warn) -> Iterator[nn.Module]:
    """Model with the composite's rules and canonizers on it, in evaluation mode, its parameters outside autograd.

    Threads that share a model, a part of it or a composite take turns; hooks act in this thread only. Leaving, also by
    an exception or an interrupt, leaves the model as it was found: a composite that a user's own hand had put on it
    stays.

    Parameters
    ----------
    composite : zennit.core.Composite or None
        None adds nothing.
    model : nn.Module
    tell : callable
        Gets the text of each warning.

    Raises
    ------
    RuntimeError
        In inference mode, if another composite is on the model, or if a call with a composite is under way on it.
    """
    if torch.is_inference_mode_enabled():
        raise StateError("attribution needs gradients, which torch.inference_mode() forbids; use torch.no_grad()")
    modules = modules_of(model)
    composite = composite_on(model, composite, modules)
    asked = propagation_of(composite)
    if composite is not None and asked.encoding != "multiplier":
        _check_chain_rule(modules, composite)
    composite = composite or Composite()
    parts = parts_of(model, modules.values())
    with ExitStack() as undo:
        undo.enter_context(TURNS.taken([composite, *parts, *filter(None, _ON_ALL_MODULES)]))
        check_weights(model, modules.values())  # (another thread may have had other weights in it until now)
        use = _Use(model, composite, get_ident(), set(map(id, parts)), undo)
        _check_not_nested(use)
        undo.callback(_forget, use)
        USES.append(use)
        training = set(undo.enter_context(evaluating(model, modules.values())))
        if training and "eval" not in vars(model):  # (an exported program has no mode, and an `eval` that refuses)
            names = [name or type(model).__name__ for name, module in modules.items() if module in training]
            tell(
                f"the model is in training mode ({first_few(names, 3, 'modules')}); it is explained in evaluation "
                "mode. Call model.eval() first to say so."
            )
        if not asked.isolates:
            undo.enter_context(without_parameter_gradients(model, modules.values()))
            undo.enter_context(uncompiled(model, modules.values()))
        if not is_on(composite, model):
            if composite.canonizers:
                undo.enter_context(_restored_on_error(model))
            undo.callback(_take_off, composite)
            _of_calls.add(composite)
            before = set() if asked.isolates else {(id(hooks), n) for hooks, n in _forward_hooks_of(modules)}
            composite.register(model)
            for hooks, number in [] if asked.isolates else _forward_hooks_of(modules_of(model)):
                if (id(hooks), number) not in before:
                    hooks[number] = OfThread(hooks[number])
            if not (asked.isolates or composite.hook_refs or composite.module_map is Composite._empty_module_map):
                tell(
                    f"{_kind(composite)} has a rule for no layer of the model, and gives the plain gradient: rules of "
                    "zennit are for modules. Those of crp.composites are for functions, too"
                )
        _check_merged(composite, modules)
        if not asked.isolates:
            undo.enter_context(_called_once(model, tell))
        yield model


def _check_chain_rule(modules: dict[str, nn.Module], composite: Composite) -> None:
    """Refuse parts of a model that need the ordinary chain rule, under composites that propagate relevance itself."""
    if exempt := [name for name, module in modules.items() if isinstance(module, ByChainRule)]:
        raise InputTypeError(
            f"layer {exempt[0]!r} needs the ordinary chain rule, and {_kind(composite)} propagates relevance itself. "
            "Use one of crp.composites"
        )


def _take_off(composite: Composite) -> None:
    composite.remove()
    _of_calls.discard(composite)


def _forget(use: _Use) -> None:
    with suppress(ValueError):
        USES.remove(use)


def _check_not_nested(use: _Use) -> None:
    """Refuse a composite within a call of this thread that has one on the same layers."""
    for other in [*USES]:
        is_empty = type(other.composite) is Composite and not other.composite.handles
        if other.thread == use.thread and not is_empty and not other.parts.isdisjoint(use.parts):
            raise StateError(
                f"a call with {_kind(other.composite)} is under way on the model, and this one is inside of it; let "
                "it end first, or explain a copy of the model"
            )


def _forward_hooks_of(modules: dict[str, nn.Module]) -> list[tuple[dict[int, Any], int]]:
    """Hooks before and after calls of modules: where each is kept, and its number."""
    return [(hooks, number) for module in modules.values() for hooks in _hooks_of(module)[:2] for number in hooks]


@atomic
def _called_once(model: nn.Module, tell: Callable[[str], None]) -> Iterator[None]:
    unsupported = _Unsupported()
    rules = {name: (module, _rules_on(module)) for name, module in modules_of(model).items()}
    for name, (_, of_layer) in rules.items():
        if len(of_layer) > 1:
            raise StateError(
                f"layer {name!r} has {len(of_layer)} rules, {' and '.join(map(_kind, of_layer))}: one composite comes "
                "on top of another; leave the context of the first, or use it alone"
            )
    watched = {
        module: unsupported.watch_layer(name)
        for name, (module, of_layer) in rules.items()
        if any(isinstance(rule, BasicHook) for rule in of_layer)
    }
    with hooked(watched), hooked({model: unsupported.watch_model} if watched else {}):
        yield
    for problem in unsupported.problems(rules):
        tell(problem)


@atomic
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


def _undo_use(use: _Use) -> None:
    """Take off what a call has put on, if it has not done so itself."""
    with suppress(ValueError, RuntimeError):  # (what was half put on, or was taken off since)
        use.undo.close()
    _forget(use)
    with suppress(ValueError):
        LEFT_BEHIND.remove(use)


def _clear_left_behind() -> None:
    for use in reversed(LEFT_BEHIND):
        _undo_use(use)


def _after_fork() -> None:
    """In the child of a fork, calls of other threads do not go on; what they have put on is taken off when asked."""
    for use in [use for use in USES if use.thread != get_ident()]:
        _forget(use)
        LEFT_BEHIND.append(use)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
