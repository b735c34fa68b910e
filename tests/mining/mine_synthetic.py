"""Script: mine 100,000 synthetic samples of 26,560 concepts, and report the memory that it takes, as JSON.

    python mine_synthetic.py FOLDER SAMPLES

Scores come from nowhere; all else is mining's own: loading, transfers, shards, hashing, writing, the manifest. Files
are emptied once they are listed, so that the disk need not hold all of them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization.mining import batches, rows
from crp.visualization.mining.run import mine
from crp.visualization.mining.scores import FINITE, UnitScores
from crp.visualization.mining.transfers import pack
from crp.visualization.table.manifest import ShardRecord
from crp.visualization.table.store import Table

#: Channels of the 53 convolutions of a ResNet-50.
CONCEPTS = [64, *[64, 64, 256] * 3, 256, *[128, 128, 512] * 4, 512, *[256, 256, 1024] * 6, 1024, *[512, 512, 2048] * 3,
            2048]  # fmt: skip
BATCH = 64


class Samples:
    """Samples of one number."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return torch.full((1,), float(index)), index % 1000


def make_scores() -> Any:
    """Function in the place of `score_unit`; the first score of each layer is the sample's index."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(BATCH, n, generator=generator) for n in CONCEPTS]
    positions = [torch.randint(0, 12544, (BATCH, n), dtype=torch.int32, generator=generator) for n in CONCEPTS]

    def score(
        job: Any, scoring: Any, transfers: Any, ask: Any, data: Any, indices: Any, unit: Any, finite: Any, **_: Any
    ) -> UnitScores:
        sample = np.array([indices[place] for place, _ in unit], np.int64)
        columns = {"prediction": torch.zeros(len(unit), dtype=torch.int64), "probability": torch.ones(len(unit))}
        for layer, value, position in zip(job.concepts, values, positions, strict=True):
            value = value[: len(unit)]
            value[:, 0] = torch.from_numpy(sample)
            columns[f"relevance.position/{layer}"] = position[: len(unit)]
            columns[f"relevance.sum/{layer}"] = value
            columns[f"relevance.sum_norm/{layer}"] = value.abs().sum(1)
        slots = np.array([targets for _, targets in unit], np.int64).T
        return UnitScores(sample, slots, transfers.fetch(pack(columns | {FINITE: finite})))

    return score


def main(folder: Path, n: int) -> dict[str, object]:
    torch.set_num_threads(1)
    write, add = rows.write_shard, Table.add
    sizes, bounds = [], []

    def checked_write(target: Path, identity: str, start: int, stop: int, columns: Any, skipped: Any) -> ShardRecord:
        expected = np.arange(start, stop)
        assert not skipped and np.array_equal(np.concatenate(columns["sample"]), expected)
        for layer in range(len(CONCEPTS)):
            first = [part[:, 0] for part in columns[f"relevance.sum/{layer}"]]
            assert np.array_equal(np.concatenate(first), expected)
        return write(target, identity, start, stop, columns, skipped)

    def emptying_add(table: Table, shard: ShardRecord) -> None:
        add(table, shard)
        file = table.path / "shards" / shard.file
        sizes.append(file.stat().st_size)
        bounds.append((shard.start, shard.stop))
        os.truncate(file, 0)

    batches.score_unit, rows.write_shard, Table.add = make_scores(), checked_write, emptying_add
    net = nn.Sequential(*(nn.Identity() for _ in CONCEPTS))
    layer_map = {str(number): ChannelConcept() for number in range(len(CONCEPTS))}
    settings: dict[str, Any] = {"modes": ["relevance"], "kinds": ["sum"], "batch_size": BATCH, "progress": False}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    table = mine(CondAttribution(net), Samples(n), layer_map, None, folder, **settings)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not table.coverage().missing
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])] and bounds[-1][1] == n
    return {"MiB": (after - before) / 1024, "GB written": sum(sizes) / 1e9, "shards": len(sizes), "seconds": seconds}


if __name__ == "__main__":
    assert sum(CONCEPTS) == 26_560
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
