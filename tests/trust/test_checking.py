"""`CondAttribution.check` holds for right explanations, and fails for broken ones."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from trust_cases import CONDITIONS, differences, images, net, state, zennit_merged

from crp.attribution import CondAttribution
from crp.composites import (
    Composite,
    DeepLift,
    EpsilonPlus,
    EpsilonPlusFlat,
    GradientTimesInput,
    UniformEpsilon,
    UniformLRP0,
)
from crp.errors import InputTypeError
from crp.rules import Rule


@pytest.mark.promise("Results", "`attribution.check(data, conditions, composite)` holds for right explanations")
@pytest.mark.parametrize(
    "make", [EpsilonPlusFlat, EpsilonPlus, GradientTimesInput, DeepLift, zennit_merged, lambda: None],
    ids=["flat", "plus", "gradient x input", "deeplift", "zennit", "none"],
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
    assert list(by_name) == ["prediction", "account", "finite", "repeats", "weights matter", "by differences"]
    assert by_name["by differences"].holds is (True if make is GradientTimesInput else None)
    ours = isinstance(composite, Composite)
    assert by_name["account"].holds is (True if ours else None)
    assert ("not known of the plain gradient" in by_name["account"].what) is (composite is None)
    assert bool(checked.rules) is ours and bool(checked.kept) is (ours and make is not DeepLift)
    assert json.loads(json.dumps(checked.to_dict()))["holds"] is is_exact
    assert ("ok     prediction" in str(checked)) is is_exact
    assert differences(before | {"random": None}, state(model) | {"random": None}) == []


class Two(nn.Module):
    """A model of two inputs, or of token ids: (n, 3)."""

    def __init__(self):
        super().__init__()
        self.words, self.left, self.right = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, other=None):
        x = x if x.is_floating_point() else self.words(x).mean(1)
        return self.left(x) if other is None else self.left(x).relu() + self.right(other)


@pytest.mark.parametrize("composite", [UniformEpsilon(), GradientTimesInput(), None], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("form", ["tuple", "dict", "ids", "list"])
def test_several_inputs_ids_and_lists_are_checked(form, composite):
    torch.manual_seed(0)
    model, x, other = Two().double().eval(), torch.randn(2, 4).double(), torch.randn(2, 4).double()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    data = {"tuple": (x, other), "dict": {"x": x, "other": other}, "ids": ids, "list": [*x]}[form]
    checked = CondAttribution(model).check(data, [{"y": 1}], composite)
    assert checked.holds, str(checked)


def test_lists_of_several_shapes_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputTypeError, match="give them one by one"):
        CondAttribution(model).check([torch.rand(2, 6, 6), torch.rand(2, 7, 7)], [{"y": 1}], EpsilonPlus())


class Doubles(Rule):
    """Hands on twice what there is."""

    def surrogate(self, layer, a):
        return layer(a) / 2

    def operate(self, layer):
        output = super().operate(layer)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * 2)
        return output


@pytest.mark.promise("Results", "`check` fails where relevance does not add up")
def test_relevance_that_does_not_add_up_fails():
    composite = Composite(name_map=[(["3"], Doubles())])
    checked = CondAttribution(net()).check(images(), [{"y": 1}], composite)
    assert not checked.holds
    assert [finding.name for finding in checked.findings if finding.holds is False] == ["account"]
    assert "FAILED account" in str(checked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "make", [UniformLRP0, GradientTimesInput, lambda: UniformEpsilon(epsilon=0.0)], ids=["lrp_0", "gradient", "epsilon"]
)
def test_relevance_by_lrp_0_is_a_difference_quotient(make, dtype):
    """The output changes by a concept's relevance where its activation is scaled, as LRP-0 is the gradient."""
    checked = CondAttribution(net().to(dtype)).check(images().to(dtype), [{"y": 1, "3": [0]}], make())
    (found,) = [finding for finding in checked.findings if finding.name == "by differences"]
    assert found.holds and found.value < (1e-6 if dtype == torch.float64 else 1e-3), str(checked)
    assert "layer '3', channel" in found.what


@pytest.mark.promise(
    "Results",
    "`check` fails where a concept's relevance by LRP-0 is not what its change does to the output",
)
def test_relevance_by_lrp_0_that_is_no_difference_quotient_fails():
    class LRP0(Doubles):
        zero_params = ()

        def __repr__(self):
            return "LRP0(zero_params=())"

    composite = Composite(layer_map=[(nn.Linear, LRP0())])
    checked = CondAttribution(net()).check(images(), [{"y": 1}], composite)
    assert {"account", "by differences"} <= {finding.name for finding in checked.findings if finding.holds is False}


class Random(nn.Module):
    def forward(self, x):
        return x * (1 + 0.1 * torch.rand_like(x))


@pytest.mark.promise("Results", "`check` fails where a call does not repeat")
def test_models_that_do_not_repeat_fail():
    with pytest.warns(UserWarning, match="as by random numbers"):
        checked = CondAttribution(nn.Sequential(net(), Random()).eval()).check(images(), [{"y": 1}], EpsilonPlus())
    failed = {finding.name for finding in checked.findings if finding.holds is False}
    assert {"prediction", "repeats"} <= failed


@pytest.mark.promise("Results", "`check` fails where an explanation does not depend on the weights")
def test_explanations_that_do_not_depend_on_weights_fail():
    class Constant(CondAttribution):
        def heatmap_modifier(self, data, on_device=None):
            return torch.ones_like(data).sum(1)

    checked = Constant(net()).check(images(), [{"y": 1}], EpsilonPlus())
    assert [finding.name for finding in checked.findings if finding.holds is False] == ["weights matter"]


class Single(nn.Module):
    """Computes in single precision, whatever is around it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())

    def forward(self, x):
        return self.inner.float()(x.float()).double()


@pytest.mark.parametrize("make", [UniformLRP0, EpsilonPlus], ids=["lrp_0", "plus"])
def test_tolerances_are_those_of_the_least_precise_part(make):
    torch.manual_seed(1)
    model = nn.Sequential(Single(), nn.LazyLinear(4)).double()
    data = torch.rand(3, 3, 7, 7).double()
    model.train()(data)
    checked = CondAttribution(model.eval()).check(data, [{"y": 1}], make())
    assert checked.holds, str(checked)
    by_name = {finding.name: finding for finding in checked.findings}
    assert by_name["account"].limit == torch.finfo(torch.float32).eps ** 0.5 > by_name["account"].value > 1e-9
