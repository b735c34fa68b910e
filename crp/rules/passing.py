"""How what is known of tensors (`crp.rules.notes`) passes through functions, beyond what the table of them says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from crp.layers.devices import holds
from crp.layers.nested import changed, tensors_in
from crp.rules.functions import _arguments_of
from crp.rules.notes import BORN, NONNEGATIVE, Born, Copied, Notes
from crp.rules.operands import Operands
from crp.rules.operation import Operation, _on_a_copy, _scaling

#: Functions by which a router chooses experts.
_CHOOSING = frozenset(("gather", "kthvalue", "take_along_dim", "topk"))
#: Functions that give an index.
_RANKING = frozenset("argmax argmin argsort kthvalue max min multinomial sort topk".split())  # noqa: SIM905
#: Functions by which a mask chooses them.
_MASKING = frozenset(("add", "masked_fill", "mul", "sub", "where"))
#: What an index chooses from.
_CHOSEN_FROM = Born.SOFTMAX | Born.ROUTED | Born.EXPONENTIAL
#: What is divided by its sum once more because experts were chosen; of sigmoids, that makes attention.
_WEIGHTS = Born.SOFTMAX | Born.ROUTED
#: Functions that cut off what is below a number and above another, and these numbers by default.
_CUTTING = {
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), (-math.inf, math.inf)),
    "hardtanh": (-1.0, 1.0),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
}
_SUMS = frozenset(("add", "sub", "rsub"))
#: Functions of which it depends on the operands what is known of the result.
_ELEMENTWISE = frozenset(("mul", "div", "rdiv", "reciprocal", "pow", "clamp", "clamp_min", "hardtanh", *_SUMS))
#: Functions of which the values of a gate, or their powers, make one.
_BOUNDED = frozenset("abs clamp clamp_max clamp_min hardtanh pow relu relu6 sqrt square threshold".split())  # noqa: SIM905


def _passed(op: Operation, notes: Notes) -> int:
    """What is known of an operation's result."""
    known, flags, name = op.known, op.flags, op.known.canonical
    kept = flags & known.keeps
    if name in _ELEMENTWISE:
        kept = _kept_by(op, kept, notes)
    is_masked = notes.has_choices and name in _MASKING and _is_masked(op, notes)
    is_indexed = flags & _CHOSEN_FROM and (known.has("indexes") or _is_indexed(op))
    if is_indexed or (is_masked and flags & (Born.SOFTMAX | Born.ROUTED)):
        kept = kept & ~Born.SOFTMAX | Born.ROUTED
    elif name in _CHOOSING or is_masked:
        kept |= Born.ROUTED if flags & Born.SQUASHED else Born.CHOSEN
    elif flags & Born.CHOSEN and known.gives & (Born.SQUASHED | Born.SOFTMAX):  # (logits of experts that come first)
        kept |= Born.ROUTED
    elif flags & Born.SOFTMAX and op.operands is not None and _mixes_heads(op.operands):
        kept |= Born.SOFTMAX
    elif name == "normalize":
        kept |= flags & Born.SQUASHED | (Born.ROUTED if flags & _WEIGHTS else 0)
    if flags & Born.SQUASHED and name in _BOUNDED and not _is_negative(op.args, op.kwargs):
        kept |= Born.SQUASHED  # (a gate that is cut off, or its power, is one)
    kept |= known.gives
    return kept & ~Born.DIVISOR if kept & Born.SQUASHED else kept  # (a gate may be one over something)


def _mixes_heads(operands: Operands) -> bool:
    """Whether probabilities are summed up across heads, say, and not along the axis along which they sum up to one."""
    with torch.no_grad():
        a = operands.a.detach()
        sums = operands.run(a, torch.ones_like(operands.weight), None)
    return not _is_constant(sums) and all(
        any(_is_constant(one.sum(dim)) for dim in range(one.dim())) for one in (a, sums)
    )


def _is_indexed(op: Operation) -> bool:
    """Whether entries are chosen by an index of tensors, or put where it says, among constants."""
    is_chosen = op.known.canonical == "getitem" or (op.known.name == "setitem" and not op.depends(op.args[0]))
    return is_chosen and _has_tensor(op.args[1])


