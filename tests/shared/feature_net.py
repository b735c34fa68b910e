"""A small net with named layers and a small dataset, for the tests of feature visualization."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization

LAYERS = ("first", "second")


def make_net(seed: int = 0) -> nn.Module:
    """(n, 1, 6, 6) -> (n, 3) in float64; ``first`` has 4 channels of 6x6, ``second`` 5 of 3x3, ``hidden`` 7."""
    layers = OrderedDict(
        first=nn.Conv2d(1, 4, 3, padding=1),
        relu1=nn.ReLU(),
        pool=nn.AvgPool2d(2),
        second=nn.Conv2d(4, 5, 3, padding=1),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        hidden=nn.Linear(45, 7),
        relu3=nn.ReLU(),
        out=nn.Linear(7, 3),
    )
    net = nn.Sequential(layers).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return net


class Images:
    """Seeded images of shape (1, 6, 6) and labels 0, 1, 2, 0, ..., or those given."""

    def __init__(self, n: int = 12, labels: list[Any] | None = None, broken: Mapping[int, Any] | None = None) -> None:
        self.data = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        self.labels = [i % 3 for i in range(n)] if labels is None else labels
        self.broken = dict(broken or {})
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.reads.append(index)
        item = self.broken.get(index, self.data[index])
        if isinstance(item, Exception):
            raise item
        return item, self.labels[index]


def make_fv(path: Path, dataset: Any = None, cls: type = FeatureVisualization, **keywords: Any) -> FeatureVisualization:
    """Feature visualization of a new net; ``net=`` and ``layers=`` may be given."""
    net = keywords.pop("net", None) or make_net()
    layers = keywords.pop("layers", LAYERS)
    layer_map = layers if isinstance(layers, Mapping) else {layer: ChannelConcept() for layer in layers}
    return cls(CondAttribution(net), Images() if dataset is None else dataset, layer_map, path=path / "fv", **keywords)


def mined(path: Path, dataset: Any = None, cls: type = FeatureVisualization, **keywords: Any) -> FeatureVisualization:
    """The same after a run over the whole dataset."""
    fv = make_fv(path, dataset, cls, **keywords)
    fv.run(EpsilonPlus(), 0, len(fv.dataset), batch_size=5, progress=False)
    return fv


def expected_scores(
    fv: FeatureVisualization, layer: str, mode: str, labels: list[int], kind: str = "sum", normed: bool = True
) -> Tensor:
    """Scores of every sample and channel, (samples, channels), one sample at a time."""
    rows = []
    for i, label in enumerate(labels):
        result = fv.attribution(fv.dataset.data[i][None], [{"y": label}], EpsilonPlus(), record_layer=[layer])
        tensor = (result.relevances if mode == "relevance" else result.activations)[layer].flatten(2)[0]
        rows.append(tensor.sum(-1) if kind == "sum" else tensor.max(-1).values)
    scores = torch.stack(rows)
    return scores / (scores.abs().sum(1, keepdim=True) + 1e-10) if normed else scores


def as_tensors(samples: Tensor, heatmaps: Tensor, rf: bool) -> tuple[Tensor, Tensor]:
    """Plot function that draws nothing."""
    return samples, heatmaps
