"""Functions of numbers, known by what they make of some points: whether they are one activation, and of what kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crp.layers.devices import holds, is_recording
from crp.layers.nested import changed, tensors_in
from crp.rules.functions import look_up
from crp.rules.notes import Born, Note
from crp.rules.spellings import in_place

#: Functions that put tensors side by side.
_STACKING = frozenset(("cat", "stack"))
_AMOUNTS = 10.0 ** torch.linspace(-3, 4, 36, dtype=torch.float64, device="cpu")
_POINTS = torch.cat([-_AMOUNTS.flip(0), 0 * _AMOUNTS[:1], _AMOUNTS])
#: How many functions of Python's numbers are remembered.
_MOST_CURVES = 4096


class _Curve:
    """What a function makes of `_POINTS`; it is found out once of those that are made of Python's numbers alone.

    Parameters
    ----------
    values : Tensor of shape (points,), or (points, entries) of functions side by side
    is_settled : bool
        Whether it is such a function, and not one of numbers in tensors, which may be others in a replay.
    """

    def __init__(self, values: Tensor, is_settled: bool = True) -> None:
        self.values, self.is_settled = values, is_settled
        self._gives: dict[Callable[[Tensor], Tensor], int] = {}

    @property
    def is_of_several(self) -> bool:
        """Whether these are functions side by side."""
        return self.values.dim() == 2

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


def _curve(call: Any, curves: Mapping[Note, _Curve]) -> _Curve:
    """What a call makes of functions."""
    function, args, kwargs = changed(call, curves.__getitem__, Note)
    key = function, args, tuple(kwargs.items())
    if next(tensors_in((args, kwargs)), None) is not None or not all(curve.is_settled for curve in curves.values()):
        return _Curve(_values(*key), is_settled=False)
    try:
        found = _curves.get(key)
    except TypeError:  # (a list is among its arguments)
        return _Curve(_values(*key))
    if found is None:
        if len(_curves) >= _MOST_CURVES:
            _curves.clear()
        found = _curves[key] = _Curve(_values(*key))
    return found


def _values(function: Callable[..., Tensor], args: Sequence[Any], kwargs: Sequence[tuple[str, Any]]) -> Tensor:
    """What a call makes of functions."""
    args, named = changed((args, dict(kwargs)), lambda curve: torch.clone(curve.values), _Curve)
    if look_up(function).canonical in _STACKING:
        return torch.stack([one.expand(_POINTS.shape) for one in tensors_in((args, named))], 1)
    if in_place(function, {}) and args[0].dim() == 0:  # (it may write into a number)
        args = args[0].repeat(len(_POINTS)), *args[1:]
    with torch.no_grad():
        return function(*args, **named)


def _is_curved(values: Tensor) -> Tensor:
    """Whether a function is not linear."""
    slopes = ((values[1:] - values[:-1]) / (_POINTS[1:] - _POINTS[:-1])).nan_to_num()
    return ((slopes - slopes[0]).abs() > 1e-6 * slopes.abs().amax()).any()


def _is_symmetric(values: Tensor) -> Tensor:
    """Whether a function is symmetric about zero, and not linear; what is added is a gate's, and changes no sign."""
    below, middle, above = _rises(values)
    keeps_signs = (middle == 0).all() | ~(values < 0).any() | ~(values > 0).any()
    rounding, line = 1e-6 * (above.abs() + below.abs() + middle.abs()), above[0] / _AMOUNTS[0] * _AMOUNTS
    # (of large numbers, exponentials may be infinite, and their quotients no numbers)
    return keeps_signs & ~((above - below).abs() > rounding).any() & ((above - line).abs() > rounding).any()


def _begins_at_zero(values: Tensor) -> Tensor:
    """Whether a function is zero at zero, and not all around it, nor linear."""
    below, middle, above = _rises(values)
    # (where a logarithm ends, it is infinite, which tells nothing)
    next_to_it = torch.stack([below[0], above[0]]).nan_to_num(0.0, 0.0, 0.0).abs().amax()
    is_line = (values - above[-1] / _AMOUNTS[-1] * _POINTS).abs() <= 1e-6 * values.abs()
    return (middle[0].abs() <= 1e-6 * next_to_it) & (next_to_it > 0) & ~is_line.all()


def _bends_at_zero(values: Tensor) -> Tensor:
    """Whether a function is linear on one side of zero, and curved from there on on the other."""
    below, _, above = _rises(values)
    slopes = torch.stack([below, above]) / _AMOUNTS
    is_line = ((slopes - slopes[:, -1:]).abs() <= 1e-6 * slopes.abs()).all(1) & (slopes[:, 0] != 0)
    is_curved = (slopes[:, 1] - slopes[:, 0]).abs() > 1e-6 * slopes[:, 0].abs()
    return (is_line & is_curved.flip(0)).any()


def _rises(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far a function rises up to zero, what it is there, and how far it rises from there, by the distance."""
    below, middle, above = values.split_with_sizes([len(_AMOUNTS), 1, len(_AMOUNTS)])
    return middle - below.flip(0), middle, above - middle


def _given(values: Tensor) -> int:
    """What is known of results of an activation, if they are bounded; nothing of an even one, such as ``-|x|``."""
    below, _, above = _rises(values)
    if holds(lambda: ((above + below).abs() <= 1e-6 * above.abs()).all()):
        return 0
    return Born.ACTIVATION | (_bounded(values) if holds(lambda: _is_symmetric(values)) else 0)


def _bounded(values: Tensor) -> int:
    """What is known of results of an activation that is nearly the same for all large numbers of each sign."""
    values = values[~values.isnan()]
    if len(values) < 2 or not holds(lambda: _is_flat(values)):
        return 0
    if holds(lambda: (values >= 0).all()):
        return Born.ACTIVATION | Born.GATING | Born.SQUASHED
    return Born.ACTIVATION | Born.GATING | Born.BALANCED if holds(lambda: (values.abs() <= 1).all()) else 0


def _power(values: Tensor) -> int:
    """What is known of results of an activation that is a power of positive numbers: whether it divides by them."""
    positive = values[len(_AMOUNTS) + 1 :]
    quotients = positive[1:] / positive[:-1]
    if not holds(lambda: ((quotients - quotients[0]).abs() <= 1e-6).all() & ((quotients[0] - 1).abs() > 1e-6)):
        return 0
    return Born.DIVISOR if holds(lambda: quotients[0] < 1) else Born.ACTIVATION


def _born_of(values: Tensor) -> int:
    """What is known of results of a function that is bounded, or a power; 0 of others."""
    return _power(values) or _bounded(values)


def _is_flat(values: Tensor) -> Tensor:
    """Whether a function is the same at both ends, but for a rest as that of ``x / (1 + |x|)``."""
    ends, beside = values[[0, -1]], values[[1, -2]]
    return ((ends - beside).abs() <= 1e-4 * ends.abs().amax()).all() & ends.isfinite().all()


#: What tells that a function is one activation.
_ACTIVATIONS = (_is_symmetric, _begins_at_zero, _bends_at_zero)