def _is_masked(op: Operation, notes: Notes) -> bool:
    """Whether a constant says what is chosen."""
    return any(notes.flags(one) & Born.CHOSEN for one in tensors_in((op.args, op.kwargs)) if not one.requires_grad)


def _is_constant(tensor: Tensor) -> bool:
    """Whether all entries are the same number, but for rounding."""
    return tensor.numel() > 0 and holds(lambda: tensor.amax() - tensor.amin() <= 1e-4 * tensor.amax())


def _kept_by(op: Operation, kept: int, notes: Notes) -> int:
    """What is known of the result of one of `_ELEMENTWISE`, of which the table says that ``kept`` is."""
    name, args, kwargs, inputs, flags = op.known.canonical, op.args, op.kwargs, op.inputs, op.flags
    if name in ("mul", "div"):
        if len(inputs) > 1:
            kept &= ~BORN | Born.SQUASHED | Born.SOFTMAX  # (a product of gates is one)
            one, other = map(notes.born, inputs)
            dividend = one if name == "div" or other & Born.DIVISOR else other if one & Born.DIVISOR else 0
            kept |= dividend & (Born.ACTIVATION | Born.SQUASHED) | (Born.ROUTED if dividend & _WEIGHTS else 0)
        elif name == "div" and not (args and args[0] is inputs[0]) and kwargs.get("input") is not inputs[0]:
            kept |= Born.DIVISOR
        if kept & NONNEGATIVE and _has_negative(args, kwargs):
            kept &= ~NONNEGATIVE
    elif name == "pow" and _is_negative(args, kwargs):
        kept |= Born.DIVISOR
    elif name in _SUMS and flags & Born.SQUASHED and (len(inputs) > 1 or _is_beside_zero(op)):
        kept |= Born.SQUASHED
    elif name in _SUMS and flags & (Born.SQUASHED | Born.BALANCED) and _is_beside_one(op):
        # (a gate is closed as far as another one is open)
        kept |= flags & Born.ACTIVATION | Born.SQUASHED
    elif name in _SUMS and notes.has_logarithms and any(notes.born(tensor) & Born.LOGARITHM for tensor in inputs):
        kept |= Born.LOGARITHM
    elif name in _CUTTING and _bounds(op)[0] >= 0:
        kept |= NONNEGATIVE
    if name in _SUMS and "identity" in op.known.properties:  # a number beside what a gate is made of
        kept |= flags & (Born.GATING | Born.ACTIVATION) | (Born.BALANCED if flags & Born.SQUASHED else 0)
    is_quotient = (name == "div" and len(inputs) > 1) or bool((kept | op.known.gives) & Born.DIVISOR)
    if is_quotient and flags & Born.GATING:  # as exp(x) / (1 + exp(x)) and 1 / (1 + exp(-x)) are
        kept |= Born.SQUASHED | Born.GATING | Born.ACTIVATION
    return kept


