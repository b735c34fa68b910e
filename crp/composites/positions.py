"""How many operations positions such as `Last` and `Depth` choose among: the model is run once to count them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from crp.layers import looking
from crp.layers.nested import tensors_in
from crp.layers.state import undisturbed
from crp.trace import Structure

if TYPE_CHECKING:
    from crp.composites.operations import Operations

#: Number of structures for which the counts of a model are remembered.
_REMEMBERED = 4
#: Shapes of all samples' inputs, without the axis of the samples: a model may do more for a longer text.
_Shapes: TypeAlias = tuple[tuple[int, ...], ...]
_counted: weakref.WeakKeyDictionary[nn.Module, deque[tuple[Any, dict[_Shapes, dict[int, int]]]]] = (
    weakref.WeakKeyDictionary()
)


def _totals_of(
    mode: Operations, model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, int]:
    """Number of layers of each position's types, by the number of its entry; counted once for a structure and shape."""
    key = structure, [(entry.number, entry.selector) for entry in mode.matching.positions]
    remembered = _counted.setdefault(model, deque(maxlen=_REMEMBERED))
    of_shapes = next((totals for known, totals in remembered if known == key), None)
    if of_shapes is None:
        of_shapes = {}
        remembered.appendleft((key, of_shapes))
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors_in((args, kwargs)))
    if not of_shapes.get(shapes):
        with undisturbed(model, args, kwargs), looking():
            of_shapes[shapes] = mode.count(model, args, kwargs)
    return of_shapes[shapes]
