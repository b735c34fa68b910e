"""Functions of one tensor, entry by entry: with the numbers in it, what is written out may be one activation.

A number that is added before an activation is a bias, and keeps its share. But a function that is symmetric about zero,
``f(x) + f(-x) = 2 f(0)``, has none: neither a hard sigmoid such as ``relu6(x + 3) / 6``, nor soft shrinkage such as
``relu(x - t) - relu(-x - t)``. (It has one where it changes its sign beside zero, as ``1 + 5 tanh(x)`` does.) Nor has
one that is zero at zero, and nothing else next to it, such as ``log(1 + x)`` or ``relu(x) - relu(x - 6)``; nor one that
is linear on one side of zero and curved on the other, such as ``where(x > 0, x + 1, exp(x))``; nor a softmax of it
beside numbers, as of ``stack([x, 0])``, which is a sigmoid. To tell them apart, what is computed of a tensor is
computed of some points, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crp.layers.devices import can_be_read
from crp.layers.nested import changed, tensors_in
from crp.rules.curves import _ACTIVATIONS, _IDENTITY, _STACKING, _born_of, _Curve, _curve, _is_curved
from crp.rules.functions import _arguments_of, look_up
from crp.rules.notes import Born, Note, Notes
from crp.rules.operation import Operation, _is_one_number
from crp.rules.passing import _CUTTING, _SEVERAL, _SUMS, _bounds, _run_on

_CONDITIONS = frozenset(("ge", "gt", "le", "lt"))
#: Functions that choose; what they choose may be a tensor of one number in every entry.
_SELECTING = frozenset("clamp clamp_max clamp_min fmax fmin heaviside masked_fill maximum minimum where".split())  # noqa: SIM905
#: Functions along an axis on which others stand side by side.
_ALONG = frozenset("amax amin log_softmax logsumexp max min softmax".split())  # noqa: SIM905
#: What is not known of exponentials that are bounded, or powers.
_OF_NUMBERS = Born.SQUASHED | Born.EXPONENTIAL | Born.GATING
#: Functions that are exponentials, or make gates of them.
_OF_EXPONENTIALS = frozenset(("div", "exp", "exp2", "pow", "rdiv", "reciprocal", "rpow"))
#: Functions that such a function may begin with: in these, a variable of the model still holds what they read.
_HELD = _CONDITIONS | {"abs", "heaviside", "neg", "sgn", "sign"}
BEGINNING = _SUMS | _HELD | _STACKING | {"clamp", "hardsigmoid", "hardtanh", "pad", "softplus"}
#: How many tensors are remembered that a function may be one of.
_MOST = 6


class _Source(NamedTuple):
    """A function of a tensor, which is held where no variable of the model may do so.

    ``is_copied`` says whether a layer's output is in between, through which relevance shall flow.
    """

    curve: _Curve = _IDENTITY
    held: Tensor | None = None
    is_copied: bool = False


@dataclass(eq=False, slots=True)
class _Entrywise:
    """What is remembered of a tensor that is made of another one, entry by entry and by numbers.

    Attributes
    ----------
    sources : dict of Note to _Source
        What it is a function of, the latest last.
    passing : frozenset of Note
        Those of them to which its relevance goes as it is.
    is_shifted, is_summed : bool
        Whether a number was added, or put in its place; whether anything was.
    axis : int or None
        Axis along which functions stand side by side, counted from the last.
    is_softmax : bool
        Whether there was a softmax of them.
    activation : Note or None
        Of what it is one activation of, if relevance has to be sent there.
    gives : int or None
        What is known of it (`Born`), if it is one activation.
    """

    sources: dict[Note, _Source]
    passing: frozenset[Note]
    is_shifted: bool
    is_summed: bool
    axis: int | None = None
    is_softmax: bool = False
    activation: Note | None = None
    gives: int | None = None

    def exponent(self) -> Tensor | None:
        """The latest tensor that it is a function of, and that is no gate, nor what one is made of."""
        below = (key for key, one in reversed(self.sources.items()) if not (key.flags & Born.GATING or one.is_copied))
        return None if (key := next(below, None)) is None else key.now()

    def of_numbers(self) -> int | None:
        """What is known of it (`Born`), if it is bounded, or a power; 0 if neither; None if not known of what."""
        curves = [source.curve for key, source in self.sources.items() if not key.flags & Born.GATING]
        below = [curve.values for curve in curves if not curve.is_of_several]
        return max(map(_born_of, below), default=None)

    def find_activation(self, sends: bool = True) -> None:
        """Find out whether it is one activation, to which relevance is sent, if the call ``sends`` it."""
        for kind in [_is_curved] if self.is_softmax and self.axis is None else _ACTIVATIONS:
            for key, source in reversed(self.sources.items()):
                if source.curve.is_of_several or (gives := source.curve.gives(kind)) < 0:
                    continue
                self.gives = gives if self.gives is None else self.gives
                is_sent = self.is_shifted or (self.is_summed and not source.is_copied)
                if not (sends and is_sent) or key in self.passing:
                    return
                if key.now() is not None:  # (or else it may be one of what is below, too)
                    self.activation, self.passing = key, frozenset((key,))
                    keys = list(self.sources)  # (to later ones nothing flows)
                    self.sources = {other: self.sources[other] for other in keys[: keys.index(key) + 1]}
                    return


def _entrywise(op: Operation, notes: Notes, begins: bool) -> _Entrywise | None:
    """What is remembered of a call, if it is such a function, or one ``begins`` there; None of others."""
    op = _put_together(op) if op.known.name == "pad" else op
    name, known, x = op.known.canonical, op.known, op.inputs[0]
    if x.is_complex() or (begins and not _may_begin(op)):
        return None
    tensors = op.inputs if known.reads_first else list(tensors_in((op.args, op.kwargs)))
    noted = {id(tensor): note for tensor in tensors if (note := notes.of(tensor)) is not None}
    made = {number: parts for number, note in noted.items() if (parts := _function_in(note.parts)) is not None}
    axis = made[id(x)].axis if id(x) in made else None
    if axis is not None and (name in _ALONG or (known.has("copies") and name != "clone")):
        return _along(op, made[id(x)], axis) if len(op.inputs) == 1 else None
    if known.has("copies") and name not in _STACKING:
        is_moved = len(op.inputs) == 1 and name not in _SEVERAL and op.args[:1] and not op.overwrites
        below = made.get(id(x)) or _Entrywise(_sources(noted[id(x)]), frozenset((noted[id(x)],)), False, False)
        return _moved(op, below) if is_moved else None
    new_axis = _new_axis(op, tensors) if name in _STACKING else axis
    if new_axis == 0 or not (known.has("elementwise") or name in _CONDITIONS | _STACKING):
        return None
    if "dropout" in known.name or "out" in op.kwargs:
        return None
    read, numbers = dict[Note, dict[Note, _Source]](), dict[int, Tensor]()
    for tensor in tensors:
        if tensor.shape == x.shape and id(tensor) in noted and (id(tensor) in made or tensor.requires_grad):
            holder = tensor if name in BEGINNING - _HELD else None
            read[noted[id(tensor)]] = _sources(noted[id(tensor)], tensor.requires_grad, holder)
        elif (
            not op.depends(tensor) and _broadcasts(tensor, x, name in _SELECTING | _STACKING) and _is_one_number(tensor)
        ):
            numbers[id(tensor)] = tensor.detach().flatten()[0].cpu()
        else:
            return None
    call = op.function, *changed((tuple(op.args), op.kwargs), lambda one: numbers.get(id(one), noted.get(id(one))))
    sources = _common(call, read)
    is_sum, n_inputs = name in _SUMS, sum(tensor.requires_grad for tensor in tensors)
    # (a number behind a gate is part of it, and so is what hands on as it is in a sum, unless it is 0)
    is_shift = n_inputs == 1 and not known.has("identity") if is_sum else _puts_a_number(op, numbers)
    # (what a number is added to may be 0, and then hand nothing on)
    is_passing = len(read) == 1 and not (is_shift or is_sum)
    passing = {noted[id(x)]}.union(*(one.passing for one in made.values())) if is_passing else ()
    is_shifted = is_shift or any(one.is_shifted for one in made.values())
    is_summed = is_sum or any(one.is_summed for one in made.values())
    is_softmax = any(one.is_softmax for one in made.values())
    result = _Entrywise(sources, frozenset(passing), is_shifted, is_summed, new_axis, is_softmax)
    is_alone = begins and name in _HELD | _SUMS and len(read) == len(sources) == 1
    if name not in _CONDITIONS | _STACKING and not is_alone:
        result.find_activation()
    return result if sources else None


def _sources(note: Note, is_own: bool = True, held: Tensor | None = None) -> dict[Note, _Source]:
    """What a tensor is a function of, entry by entry; at last itself, if ``is_own``."""
    below = dict[Note, _Source]()
    if (made := _function_in(note.parts)) is not None:
        below = made.sources
    elif note.call is not None and next(tensors_in(note.call), None) is None:
        read = list[Note]()
        changed(note.call, read.append, Note)
        below = _common(note.call, {one: _sources(one) for one in read})
    tensor = note.tensor()
    is_complex = tensor is not None and tensor.is_complex()
    return {**below, note: _Source(held=held)} if is_own and not is_complex else below


def _common(call: Any, read: Mapping[Note, Mapping[Note, _Source]]) -> dict[Note, _Source]:
    """What a call makes of functions, of tensors that all that it reads is made of."""
    first, *others = read.values()
    found, is_copy = dict[Note, _Source](), "memory_format" in call[2]
    for key in [key for key in first if all(key in other for other in others)][-_MOST:]:
        of_source = {note: one[key] for note, one in read.items()}
        curve = _curve(call, {note: source.curve for note, source in of_source.items()})
        is_copied = is_copy or any(source.is_copied for source in of_source.values())
        found[key] = first[key]._replace(curve=curve, is_copied=is_copied)
    return found


def _put_together(op: Operation) -> Operation:
    """Where one entry along an axis is padded with numbers, what puts these side by side with it."""
    given = _arguments_of(op.known, op.function, op.args, op.kwargs)
    x, ends, is_constant = given["input"], given["pad"], given.get("mode", "constant") == "constant"
    padded = [(-1 - k, pair) for k, pair in enumerate(zip(ends[::2], ends[1::2], strict=True)) if any(pair)]
    if len(padded) != 1 or not is_constant or x.shape[padded[0][0]] != 1 or min(ends) < 0:
        return op
    ((axis, (before, after)),), number = padded, torch.full_like(x, given.get("value") or 0)
    tensors = [number] * before + [x] + [number] * after
    return replace(op, function=torch.cat, args=(tensors, axis), kwargs={}, known=look_up(torch.cat))


def _new_axis(op: Operation, tensors: Sequence[Tensor]) -> int | None:
    """Axis along which tensors of one shape are put side by side, counted from the last; 0 if they are not."""
    axis, dims = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else 0), tensors[0].dim()
    if len(tensors) < 2 or not isinstance(axis, int) or any(tensor.shape != tensors[0].shape for tensor in tensors):
        return 0
    if op.known.canonical == "stack":
        return axis % (dims + 1) - dims - 1
    return axis % dims - dims if tensors[0].shape[axis] == 1 else 0


def _along(op: Operation, made: _Entrywise, axis: int) -> _Entrywise | None:
    """What is remembered of functions side by side that are mixed along their axis, or of one that is taken."""
    name, x = op.known.canonical, op.inputs[0]
    place, shape, dims = x.dim() + axis, x.shape, x.dim()
    if op.known.has("copies"):
        if not all(map(can_be_read, tensors_in((op.args[1:], op.kwargs)))):  # (an index)
            return None
        args, kwargs = changed((op.args[1:], op.kwargs), Tensor.cpu)
        numbers = torch.arange(shape[axis], device="cpu").reshape(-1, *[1] * (-1 - axis)).expand(shape)
        taken = op.function(numbers, *args, **kwargs) if shape.numel() else numbers
        dims = taken.dim()
        one = shape[:place] + (1,) * (dims + 1 - x.dim()) + shape[place + 1 :]
        if taken.shape != one or taken.amin() != taken.amax():
            return None
        take = partial(torch.select, dim=1, index=int(taken.amin()))
    else:
        dim = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
        if dim not in (place, axis, (place,), (axis,), [place], [axis]):
            return None
        take = partial(getattr(torch, {"max": "amax", "min": "amin"}.get(name, name)), dim=1)
        dims -= not op.kwargs.get("keepdim", op.args[2] if len(op.args) > 2 else False)
    is_softmax, stays = made.is_softmax or "softmax" in name or name == "logsumexp", "softmax" in name
    result = _Entrywise({}, frozenset(), made.is_shifted or is_softmax, True, axis if stays else None, is_softmax)
    for key, source in made.sources.items():
        if not source.curve.is_of_several:  # (of all of them at once)
            continue
        source, tensor = source._replace(curve=_Curve(take(source.curve.values), source.curve.is_settled)), key.now()
        if tensor is not None and result.axis is None and tensor.dim() != dims:
            tensor = tensor.select(place, 0) if dims < x.dim() else tensor.unsqueeze(place)
            key, source = Note(tensor, key.flags), source._replace(held=tensor)
        result.sources[key] = source
    if result.axis is None:
        result.find_activation(sends=name not in ("max", "min"))  # (these have two results)
    return result


def _is_of_several(note: Note | None) -> bool:
    """Whether a tensor is remembered as functions side by side."""
    made = None if note is None else _function_in(note.parts)
    return made is not None and made.axis is not None


def _function_in(parts: Any) -> _Entrywise | None:
    """Such a function in what is remembered of a tensor, perhaps beside exponentials."""
    return parts if isinstance(parts, _Entrywise) else getattr(parts, "entrywise", None)


def _known(op: Operation, notes: Notes, parts: object, passed: int) -> int:
    """What is known of an operation's result that may be one function of a tensor, entry by entry."""
    is_joined = len(op.inputs) > 1 and _is_written_out(op, map(notes.born, op.inputs))
    is_quotient = bool(op.flags & Born.GATING and passed & Born.SQUASHED and not op.flags & Born.SQUASHED)
    is_bounded = op.known.canonical in _OF_EXPONENTIALS and (is_quotient or bool(op.known.gives & Born.EXPONENTIAL))
    made = _function_in(parts)
    if made is None and (is_joined or is_bounded):
        made = _entrywise(op, notes, begins=False)
    if made is None:
        return passed | (Born.ACTIVATION if is_joined else 0)
    if is_bounded and (born := made.of_numbers()) is not None:
        passed = passed & ~(_OF_NUMBERS if born else Born.SQUASHED) | born
    if made.is_softmax and made.axis is None:
        passed &= ~(Born.SOFTMAX | Born.LOGARITHM)
        passed |= Born.SOFTMAX if any(key.flags & Born.SOFTMAX for key in made.sources) else 0
    return passed | (made.gives or 0) | (Born.ACTIVATION if is_joined and made.gives != 0 else 0)


