"""What is made of exponentials: divided by their sum, they are a softmax, and what they weight is attention.

Models write these in many ways: with the largest logit subtracted, with a number or a sink added to the sum, over the
edges of a graph, block by block with a running maximum. Whatever the way, the ordinary chain rule on the whole is that
on a softmax. So what was computed of exponentials is remembered, and once a quotient of such sums is reached, or the
logarithm of one, it is computed again from the logits without rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crp.errors import InputError
from crp.layers.devices import can_be_read, holds
from crp.layers.nested import changed, tensors_in
from crp.rules.entrywise import _Entrywise, _function_in, _itself
from crp.rules.functions import look_up
from crp.rules.layer import Layer
from crp.rules.notes import Notes
from crp.rules.operands import _is_parameter
from crp.rules.operation import Operation, _on_a_copy

#: Functions that are exponential in an operand.
_EXPONENTIAL = frozenset({"exp", "exp2", "pow", "rpow"})
#: Other functions that what is made of exponentials goes through, beside those that are linear or rearrange.
_THROUGH = frozenset("clamp clamp_min div mul normalize pow rdiv reciprocal scatter_reduce square".split())  # noqa: SIM905
#: Functions that sum up entries.
_SUMMING = frozenset("cumsum index_add index_put mean scatter_add scatter_reduce sum".split())  # noqa: SIM905
_LOGARITHMS = frozenset({"log", "log10", "log1p", "log2"})
#: Functions that may be the end of a softmax that is written out, beside products and quotients.
_ENDING = _EXPONENTIAL | _LOGARITHMS | {"normalize"}


@dataclass(eq=False, slots=True)
class _OfExponentials:
    """What is remembered of a tensor that is made of exponentials: the call that made it.

    Attributes
    ----------
    function, args, kwargs
        The call.
    below : dict of int to _OfExponentials
        Operands that are made of exponentials themselves, by `id`.
    leaves : list of Tensor
        Other operands that depend on the model's input: the exponent, or what is weighted.
    is_inverse : bool
        Whether it is one over something.
    is_quotient : bool
        Whether it is divided by a sum.
    is_summed : bool
        Whether several are summed up.
    is_weighting : bool
        Whether they weight what depends on the model's input.
    share : float or None
        What exponentials get of the relevance of such products, by their rule; None where none has said so.
    original : _OfExponentials or None
        What it is a copy of.
    is_chained : bool
        Whether rules give way to the ordinary chain rule, as a softmax is made of a copy of it.
    is_passed : bool
        Whether another copy is made of its copy, from which flows what is not counted there.
    arrived : Tensor or None
        What has arrived at such a copy from softmaxes, in a backward pass.
    entrywise : _Entrywise or None
        The same as a function of a tensor, entry by entry.
    """

    function: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    below: dict[int, _OfExponentials]
    leaves: list[Tensor]
    is_inverse: bool = False
    is_quotient: bool = False
    is_summed: bool = False
    is_weighting: bool = False
    share: float | None = None
    original: _OfExponentials | None = None
    is_chained: bool = False
    is_passed: bool = False
    arrived: Tensor | None = None
    entrywise: _Entrywise | None = None
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        operands = tensors_in((self.args, self.kwargs))
        return tuple(tensor._version for tensor in operands if id(tensor) not in self.below)

    def calls(self) -> list[_OfExponentials]:
        """All calls that it is made by, in order."""
        ordered: dict[_OfExponentials, None] = {}
        todo = [self]
        while todo:
            missing = [made for made in todo[-1].below.values() if made not in ordered]
            if missing:
                todo += missing
            else:
                ordered[todo.pop()] = None
        return list(ordered)

    def exponents(self) -> list[Tensor]:
        """What its exponentials are of, and softmaxes."""
        return [
            tensor
            for made in self.calls()
            if not made.below
            for tensor in (made.leaves if made.original is None else made.original.exponents())
        ]

    def again(self, *leaves: Tensor) -> Tensor:
        """The same of other leaves, without rules."""
        calls, results, others = self.calls(), dict[_OfExponentials, Tensor](), iter(leaves)
        for made in calls:  # (a tensor may be the exponent, and be weighted, too)
            known = {id(leaf): next(others) for leaf in made.leaves}
            known |= {number: results[one] for number, one in made.below.items()}
            args, kwargs = changed((list(made.args), dict(made.kwargs)), partial(_replaced, known))
            results[made] = made.function(*args, **kwargs)
        return results[self]

    def chain(self) -> None:
        """Let rules give way to the chain rule in what copies are of, but for products of matrices, which share alike.

        Raises
        ------
        ValueError
            If a product of entries is among them, which may share otherwise than attention does.
        """
        todo = [made.original for made in self.calls() if made.original is not None]
        for made in todo:
            is_product = made.is_weighting and len(made.leaves) + len(made.below) > 1
            if is_product and look_up(made.function).canonical == "mul":
                raise InputError(
                    "exponentials weight values entry by entry, and are divided by their sum: all of it is one "
                    "function, and no relevance flows through what is named as a layer, or copied, in between. Name "
                    "a layer before, or behind"
                )
            made.is_chained = not is_product
            todo += [*made.below.values(), *([made.original] if made.original is not None else [])]

    def is_unchanged(self) -> bool:
        """Whether nothing that it reads was changed in place since."""
        return all(made.versions == made._versions() for made in self.calls())

    def one(self, number: int) -> _OfExponentials:
        """The same of one of several results."""
        return replace(self, function=lambda *args, **kwargs: self.function(*args, **kwargs)[number])


def _replaced(known: Mapping[int, Tensor], tensor: Tensor) -> Tensor:
    return known.get(id(tensor), tensor)


def _exponential(layer: Layer) -> _OfExponentials | None:
    """What is remembered of a call that is exponential in its operand, ``b ** x``; None of others."""
    if layer.module is not None or layer.known.canonical not in _EXPONENTIAL:
        return None
    (x,), operands = layer.inputs, [*layer.args, *layer.kwargs.values()]
    if x.is_complex() or (layer.known.canonical == "pow" and operands[0] is x):  # a power, ``x ** b``
        return None
    base = {"exp": math.e, "exp2": 2}.get(layer.name) or next(v for v in operands if v is not x)
    is_base = base.numel() == 1 if isinstance(base, Tensor) else isinstance(base, int | float) and base > 0
    made = _OfExponentials(layer.function, layer.args, layer.kwargs, {}, [x], entrywise=_function_in(layer.parts))
    return made if is_base else None


def _softmax(output: Tensor) -> _OfExponentials:
    """What is remembered of a softmax, or its copy."""
    return _OfExponentials(_itself, [output], {}, {}, [output], is_quotient=True)


def _copy(made: _OfExponentials, output: Tensor) -> _OfExponentials:
    """What is remembered of a copy, through which relevance flows."""
    alone: dict[str, Any] = {"args": [output], "kwargs": {}, "below": {}, "leaves": [output]}
    for one in made.calls():
        if one.original is not None:
            one.original.is_passed = True
    if output.requires_grad:
        output.register_hook(partial(_check_flow, made))  # type: ignore[no-untyped-call]
    return replace(made, function=_itself, **alone, original=made)


class _Arriving(torch.autograd.Function):
    """A copy of exponentials, as a softmax reads it: what arrives there is counted."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, made: _OfExponentials) -> Tensor:
        """Return another view of the copy of what was ``made``."""
        ctx.made = made
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Count, and hand on."""
        ctx.made.arrived = grads[0] if ctx.made.arrived is None else ctx.made.arrived + grads[0]
        return grads[0], None


def _check_flow(made: _OfExponentials, total: Tensor) -> None:
    """Refuse a copy of exponentials through which more flows than to a softmax, where rules have given way."""
    arrived, made.arrived = made.arrived, None
    if not made.is_chained or made.is_passed or not can_be_read(total):
        return
    others = total if arrived is None else total - arrived
    if bool(others.abs().amax() > 1e-4 * total.abs().amax()):
        raise InputError(
            "exponentials are divided by their sum, and something else reads them, too: what flows through a layer "
            "that is named in between, or through a copy, cannot be told apart. Name a layer before, or behind"
        )


def _combined(op: Operation, notes: Notes) -> _OfExponentials | None:
    """What is remembered of a call that reads what is made of exponentials; None where they end."""
    known = [(tensor, note.parts) for tensor in op.inputs if (note := notes.of(tensor)) is not None]
    below = {id(tensor): parts for tensor, parts in known if isinstance(parts, _OfExponentials)}
    if not below or "dropout" in op.known.name or any(tensor.is_complex() for tensor in op.inputs):
        return None
    name, read, leaves = op.known.canonical, [*below.values()], [i for i in op.inputs if id(i) not in below]
    is_product, is_weighed = name == "mul" or op.kind == "product", op.operands is not None
    if not (is_product or is_weighed or name in _THROUGH or op.known.has("linear", "selects", "scales")):
        return None
    if (leaves and not is_product) or (is_weighed and not _only_weighs(op, read)):
        return None
    if leaves and any(made.is_quotient and not made.below for made in read):  # (a softmax is not divided by its sum)
        return None
    is_inverse, divisor = {made.is_inverse for made in read}, _divisor(op, below)
    if divisor is None and (len(is_inverse) > 1 or (name == "div" and len(read) > 1)):
        return None
    function, args = op.function, op.args
    if op.overwrites:
        if id(args[0]) not in below and op.depends(args[0]):
            return None
        function, args = _on_a_copy(function), [args[0].clone(), *args[1:]] if id(args[0]) not in below else args
    is_sum = name in _SUMMING or op.known.parse is not None or op.kind == "pooling"
    is_summed = is_sum or any(made.is_summed for made in read)
    if not is_summed and name in ("add", "sub") and len(op.inputs) > 1:  # (of one tensor, they may be a tanh)
        exponents = _exponents(read)
        is_whole = all(tensor.numel() == exponent.numel() for tensor in op.inputs for exponent in exponents)
        is_summed = not exponents or not is_whole or notes.common(exponents) is None
    shares = {None} if leaves else {made.share for made in read if made.is_weighting}
    return _OfExponentials(
        function, args, op.kwargs, below, leaves,
        is_inverse=is_inverse.pop() != _inverts(op),
        is_quotient=divisor is not None or (name == "clone" and _is_of_softmax(read[0])),
        is_summed=is_summed,
        is_weighting=bool(leaves) or any(made.is_weighting for made in read),
        share=shares.pop() if len(shares) == 1 else None,
    )  # fmt: skip


def _is_of_softmax(made: _OfExponentials) -> bool:
    """Whether it is a softmax, or such with constants, so that a layer's relevance may flow through it."""
    return not made.is_weighting and all(one.is_quotient for one in made.calls() if not one.below)


