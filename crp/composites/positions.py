"""How many operations positions such as `Last` and `Depth` choose among: the model is run once to count them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from crp.trace import Structure, looking, undisturbed

if TYPE_CHECKING:
    from crp.composites.operations import Operations

#: Number of structures for which the counts of a model are remembered.
_REMEMBERED = 4
_counted: weakref.WeakKeyDictionary[nn.Module, deque[tuple[Any, dict[int, int]]]] = weakref.WeakKeyDictionary()


def _totals_of(
    mode: Operations, model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, int]:
    """Number of layers of each position's types, by the number of its entry; counted once for a structure."""
    key = structure, [(entry.number, entry.selector) for entry in mode.matching.positions]
    for known, totals in _counted.get(model, ()):
        if known == key:
            return totals
    with undisturbed(model, args, kwargs), looking():
        totals = mode.count(model, args, kwargs)
    _counted.setdefault(model, deque(maxlen=_REMEMBERED)).appendleft((key, totals))
    return totals
