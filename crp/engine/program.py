"""Calls of torch's kernels as a function, in as little memory as they need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

#: Operations that give the tensor that they take, where there are no gradients.
_NOTHING = {torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.alias.default}


@dataclass(frozen=True)
class Value:
    """A tensor among those that were given, made or met.

    Attributes
    ----------
    number : int
    memory : int, optional
        Where it lies, if that was made by a call: memory that nobody else has. Views lie where their base does.
    form : tuple
        Shape, strides and data type.
    """

    number: int
    memory: int | None
    form: tuple[Any, ...]


class KernelCall(NamedTuple):
    """A call of an operation of torch; tensors in what it takes and gives are `Value`."""

    function: Any
    args: Any
    kwargs: Any
    result: Any


def compiled(given: Sequence[int], calls: Sequence[KernelCall], outputs: Any) -> Callable[..., Any]:
    """Calls as one function, which lets go of each tensor, or writes on it, where it is read for the last time.

    Parameters
    ----------
    given : sequence of int
        Numbers of the tensors that it takes.
    calls : sequence of KernelCall
    outputs : nested lists of Value
        What it returns; what the calls have not made is copied.
    """
    graph, nodes = fx.Graph(), dict[int, fx.Node]()
    for number in given:
        nodes[number] = graph.placeholder(f"x{number}")
    # (by memory: what lies in the same must be read no more either)
    last = {value.memory: place for place, call in enumerate(calls) for value in _values(call)}
    last |= {value.memory: len(calls) for value in _values(outputs)}

    def node_of(value: Any) -> Any:
        return nodes[value.number] if isinstance(value, Value) else value

    def own(value: Value) -> fx.Node:
        clone = torch.ops.aten.clone.default
        return nodes[value.number] if value.memory is not None else graph.call_function(clone, (nodes[value.number],))

    for place, (function, args, kwargs, result) in enumerate(calls):
        if function in _NOTHING:
            nodes[result.number] = node_of(args[0])
            continue
        taken, named = tree_map(node_of, (args, kwargs))
        read = _values((args, kwargs))
        free = [value for value in read if value.memory is not None and last[value.memory] == place]
        if (over := _written_over(function, result, read, free)) is not None:
            function, name, value = over
            named = named | {name: nodes[value.number]}
        node = graph.call_function(function, taken, named)
        if isinstance(result, Value):
            nodes[result.number] = node
            continue
        for entry, value in enumerate(result or ()):
            if isinstance(value, Value):
                nodes[value.number] = graph.call_function(operator.getitem, (node, entry))
    graph.output(tree_map(lambda value: own(value) if isinstance(value, Value) else value, outputs))
    # (a `fx.GraphModule` would leave its source behind for good)
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return partial(names["forward"], None)


def _written_over(
    function: Any, result: Any, operands: Sequence[Value], free: Sequence[Value]
) -> tuple[Any, str, Value] | None:
    """How an operation writes its result over an operand that nobody reads afterwards; None where it cannot.

    Its form with a tensor for the result, the name of that argument, and the operand.
    """
    form = _with_target(function)
    if form is None or not isinstance(result, Value):
        return None
    for value in free:
        alone = all(other.number == value.number for other in operands if other.memory == value.memory)
        if alone and value.form == result.form:
            return *form, value
    return None


@cache
def _with_target(function: Any) -> tuple[Any, str] | None:
    """Form of a pointwise operation that writes into a tensor, and the name of that argument, if it has one.

    Each entry is then read before it is written. (Forms that torch has generated compute in memory of their own first.)
    """
    if torch.Tag.pointwise not in function.tags or function._schema.is_mutable:
        return None
    asked = [(argument.name, str(argument.type)) for argument in function._schema.arguments]
    for name in function.overloadpacket.overloads():
        form = getattr(function.overloadpacket, name)
        *others, target = form._schema.arguments
        same = [(argument.name, str(argument.type)) for argument in others] == asked
        if same and form._schema.is_mutable and torch.Tag.generated not in form.tags:
            return form, target.name
    return None


def _values(tree: Any) -> list[Value]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Value)]
