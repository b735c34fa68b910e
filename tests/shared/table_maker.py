"""Small tables made of given numbers, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crp.visualization.table.manifest import ShardRecord, TableHeader
from crp.visualization.table.shards import write_shard
from crp.visualization.table.store import Table

LAYERS = ("a", "b")


def make_header(n_samples: int = 100, layers: Sequence[str] = LAYERS, **fingerprints: str) -> TableHeader:
    prints = {"model": "m" * 64, "composite": "c" * 64, "dataset": "d" * 64} | fingerprints
    return TableHeader(n_samples, tuple(layers), fingerprints=prints, versions={"torch": "2.4"})


class Source:
    """Values of every row of an imagined mining run; few distinct ones, so that there are many ties.

    Every fifth sample has very little of everything.
    """

    def __init__(
        self, n_samples: int = 100, n_concepts: int = 5, layers: Sequence[str] = LAYERS, seed: int = 0
    ) -> None:
        generator = np.random.default_rng(seed)
        self.layers = layers
        pairs = [(i, t) for i in range(n_samples) for t in sorted({int(t) for t in generator.integers(0, 4, i % 3)})]
        self.sample, self.target = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
        self.columns: dict[str, np.ndarray] = {}
        for layer in layers:
            for mode in ("relevance", "activation"):
                shape = (n_samples if mode == "activation" else len(self.sample), n_concepts)
                row = self.sample if mode == "activation" else slice(None)  # the same for all targets of a sample
                for kind in ("sum", "max"):
                    value = generator.integers(-3, 4, shape).astype(np.float32)[row]
                    value[self.sample % 5 == 0] *= np.float32(2.0**-60)
                    self.columns[f"{mode}.{kind}/{layer}"] = value
                    self.columns[f"{mode}.{kind}_norm/{layer}"] = np.abs(value).sum(1)
                self.columns[f"{mode}.position/{layer}"] = generator.integers(0, 64, shape).astype(np.uint16)[row]

    def arrays(self, start: int, stop: int, skip: Iterable[int] = ()) -> dict[str, np.ndarray]:
        keep = (self.sample >= start) & (self.sample < stop) & ~np.isin(self.sample, list(skip))
        found = {"sample": self.sample[keep], "target": self.target[keep]}
        return found | {key: column[keep] for key, column in self.columns.items() if keep.any()}

    def write(self, table: Table, start: int, stop: int, skipped: Mapping[int, str] | None = None) -> ShardRecord:
        folder = table.path / "shards"
        columns = {key: [array] for key, array in self.arrays(start, stop, skipped or {}).items()}
        return write_shard(folder, table.header.identity, start, stop, columns, skipped or {})


def make_table(
    path: Path, ranges: Iterable[tuple[int, int]] = ((0, 40), (40, 100)), **source: Any
) -> tuple[Table, Source]:
    made = Source(**source)
    table = Table.create(path, make_header(layers=made.layers))
    for start, stop in ranges:
        table.add(made.write(table, start, stop))
    return table, made
