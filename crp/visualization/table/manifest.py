"""What a table's manifest says: what was mined, and which shards there are.

All of it is plain data; files are read and written by `shards` and `store`.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]

#: Of the layout on disk.
VERSION = 1
MODES = ("relevance", "activation")
KINDS = ("sum", "max")

#: File names of shards.
NAME = re.compile(r"\d{1,18}-\d{1,18}-[0-9a-f]{8}\.safetensors")
#: File names of cached answers.
DERIVED = re.compile(r"[0-9a-f]{32}\.safetensors")
_SHA = re.compile(r"[0-9a-f]{64}")


class TableError(Exception):
    """Something is wrong with a mined table; the base of all its errors."""


class TableCorruptError(TableError, ValueError):
    """A file of the table is not what was written; the message names it."""


class TableNotFoundError(TableError, FileNotFoundError):
    """Nothing was mined into the folder."""

    def __str__(self) -> str:
        return str(self.args[0])


class TableMismatchError(TableError, ValueError):
    """The table was mined with another model, composite, dataset, or other settings; the message says which."""


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says about a shard.

    Attributes
    ----------
    file : str
        Name in the folder ``shards``: ``<start>-<stop>-<first 8 digits of sha256>.safetensors``.
    sha256 : str
        Of the file.
    start, stop : int
        Range of dataset indices; ``stop`` is excluded.
    rows : int
        Number of (sample, target) rows.
    concepts : dict of str to int
        Number of concepts of each layer; empty if there are no rows.
    skipped : dict of int to str
        Samples of the range that have no rows because something is wrong with them, with the reason.
    """

    file: str
    sha256: str
    start: int
    stop: int
    rows: int
    concepts: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return vars(self) | {
            "concepts": dict(self.concepts),
            "skipped": {str(i): self.skipped[i] for i in sorted(self.skipped)},
        }

    @classmethod
    def from_json(cls, entry: Any, source: Path) -> ShardRecord:
        """Record from the manifest ``source``, checked: a manifest may come from anywhere."""
        try:
            record = cls(**entry | {"skipped": {int(i): str(reason) for i, reason in entry["skipped"].items()}})
            numbers = (record.start, record.stop, record.rows, *record.concepts.values())
            sound = all(type(n) is int and n >= 0 for n in numbers) and record.start < record.stop
            sound = sound and all(record.start <= i < record.stop for i in record.skipped)
            if not (sound and NAME.fullmatch(record.file) and _SHA.fullmatch(record.sha256)):
                raise ValueError("values out of range, or a file name that no shard has")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise TableCorruptError(f"{source}: shard {entry!r} is not valid: {error}") from error
        return record


class RowIds(NamedTuple):
    """Sample and target of each row of a table.

    Attributes
    ----------
    sample : array of shape (rows,)
        Dataset index (int64).
    target : array of shape (rows,)
        Target (int64), -1 for a sample without one.
    """

    sample: Array
    target: Array


class Block(NamedTuple):
    """Some rows of one layer; of one concept if the values have one axis.

    Attributes
    ----------
    sample, target : arrays of shape (rows,)
    value : array of shape (rows, concepts) or (rows,)
    position : array of the same shape
        Index of the concept's maximum in the flattened space (int64).
    """

    sample: Array
    target: Array
    value: Array
    position: Array


class Coverage(NamedTuple):
    """What of a dataset a table holds.

    Attributes
    ----------
    seen : list of (start, stop)
        Ranges that were mined, skipped samples included.
    skipped : dict of int to str
        Samples that were left out, with the reason.
    missing : list of (start, stop)
        Ranges that were not mined.
    """

    seen: list[tuple[int, int]]
    skipped: dict[int, str]
    missing: list[tuple[int, int]]


@dataclass(frozen=True)
class TableHeader:
    """What a table is about: everything that all its rows share.

    Attributes
    ----------
    n_samples : int
        Length of the dataset.
    layers, modes, kinds : tuple of str
        What was recorded; kinds are ``"sum"`` and ``"max"``.
    fingerprints : dict of str to str
        Of the model, the composite, the dataset, the concepts and the functions in between.
    versions : dict of str to str
        Of the libraries it was mined with; for information.
    """

    n_samples: int
    layers: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    kinds: tuple[str, ...] = KINDS
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = (*self.layers, *self.modes, *self.kinds)
        words += (*self.fingerprints, *self.fingerprints.values(), *self.versions, *self.versions.values())
        if type(self.n_samples) is not int or self.n_samples < 0 or not all(type(word) is str for word in words):
            raise TypeError(f"n_samples must be a number and all else words; not {self}")

    @property
    def identity(self) -> str:
        """Short hash of all that must agree between shards of one table."""
        content = {key: value for key, value in asdict(self).items() if key != "versions"}
        return hashlib.sha256(json.dumps([VERSION, content], sort_keys=True).encode()).hexdigest()[:32]


def get_coverage(shards: Sequence[ShardRecord], start: int, stop: int) -> Coverage:
    """Which samples of a range the shards, in the order of their ranges, hold, skipped and miss."""
    seen: list[tuple[int, int]] = []
    missing: list[tuple[int, int]] = []
    reached = start
    for shard in shards:
        a, b = max(shard.start, start), min(shard.stop, stop)
        if a >= b:
            continue
        if a > reached:
            missing.append((reached, a))
        if seen and a <= seen[-1][1]:
            seen[-1] = (seen[-1][0], max(b, seen[-1][1]))
        else:
            seen.append((a, b))
        reached = max(reached, b)
    if reached < stop:
        missing.append((reached, stop))
    starts, stops = sorted(shard.start for shard in shards), sorted(shard.stop for shard in shards)
    listed = Counter(i for shard in shards for i in shard.skipped)
    skipped = {
        i: reason
        for shard in shards
        for i, reason in shard.skipped.items()
        # (skipped only if every shard whose range holds it skipped it)
        if start <= i < stop and listed[i] == bisect_right(starts, i) - bisect_right(stops, i)
    }
    return Coverage(seen, dict(sorted(skipped.items())), missing)