def _inverts(op: Operation) -> bool:
    """Whether a call gives one over its only operand."""
    dividend = op.args[0] if op.args else op.kwargs.get("input")
    is_below = op.known.canonical == "div" and dividend is not op.inputs[0]
    return is_below or op.known.canonical in ("rdiv", "reciprocal")


def _divisor(op: Operation, below: Mapping[int, _OfExponentials]) -> _OfExponentials | None:
    """The sum by which a call divides other exponentials; None if it does not."""
    name, read = op.known.canonical, [below[id(tensor)] for tensor in op.inputs if id(tensor) in below]
    if name == "normalize":
        named = dict(zip(("input", "p"), op.args, strict=False)) | op.kwargs
        return read[0] if named.get("p") == 1 else None
    if len(read) != 2 or name not in ("div", "mul") or (name == "mul" and read[0].is_inverse == read[1].is_inverse):
        return None
    dividend, divisor = read if name == "div" or read[1].is_inverse else read[::-1]
    is_norm = divisor.is_weighting and any(made.is_quotient for made in divisor.calls())  # (of what was attended to)
    return divisor if divisor.is_summed and not is_norm and _is_of_the_same(dividend, divisor) else None


def _is_of_the_same(dividend: _OfExponentials, divisor: _OfExponentials) -> bool:
    """Whether two are made of the same exponents, which may have been computed twice, or the same softmax."""

    def is_one(a: Tensor, b: Tensor) -> bool:
        return a is b or (a.shape == b.shape and holds(lambda: (a == b).all()))

    others = divisor.exponents()
    return any(is_one(a, b) for a in dividend.exponents() for b in others)


def _only_weighs(op: Operation, read: Sequence[_OfExponentials]) -> bool:
    """Whether constants weigh exponentials, as ones sum them up, and no layer what they have weighted."""
    assert op.operands is not None
    return not _is_parameter(op.operands.weight) and not any(made.is_weighting for made in read)


def _exponents(read: Sequence[_OfExponentials]) -> list[Tensor]:
    return [leaf for made in read for one in made.calls() if not (one.below or one.is_quotient) for leaf in one.leaves]
