"""Rules in float32, under autocast to bfloat16 and in channels_last, against float64.

Deviations are norms of the difference over the norm of the whole. Measured: at most 3e-7 in float32 and 1.3e-2 in
bfloat16 for one layer; at most 6e-7 and 0.15 for a net, where gradient × input has 0.14 itself.
"""

import pytest
import torch
from rule_cases import LAYERS, seeded
from torch import nn

import crp.rules as rules
from crp.composites import Composite

RULES = [
    rules.Epsilon(0.1),
    rules.Epsilon(0.1, norm_scale=True),
    rules.LRP0(),
    rules.ZPlus(),
    rules.ZPlus(empty="epsilon"),
    rules.AlphaBeta(1.4, 0.4),
    rules.AlphaBeta(empty="epsilon"),
    rules.Gamma(),
    rules.Gamma(100),
    rules.WSquare(),
    rules.Flat(),
    rules.ZBox(-5.0, 5.0),
]


def attribute(composite, model, x, start, autocast=False):
    with composite.context(model):
        data = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(data)
        assert y.dtype == (torch.bfloat16 if autocast else x.dtype)
        (relevance,) = torch.autograd.grad(y, data, start.to(y.dtype))
    assert relevance.dtype == x.dtype
    return relevance.double()


def deviation(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.covering(4)
@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_layer(rule, name):
    layer, a = seeded(name, True, False)
    m = torch.rand_like(layer(a).detach())
    composite = Composite(None, layer_map=[(nn.Module, rule)])
    wanted = attribute(composite, layer, a, m)
    layer = layer.float()
    assert deviation(attribute(composite, layer, a.float(), m), wanted) < 1e-6
    assert deviation(attribute(composite, layer, a.float(), m, autocast=True), wanted) < 2e-2


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    ).double()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_net(rule):
    affine = (nn.Conv2d, nn.Linear)
    rest = rules.Epsilon(0.1, norm_scale=True) if rule.at_input else rule
    composite = Composite(None, first_map=[(affine, rule)], layer_map=[(affine, rest)])
    x, start = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    wanted = attribute(composite, net(), x, start)
    single, last = net().float(), net().float().to(memory_format=torch.channels_last)
    assert deviation(attribute(composite, single, x.float(), start), wanted) < 2e-6
    assert deviation(attribute(composite, single, x.float(), start, autocast=True), wanted) < 0.25
    images = x.float().to(memory_format=torch.channels_last)
    assert deviation(attribute(composite, last, images, start), wanted) < 2e-6
