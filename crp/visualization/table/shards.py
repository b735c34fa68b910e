"""Shard files: one stretch of a dataset each, complete or absent, and checked before their content is believed."""

from __future__ import annotations

import contextlib
import heapq
import json
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from crp.visualization.table.contents import find_problem
from crp.visualization.table.files import check_file, hash_of, write_hashed
from crp.visualization.table.manifest import Array, Block, RowIds, ShardRecord, TableCorruptError

_REDO = "mine again with the same arguments to redo it"
#: Files that were written here, or found to be what their record says, as (path, size, time of change, sha256).
_verified: set[tuple[str, int, int, str]] = set()
#: What reading a file that is no shard, or a forged one, may raise.
_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write_shard(
    folder: Path,
    identity: str,
    start: int,
    stop: int,
    columns: Mapping[str, Sequence[Array]],
    skipped: Mapping[int, str],
) -> ShardRecord:
    """Write a shard; its name follows from its content, so that writing it again changes nothing.

    Parameters
    ----------
    folder : Path
        ``<table>/shards``.
    identity : str
        Which table the shard belongs to.
    start, stop : int
    columns : dict of str to sequence of array
        ``"sample"`` and ``"target"`` of shape (rows,), and for layers ``"<mode>.<field>/<layer>"``; each in parts,
        which are stretches of rows.
    skipped : dict of int to str
    """
    rows = sum(map(len, columns["sample"]))
    described = {"table": identity, "start": start, "stop": stop}
    described["skipped"] = {str(i): skipped[i] for i in sorted(skipped)}
    # Metadata is one entry, because safetensors writes several in arbitrary order, which would change the file's hash.
    content = _serialized(columns, {"crp": json.dumps(described)})
    path, sha = write_hashed(folder, content, lambda sha: f"{start}-{stop}-{sha[:8]}.safetensors")
    _verified.add(_state(path, sha))
    concepts = _concepts({key: (rows, *parts[0].shape[1:]) for key, parts in columns.items()})
    return ShardRecord(path.name, sha, start, stop, rows, concepts, dict(skipped))


