"""The report of a composite: which rule and which canonizer reached which operation, and why."""

import json
import re

import pytest
import torch
import zennit.rules
from core_cases import conv_net, exhibit, images, net
from torch import nn
from torch.nn import functional as F

from crp.composites import LRP, Composite, DeepLift, EpsilonPlus, EpsilonPlusFlat, Report
from crp.errors import InputError, InputTypeError
from crp.rules import Epsilon, Pass


def of(model, composite=None, data=None):
    return (composite or EpsilonPlusFlat()).report(model, images(2, 8) if data is None else data)


def named(report, layer):
    """Function and rule of the operations of a layer."""
    return [(operation.function, operation.rule) for operation in report.by_layer()[layer]]


def test_every_operation_is_told_with_its_layer_rule_call_and_canonizer():
    report = of(exhibit())
    rows = [(o.layer, o.module, o.call, o.function, o.rule.partition("(")[0]) for o in report.operations]
    chain = "ordinary chain rule"
    assert rows == [
        ("stem.0", "Conv2d", 0, "conv2d", "Flat"),
        ("stem.2", "ReLU", 0, "relu", chain),
        ("deep", "Conv2d", 0, "conv2d", "ZPlus"),
        ("act", "SiLU", 0, "silu", "Pass"),
        ("", "Exhibit", 0, "mean", chain),
        ("squeeze", "Conv2d", 0, "conv2d", "ZPlus"),
        ("", "Exhibit", 0, "sigmoid", "Pass"),
        ("", "Exhibit", 0, "mul", "Gate"),
        ("", "Exhibit", 0, "add", chain),
        ("", "Exhibit", 0, "relu", chain),
        ("pool", "MaxPool2d", 0, "max_pool2d", chain),
        ("mix", "Conv2d", 0, "conv2d", "ZPlus"),
        ("", "Exhibit", 0, "relu", chain),
        ("mix", "Conv2d", 1, "conv2d", "ZPlus"),
        ("", "Exhibit", 0, "relu", chain),
        ("", "Exhibit", 0, "mean", chain),
        ("fc", "Linear", 0, "linear", "Epsilon"),
    ]
    assert report.changed == {"norm": "merged into deep", "stem.1": "merged into stem.0"}
    assert [report.calls[name] for name in ("stem.0", "mix", "act", "fc")] == [1, 2, 1, 1]
    assert list(report.modules) == [name for name, _ in exhibit().named_modules() if name in report.modules]
    assert report.modules["norm"] == "BatchNorm2d" and not report.by_layer()["norm"]


def test_why_is_the_entry_that_an_operation_matched():
    reasons = {o.layer or o.function: o.why for o in of(exhibit()).operations}
    assert reasons["stem.0"].endswith("Flat(stabilizer=1e-06, norm_scale=False))")
    assert reasons["deep"].startswith("(Kind(name='convolution'), ZPlus(")
    assert reasons["fc"].startswith("(Kind(name='dense'), Epsilon(")
    assert reasons["mul"] == "(Functions(names=('mul',)), Gate(mode='signal', attention='constant'))"
    assert reasons["relu"] == reasons["pool"] == "the ordinary chain rule is the method"


def test_canonizers_are_told_with_what_they_left():
    report = of(exhibit())
    assert len(report.canonizers) == 1 and report.canonizers[0].endswith("changed 2 layers")
    assert of(exhibit(), EpsilonPlusFlat(None)).canonizers == []
    model, composite = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten()).double(), EpsilonPlusFlat()
    for _ in range(2):
        assert of(model, composite).canonizers == ["MergeBatchNorm() changed 1 layer"]
    behind = net(lambda s, x: s.fc(F.relu(s.norm(s.conv(x) + x)).mean((2, 3))),
                 conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3), fc=nn.Linear(3, 3))  # fmt: skip
    report = of(behind)
    assert report.changed["norm"].startswith("left: ") and "left 1" in report.canonizers[0]
    (operation,) = report.by_layer()["norm"]
    assert (operation.function, operation.rule, operation.canonizer) == ("batch_norm", "Pass()", report.changed["norm"])


def test_text_and_json_say_the_same():
    report = of(exhibit())
    assert isinstance(report, Report)
    text, plain = str(report), json.loads(json.dumps(report.to_dict()))
    assert text.splitlines()[0] == "EpsilonPlusFlat() on Exhibit"
    assert plain["composite"] == "EpsilonPlusFlat()" and plain["model"] == "Exhibit"
    for operation in plain["operations"]:
        assert (operation["layer"] or "(model)") in text and operation["module"] in text
        assert operation["function"] in text and operation["rule"] in text
    for name, what in plain["changed"].items():
        assert name in text and what in text
    assert "mix ×2" in text and "relu ×3" in text
    assert text.splitlines()[-1].startswith("canonizer ")
    assert {len(line) - len(line.rstrip()) for line in text.splitlines()} == {0}


