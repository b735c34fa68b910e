"""What is on a model, for a user's own eyes and hands: listed, and taken off."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from zennit.core import Hook

from crp.engine.attached import LEFT_BEHIND, USES, _undo_use, placed
from crp.engine.module_hooks import _hooks_of, _owner_of
from crp.engine.turns import TURNS, parts_of
from crp.layers import modules_of, unwrap


class _Addition(NamedTuple):
    """Something that is on a model and no part of it.

    Attributes
    ----------
    what : str
        Type of the composite, rule or hook.
    layer : str
        Where it is; ``""`` is the model itself.
    thread : int or None
        Where alone it acts (`threading.get_ident`), if it is known.
    """

    what: str
    layer: str
    thread: int | None


def attached(model: nn.Module) -> list[_Addition]:
    """What this package, or zennit, has put on a model, or on a part of it: composites first, then hooks.

    Returns
    -------
    list of Addition
        Empty unless a composite's context is entered, a call is under way, or the program was left in the midst of one;
        `clear` takes it all off.
    """
    modules = modules_of(unwrap(model))
    names = {id(module): name for name, module in modules.items()}
    on = [one for one in placed() if id(one.module) in names]
    known = {one.composite for one in on}
    found = [_Addition(type(one.composite).__name__, names[id(one.module)], one.thread) for one in on]
    found += [
        _Addition(type(use.composite).__name__, names[id(use.model)], use.thread)
        for use in [*USES, *LEFT_BEHIND]
        if id(use.model) in names and use.composite not in known
    ]
    for name, module in modules.items():
        for hooks in _hooks_of(module):
            owned = [(hook, owner) for hook in hooks.values() if (owner := _owner_of(hook)) is not None]
            ours = {id(owner): (type(owner).__name__, getattr(hook, "_thread", None)) for hook, owner in owned}
            found += [_Addition(what, name, thread) for what, thread in ours.values()]
    return found


def clear(model: nn.Module) -> list[_Addition]:
    """Take off a model what this package, or zennit, has put on it; for programs that were left in the midst of a call.

    Weights, training flags and attributes that a call has changed are as before it. What a composite of zennit has
    changed by a user's own hand is put back by its own ``remove()`` only.

    Returns
    -------
    list of _Addition
        What was there.

    Raises
    ------
    RuntimeError
        If another thread is at work on the model.
    """
    model = unwrap(model)
    with TURNS.taken(parts_of(model), wait=False):
        found = attached(model)
        modules = modules_of(model)
        parts = set(map(id, parts_of(model)))
        for use in reversed([*USES, *LEFT_BEHIND]):
            if not use.parts.isdisjoint(parts):
                _undo_use(use)
        for one in placed():
            if any(one.module is part for part in modules.values()):
                one.composite.remove()
        for module in modules_of(model).values():
            for hooks in _hooks_of(module):
                for number in [number for number, hook in hooks.items() if _owner_of(hook) is not None]:
                    owner = _owner_of(hooks.pop(number))
                    if isinstance(owner, Hook):
                        owner.remove()
    return found
