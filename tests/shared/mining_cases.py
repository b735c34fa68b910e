"""A small net and dataset, and tables mined of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.visualization.mining.run import mine
from crp.visualization.table.store import Table

LAYERS = ("conv", "relu", "fc")


class Data:
    """Pairs of an image and a label; entries of ``special`` replace samples, or are raised."""

    def __init__(self, n: int = 21, labels: list[Any] | None = None) -> None:
        self.images = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.labels = [i % 3 for i in range(n)] if labels is None else labels
        self.special: dict[int, Any] = {}
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        found = self.special.get(index, (self.images[index], self.labels[index]))
        if isinstance(found, BaseException):
            raise found
        return found


def make_net(channels: int = 4) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(1, channels, 3))
    net.add_module("bn", nn.BatchNorm2d(channels))
    net.add_module("relu", nn.ReLU())
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(channels * 16, 3))
    net.bn.running_mean += 0.1
    return net.double().eval()


def run(path: Path, data: Any, **changes: Any) -> Table:
    settings: dict[str, Any] = {
        "attribution": CondAttribution(make_net()),
        "layer_map": dict.fromkeys(LAYERS, ChannelConcept()),
        "composite": EpsilonPlus(),
        "batch_size": 4,
        "shard_size": 8,
        "progress": False,
    }
    return mine(dataset=data, path=path, **settings | changes)


def rows_of(table: Table) -> list[tuple[int, int]]:
    return list(zip(*(column.tolist() for column in table.rows()), strict=True))


def same_rows(one: Table, other: Table, tolerance: float = 1e-12) -> None:
    assert rows_of(one) == rows_of(other)
    for layer in one.layers:
        for mode in one.modes:
            for kind in one.kinds:
                left, right = (
                    [np.concatenate(c) for c in zip(*t.blocks(layer, mode, kind), strict=True)] for t in (one, other)
                )
                np.testing.assert_allclose(left[2], right[2], rtol=tolerance, atol=tolerance)
                np.testing.assert_array_equal(left[3], right[3])


def shards_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """The shards among the files of a table; a manifest also keeps what a few samples were, unless it was told."""
    return {name: content for name, content in files.items() if name != "manifest.json"}


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
