"""Rows of a result: which sample meets which condition, numbered once, and their places in a backward pass.

With n samples and n conditions they are paired; with other counts every sample meets every condition, samples first.
Each (sample, condition) is a *row* of the result. Rows are computed in a *grid* of slots x samples: the forward pass
sees each sample once, and slot k holds the k-th condition of every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crp.types import Condition


@dataclass(frozen=True)
class Rows:
    """Some rows of a result. Parts of them keep their samples and places: nothing is numbered anew.

    Attributes
    ----------
    samples : tuple of int
        Sample of each row, as the caller numbers them.
    conditions : tuple of mapping
        Condition of each row.
    places : tuple of int
        Place of each row among all rows, in the caller's order.
    """

    samples: tuple[int, ...]
    conditions: tuple[Condition, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[int], conditions: Sequence[Condition]) -> Rows:
        """All rows, in this order."""
        return cls(tuple(samples), tuple(conditions), tuple(range(len(samples))))

    @classmethod
    def broadcast(cls, n_samples: int, conditions: Sequence[Condition]) -> Rows:
        """Pair samples with conditions where they are equally many; otherwise every sample meets every condition."""
        if n_samples == len(conditions):
            return cls.of(range(n_samples), conditions)
        return cls.of([sample for sample in range(n_samples) for _ in conditions], list(conditions) * n_samples)

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, rows: Sequence[int]) -> Rows:
        """Some of these rows."""
        samples, places = (tuple(numbers[i] for i in rows) for numbers in (self.samples, self.places))
        return Rows(samples, tuple(self.conditions[i] for i in rows), places)

    def chunks(self, size: int) -> list[Rows]:
        """Consecutive parts of at most ``size`` rows."""
        starts = range(0, len(self), size)
        return [self.part(range(i, min(i + size, len(self)))) for i in starts]

    def one_by_one(self, every_row: bool) -> list[Rows]:
        """The rows of each sample, or every row by itself."""
        if every_row:
            return self.chunks(1)
        found: dict[int, list[int]] = {}
        for row, sample in enumerate(self.samples):
            found.setdefault(sample, []).append(row)
        return [self.part(rows) for rows in found.values()]

    def groups(self, output_name: str) -> list[list[int]]:
        """Which of these rows have the same conditioned layers in the same order."""
        found: dict[tuple[str, ...], list[int]] = {}
        for row, condition in enumerate(self.conditions):
            found.setdefault(tuple(name for name in condition if name != output_name), []).append(row)
        return list(found.values())

    def layers(self, output_name: str) -> list[str]:
        """Layers named by the conditions, in the order in which they are first named."""
        return list(dict.fromkeys(name for condition in self.conditions for name in condition if name != output_name))

    def targets(self, output_name: str) -> list[Any] | None:
        """Targets of each row (None where a row has none), or None if no row has any."""
        targets = [condition.get(output_name) for condition in self.conditions]
        return None if all(t is None for t in targets) else targets


class Grid:
    """Puts the values of rows, each with its column, into slots x columns of a forward pass; takes them out again."""

    def __init__(self, columns: Sequence[int], n_columns: int, device: torch.device) -> None:
        used = [0] * n_columns
        place = []
        for column in columns:
            place.append(used[column] * n_columns + column)
            used[column] += 1
        self.n_columns, self.n_slots = n_columns, max(used)
        # Row i in place i needs no moving: paired samples and conditions, or one sample.
        self._identity = place == list(range(self.n_slots * n_columns))
        self._index = torch.tensor(place, device=device)

    def scatter(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (slots, columns, ...); places without a row are 0.

        With a single column, each row may have several entries: (rows * entries, ...) to (slots, entries, ...).
        """
        if not self._identity:
            rows = rows.new_zeros(self.n_slots * self.n_columns, *rows.shape[1:]).index_copy(0, self._index, rows)
        return rows.reshape(self.n_slots, len(rows) // self.n_slots, *rows.shape[1:])

    def gather(self, grid: Tensor) -> Tensor:
        """(slots, columns, ...) to (rows, ...), or (slots, entries, ...) to (rows * entries, ...).

        Slots that share their values, (1, columns, ...), are repeated.
        """
        flat = grid.expand(self.n_slots, *grid.shape[1:]).flatten(0, 1)
        return flat if self._identity else flat.index_select(0, self._index)


def row_index(rows: Sequence[int], n_entries: int) -> list[int]:
    """Entries of rows along the first axis of a layer that has several for each row."""
    return [row * n_entries + i for row in rows for i in range(n_entries)]