def _is_written_out(op: Operation, born: Iterable[int]) -> bool:
    """Whether several operands that are made of one tensor make an activation of it, as ``x * sigmoid(x)`` is one."""
    marks = Born.ACTIVATION | (Born.DIVISOR if op.known.canonical == "mul" else 0)
    return op.known.has("quotient", "choosing", "selection") or any(one & marks for one in born)


def _of_mask(op: Operation, notes: Notes, result: object) -> _Entrywise | None:
    """What is remembered of what a call makes of a mask alone, such as ``(x > 0).float()``."""
    made = _entrywise(op, notes, begins=False) if isinstance(result, Tensor) else None
    if made is not None and cast(Tensor, result).dtype != torch.bool:  # (numbers, also where it was only cast)
        for key, one in made.sources.items():
            made.sources[key] = one._replace(curve=_Curve(one.curve.values.double(), one.curve.is_settled))
    return made


def _broadcasts(tensor: Tensor, x: Tensor, is_choosing: bool) -> bool:
    """Whether a tensor may stand for one number beside another tensor."""
    if tensor.numel() == 1:
        return tensor.dim() <= x.dim()
    return is_choosing and torch.broadcast_shapes(tensor.shape, x.shape) == x.shape  # type: ignore[no-untyped-call]


def _puts_a_number(op: Operation, numbers: Mapping[int, Tensor]) -> bool:
    """Whether a function that chooses may put a number in the place of an entry: not 0, and finite."""
    if not op.known.has("constant"):
        return False
    given = () if op.known.canonical in _STACKING else (*op.args, *op.kwargs.values())
    values: list[Any] = [value for value in given if isinstance(value, int | float)]
    constants = (tensor for tensor in tensors_in((op.args, op.kwargs)) if not op.depends(tensor))
    values += [numbers.get(id(tensor), 1) for tensor in constants if tensor.is_floating_point()]
    return any(value != 0 and math.isfinite(value) for value in values)


def _may_begin(op: Operation) -> bool:
    """Whether such a function may begin with a call: where it cuts off, as far below zero as above."""
    lowest, highest = _bounds(op) if op.known.canonical in _CUTTING else (0, 0)
    return -math.inf < lowest == -highest


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _moved(op: Operation, made: _Entrywise) -> _Entrywise:
    """The same where a function has moved or copied entries."""
    result = _Entrywise({}, frozenset(), made.is_shifted, made.is_summed, made.axis, made.is_softmax)
    for key, source in made.sources.items():
        tensor, new = key.now(), key
        if op.known.canonical == "clone":
            source = source._replace(is_copied=source.is_copied or "memory_format" in op.kwargs)
        elif tensor is not None:
            held = _run_on(op, tensor)
            new, source = key if held is tensor else Note(held, key.flags), source._replace(held=held)
        result.sources[new] = source
        result.passing |= {new} if key in made.passing else set()
    return result
