"""Rows of several shards, some at a time: each (sample, target) once, whatever the shards' ranges."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crp.visualization.table.manifest import Array, Block, RowIds, ShardRecord
from crp.visualization.table.shards import open_shard

#: Added to the norm of a row, as zennit-crp does.
STABILIZER = 1e-10
_BLOCK_BYTES = 32 << 20


class Query(NamedTuple):
    """Which values are asked for; as for `Table.blocks`, with ids that were checked.

    Attributes
    ----------
    layer, mode, kind : str
    normed : bool
    concepts : array of int, or None for all
    of_class : int or None
    samples : array of int, or None for all
    """

    layer: str
    mode: str
    kind: str
    normed: bool
    concepts: Array | None
    of_class: int | None
    samples: Array | None


def read_rows(folder: Path, shards: Sequence[ShardRecord]) -> RowIds:
    """Sample and target of every row."""
    none = RowIds(np.zeros(0, np.int64), np.zeros(0, np.int64))
    each = zip(shards, _get_earlier(shards), strict=True)
    found = [none, *(_read_ids(folder, shard, earlier)[0] for shard, earlier in each)]
    return RowIds(*(np.concatenate(column) for column in zip(*found, strict=True)))


def count_rows(folder: Path, shards: Sequence[ShardRecord]) -> int:
    """Number of rows; shards are only read where their ranges overlap."""
    return sum(
        len(_read_ids(folder, shard, earlier)[1]) if earlier else shard.rows
        for shard, earlier in zip(shards, _get_earlier(shards), strict=True)
    )


def read_blocks(folder: Path, shards: Sequence[ShardRecord], query: Query) -> Iterator[Block]:
    """Values that a query asks for; see `Table.blocks`."""
    layer, field = query.layer, f"{query.mode}.{query.kind}"
    span, concepts = _get_span(query.concepts)
    for shard, earlier in zip(shards, _get_earlier(shards), strict=True):
        if not shard.rows:
            continue
        (sample, target), row = _read_ids(folder, shard, earlier)
        keep = np.ones(len(sample), bool) if query.of_class is None else target == query.of_class
        if query.samples is not None:
            keep &= np.isin(sample, query.samples)
        sample, target, row = sample[keep], target[keep], row[keep]
        with open_shard(folder, shard) as file:
            for part in _get_parts(row, _BLOCK_BYTES // (8 * shard.concepts[layer]) or 1):
                begin, end = int(row[part][0]), int(row[part][-1]) + 1
                whole = end - begin == len(row[part])
                inner = slice(None) if whole else row[part] - begin
                value = file.get_slice(f"{field}/{layer}")[begin:end, span][inner]
                position = file.get_slice(f"{query.mode}.position/{layer}")[begin:end, span][inner]
                if query.normed:
                    norm = file.get_slice(f"{field}_norm/{layer}")[begin:end][inner]
                    value = value / (norm + norm.dtype.type(STABILIZER))[:, None]
                if concepts is not None:
                    value, position = value[:, concepts], position[:, concepts]
                yield Block(sample[part], target[part], value, position.astype(np.int64))


class _Overlap(NamedTuple):
    """Earlier shards that reach into the range of a shard.

    Attributes
    ----------
    stops : array of int
        Where each ends, ascending. All begin at or before the shard, as shards are in the order of their ranges.
    skipped : mapping of int to int
        By sample, how many of them have skipped it.
    """

    stops: Array
    skipped: Mapping[int, int]


def _read_ids(folder: Path, shard: ShardRecord, earlier: _Overlap | None) -> tuple[RowIds, Array]:
    """Sample and target of a shard's rows that no earlier shard holds, and their place in the shard."""
    with open_shard(folder, shard) as file:
        sample, target = file.get_tensor("sample"), file.get_tensor("target")
    keep = np.ones(len(sample), bool)
    if earlier is not None:
        n_around = len(earlier.stops) - np.searchsorted(earlier.stops, sample, "right")
        n_skipped = np.array([earlier.skipped.get(i, 0) for i in sample.tolist()], np.int64)
        keep = n_around == n_skipped
    return RowIds(sample[keep], target[keep]), np.flatnonzero(keep)


def _get_earlier(shards: Sequence[ShardRecord]) -> Iterator[_Overlap | None]:
    """For each shard, in the order of their ranges, those before it whose ranges overlap with its range, if any."""
    stops: list[int] = []
    reaching: list[tuple[int, int, Mapping[int, str]]] = []  # a heap by the stop
    skipped = Counter[int]()
    for number, shard in enumerate(shards):
        while reaching and reaching[0][0] <= shard.start:
            stop, _, left = heapq.heappop(reaching)
            del stops[bisect_left(stops, stop)]
            skipped.subtract(left.keys())
        yield _Overlap(np.array(stops, np.int64), skipped) if stops else None
        insort(stops, shard.stop)
        heapq.heappush(reaching, (shard.stop, number, shard.skipped))
        skipped.update(shard.skipped.keys())


def _get_span(concepts: Array | None) -> tuple[slice, Array | None]:
    """Concepts as a slice that holds them all, and their places in it."""
    if concepts is None or not len(concepts):
        return slice(None), concepts
    return slice(int(concepts.min()), int(concepts.max()) + 1), concepts - concepts.min()


def _get_parts(rows: Array, size: int) -> Iterator[slice]:
    """Slices of ``rows`` (ascending) that each span at most ``size`` numbers."""
    begin = 0
    while begin < len(rows):
        end = int(np.searchsorted(rows, rows[begin] + size))
        yield slice(begin, end)
        begin = end