def test_operations_without_a_rule_are_told_not_warned_of_alone():
    model = conv_net(lambda s, h: torch.atan2(h, h * 2) + s.inner(h), inner=nn.Sequential(nn.Conv2d(4, 4, 1)))
    with pytest.warns(UserWarning, match="no rule for atan2"):
        report = of(model, data=images())
    assert list(report.left) == ["atan2()"]
    assert "without a rule, by the ordinary chain rule: atan2()" in str(report)
    assert [o.why for o in report.operations if o.function == "atan2"] == ["no entry matches"]
    none = of(model, EpsilonPlusFlat(layer_map=[(torch.atan2, None)]), images())
    assert list(none.left) == []


def test_layers_that_are_not_called_are_told():
    model = conv_net(lambda s, h: h, unused=nn.Conv2d(3, 3, 1))
    report = of(model, data=images())
    assert report.calls["unused"] == 0 and not report.by_layer()["unused"]
    assert "unused (not called)" in str(report)


def test_layers_of_the_ordinary_chain_rule_by_choice():
    model = conv_net(lambda s, h: s.act(h), act=nn.SiLU())
    report = of(model, LRP(layer_map=[("conv", None), (nn.SiLU, Pass()), (nn.Linear, Epsilon())]), images())
    assert named(report, "conv") == [("conv2d", "ordinary chain rule")]
    assert named(report, "act") == [("silu", "Pass()")]
    assert [report.by_layer()[name][0].why for name in ("conv", "act")] == ["('conv', None)", "(SiLU, Pass())"]


def test_reference_passes_are_not_counted():
    model = conv_net(lambda s, h: s.act(h), act=nn.SiLU())
    report = of(model, DeepLift(), images())
    assert set(report.calls.values()) == {1}
    assert [o.function for o in report.operations] == ["conv2d", "silu", "flatten", "mean", "linear"]


@pytest.mark.parametrize("training", [True, False])
def test_report_leaves_the_model_and_the_data_alone(training, untouched):
    model, data = exhibit().train(training), images(2, 8)
    with untouched(model):
        of(model, data=data)
    assert not data.requires_grad and data.grad is None
    broken = conv_net(lambda s, h: h[:, :, :1, :1] ** h)
    with untouched(broken), pytest.raises(RuntimeError):
        of(broken, data=images())
    with untouched(model), pytest.raises(InputTypeError, match=r"gets an ndarray .* in place of a tensor"):
        of(model, data=data.numpy())
    with untouched(model), pytest.raises(InputError, match=r"takes .* channels"):
        of(model, data=data[:, :1])


def test_models_of_other_calls():
    model = net(lambda s, pair, scale: s.fc((pair[0] + pair[1]) * scale), fc=nn.Linear(4, 3))
    data = torch.ones(2, 4, dtype=torch.float64)
    report = Composite(layer_map=[(nn.Linear, Epsilon())]).report(model, [data, data], scale=torch.tensor(2))
    assert report.calls["fc"] == 1
    assert named(report, "") == [("add", "ordinary chain rule"), ("mul", "ordinary chain rule")]
    with torch.no_grad():
        again = Composite(layer_map=[(nn.Linear, Epsilon())]).report(model, [data, data], scale=2)
    assert named(again, "fc") == named(report, "fc") == [("linear", repr(Epsilon()))]


def test_watching_needs_a_model():
    with pytest.raises(RuntimeError, match="EpsilonPlusFlat is on no model; enter its context first"):
        EpsilonPlusFlat().watching().__enter__()


def test_rules_are_shown_by_words_where_nobody_can_write_their_name():
    def forward(s, h):
        h = torch.maximum(h, s.inner(h)).flatten(1)
        weights = F.prelu(h, torch.full((1,), 0.1).to(h)).softmax(1)[:, None]
        solved = torch.linalg.solve(torch.eye(len(h)).to(h), h)
        return (weights @ solved[:, :, None])[:, 0] + h.var(1, keepdim=True) + h[:, :3].prod(1, keepdim=True)

    model = net(lambda s, x: s.fc(forward(s, x)), inner=nn.Conv2d(3, 3, 1), fc=nn.Linear(1, 2))
    report = of(model, EpsilonPlus(layer_map=[("fc", zennit.rules.Epsilon())]), images())
    assert not re.search(r"\b_[A-Z]| object at ", "".join(operation.rule for operation in report.operations))
    rules = {operation.function: operation.rule for operation in report.operations}
    assert rules["maximum"] == rules["softmax"] == rules["prelu"] == "ordinary chain rule"
    assert rules["matmul"] == "MatrixProduct(mode='constant')" and rules["linear"] == "zennit's Epsilon"
