"""How what is known of tensors (`crp.rules.notes`) passes through functions, beyond what the table of them says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from crp.rules.functions import Function, _has_negative
from crp.rules.notes import BORN, NONNEGATIVE, Born

#: What weights are that are chosen, or divided by their sum, as those of the experts of a mixture.
_WEIGHTS = Born.SOFTMAX | Born.SQUASHED | Born.ROUTED
#: Functions that cut off what is below a number, and their argument for it.
_LOWEST = {"clamp": "min", "clamp_min": "min", "hardtanh": "min_val"}
#: Functions of which it depends on the operands what is known of the result.
_ELEMENTWISE = frozenset(("neg", "mul", "div", "pow", "sub", "rsub", "add", *_LOWEST))


def _passed(
    known: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    flags: int,
    born: Callable[[Tensor], int],
) -> int:
    """What is known of a result.

    Parameters
    ----------
    known : Function
        What was called.
    args, kwargs
        What it was called with.
    inputs : sequence of Tensor
        Operands that depend on the model's input.
    flags : int
        What is known of all of them.
    born : callable
        What made the values of one.
    """
    kept, name = flags & known.keeps, known.canonical
    if name in _ELEMENTWISE:
        kept = _kept_by(name, kept, args, kwargs, inputs, flags, born)
    if flags & (Born.SOFTMAX | Born.ROUTED) and (known.has("indexes") or (name == "getitem" and _has_tensor(args[1:]))):
        kept = kept & ~Born.SOFTMAX | Born.ROUTED
    elif flags & Born.SQUASHED and name in ("gather", "take_along_dim", "topk"):
        kept |= Born.ROUTED
    return kept | known.gives


def _kept_by(
    name: str,
    kept: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    flags: int,
    born: Callable[[Tensor], int],
) -> int:
    """What is known of the result of one of `_ELEMENTWISE`, of which the table says that ``kept`` is."""
    if name == "neg" and flags & (Born.SQUASHED | Born.NEGATED):
        kept ^= Born.SQUASHED | Born.NEGATED
    elif name in ("mul", "div"):
        if len(inputs) > 1:
            kept &= ~BORN | Born.SQUASHED  # (a product of gates is one)
            if name == "div" and born(inputs[0]) & _WEIGHTS:
                kept |= Born.ROUTED
        elif name == "div" and not (args and args[0] is inputs[0]) and kwargs.get("input") is not inputs[0]:
            kept |= Born.DIVISOR
        if kept & NONNEGATIVE and _has_negative(args, kwargs):
            kept &= ~NONNEGATIVE
    elif name == "pow" and _is_negative(args, kwargs):
        kept |= Born.DIVISOR
    elif name in ("sub", "rsub", "add") and _is_complement(name, flags, args, kwargs, inputs):
        kept |= Born.SQUASHED | flags & Born.ACTIVATION  # a gate is closed as far as another one is open
    elif name in _LOWEST and _has_lower_bound(name, args, kwargs):
        kept |= NONNEGATIVE
    return kept


def _is_negative(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a power has a negative exponent, a number."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, Real) and exponent < 0


def _has_lower_bound(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether values below a number that is not negative become that number, as in ReLU6."""
    lowest = args[1] if len(args) > 1 else kwargs.get(_LOWEST[name])
    return isinstance(lowest, int | float) and lowest >= 0


def _has_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_has_tensor, value)))


def _is_complement(
    name: str, flags: int, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]
) -> bool:
    """Whether a sum or difference is 1 (or a constant tensor) minus what a squashing function has made."""
    if not flags & (Born.NEGATED if name == "add" else Born.SQUASHED):
        return False
    whole, part = [*args, *(kwargs[key] for key in ("input", "self", "other") if key in kwargs)][:2]
    if name == "rsub" or (name == "add" and part is not inputs[0]):  # they come the other way round
        whole, part = part, whole
    is_only = len(inputs) == 1 and part is inputs[0]
    return is_only and (isinstance(whole, Tensor) or whole == 1) and kwargs.get("alpha", 1) == 1
