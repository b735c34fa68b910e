"""The account of what layers keep, where outputs and operations have other shapes than (batch, ...)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attribution_cases import Net, close, net
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, UniformEpsilon
from crp.types import AbsorbedRelevance

IMAGES = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

COMPOSITES = [EpsilonPlus(), UniformEpsilon(epsilon=0.1)]
both = pytest.mark.parametrize("composite", COMPOSITES, ids=["plus", "epsilon"])


def account(model: nn.Module, data: Tensor, composite: Any, **keywords: Any) -> AbsorbedRelevance:
    """Account that closes, and in which layers keep something."""
    kept = CondAttribution(model).absorbed(data, keywords.pop("conditions", [{"y": 1}]), composite, **keywords)
    assert close(kept.input + kept.total, kept.initial, 1e-9)
    assert kept.total.abs().min() > 1e-6
    return kept


def regions(s: Net, images: Tensor) -> Tensor:
    """Detector in small: each image is normalised on its own, and regions of it are scored; (batch, classes)."""
    scores = []
    for image in images:
        image = (image - torch.tensor([0.1, 0.2, 0.3]).double()[:, None, None]) / 0.5
        features = s.conv(image[None])
        boxes = torch.stack([features[0, :, :2, :2], features[0, :, 1:3, 1:3], features[0, :, 2:, 2:]])
        score = s.fc(boxes.relu().flatten(1)).sum(0)
        scores.append(score - 0.1 * score.mean() + 0.05)
    return torch.stack(scores)


def detector() -> Net:
    torch.manual_seed(3)
    return net(regions, conv=nn.Conv2d(3, 2, 3), fc=nn.Linear(8, 3))


@both
def test_an_output_of_one_number_for_each_sample(composite):
    """As regression models have it."""
    model = net(lambda s, x: s.fc(s.conv(x).relu().flatten(1)).squeeze(1), conv=nn.Conv2d(3, 2, 3), fc=nn.Linear(32, 1))
    wide = net(lambda s, x: s.inner(x)[:, None], inner=model)
    for init in (lambda y: y, 2.0, torch.tensor([1.0, -3.0])):
        kept = account(model, IMAGES, composite, conditions=[{}], init_rel=init)
        rows = init[:, None] if isinstance(init, Tensor) else init
        wanted = account(wide, IMAGES, composite, conditions=[{"y": 0}], init_rel=rows)
        assert close(kept.initial, wanted.initial) and close(kept.input, wanted.input)
        for name, shares in kept.layers.items():
            for kind, share in shares.items():
                assert torch.allclose(share, wanted.layers[f"inner.{name}" if name else "inner"][kind], rtol=1e-12)


@both
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_operations_on_one_image_its_regions_and_on_numbers(composite, image, exclude_parallel):
    """G9: all that they keep belongs to the only sample."""
    keywords = {"exclude_parallel": exclude_parallel}
    conditions = [{"y": 0}, {"y": 1}, {"y": [0, 2]}] if exclude_parallel else [{"y": 1}]
    kept = account(detector(), IMAGES[[image]], composite, conditions=conditions, **keywords)
    assert set(kept.layers) >= {"", "conv", "fc"}
    for share in (share for shares in kept.layers.values() for share in shares.values()):
        assert share.shape == (len(conditions),)
    part = CondAttribution(detector()).absorbed(IMAGES[[image]], [{"y": 1, "conv": [0]}], composite, **keywords)
    other = CondAttribution(detector()).absorbed(IMAGES[[image]], [{"y": 1, "conv": [1]}], composite, **keywords)
    whole = account(detector(), IMAGES[[image]], composite, **keywords)
    assert close(part.input + other.input, whole.input, 1e-9)
    for kind, share in whole.layers["conv"].items():
        total = part.layers["conv"][kind] + other.layers["conv"][kind]
        assert torch.allclose(total, share, rtol=1e-9, atol=1e-14)
        above = whole.layers["fc"][kind]  # (masks act below it)
        assert torch.allclose(part.layers["fc"][kind], above, rtol=1e-9, atol=1e-14)


@both
def test_operations_on_one_of_several_images_are_of_that_image(composite, untouched):
    model = detector()
    with untouched(model):
        kept = CondAttribution(model).absorbed(IMAGES, [{"y": 1}], composite)
    alone = [CondAttribution(model).absorbed(image[None], [{"y": 1}], composite) for image in IMAGES]
    assert close(kept.input, torch.cat([one.input for one in alone]), 1e-12)
    assert close(kept.total, torch.cat([one.total for one in alone]), 1e-12)
    assert close(kept.input + kept.total, kept.initial, 1e-9)


def test_a_model_of_one_number():
    """Its output and a gate of it are 0-d inside."""

    def wiring(s: Net, x: Tensor) -> Tensor:
        h = s.fc(x.flatten(1)).relu()
        score = (h.sum() + 0.3) * 2 - 0.1
        return torch.stack([score, h.max()])[None]

    model = net(wiring, fc=nn.Linear(108, 5))
    for composite in COMPOSITES:
        kept = account(model, IMAGES[:1], composite, conditions=[{"y": 0}, {"y": 1}])
        assert {"", "fc"} <= set(kept.layers)
