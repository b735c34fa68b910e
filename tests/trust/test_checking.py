"""`CondAttribution.check` holds for right explanations, and fails for broken ones."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from trust_cases import CONDITIONS, differences, images, net, state, zennit_merged

from crp.attribution import CondAttribution
from crp.composites import Composite, EpsilonPlus, EpsilonPlusFlat, GradientTimesInput
from crp.rules import Rule


@pytest.mark.parametrize(
    "make", [EpsilonPlusFlat, EpsilonPlus, GradientTimesInput, zennit_merged, lambda: None],
    ids=["flat", "plus", "gradient x input", "zennit", "none"],
)  # fmt: skip
def test_right_explanations_hold(make):
    model = net()
    before = state(model)
    composite = make()
    checked = CondAttribution(model).check(images(), CONDITIONS, composite)
    by_name = {finding.name: finding for finding in checked.findings}
    # (zennit's canonizer leaves out the eps of batch norm, which changes the prediction)
    is_exact = make is not zennit_merged
    assert checked.holds is is_exact, str(checked)
    assert by_name["prediction"].holds is is_exact
    assert list(by_name) == ["prediction", "account", "finite", "repeats", "weights matter"]
    ours = isinstance(composite, Composite)
    assert by_name["account"].holds is (True if ours else None)
    assert bool(checked.rules) is ours and bool(checked.kept) is ours
    assert json.loads(json.dumps(checked.to_dict()))["holds"] is is_exact
    assert ("ok     prediction" in str(checked)) is is_exact
    assert differences(before | {"random": None}, state(model) | {"random": None}) == []


class Doubles(Rule):
    """Hands on twice what there is."""

    def surrogate(self, layer, a):
        return layer(a) / 2

    def operate(self, layer):
        output = super().operate(layer)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * 2)
        return output


def test_relevance_that_does_not_add_up_fails():
    composite = Composite(name_map=[(["3"], Doubles())])
    checked = CondAttribution(net()).check(images(), [{"y": 1}], composite)
    assert not checked.holds
    assert [finding.name for finding in checked.findings if finding.holds is False] == ["account"]
    assert "FAILED account" in str(checked)


class Random(nn.Module):
    def forward(self, x):
        return x * (1 + 0.1 * torch.rand_like(x))


def test_models_that_do_not_repeat_fail():
    checked = CondAttribution(nn.Sequential(net(), Random()).eval()).check(images(), [{"y": 1}], EpsilonPlus())
    failed = {finding.name for finding in checked.findings if finding.holds is False}
    assert {"prediction", "repeats"} <= failed


def test_explanations_that_do_not_depend_on_weights_fail():
    class Constant(CondAttribution):
        def heatmap_modifier(self, data, on_device=None):
            return torch.ones_like(data).sum(1)

    checked = Constant(net()).check(images(), [{"y": 1}], EpsilonPlus())
    assert [finding.name for finding in checked.findings if finding.holds is False] == ["weights matter"]
