"""Rows of one sample share its forward pass and go back together, in the way that its rules allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attribution_cases import COMPOSITES, SMALL, rows, same, small_net
from torch import Tensor, nn
from zennit.core import Composite as ZennitComposite

from crp.attribution import CondAttribution
from crp.composites import Composite
from crp.engine import backward as engine
from crp.rules import Rule

VMAP, OLDER = "_by_vmap", "_by_older_vmap"


class Branches(Rule):
    """Looks at values in the backward pass, and so cannot be batched."""

    def surrogate(self, layer: Any, a: Tensor) -> Tensor:
        z = layer(a)
        z.register_hook(lambda grad: grad if grad.sum() > 0 else grad.clone())
        return z


def branches() -> Composite:
    return Composite(layer_map=[(nn.Conv2d, Branches())])


@pytest.mark.parametrize("at_once", [1, 4, 9], ids=["one by one", "in parts", "all"])
@pytest.mark.parametrize(
    ("make", "works"),
    [*((make, True) for make in COMPOSITES.values()), (branches, False)],
    ids=[*COMPOSITES, "branches"],
)
def test_rows_that_go_back_together_are_those_that_go_alone(
    make: Callable[[], ZennitComposite | None], works: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_slots_at_once", lambda cotangent, n_bytes: min(len(cotangent), at_once))
    asked, worked = Counter[str](), set()

    def watch(name: str) -> None:
        way = getattr(engine, name)

        def watched(grad: Any, part: list[Tensor]) -> Any:
            asked[name] += 1
            found = way(grad, part)
            worked.add(name)
            return found

        monkeypatch.setattr(engine, name, watched)

    watch(VMAP)
    watch(OLDER)
    conditions = [{"y": k % 3, "conv2": [k % 4, 3]} for k in range(9)]
    attribution = CondAttribution(small_net())
    together = attribution(SMALL, conditions, make(), ["conv1"])
    # From the output to the layer and from there to the data, nine slots each.
    parts = {1: 9, 4: 3, 9: 1}[at_once]
    if works:
        assert asked == {VMAP: 2 * parts}
        assert worked == {VMAP}
    else:
        assert asked == {VMAP: parts + 1, OLDER: 1}  # (its hooks are below the layer)
    for row in range(len(together.heatmap)):
        sample, condition = divmod(row, len(conditions))
        alone = attribution(SMALL[sample : sample + 1], [conditions[condition]], make(), ["conv1"])
        assert same(rows(together, [row]), alone)


@pytest.mark.parametrize("message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory", "another"])
def test_memory_is_not_asked_for_twice(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(grad: Any, part: list[Tensor]) -> Any:
        asked.append(len(part[0]))
        raise RuntimeError(message)

    monkeypatch.setattr(engine, VMAP, fails)
    monkeypatch.setattr(engine, OLDER, fails)
    attribute = CondAttribution(small_net())
    conditions = [{"y": 0, "conv2": k} for k in range(4)]
    if "memory" in message:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            attribute(SMALL, conditions)
        assert asked == [4]
    else:
        assert torch.isfinite(attribute(SMALL, conditions).heatmap).all()
        assert asked == [4, 4]