def _serialized(columns: Mapping[str, Sequence[Array]], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Content of a file that safetensors would write, in pieces: the columns stay where they are.

    Its own function copies everything twice, and meanwhile keeps the interpreter from others.
    """
    # (what the library writes of empty columns has its order, its words for the numbers, and the metadata)
    empty = save({key: np.empty(0, parts[0].dtype) for key, parts in columns.items()}, metadata=dict(metadata))
    header = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    end = 0
    for key, entry in header.items():
        if key in columns:
            parts = columns[key]
            begin, end = end, end + sum(part.nbytes for part in parts)
            entry |= {"shape": [sum(map(len, parts)), *parts[0].shape[1:]], "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for key in header:
        for part in columns.get(key, ()):
            little = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
            yield little.reshape(-1).view(np.uint8).data


def read_record(path: Path, identity: str) -> ShardRecord | None:
    """Record of a shard file that no manifest lists; None if it is damaged or belongs to another table."""
    with contextlib.suppress(OSError, *_UNREADABLE):
        check_file(path)
        sha = hash_of(path)
        with safe_open(path, framework="numpy") as file:
            described = json.loads(file.metadata()["crp"])
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if path.name.endswith(f"-{sha[:8]}.safetensors") and described.pop("table") == identity:
            concepts = _concepts(shapes)
            entry = {"file": path.name, "sha256": sha, "rows": shapes["sample"][0], "concepts": concepts, **described}
            return ShardRecord.from_json(entry, path)
    return None


@contextlib.contextmanager
def open_shard(folder: Path, record: ShardRecord, check: bool = True) -> Iterator[Any]:
    """Memory-mapped shard, whose content is what the manifest says; without ``check``, it is hoped to be.

    Raises
    ------
    TableCorruptError
        If the file is missing, damaged or another one; the message names it and says what to do.
    """
    path = folder / record.file
    try:
        if check:
            check_shard(folder, record)
        elif not path.is_file():
            raise TableCorruptError(f"{path} is missing; {_REDO}")
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise TableCorruptError(f"{path} is damaged ({error}); {_REDO}") from error


def check_shard(folder: Path, record: ShardRecord, *, again: bool = False) -> None:
    """Raise a `TableCorruptError` unless a shard's file is what its record says, and holds what a shard may hold.

    Parameters
    ----------
    folder : Path
        ``<table>/shards``.
    record : ShardRecord
    again : bool
        Read the file, also where this process has read or written it and its size and time are as they were.
    """
    path = folder / record.file
    try:
        state = _state(path, record.sha256)
        if state in _verified and not again:
            return
        _verified.discard(state)
        sha = hash_of(path)
        if sha != record.sha256:
            raise TableCorruptError(
                f"{path} is damaged: its sha256 is {sha[:16]}…, the manifest says {record.sha256[:16]}…; {_REDO}"
            )
        with safe_open(path, framework="numpy") as file:
            problem = find_problem(file, record)
    except OSError as error:
        raise TableCorruptError(f"{path} cannot be read ({error.strerror}); {_REDO}") from error
    except TableCorruptError:
        raise
    except _UNREADABLE as error:
        raise TableCorruptError(f"{path} is damaged ({error}); {_REDO}") from error
    if problem:
        raise TableCorruptError(f"{path} is not what mining writes: {problem}; {_REDO}")
    _verified.add(state)


def _state(path: Path, sha: str) -> tuple[str, int, int, str]:
    status = check_file(path)
    return str(path.resolve()), status.st_size, status.st_mtime_ns, sha


def _concepts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {key.partition("/")[2]: int(shape[1]) for key, shape in sorted(shapes.items()) if len(shape) == 2}


# --- rows of several shards: each (sample, target) is read once, also where ranges overlap ----------------------------

_BLOCK_BYTES = 32 << 20


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


def read_blocks(
    folder: Path, shards: Sequence[ShardRecord], layer: str, mode: str, kind: str, normed: bool,
    concepts: Array | None, of_class: int | None, samples: Array | None,
) -> Iterator[Block]:  # fmt: skip
    """Values that are asked for; see `Table.blocks`, which has checked the ids."""
    field = f"{mode}.{kind}"
    span, concepts = _get_span(concepts)
    for shard, earlier in zip(shards, _get_earlier(shards), strict=True):
        wanted = samples is None or np.ptp(np.searchsorted(samples, (shard.start, shard.stop))) > 0
        if not (shard.rows and wanted):
            continue
        (sample, target), row = _read_ids(folder, shard, earlier)
        keep = np.ones(len(sample), bool) if of_class is None else target == of_class
        if samples is not None:
            keep &= np.isin(sample, samples)
        sample, target, row = sample[keep], target[keep], row[keep]
        with open_shard(folder, shard) as file:
            scaled = f"{field}_scale/{layer}" in file.keys()  # noqa: SIM118
            for part in _get_parts(row, _BLOCK_BYTES // (8 * shard.concepts[layer]) or 1):
                begin, end = int(row[part][0]), int(row[part][-1]) + 1
                inner = slice(None) if end - begin == len(row[part]) else row[part] - begin
                value = file.get_slice(f"{field}/{layer}")[begin:end, span][inner]
                if scaled:
                    scale = file.get_slice(f"{field}_scale/{layer}")[span]
                    value = value.astype(scale.dtype) * scale
                position = file.get_slice(f"{mode}.position/{layer}")[begin:end, span][inner]
                if normed:
                    norm = file.get_slice(f"{field}_norm/{layer}")[begin:end][inner]
                    # (as `crp.concepts.normalize` does)
                    added = np.clip(1e-6 * norm, np.finfo(norm.dtype).tiny, 1e-10, dtype=norm.dtype)
                    value = value / (norm + added)[:, None]
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
