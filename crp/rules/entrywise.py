"""Functions of one tensor, entry by entry: with the numbers in it, what is written out may be one activation.

A number that is added before an activation is a bias, and keeps its share. But a function that is symmetric about zero,
``f(x) + f(-x) = 2 f(0)``, has none: neither a hard sigmoid such as ``relu6(x + 3) / 6``, nor soft shrinkage such as
``relu(x - t) - relu(-x - t)``. Nor has one that is zero at zero, and nothing else next to it, such as ``log(1 + x)`` or
``relu(x) - relu(x - 6)``. To tell them apart, what is computed of a tensor is computed of some points, too.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crp.layers.devices import holds, is_recording
from crp.rules.layer import changed
from crp.rules.notes import Born, Notes
from crp.rules.operation import Operation, _is_one_number, _on_a_copy
from crp.rules.passing import _CUTTING, _SEVERAL, _SUMS, _bounds, _run_on
from crp.trace.recorder import tensors_in

_CONDITIONS = frozenset(("ge", "gt", "le", "lt"))
#: Functions that choose; what they choose may be a tensor of one number in every entry.
_SELECTING = frozenset("clamp clamp_max clamp_min fmax fmin masked_fill maximum minimum where".split())  # noqa: SIM905
#: Functions that such a function may begin with: in these, a variable of the model still holds what they read.
_HELD = _CONDITIONS | {"abs", "neg", "sign"}
BEGINNING = _SUMS | _HELD | {"clamp", "hardsigmoid", "hardtanh", "softplus"}
_AMOUNTS = 10.0 ** torch.linspace(-3, 4, 36, dtype=torch.float64, device="cpu")
_POINTS = torch.cat([-_AMOUNTS.flip(0), 0 * _AMOUNTS[:1], _AMOUNTS])
#: How many tensors are remembered that a function may be one of, and how many functions of Python's numbers.
_MOST, _MOST_CURVES = 6, 4096


class _Curve:
    """What a function makes of `_POINTS`; it is found out once of those that are made of Python's numbers alone.

    Parameters
    ----------
    values : Tensor
    is_settled : bool
        Whether it is such a function, and not one of numbers in tensors, which may be others in a replay.
    """

    def __init__(self, values: Tensor, is_settled: bool = True) -> None:
        self.values, self.is_settled = values, is_settled
        self._gives: dict[Callable[[Tensor], Tensor], int] = {}

    def gives(self, kind: Callable[[Tensor], Tensor]) -> int:
        """What is known of its results (`Born`), if it is one activation of this kind; -1 if not."""
        if kind in self._gives or self.values.dtype == torch.bool:
            return self._gives.get(kind, -1)
        found = _given(self.values) if holds(partial(kind, self.values)) else -1
        if self.is_settled and not is_recording():  # (where a GPU records, nothing holds)
            self._gives[kind] = found
        return found


_IDENTITY = _Curve(_POINTS)
#: Functions of Python's numbers, by calls; a model calls the same ones again and again.
_curves: dict[Any, _Curve] = {}


class _Source(NamedTuple):
    """A tensor, or what gives it, that a function may be one of, and that function.

    ``is_copied`` says whether a layer's output is in between, through which relevance shall flow.
    """

    tensor: Callable[[], Tensor | None]
    version: int
    curve: _Curve
    is_copied: bool = False

    @property
    def is_there(self) -> bool:
        """Whether it still has its values."""
        tensor = self.tensor()
        return tensor is not None and tensor._version == self.version


@dataclass(eq=False, slots=True)
class _Entrywise:
    """What is remembered of a tensor that is made of another one, entry by entry and by numbers.

    Attributes
    ----------
    sources : dict of int to _Source
        What it is a function of, by `id`, the latest last.
    passing : frozenset of int
        Those of them to which its relevance goes as it is.
    is_shifted : bool
        Whether a number was added, or put in its place.
    activation : _Source or None
        That of which it is one activation, if relevance has to be sent there.
    gives : int
        What is known of it (`Born`).
    """

    sources: dict[int, _Source]
    passing: frozenset[int]
    is_shifted: bool
    activation: _Source | None = None
    gives: int = 0

    def find_activation(self) -> None:
        """Find out whether it is one activation."""
        for kind in (_is_symmetric, _begins_at_zero):
            for key, source in reversed(self.sources.items()):
                if (gives := source.curve.gives(kind)) >= 0:
                    self.gives = gives
                    if self.is_shifted and key not in self.passing and source.is_there:
                        self.activation, self.passing = source, frozenset((key,))
                        keys = list(self.sources)  # (to later ones nothing flows)
                        self.sources = {other: self.sources[other] for other in keys[: keys.index(key) + 1]}
                    return


def _entrywise(op: Operation, notes: Notes, begins: bool) -> _Entrywise | None:
    """What is remembered of a call, if it is such a function, or one ``begins`` there; None of others."""
    if begins and not _may_begin(op):
        return None
    name, known, x = op.known.canonical, op.known, op.inputs[0]
    tensors = op.inputs if known.reads_first else list(tensors_in((op.args, op.kwargs)))
    parts = {id(tensor): note.parts for tensor in tensors if (note := notes.of(tensor)) is not None}
    made = {number: one for number, one in parts.items() if isinstance(one, _Entrywise)}
    if known.has("copies"):
        is_moved = len(made) == len(tensors) == 1 and name not in _SEVERAL and op.args[:1] and not op.overwrites
        return _moved(op, made[id(x)]) if is_moved else None
    if not (known.has("elementwise") or name in _CONDITIONS) or "dropout" in known.name or "out" in op.kwargs:
        return None
    read, numbers = dict[int, dict[int, _Source]](), dict[int, Tensor]()
    for tensor in tensors:
        if tensor.shape == x.shape and (id(tensor) in made or op.depends(tensor)):
            found = partial(_itself, tensor) if name in BEGINNING - _HELD else weakref.ref(tensor)
            below = made[id(tensor)].sources if id(tensor) in made else {}
            read[id(tensor)] = {key: source for key, source in below.items() if source.is_there}
            if tensor.requires_grad:
                read[id(tensor)][id(tensor)] = _Source(found, tensor._version, _IDENTITY)
        elif not op.depends(tensor) and _broadcasts(tensor, x, name in _SELECTING) and _is_one_number(tensor):
            numbers[id(tensor)] = tensor.detach().flatten()[0].cpu()
        else:
            return None
    sources = dict[int, _Source]()
    for key in [key for key in read[id(x)] if all(key in others for others in read.values())][-_MOST:]:
        of_source = {number: others[key] for number, others in read.items()}
        curve = _curve(op, {number: source.curve for number, source in of_source.items()}, numbers)
        is_copied = any(source.is_copied for source in of_source.values())
        sources[key] = of_source[id(x)]._replace(curve=curve, is_copied=is_copied)
    passing = frozenset(read).union(*(one.passing for one in made.values()))
    is_shift = name in _SUMS or (known.has("constant") and _puts_a_number(op, numbers))
    # (what a number is added to may be 0, and then hand nothing on)
    passing = passing if len(read) == 1 and not is_shift else frozenset()
    result = _Entrywise(sources, passing, is_shift or any(one.is_shifted for one in made.values()))
    if name not in (_HELD | _SUMS if begins else _CONDITIONS):
        result.find_activation()
    return result if sources else None


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
    values: list[Any] = [value for value in (*op.args, *op.kwargs.values()) if isinstance(value, int | float)]
    constants = (tensor for tensor in tensors_in((op.args, op.kwargs)) if not op.depends(tensor))
    values += [numbers.get(id(tensor), 1) for tensor in constants if tensor.is_floating_point()]
    return any(value != 0 and math.isfinite(value) for value in values)


def _may_begin(op: Operation) -> bool:
    """Whether such a function may begin with a call of real numbers: where it cuts off, as far below zero as above."""
    lowest, highest = _bounds(op) if op.known.canonical in _CUTTING else (0, 0)
    return not op.inputs[0].is_complex() and -math.inf < lowest == -highest


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _curve(op: Operation, curves: Mapping[int, _Curve], numbers: Mapping[int, Tensor]) -> _Curve:
    """What a call makes of functions, by `id` of the tensors that it reads, and of numbers in others."""
    known = {**numbers, **{number: curve.values for number, curve in curves.items()}}
    if numbers or not all(curve.is_settled for curve in curves.values()):
        return _Curve(_values(op, known), is_settled=False)
    args, kwargs = changed((tuple(op.args), op.kwargs), lambda tensor: curves[id(tensor)])
    key = op.function, args, tuple(kwargs.items())
    try:
        found = _curves.get(key)
    except TypeError:  # (a list is among its arguments)
        return _Curve(_values(op, known))
    if found is None:
        if len(_curves) >= _MOST_CURVES:
            _curves.clear()
        found = _curves[key] = _Curve(_values(op, known))
    return found


def _values(op: Operation, known: Mapping[int, Tensor]) -> Tensor:
    """What a call makes of other tensors in place of those that it reads."""
    kwargs = {key: value for key, value in op.kwargs.items() if key != "inplace"}
    function = _on_a_copy(op.function) if op.overwrites and not op.kwargs.get("inplace") else op.function
    with torch.no_grad():  # (a function that works in place may be told so by position)
        args, kwargs = changed((tuple(op.args), kwargs), lambda tensor: known[id(tensor)].clone())
        if op.overwrites and args:  # (what it writes into may be a number)
            args = args[0].expand_as(_POINTS).clone(), *args[1:]
        return cast(Tensor, function(*args, **kwargs))


def _moved(op: Operation, made: _Entrywise) -> _Entrywise:
    """The same where a function has moved or copied entries."""
    sources, passing = dict[int, _Source](), list[int]()
    for key, source in made.sources.items():
        tensor = source.tensor()
        if op.known.canonical == "clone":
            sources[key] = source._replace(is_copied=True)
        elif tensor is not None and source.is_there:
            tensor = _run_on(op, tensor)
            key = id(tensor)
            sources[key] = source._replace(tensor=partial(_itself, tensor), version=tensor._version)
        passing += [key] if key in made.passing else []
    return _Entrywise(sources, frozenset(passing), made.is_shifted)


def _is_symmetric(values: Tensor) -> Tensor:
    """Whether a function is symmetric about zero, and not linear; what is added is a gate's, and changes no sign."""
    below, middle, above = _rises(values)
    keeps_signs = (middle == 0).all() | (values >= 0).all() | (values <= 0).all()
    rounding, line = 1e-6 * (above.abs() + below.abs() + middle.abs()), above[-1] / _AMOUNTS[-1] * _AMOUNTS
    return keeps_signs & ((above - below).abs() <= rounding).all() & ((above - line).abs() > rounding).any()


