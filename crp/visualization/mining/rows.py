"""Rows of a shard in the making, and how they are kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crp.visualization.mining.datasets import Sample
from crp.visualization.mining.marks import Source, plain_label, source_of
from crp.visualization.table.columns import pack_about
from crp.visualization.table.contents import ABOUT
from crp.visualization.table.manifest import Array, ShardRecord
from crp.visualization.table.shards import write_shard

#: Largest value of a column that is kept as float16: a power of two, with room below the largest float16.
_LARGEST = 1 << 14
#: Columns of a number for each row.
_OF_ROWS = ("sample", "target", "prediction", "probability")


class ShardRows:
    """Rows and samples of a shard, until it is written.

    Attributes
    ----------
    skipped : dict of int to str
    n_bytes : int
        Of the scores so far.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._arrays: dict[str, list[Array]] = {"sample": [np.zeros(0, np.int64)], "target": [np.zeros(0, np.int64)]}
        self._samples: dict[int, tuple[Any, int, int]] = {}
        self.skipped: dict[int, str] = {}
        self.n_bytes = 0

    def extend(self, arrays: Mapping[str, Array], samples: Iterable[Sample]) -> None:
        """Add rows, and the samples that they are of; a shard without rows has no columns of layers."""
        if not len(arrays["sample"]):
            return
        for key, array in arrays.items():
            self._arrays.setdefault(key, []).append(array)
            self.n_bytes += array.nbytes if "/" in key else 0
        for sample in samples:
            self._samples[sample.id] = plain_label(sample.label), sample.content, sample.stamp

    def sources(self, dataset: Any) -> dict[int, Source | None]:
        """File of each sample, where the dataset tells it."""
        return {index: source_of(dataset, index) for index in self._samples}

    def write(
        self, folder: Path, identity: str, stop: int, sources: Mapping[int, Source | None], storage: str
    ) -> ShardRecord:
        """Write the shard, which ends before ``stop``, in whatever thread: the dataset is not asked."""
        columns: dict[str, Sequence[Array]] = {}
        for key in list(self._arrays):
            columns |= _stored(key, _alike(self._arrays.pop(key)), storage)
        arrays = {name: np.concatenate(columns[name]) for name in _OF_ROWS if name in columns}
        samples, first = np.unique(arrays["sample"], return_index=True)
        if len(samples):
            labels, content, stamp = zip(*(self._samples[i] for i in samples.tolist()), strict=True)
            files = [sources[i] for i in samples.tolist()]
            columns |= {name: [arrays[name][first]] for name in ("prediction", "probability") if name in arrays}
            columns |= {"content": [np.array(content, np.int64)], "stamp": [np.array(stamp, np.int64)]}
            columns[ABOUT] = [pack_about(["" if source is None else source.name for source in files], labels)]
        return write_shard(folder, identity, self._start, stop, columns, self.skipped)


def _alike(parts: list[Array]) -> list[Array]:
    """Stretches of one column, which are of one kind of number."""
    return parts if len({(part.dtype, part.shape[1:]) for part in parts}) == 1 else [np.concatenate(parts)]


def _stored(key: str, parts: Sequence[Array], storage: str) -> dict[str, Sequence[Array]]:
    """A column as it is kept: positions as uint16 where they fit, values by choice as float16 with a scale for each."""
    name, slash, layer = key.partition("/")
    if name.endswith(".position"):
        fits = all(part.max(initial=0) < 1 << 16 for part in parts)
        return {key: [part.astype(np.uint16) for part in parts] if fits else parts}
    if storage == "float32" or not slash or parts[0].ndim != 2:
        return {key: parts}
    # A scale that is a power of two changes no digit: what is lost is what float16 rounds. The least divides all.
    largest = np.max([np.abs(part).max(axis=0, initial=0) for part in parts], axis=0)
    least = np.finfo(largest.dtype).minexp - np.finfo(largest.dtype).nmant
    exponent = (np.frexp(np.where(largest > 0, largest, 1))[1] - np.frexp(_LARGEST)[1] + 1).clip(least)
    scale = np.ldexp(np.ones_like(largest), exponent)
    return {key: [(part / scale).astype(np.float16) for part in parts], f"{name}_scale/{layer}": [scale]}
