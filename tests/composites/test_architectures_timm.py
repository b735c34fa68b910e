"""Families of timm without attention: predictions, accounts, and the model as it was."""

from __future__ import annotations

import inspect

import pytest
import torch
from architectures import randomized
from architectures_timm import TIMM
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlusFlat

timm = pytest.importorskip("timm", reason="timm is not installed")
#: What these functions make is a gate or divides here, and is given no relevance; they have no rule for other uses.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no rule for (softmax|var)\\(\\)[^;]*; the ordinary:UserWarning")

#: Standardised weights, a gate, a norm that is not merged, a mixer, and an anti-aliased net: with other presets, too.
CLOSER = ["test_nfnet", "regnety_002", "convnextv2_atto", "resmlp_12_224", "resnetblur18"]


def check(model, data, composite, untouched):
    model.requires_grad_(False)
    with torch.no_grad():
        logits = model(data)
    target, attribution = int(logits[0].argmax()), CondAttribution(model)
    with untouched(model):
        result = attribution(data, [{"y": target}], composite)
        kept = attribution.absorbed(data, [{"y": target}], composite)
    assert (result.prediction - logits).abs().max() <= 1e-12 * logits.abs().max()
    assert result.heatmap.isfinite().all()
    assert result.heatmap.flatten(1).any(1).all()
    torch.testing.assert_close(kept.initial, logits[:, target], rtol=1e-12, atol=0)
    torch.testing.assert_close(kept.input + kept.total, logits[:, target], rtol=1e-8, atol=0)


def test_there_are_at_least_thirty_families():
    files = {inspect.getmodule(timm.model_entrypoint(net.name)) for net in TIMM}
    assert len(files) >= 30


#: What others of them have as well: standardised weights, attention to channels, padding, kernels of several sizes.
SIMILAR = {
    *["legacy_seresnet18", "skresnext50_32x4d", "res2next50", "resnetv2_50x1_bit", "nf_ecaresnet26", "tf_mixnet_s"],
    *["efficientnet_lite0", "mobilenetv2_035"],
}


@pytest.mark.parametrize(
    "net",
    [pytest.param(net, id=str(net), marks=[pytest.mark.slow] if net.name in SIMILAR else []) for net in TIMM],
)
def test_prediction_is_the_model_s_and_all_relevance_is_accounted_for(net, untouched):
    check(net.build(), net.images(2), EpsilonPlusFlat(), untouched)


@pytest.mark.parametrize(
    "composite", [EpsilonGammaBox(low=-3.0, high=3.0), EpsilonAlpha2Beta1()], ids=lambda composite: composite.name
)
@pytest.mark.parametrize("net", [net for net in TIMM if net.name in CLOSER], ids=str)
def test_other_presets(net, composite, untouched):
    check(net.build(), net.images(2), composite, untouched)


def test_pooling_that_pads_with_minus_infinity(untouched):
    pool = timm.layers.create_pool2d("max", 3, stride=2, padding="same")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    data = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    check(randomized(model.double(), 0).eval(), data, EpsilonPlusFlat(), untouched)
