"""Conditions as data: checked, and paired with samples.

A condition is a dict ``{layer name: concept ids, "y": targets}``. With n samples and n conditions they are paired; with
other counts every sample meets every condition, samples first. Each (sample, condition) is a *row* of the result. Rows
are computed in a *grid* of slots x samples: the forward pass sees each sample once, and slot k holds the k-th condition
of every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crp.engine.targets import check_target
from crp.errors import InputError, InputTypeError
from crp.layers.devices import send_to
from crp.notices import warn
from crp.types import Condition, MaskFactory

MaskMap = MaskFactory | Mapping[str, MaskFactory]


def check_conditions(
    conditions: Sequence[Condition], output_name: str, start_layer: str | None = None, has_init: bool = False
) -> list[Condition]:
    """Conditions as a list, or an error that names the one that is wrong.

    ``output_name`` is the key of the targets. Where neither a start layer nor an initial relevance is given, every
    condition must say where relevance starts.
    """
    if isinstance(conditions, Mapping) or not isinstance(conditions, Sequence):
        remedy = "put the dict in a list" if isinstance(conditions, Mapping) else "list(...) makes one"
        raise InputTypeError(f"conditions must be a list of dicts, not {type(conditions).__name__}; {remedy}")
    if not conditions:
        raise InputError(f"conditions is empty; give at least one, such as [{{{output_name!r}: [0]}}]")
    for i, condition in enumerate(conditions):
        if not isinstance(condition, Mapping):
            raise InputTypeError(f"conditions[{i}] must be a dict, not {type(condition).__name__}: {condition!r}")
        for layer in condition:
            if not isinstance(layer, str):
                raise InputTypeError(f"conditions[{i}]: layers are named by strings, not {layer!r}")
        targets = condition.get(output_name)
        if targets is not None:
            check_target(targets, f"conditions[{i}][{output_name!r}]")
        if targets is None and start_layer is None and not has_init:
            alike = [f"; {name!r} is not {output_name!r}" for name in condition if name.lower() == output_name.lower()]
            raise InputError(
                f"Either {output_name} in 'conditions' or 'start_layer' or 'init_rel' must be defined; "
                f"conditions[{i}] is {dict(condition)!r}{''.join(alike) if output_name not in condition else ''}"
            )
    if start_layer is not None and any(output_name in condition for condition in conditions):
        warn(f"{output_name!r} has no effect in conditions: the backward pass begins at start_layer {start_layer!r}")
    return list(conditions)


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
        if size >= len(self):
            return [self]
        return [self.part(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def one_by_one(self, every_row: bool) -> list[Rows]:
        """The rows of each sample, or every row by itself."""
        if every_row:
            return self.chunks(1)
        rows_of: dict[int, list[int]] = {}
        for row, sample in enumerate(self.samples):
            rows_of.setdefault(sample, []).append(row)
        return [self.part(rows) for rows in rows_of.values()]

    def groups(self, output_name: str) -> list[list[int]]:
        """Which of these rows have the same conditioned layers in the same order."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, condition in enumerate(self.conditions):
            groups.setdefault(tuple(name for name in condition if name != output_name), []).append(row)
        return list(groups.values())

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
        is_identity = place == list(range(self.n_slots * n_columns))
        self.places = place
        self._index = None if is_identity else send_to(device, torch.tensor(place))

    def scatter(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (slots, columns, ...); places without a row are 0.

        With a single column, each row may have several entries: (rows * entries, ...) to (slots, entries, ...).
        """
        if self._index is not None:
            rows = rows.new_zeros(self.n_slots * self.n_columns, *rows.shape[1:]).index_copy(0, self._index, rows)
        return rows.reshape(self.n_slots, len(rows) // self.n_slots, *rows.shape[1:])

    def gather(self, grid: Tensor) -> Tensor:
        """(slots, columns, ...) to (rows, ...), or (slots, entries, ...) to (rows * entries, ...).

        Slots that share their values, (1, columns, ...), are repeated.
        """
        flat = grid.expand(self.n_slots, *grid.shape[1:]).flatten(0, 1)
        return flat if self._index is None else flat.index_select(0, self._index)


def row_index(rows: Sequence[int], n_entries: int) -> list[int]:
    """Entries of rows along the first axis of a layer that has several for each row."""
    return [row * n_entries + i for row in rows for i in range(n_entries)]
