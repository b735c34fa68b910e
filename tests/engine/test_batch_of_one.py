"""Batch norms of one sample, whose gradients torch gets wrong where their layout is not that of the input."""

from __future__ import annotations

import pytest
import torch
import zennit.composites
from preset_cases import maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

import crp
from crp.attribution import CondAttribution
from crp.composites import DeepLift, Gradient, GradientTimesInput, GuidedBackprop, UniformLRP0

X = numbers(1, 3, 6, 6)
NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "of planes": lambda: nn.Sequential(nn.Unflatten(2, (2, 3)), nn.BatchNorm3d(8), nn.Flatten(2, 3)),
}
COMPOSITES = {
    "none": lambda: None,
    "gradient": Gradient,
    "gradient_x_input": GradientTimesInput,
    "guided": GuidedBackprop,
    "deeplift": DeepLift,
    "lrp_0": lambda: UniformLRP0(None),
    "zennit": lambda: zennit.composites.EpsilonPlus(),
}


class TokensBehind(nn.Module):
    """A norm, behind which channels come last."""

    def __init__(self, norm):
        super().__init__()
        self.below, self.norm = nn.Conv2d(3, 8, 3, padding=1), norm()
        self.between, self.above = nn.LayerNorm(8), nn.Linear(8, 3)

    def normed(self, x):
        return self.norm(self.below(x).relu()).flatten(2).transpose(1, 2)

    def forward(self, x):
        return self.above(self.between(self.normed(x)).relu().mean(1))


class TokensBefore(TokensBehind):
    """A norm before which they do."""

    def normed(self, x):
        tokens = self.below(x).flatten(2).transpose(1, 2).contiguous().relu()
        return F.avg_pool2d(self.norm(tokens.transpose(1, 2).unflatten(2, (6, 6))), 2).flatten(2).mT


@pytest.mark.filterwarnings("ignore:outside DeepLIFT's rules")
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("net", [TokensBehind, TokensBefore])
@pytest.mark.parametrize("norm", NORMS)
def test_one_sample_is_explained_as_beside_others(norm, net, composite, untouched):
    model, make = seeded(net(NORMS[norm])), COMPOSITES[composite]
    wanted = maps(model, torch.cat([X, X.flip(0)]), make())[:1]
    with untouched(model):
        for _ in range(4):  # (the last may be replays)
            assert off(maps(model, X, make()), wanted) <= 1e-9


@pytest.mark.parametrize("method", ["saliency", "guided_backprop", "gradient_x_input"])
def test_other_methods_explain_it_so_too(method):
    model = seeded(TokensBehind(NORMS["instance norm"]))
    wanted = crp.explain(method, model, torch.cat([X, X]), 1)[:1]
    assert off(crp.explain(method, model, X, 1), wanted) <= 1e-9


def test_a_mask_of_one_picture_is_found_as_beside_others():
    """Its gradient is that of a score, in passes of their own."""
    model, keywords = seeded(TokensBehind(NORMS["batch norm"])), {"steps": 3, "jitter": 1, "verbose": False, "seed": 0}
    found, wanted = (
        crp.explain("meaningful_perturbation", model, pictures, 1, **keywords) for pictures in (X, torch.cat([X, X]))
    )
    assert off(found, wanted[:1]) <= 1e-9


def test_several_conditions_and_layers():
    model = seeded(TokensBehind(NORMS["batch norm"]))
    conditions = [{"y": 1}, {"y": 2}, {"y": 1, "below": [0, 3]}]
    found, wanted = (
        CondAttribution(model)(data, conditions, GradientTimesInput(), record_layer=["below"])
        for data in (X, torch.cat([X, X]))
    )
    assert off(found.heatmap, wanted.heatmap[:3]) <= 1e-9
    assert off(found.relevances["below"], wanted.relevances["below"][:3]) <= 1e-9


def test_a_norm_whose_input_was_overwritten():
    """Torch has no gradient there, and where relevance starts at a layer below, none is needed."""

    class Overwriting(TokensBehind):
        def __init__(self, norm):
            super().__init__(norm)
            self.first = nn.Conv2d(3, 3, 1)

        def normed(self, x):
            z = self.below(self.first(x))
            y = self.norm(z)
            z.mul_(2)
            return y.flatten(2).transpose(1, 2)

    attribution = CondAttribution(seeded(Overwriting(NORMS["batch norm"])))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        attribution(X, [{"y": 1}], None)
    found = attribution(X, [{}], None, start_layer="first").heatmap
    assert off(found, attribution(torch.cat([X, X]), [{}], None, start_layer="first").heatmap[:1]) <= 1e-9
