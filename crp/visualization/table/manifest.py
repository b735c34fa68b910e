"""What a table's manifest says: what was mined, and which shards there are.

All of it is plain data; `document` makes text of it, and `files` writes and reads that.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from numpy.typing import NDArray

from crp.checks import check_number
from crp.errors import CRPError, InputError, InputTypeError

Array = NDArray[Any]

#: Of the layout on disk.
VERSION = 2
MODES = ("relevance", "activation")
KINDS = ("sum", "max")
#: How values are kept: as they were computed, or as float16 with a scale for each concept of a shard.
Storage = Literal["float32", "float16"]

#: File names of shards.
NAME = re.compile(r"\d{1,18}-\d{1,18}-[0-9a-f]{8}\.safetensors")
#: File names of cached answers.
DERIVED = re.compile(r"[0-9a-f]{32}\.safetensors")
#: File names of results that are kept, such as prototypes.
KEPT = re.compile(r"[a-z]{1,20}-[0-9a-f]{16}\.safetensors")
_SHA = re.compile(r"[0-9a-f]{64}")


class TableError(CRPError):
    """Something is wrong with a mined table; the base of all its errors."""


class TableCorruptError(TableError, ValueError):
    """A file of the table is not what was written; the message names it."""


class TableNotFoundError(TableError, FileNotFoundError):
    """Nothing was mined into the folder."""


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
            sound = sound and 0 not in record.concepts.values() and bool(record.concepts) == (record.rows > 0)
            named = f"{record.start}-{record.stop}-{record.sha256[:8]}.safetensors"
            if not (sound and NAME.fullmatch(record.file) and _SHA.fullmatch(record.sha256) and record.file == named):
                raise InputError("values out of range, or a file name that no such shard has")
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
    storage : {"float32", "float16"}
        How values are kept; of a model that computes in float64, ``"float32"`` keeps float64.
    probes : dict of str to str
        What a few samples were when the table was made, by their indices; a dataset that differs is another one.
    recipe : dict of str to object
        The same as the fingerprints in words: how model, weights, dataset and the rest were named. Plain JSON.
    version : int
        Of the layout on disk.
    """

    n_samples: int
    layers: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    kinds: tuple[str, ...] = KINDS
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    storage: Storage = "float32"
    probes: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        words = [*self.layers, *self.modes, *self.kinds, self.storage]
        for mapping in (self.fingerprints, self.versions, self.probes):
            words += [*mapping, *mapping.values()]
        if type(self.n_samples) is not int or self.n_samples < 0 or not all(type(word) is str for word in words):
            raise InputTypeError(f"n_samples must be a number and all else words; not {self}")
        parts = ((self.modes, MODES), (self.kinds, KINDS), ((self.storage,), get_args(Storage)))
        if any(not set(there) <= set(known) for there, known in parts) or len(set(self.layers)) != len(self.layers):
            raise InputError(f"modes, kinds and storage must be known ones, and each layer once; not {self}")
        if not isinstance(self.recipe, Mapping) or json.loads(json.dumps(self.recipe, allow_nan=False)) != self.recipe:
            raise InputTypeError(f"recipe must be plain JSON, not {self.recipe!r}")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by their number; none where the recipe does not say them."""
        known = self.recipe.get("class_names")
        return list(map(str, known)) if isinstance(known, list) else []

    @property
    def identity(self) -> str:
        """Short hash of all that must agree between shards of one table; its dataset may grow."""
        names = ["layers", "modes", "kinds", "fingerprints"] + (["n_samples"] if self.version == 1 else ["storage"])
        content = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps([self.version, content], sort_keys=True).encode()).hexdigest()[:32]


def get_coverage(shards: Sequence[ShardRecord], start: int, stop: int) -> Coverage:
    """Which samples of a range the shards, in the order of their ranges, hold, skipped and miss."""
    for name, number in (("start", start), ("stop", stop)):
        check_number(name, number, 0, whole=True)
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
