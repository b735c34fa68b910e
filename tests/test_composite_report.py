"""The report of a composite: which rule and which canonizer reached which layer and operation."""

import json

import pytest
import torch
from core_cases import conv_net, exhibit, images, net
from torch import nn
from torch.nn import functional as F

from crp.composites import LRP, Composite, DeepLift, EpsilonPlusFlat, Report
from crp.rules import Epsilon, Pass


def of(model, composite=None, data=None):
    return (composite or EpsilonPlusFlat()).report(model, images(2, 8) if data is None else data)


def layers(report):
    return {layer.layer: layer for layer in report.layers}


def test_every_layer_is_told_with_its_rule_calls_and_canonizer():
    found = layers(of(exhibit()))
    assert found["stem.0"].rule.startswith("Flat(")
    assert found["deep"].rule.startswith("ZPlus(") and found["fc"].rule.startswith("Epsilon(")
    assert [found[name].calls for name in ("stem.0", "mix", "act", "fc")] == [1, 2, 1, 1]
    assert found["norm"].canonizer == "merged into deep" and found["stem.1"].canonizer == "merged into stem.0"
    assert found["norm"].rule is None
    assert found["act"].operations == {("silu", "Pass()"): 1}
    operations = found[""].operations
    assert operations["relu", "ordinary chain rule"] == 3
    assert operations["mul", "Gate(mode='signal')"] == operations["sigmoid", "Squash()"] == 1
    assert list(found) == [name for name, _ in exhibit().named_modules() if name in found]


def test_canonizers_are_told_with_what_they_left():
    report = of(exhibit())
    assert len(report.canonizers) == 1 and report.canonizers[0].endswith("changed 2 layers")
    assert of(exhibit(), EpsilonPlusFlat(None)).canonizers == []
    behind = net(lambda s, x: s.fc(F.relu(s.norm(s.conv(x) + x)).mean((2, 3))),
                 conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3), fc=nn.Linear(3, 3))  # fmt: skip
    report = of(behind)
    assert layers(report)["norm"].canonizer.startswith("left: ") and "left 1" in report.canonizers[0]
    assert layers(report)["norm"].rule or layers(report)["norm"].operations


def test_text_and_json_say_the_same():
    report = of(exhibit())
    assert isinstance(report, Report)
    text, plain = str(report), json.loads(json.dumps(report.to_dict()))
    assert text.splitlines()[0] == "EpsilonPlusFlat() on Exhibit"
    assert plain["composite"] == "EpsilonPlusFlat()" and plain["model"] == "Exhibit"
    for layer in plain["layers"]:
        assert (layer["layer"] or "(model)") in text and layer["kind"] in text
        assert layer["rule"] is None or layer["rule"] in text
        for operation in layer["operations"]:
            assert operation["operation"] in text and operation["rule"] in text
    assert "mix ×2" in text and "relu ×3" in text
    assert text.splitlines()[-1].startswith("canonizer ")
    assert {len(line) - len(line.rstrip()) for line in text.splitlines()} == {0}


def test_operations_without_a_rule_are_told_not_warned_of_alone():
    model = conv_net(lambda s, h: torch.lerp(h, h * 2, 0.5) + s.inner(h), inner=nn.Sequential(nn.Conv2d(4, 4, 1)))
    with pytest.warns(UserWarning, match="no rule for lerp"):
        report = of(model, data=images())
    assert list(report.left) == ["lerp()"]
    assert "without a rule, by the ordinary chain rule: lerp()" in str(report)
    none = of(model, EpsilonPlusFlat(layer_map=[(torch.lerp, None)]), images())
    assert list(none.left) == []


def test_layers_that_are_not_called_are_told():
    model = conv_net(lambda s, h: h, unused=nn.Conv2d(3, 3, 1))
    report = of(model, data=images())
    assert layers(report)["unused"].calls == 0
    assert "unused (not called)" in str(report)


def test_layers_of_the_ordinary_chain_rule_by_choice():
    model = conv_net(lambda s, h: s.act(h), act=nn.SiLU())
    report = of(model, LRP(layer_map=[("conv", None), (nn.SiLU, Pass()), (nn.Linear, Epsilon())]), images())
    assert layers(report)["conv"].rule == "ordinary chain rule"
    assert layers(report)["act"].rule == "Pass()" and not layers(report)["act"].operations


def test_reference_passes_are_not_counted():
    model = conv_net(lambda s, h: s.act(h), act=nn.SiLU())
    assert {layer.calls for layer in of(model, DeepLift(), images()).layers} == {1}


@pytest.mark.parametrize("training", [True, False])
def test_report_leaves_the_model_and_the_data_alone(training, untouched):
    model, data = exhibit().train(training), images(2, 8)
    with untouched(model):
        of(model, data=data)
    assert not data.requires_grad and data.grad is None
    broken = conv_net(lambda s, h: h @ h[0, 0, 0])
    with untouched(broken), pytest.raises(RuntimeError):
        of(broken, data=images())


def test_models_of_other_calls():
    model = net(lambda s, pair, scale: s.fc((pair[0] + pair[1]) * scale), fc=nn.Linear(4, 3))
    data = torch.ones(2, 4, dtype=torch.float64)
    report = Composite(layer_map=[(nn.Linear, Epsilon())]).report(model, [data, data], scale=torch.tensor(2))
    assert layers(report)["fc"].calls == 1
    assert ("add", "ordinary chain rule") in layers(report)[""].operations
    with torch.no_grad():
        again = Composite(layer_map=[(nn.Linear, Epsilon())]).report(model, [data, data], scale=2)
    assert layers(again)["fc"].rule == layers(report)["fc"].rule


def test_watching_needs_a_model():
    with pytest.raises(RuntimeError, match="EpsilonPlusFlat is on no model; enter its context first"):
        EpsilonPlusFlat().watching().__enter__()