def _has_negative(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a number below zero is among the arguments."""
    return any(isinstance(value, Real) and value < 0 for value in (*args, *kwargs.values()))


def _is_negative(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a power has a negative exponent, a number."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, Real) and exponent < 0


def _bounds(op: Operation) -> tuple[float, float]:
    """Numbers below and above which a function cuts off values; infinite where it does not, or where not at numbers."""
    given = _arguments_of(op.known, op.function, op.args, op.kwargs)
    low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    bounds = zip((low, high), _CUTTING[op.known.canonical], strict=True)
    lowest, highest = (float(value) if isinstance(value, int | float) else default for value, default in bounds)
    return lowest, highest


def _has_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_has_tensor, value)))


def _is_beside_zero(op: Operation) -> bool:
    """Whether 0 is added or subtracted, as by Python's ``sum``."""
    return any(isinstance(value, int | float) and value == 0 for value in op.args)


def _is_beside_one(op: Operation) -> bool:
    """Whether a sum or difference is 1 plus or minus a tensor.

    Any positive number counts as 1, and a constant tensor where the other is squashed.
    """
    name, kwargs, inputs = op.known.canonical, op.kwargs, op.inputs
    whole, part = [*op.args, *(kwargs[key] for key in ("input", "self", "other") if key in kwargs)][:2]
    if name == "rsub" or (name == "add" and part is not inputs[0]):  # they come the other way round
        whole, part = part, whole
    is_only = len(inputs) == 1 and part is inputs[0]
    is_one = (
        bool(op.flags & Born.SQUASHED) if isinstance(whole, Tensor) else isinstance(whole, int | float) and whole > 0
    )
    return is_only and is_one and kwargs.get("alpha", 1) in (1, -1)


# --- copies of the model's input ------------------------------------------------------------------------------------

#: Functions that leave every entry of one operand in its place, whatever constants do to it.
_IN_PLACE_OF_THE_INPUT = frozenset(
    """add sub rsub mul div neg positive dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout""".split()  # noqa: SIM905
)
#: Functions that put constants in the place of some entries.
_FILLING = frozenset(("masked_fill", "where"))
#: Functions that return several tensors.
_SEVERAL = frozenset(
    "chunk dsplit hsplit split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split vsplit".split()  # noqa: SIM905
)


def _copied(op: Operation, notes: Notes) -> Copied | list[Copied] | None:
    """How an operation copies its result, or each of several, from the model's input; None if it does not."""
    below = [note.copied for note in map(notes.of, op.inputs) if note is not None and note.copied is not None]
    if len(below) != len(op.inputs):
        return None
    if op.known.canonical in _IN_PLACE_OF_THE_INPUT:
        return _spread(op, below) if len(below) == 1 else None
    if op.known.canonical == "setitem":
        return Copied(below, partial(_set_again, op))
    if op.known is _scaling:
        return Copied(below, partial(_run_on, op, constant=torch.ones_like))
    if op.known.canonical not in _FILLING and (not op.known.has("copies") or op.overwrites):
        return None
    again = partial(_run_on, op)
    if op.known.has("constant"):  # beside copies, which count as no input
        return Copied(below, lambda *others: again(*others) - again(*map(torch.zeros_like, others)))
    if op.known.canonical not in _SEVERAL:
        return Copied(below, again)
    return [Copied(below, lambda *others, i=i: again(*others)[i]) for i in range(len(op.run()))]


def _spread(op: Operation, below: list[Copied]) -> Copied:
    """How an operation copies its only input, whose entries broadcast to the others; what is times 0 is none."""
    others = [tensor for tensor in tensors_in((op.args, op.kwargs)) if not op.depends(tensor)]
    if others and op.known.canonical == "mul":
        is_kept = others[0] != 0
        return Copied(below, lambda other: other * is_kept)
    shapes = [op.inputs[0].shape, *(tensor.shape for tensor in others)]
    shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return Copied(below) if shape == shapes[0] else Copied(below, lambda other: other.expand(shape))


def _run_on(op: Operation, *others: Tensor, constant: Callable[[Tensor], Tensor] = torch.zeros_like) -> Any:
    """What an operation makes of other tensors in place of its inputs; constants count as nothing, an index stays."""
    copies = {id(tensor): other for tensor, other in zip(op.inputs, others, strict=True)}

    def other_than(tensor: Tensor) -> Tensor:
        if id(tensor) in copies:
            return copies[id(tensor)]
        return constant(tensor) if tensor.is_floating_point() else tensor

    args, kwargs = changed((op.args, op.kwargs), other_than)
    return (_on_a_copy(op.function) if op.overwrites else op.function)(*args, **kwargs)


def _set_again(op: Operation, *others: Tensor) -> Tensor:
    """What ``target[index] = value`` makes of other tensors in place of its inputs; constants count as nothing."""
    copies = {id(tensor): other for tensor, other in zip(op.inputs, others, strict=True)}
    target, index, value = op.args
    result = copies[id(target)].clone() if id(target) in copies else torch.zeros_like(target, dtype=others[0].dtype)
    result[index] = copies.get(id(value), 0.0)
    return result
