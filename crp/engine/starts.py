"""Where relevance of rows starts: rows that start alike share what starts, and what arrives at the first layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crp.engine.conditions import Grid, Rows
from crp.engine.targets import Position


@dataclass(frozen=True)
class Starts:
    """What starts at the root for each row.

    Attributes
    ----------
    values : Tensor of shape (starts, *root shape)
        Rows of one sample and target share one of them, which for a text of a thousand tokens has 200 MB.
    of_rows : tuple of int
        Which of them each row has.
    keys : tuple, optional
        What makes each of them: equal ones are of equal values. None where that is not known.
    """

    values: Tensor
    of_rows: tuple[int, ...]
    keys: tuple[Hashable, ...] | None = None

    @classmethod
    def of_each(cls, values: Tensor) -> Starts:
        """A start of its own for each row."""
        return cls(values, tuple(range(len(values))))

    def rows(self) -> Tensor:
        """The same, of shape (rows, *root shape); rows that share a start may be views of it."""
        if self.of_rows == tuple(range(len(self.values))):
            return self.values
        if len(self.values) == 1:
            return self.values.expand(len(self.of_rows), *self.values.shape[1:])
        return self.values[list(self.of_rows)]

    def part(self, rows: Sequence[int]) -> Starts:
        """Starts of some of the rows."""
        return replace(self, of_rows=tuple(self.of_rows[row] for row in rows))

    def shared(self, grid: Grid) -> tuple[Tensor, tuple[Hashable, ...]] | None:
        """Cotangent of every slot, (1, columns, *root shape), and what makes it; None where slots start differently.

        A column with fewer rows than others has the same in slots without one, which nobody reads.
        """
        if self.keys is None:
            return None
        n = grid.n_columns
        first: list[int | None] = [None] * n
        for row, place in enumerate(grid.places):
            if first[place % n] not in (None, self.of_rows[row]):
                return None
            first[place % n] = self.of_rows[row]
        keys = tuple(None if start is None else self.keys[start] for start in first)
        used = [start for start in first if start is not None]
        values = self.values if used == list(range(len(self.values))) else self.values[used]
        if len(used) < n:
            columns = torch.tensor([column for column, start in enumerate(first) if start is not None])
            values = values.new_zeros(n, *values.shape[1:]).index_copy(0, columns.to(values.device), values)
        return values[None], keys


class Arrivals:
    """What arrived at layers from the last start that rows shared; the next rows of the same start need it, too."""

    def __init__(self) -> None:
        self._start: tuple[Hashable, ...] | None = None
        self._at: dict[str, Mapping[str, Tensor]] = {}

    def get(
        self, layer: str, start: tuple[Hashable, ...] | None, compute: Callable[[], dict[str, Tensor]], keep: bool
    ) -> dict[str, Tensor]:
        """What arrives at a layer, and at others on the way, from a start that is known; with ``keep`` for other rows.

        It belongs to the caller.
        """
        known = self._at.get(layer) if start is not None and start == self._start else None
        if known is None:
            known = compute()
            if not keep or start is None:
                return known
            if start != self._start:
                self._start, self._at = start, {}
            self._at[layer] = known
        return {name: values.clone() for name, values in known.items()}


def distinct(rows: Rows, columns: Sequence[int], targets: Sequence[Any] | None) -> tuple[list[int], Starts]:
    """First row of each sample and target; and which of these each row has, without values."""
    keys = [(columns[row], *_key_of(target)) for row, target in enumerate(targets or [None] * len(rows))]
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    place = {key: number for number, key in enumerate(first)}
    return list(first.values()), Starts(torch.empty(0), tuple(place[key] for key in keys), tuple(first))


def _key_of(target: Any) -> tuple[Hashable, ...]:
    """What is equal for equal targets; for those that are compared by identity alone, differs for equal ones."""
    if target is None or type(target) is int:
        return ("class", target)
    if isinstance(target, Position):
        return ("position", target.position, _plain(target.token), _plain(target.against))
    if isinstance(target, list | tuple):
        return (type(target).__name__, *map(_key_of, target))
    return ("object", id(target))


def _plain(ids: Any) -> Hashable:
    return tuple(ids) if isinstance(ids, list | tuple) else ids
