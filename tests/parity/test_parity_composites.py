"""Our presets against zennit's of the same name.

Both merge batch norm, zennit with its own canonizers; its merge is exact only where the batch norm's epsilon is 0, so
that the models have 0 there. Ours needs no canonizer for residual additions; zennit does.
"""

from __future__ import annotations

import pytest
import torch
import zennit.composites
from parity_compare import assert_parity
from parity_nets import flat_attribution, images, settle
from torch import Tensor, nn
from zennit.canonizers import AttributeCanonizer, Canonizer, CompositeCanonizer, SequentialMergeBatchNorm
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer

from crp import composites
from crp.attribution import CondAttribution
from crp.demo.net import DigitNet, ResidualBlock

STABILIZERS = {"epsilon": 1e-15, "stabilizer": 1e-15}
PRESETS = {
    "EpsilonPlus": {},
    "EpsilonPlusFlat": {},
    "EpsilonAlpha2Beta1": {},
    "EpsilonAlpha2Beta1Flat": {},
    "EpsilonGammaBox": {"low": -3.0, "high": 3.5},
}


def vgg() -> nn.Module:
    """torchvision's VGG-11 with batch norm; a smaller head, as 32x32 images leave one position."""
    from torchvision.models import vgg11_bn

    model = nn.Sequential(vgg11_bn(weights=None).features, nn.Flatten())
    return model.extend([nn.Linear(512, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 10)])


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(weights=None, num_classes=10)


class BlockCanonizer(AttributeCanonizer):
    """Makes the addition in the demo's block a module, as zennit's `ResNetCanonizer` does for torchvision's."""

    def __init__(self) -> None:
        super().__init__(self.attributes)

    @classmethod
    def attributes(cls, name: str, module: nn.Module) -> dict[str, object] | None:
        if not isinstance(module, ResidualBlock):
            return None
        return {"forward": cls.forward.__get__(module), "addition": Sum()}

    @staticmethod
    def forward(self: ResidualBlock, input: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(input)))))
        return self.relu2(self.addition(torch.stack([input, hidden], dim=-1)))


def digit_net_canonizer() -> Canonizer:
    return CompositeCanonizer((SequentialMergeBatchNorm(), BlockCanonizer()))


#: Network, its input, zennit's canonizer, and a layer to condition on.
MODELS = {
    "vgg11_bn": (vgg, (3, 32, 32), SequentialMergeBatchNorm, "0.11"),
    "resnet18": (resnet18, (3, 64, 64), ResNetCanonizer, "layer2.0.conv2"),
    "demo": (DigitNet, (1, 32, 32), digit_net_canonizer, "conv2"),
}


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    build, shape, canonizer, layer = MODELS[request.param]
    model = settle(build(), 40)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return CondAttribution(model), images(1, seed=41, shape=shape), canonizer, layer


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_equals_zennits(preset, setting):
    attribution, data, canonizer, layer = setting
    ours = getattr(composites, preset)(**PRESETS[preset], **STABILIZERS)
    theirs = getattr(zennit.composites, preset)(**PRESETS[preset], **STABILIZERS, canonizers=[canonizer()])
    conditions = [{"y": [3]}, {"y": [8], layer: [0, 2, 5]}]
    found, expected = (
        flat_attribution(attribution(data, conditions, rules, [layer], exclude_parallel=False))
        for rules in (ours, theirs)
    )
    assert (abs(expected["heatmap"]).max((1, 2)) > 0).all()
    assert_parity(found, expected)
