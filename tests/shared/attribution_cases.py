"""Composites, small nets and comparisons that the tests of the engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus
from zennit.composites import EpsilonPlusFlat as ZennitEpsilonPlusFlat
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from crp.types import AttributionResults


def zennit_flat() -> Composite:
    return ZennitEpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()])


#: For laws that hold under zennit's rules also where they give all relevance to each branch of a plain sum.
plain_sums = pytest.mark.filterwarnings("ignore:the model adds branches up")

#: Every way in which relevance travels: plain gradient, relevance itself, and multipliers.
COMPOSITES: dict[str, Callable[[], Composite | None]] = {
    "gradient": lambda: None,
    "zennit_plus": ZennitEpsilonPlus,
    "zennit_flat": zennit_flat,
    "plus": EpsilonPlus,
    "plus_flat": EpsilonPlusFlat,
    "gamma_box": lambda: EpsilonGammaBox(low=-4.0, high=4.0),
}
#: One of each kind, where the rules do not matter.
KINDS = {name: COMPOSITES[name] for name in ("gradient", "zennit_flat", "plus_flat")}
every_composite = pytest.mark.parametrize("composite", [make() for make in COMPOSITES.values()], ids=list(COMPOSITES))
every_kind = pytest.mark.parametrize("composite", [make() for make in KINDS.values()], ids=list(KINDS))
parallel = pytest.mark.parametrize("exclude_parallel", [True, False], ids=["exclusive", "masks_only"])


class Net(nn.Module):
    """Named layers, wired by a function ``(net, x) -> output``."""

    def __init__(self, wiring: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        self.calls = 0
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        self.calls += 1
        return self.wiring(self, x)


def net(wiring: Callable[..., object], **layers: nn.Module) -> Net:
    return Net(wiring, **layers).double().eval()


#: Shape (2, 3, 6, 6).
SMALL = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small_net() -> Net:
    """(n, 3, 6, 6) -> (n, 3); ``conv1`` and ``conv2`` have 5 and 4 channels; ``calls`` counts the forward passes."""
    return net(
        lambda s, x: s.fc(s.conv2(s.conv1(x).relu()).relu().flatten(1)),
        conv1=nn.Conv2d(3, 5, 3), conv2=nn.Conv2d(5, 4, 3), fc=nn.Linear(16, 3),
    )  # fmt: skip


def ask(
    model: nn.Module,
    conditions: object = ({"y": 1, "conv2": [0]},),
    *,
    data: object = SMALL,
    generate: bool = False,
    **keywords: Any,
) -> AttributionResults:
    """Result of `CondAttribution`, or of its `generate`."""
    attribution = CondAttribution(model)
    if generate:
        return stack(attribution.generate(data, conditions, verbose=False, **keywords))
    return attribution(data, conditions, **keywords)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    """Whether two tensors of one shape differ by no more than ``tolerance`` of the largest value."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def same(found: AttributionResults, wanted: AttributionResults, tolerance: float = 1e-12) -> bool:
    """Whether two results agree in every tensor, and are about the same layers."""
    pairs = [(found.heatmap, wanted.heatmap), (found.prediction, wanted.prediction)]
    for one, other in ((found.activations, wanted.activations), (found.relevances, wanted.relevances)):
        assert set(one) == set(other)
        pairs += [(one[name], other[name]) for name in one]
    return all(close(one, other, tolerance) for one, other in pairs)


def stack(parts: Iterable[AttributionResults]) -> AttributionResults:
    """Parts of a generator as one result."""
    parts = list(parts)
    return AttributionResults(
        torch.cat([part.heatmap for part in parts]),
        {name: torch.cat([part.activations[name] for part in parts]) for name in parts[0].activations},
        {name: torch.cat([part.relevances[name] for part in parts]) for name in parts[0].relevances},
        torch.cat([part.prediction for part in parts]),
    )


def rows(result: AttributionResults, index: list[int]) -> AttributionResults:
    """Some rows of a result."""
    return AttributionResults(
        result.heatmap[index],
        {name: value[index] for name, value in result.activations.items()},
        {name: value[index] for name, value in result.relevances.items()},
        result.prediction[index],
    )
