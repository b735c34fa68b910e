"""How many operations positions such as `Last` and `Depth` choose among, which the model's order of execution says."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from crp.composites.selection import Entry, fits, is_counted
from crp.provenance import FunctionCall, Trace
from crp.rules.functions import described


def totals_of(positions: Sequence[Entry], record: Trace, explained: Collection[int]) -> dict[int, int]:
    """Number of operations of each position's types, by the number of its entry.

    Parameters
    ----------
    positions : sequence of Entry
    record : Trace
        A forward pass of the model.
    explained : collection of int
        Which of the model's inputs are explained; what depends on no other one is a constant.
    """
    totals = {}
    for entry in positions:
        assert entry.position is not None
        types = entry.position.types
        modules = sum(is_counted(call.kind, types) for call in record.calls)
        totals[entry.number] = modules + sum(_is_one(call, types, explained) for call in record.operations)
    return totals


def _is_one(call: FunctionCall, types: type | tuple[type, ...], explained: Collection[int]) -> bool:
    """Whether a call is an affine operation of these types."""
    known = described(call.name)
    if not fits(known, known.kind, types):
        return False
    depends = [not operand.origins.isdisjoint(explained) for operand in call.operands]
    if known.has("constant") and len(depends) > 2:  # what is added may depend on the input as well
        depends = depends[1:] if known.canonical.startswith("add") else depends[:2]
    return sum(depends) == 1