def _begins_at_zero(values: Tensor) -> Tensor:
    """Whether a function is zero at zero, and not all around it, nor linear."""
    below, middle, above = _rises(values)
    next_to_it = torch.maximum(below[0].nan_to_num().abs(), above[0].nan_to_num().abs())
    is_line = (values - above[-1] / _AMOUNTS[-1] * _POINTS).abs() <= 1e-6 * values.abs()
    return (middle[0].abs() <= 1e-6 * next_to_it) & (next_to_it > 0) & ~is_line.all()


def _rises(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far a function rises up to zero, what it is there, and how far it rises from there, by the distance."""
    below, middle, above = values.split_with_sizes([len(_AMOUNTS), 1, len(_AMOUNTS)])
    return middle - below.flip(0), middle, above - middle


def _given(values: Tensor) -> int:
    """What is known of results of an activation, if they are bounded; nothing of an even one, such as ``-|x|``."""
    below, _, above = _rises(values)
    if holds(lambda: ((above + below).abs() <= 1e-6 * above.abs()).all()):
        return 0
    if not holds(lambda: (values[[0, -1]] == values[[1, -2]]).all() & (abs(values) <= 1).all() & _is_symmetric(values)):
        return Born.ACTIVATION
    is_positive = holds(lambda: (values >= 0).all())
    return Born.ACTIVATION | Born.GATING | (Born.SQUASHED if is_positive else Born.BALANCED)
